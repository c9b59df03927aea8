"""Our own kernels for CPUs, in C++: keys outside a row's interval are never read into its sum."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..errors import Unsupported
from ..problem import state_dtype
from ..quantized import Quantized
from ..scores import Scores
from ..state import AttentionState
from .base import Bounds, Gradients, Kernel, Keys, OutputGradient, Queries, Values
from .reference import EagerKernel

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, torch.int8: 4}
LARGEST_DIM = 512
# Up to so many rows for each KV head, decode is faster than prefill.
DECODE_ROWS = 16


class NativeKernel(Kernel):
    """The C++ kernels in `native/`, compiled for several instruction sets; by default the best that runs here.

    Scores with an additive bias go to the eager kernel.
    Raises: Unsupported where the package was built without them, for an instruction set that this machine does
    not have, and for tensors that are not on the CPU.
    """

    name = "native"

    def __init__(self, instruction_set: str | None = None) -> None:
        missing = why_not_native()
        if missing is not None:
            raise Unsupported(f"{missing} kernel='aten' needs none.")
        available = instruction_sets()
        if instruction_set not in (None, *available):
            raise Unsupported(f"this machine runs {', '.join(available)}: got {instruction_set!r}.")
        self.instruction_set = instruction_set or available[0]

    def forward(self, q: Queries, k: Keys, v: Values, lo: Bounds, hi: Bounds, scores: Scores) -> AttentionState:
        if scores.bias is not None:
            return EagerKernel().forward(q, k, v, lo, hi, scores)
        _check(q, v)
        q, k, v = (_readable(x, q.dtype) for x in (q, k, v))
        state = AttentionState.empty(*q.shape[:3], v.shape[3], dtype=state_dtype(q.dtype))
        if state.out.numel() and k.shape[2]:
            call, kept_alive = _call(q, k, v, lo, hi, scores)
            operation = native_module().decode if _few_rows(q, k) else native_module().prefill
            operation(self.instruction_set, *call, state.out.data_ptr(), state.lse.data_ptr())
            del kept_alive
        return state

    def forward_quantized(
        self, q: Queries, k: Quantized, v: Quantized, lo: Bounds, hi: Bounds, scores: Scores
    ) -> AttentionState:
        if scores.bias is not None or q.dtype == torch.float64 or not _few_rows(q, k.numbers):
            return super().forward_quantized(q, k, v, lo, hi, scores)
        _check(q, v.numbers)
        q, keys, values = _readable(q, torch.float32), *(_readable(x.numbers, torch.int8) for x in (k, v))
        scales = [x.scales if x.scales.stride(2) == 1 else x.scales.contiguous() for x in (k, v)]
        state = AttentionState.empty(*q.shape[:3], values.shape[3], dtype=torch.float32)
        if state.out.numel() and keys.shape[2]:
            call, kept_alive = _call(q, keys, values, lo, hi, scores, scales)
            native_module().decode(self.instruction_set, *call, state.out.data_ptr(), state.lse.data_ptr())
            del kept_alive
        return state

    def backward(
        self, q: Queries, k: Keys, v: Values, lo: Bounds, hi: Bounds, scores: Scores, gradient: OutputGradient
    ) -> Gradients:
        if scores.bias is not None:
            return EagerKernel().backward(q, k, v, lo, hi, scores, gradient)
        _check(q, v)
        q, k, v = (_readable(x, q.dtype) for x in (q, k, v))
        d_q, d_k, d_v = (torch.zeros(x.shape, dtype=state_dtype(q.dtype)) for x in (q, k, v))
        if gradient.out.numel() and k.numel():
            given = [x.to(d_q.dtype).contiguous() for x in (gradient.out, gradient.lse, gradient.delta)]
            addresses = (tuple(x.data_ptr() for x in tensors) for tensors in (given, (d_q, d_k, d_v)))
            call, kept_alive = _call(q, k, v, lo, hi, scores)
            native_module().backward(self.instruction_set, *call, *addresses)
            del kept_alive
        return Gradients(d_q, d_k, d_v)


@functools.cache
def native_module() -> Any:  # the module is compiled; None where it was not built
    try:
        return import_module("shardsum._native")
    except ModuleNotFoundError:
        return None


def instruction_sets() -> list[str]:
    """The instruction sets that the native kernels can use here, the best first; none if they were not built."""
    return [] if native_module() is None else list(native_module().instruction_sets())


def why_not_native(q: Tensor | None = None, v: Tensor | None = None) -> str | None:
    """Why the native kernels can't be used here, or not for these tensors, as a sentence; None where they can."""
    if not instruction_sets():
        return "shardsum was built without its native kernels: install it again with a C++ compiler at hand."
    for x in (q, v):
        if x is not None and x.device.type != "cpu":
            return f"the native kernels are for CPUs: got tensors on {x.device}."
        if x is not None and x.shape[3] > LARGEST_DIM:
            return f"the native kernels take head_dim and v_dim up to {LARGEST_DIM}: got {x.shape[3]}."
    return None


def _readable(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the queries' dtype (a scale that is a tensor widens them), each row in one piece."""
    return x.to(dtype) if x.stride(3) == 1 else x.to(dtype).contiguous()


def _check(q: Tensor, v: Tensor) -> None:
    wrong = why_not_native(q, v)
    if wrong is not None:
        raise Unsupported(f"{wrong} Use kernel='aten'.")


def _few_rows(q: Tensor, k: Tensor) -> bool:
    return q.shape[1] // k.shape[1] * q.shape[2] <= DECODE_ROWS


def _strided(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    scores: Scores,
    scales: Sequence[Tensor] | None = None,
) -> tuple[tuple[Any, ...], list[Tensor]]:
    """What all operations are told, as native/module.cpp takes it apart, and the tensors that it points to."""
    lo, hi = (bound.expand(lo.shape).contiguous() for bound in torch.broadcast_tensors(lo, hi))
    alive = [lo, hi]

    def address(x: Tensor | None, dtype: torch.dtype = torch.int64) -> int:
        if x is None:
            return 0
        alive.append(x.to("cpu", dtype).contiguous())
        return alive[-1].data_ptr()

    def per_sequence(x: Tensor | None) -> int:
        return 0 if x is None or x.shape[0] == 1 else q.shape[2]

    sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    storage = ((0, 0, 0, 0),) * 2 if scales is None else tuple(_strided(x) for x in scales)
    described = (
        scores.scale,
        scores.softcap or 0.0,
        address(scores.alibi_slopes, torch.float32),
        scores.dropout_p,
        scores.seed % (1 << 64),
        scores.head,
        address(scores.rows),
        address(scores.keys),
        address(scores.own),
        per_sequence(scores.own),
    )
    bounds = (lo.data_ptr(), hi.data_ptr(), per_sequence(lo))
    tensors = (_strided(q), _strided(k), _strided(v), storage)
    return (_TYPES[k.dtype], sizes, *tensors, bounds, described, torch.get_num_threads()), alive

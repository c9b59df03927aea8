"""The native kernels as operators of torch, which torch.compile, its shape checks and autograd know.

    torch.ops.shardsum.attention_forward(q, k, v, lo, hi, scale, ...) -> (out, lse)
    torch.ops.shardsum.attention_backward(d_out, lse, delta, q, k, v, lo, hi, scale, ...) -> (d_q, d_k, d_v)

They are `Kernel.forward` and `Kernel.backward` of base.py for CPU tensors. For `...` stand the fields of `Scores`
but its bias, and an instruction set, by default the best that runs here: softcap=None, alibi_slopes=None,
dropout_p=0.0, seed=0, head=0, rows=None, keys=None, own=None, instruction_set=None.

Shapes: q (batch, q_heads, q_len, head_dim), k (batch, kv_heads, kv_len, head_dim), v (batch, kv_heads, kv_len,
v_dim), of any strides; lo, hi and own (batch or 1, q_len), rows (q_len,), keys (kv_len,), int64; alibi_slopes
(q_heads,), float32; out and d_out (batch, q_heads, q_len, v_dim), lse and delta (batch, q_heads, q_len).
Numerics: out, lse, delta and all gradients are float32, or float64 for float64 inputs; autograd rounds to the
dtypes of q, k and v. Ends beyond 0 and kv_len mean these: no other key is read.
Gradients: of q, k and v, once, from those of out and lse.
Raises: ValueError for what does not fit together, Unsupported for what only other kernels take.
"""

from __future__ import annotations

import functools
import math
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from ..errors import Unsupported
from ..problem import Problem, state_dtype

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, torch.int8: 4}
LARGEST_DIM = 512
# Up to so many rows for each KV head, decode is faster than prefill.
DECODE_ROWS = 16
_NO_SCALES = ((0, 0, 0, 0),) * 2


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
    if native_module() is None:
        return "shardsum was built without its native kernels: install it again with a C++ compiler at hand."
    for x in (q, v):
        if x is not None and not (x.is_cpu or x.is_meta):  # a tensor on meta only asks for shapes
            return f"the native kernels are for CPUs: got tensors on {x.device}."
        if x is not None and x.shape[3] > LARGEST_DIM:
            return f"the native kernels take head_dim and v_dim up to {LARGEST_DIM}: got {x.shape[3]}."
    return None


class _Options(NamedTuple):
    """The operators' arguments after the tensors, with their defaults."""

    scale: float
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    dropout_p: float = 0.0
    seed: int = 0
    head: int = 0
    rows: Tensor | None = None
    keys: Tensor | None = None
    own: Tensor | None = None
    instruction_set: str | None = None


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor lo, Tensor hi, float scale, float? softcap=None, "
    "Tensor? alibi_slopes=None, float dropout_p=0.0, int seed=0, int head=0, Tensor? rows=None, "
    "Tensor? keys=None, Tensor? own=None, str? instruction_set=None"
)


def _forward(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _state(q, k, v, None, lo, hi, _Options(*options))


def few_rows(q: Tensor, k: Tensor) -> bool:
    """Whether decode takes these queries."""
    return q.shape[1] // k.shape[1] * q.shape[2] <= DECODE_ROWS


def quantized_forward(
    q: Tensor, k: Tensor, v: Tensor, scales: tuple[Tensor, Tensor], lo: Tensor, hi: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    """`attention_forward` of few float32 rows over int8 k and v, `scales` (batch, kv_heads, kv_len) of each."""
    return _state(q, k, v, scales, lo, hi, _Options(*options))


def _state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    lo: Tensor,
    hi: Tensor,
    given: _Options,
) -> tuple[Tensor, Tensor]:
    problem = _check(q, k, v, lo, hi, given, quantized=scales is not None)
    out, lse = _empty_state(q, problem)
    if not (out.numel() and problem.kv_len):
        return out.zero_(), lse.fill_(-math.inf)
    call, kept_alive = _call(problem, q, k, v, lo, hi, given, scales)
    by_decode = scales is not None or few_rows(q, k)  # decode alone reads int8
    operation = native_module().decode if by_decode else native_module().prefill
    operation(*call, out.data_ptr(), lse.data_ptr())
    del kept_alive
    return out, lse


def _forward_shapes(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    return _empty_state(q, _check(q, k, v, lo, hi, _Options(*options)))


def _empty_state(q: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    dtype, shape = state_dtype(q.dtype), (problem.batch, problem.q_heads, problem.q_len)
    return q.new_empty((*shape, problem.v_dim), dtype=dtype), q.new_empty(shape, dtype=dtype)


def _backward(
    d_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    given = _Options(*options)
    problem = _check(q, k, v, lo, hi, given)
    _check_gradient(d_out, lse, delta, q, problem)
    found = tuple(x.new_zeros(x.shape, dtype=state_dtype(x.dtype)) for x in (q, k, v))
    if d_out.numel() and problem.kv_len:
        gradient = [x.contiguous() for x in (d_out, lse, delta)]
        call, kept_alive = _call(problem, q, k, v, lo, hi, given)
        addresses = (tuple(x.data_ptr() for x in tensors) for tensors in (gradient, found))
        native_module().backward(*call, *addresses)
        del kept_alive
    return found


def _backward_shapes(
    d_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    problem = _check(q, k, v, lo, hi, _Options(*options))
    _check_gradient(d_out, lse, delta, q, problem)
    return tuple(x.new_empty(x.shape, dtype=state_dtype(x.dtype)) for x in (q, k, v))


def _check(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, given: _Options, *, quantized: bool = False
) -> Problem:
    """The sizes, once everything is what the C++ takes it to be."""
    problem = Problem.of(q, k, v, quantized=quantized)
    wrong = why_not_native(q, v)
    if wrong is not None:
        raise Unsupported(f"{wrong} Use kernel='aten'.")
    batch, q_len, whole = problem.batch, problem.q_len, torch.int64
    of_rows = ((1, q_len), (batch, q_len))
    _check_tensor("lo", lo, q, whole, *of_rows)
    _check_tensor("hi", hi, q, whole, *of_rows)
    if given.rows is not None:
        _check_tensor("rows", given.rows, q, whole, (q_len,))
    if given.keys is not None:
        _check_tensor("keys", given.keys, q, whole, (problem.kv_len,))
    if given.own is not None:
        _check_tensor("own", given.own, q, whole, *of_rows)
    if given.alibi_slopes is not None:
        _check_tensor("alibi_slopes", given.alibi_slopes, q, torch.float32, (problem.q_heads,))
        if given.own is None or given.keys is None:
            raise ValueError("alibi_slopes need own and keys, the positions that distances are between.")
    if given.softcap is not None and not given.softcap > 0.0:
        raise ValueError(f"softcap must be above 0, or None: got {given.softcap}.")
    if not 0.0 <= given.dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and below 1: got {given.dropout_p}.")
    if given.dropout_p and (given.rows is None or given.keys is None):
        raise ValueError("dropout needs rows and keys, the indices whose hash decides.")
    return problem


def _check_gradient(d_out: Tensor, lse: Tensor, delta: Tensor, q: Tensor, problem: Problem) -> None:
    dtype, shape = state_dtype(q.dtype), tuple(q.shape[:3])
    _check_tensor("d_out", d_out, q, dtype, (*shape, problem.v_dim))
    _check_tensor("lse", lse, q, dtype, shape)
    _check_tensor("delta", delta, q, dtype, shape)


def _check_tensor(name: str, x: Tensor, q: Tensor, dtype: torch.dtype, *shapes: tuple[Any, ...]) -> None:
    # A size is an int, or a symbol while torch traces shapes.
    if x.dtype != dtype or x.device != q.device or x.shape not in shapes:
        expected = " or ".join(str(tuple(shape)) for shape in dict.fromkeys(shapes))
        raise ValueError(
            f"{name} must be {dtype} {expected} on {q.device}: got {x.dtype} {tuple(x.shape)} on {x.device}."
        )


def _call(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    given: _Options,
    scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[tuple[Any, ...], list[Tensor]]:
    """What all operations are told, as native/module.cpp takes it apart, and the tensors that it points to."""
    if lo.shape != hi.shape:
        lo, hi = torch.broadcast_tensors(lo, hi)
    lo, hi = lo.contiguous(), hi.contiguous()
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    alive = [lo, hi, q, k, v]

    def address(x: Tensor | None) -> int:
        if x is None:
            return 0
        alive.append(x.contiguous())
        return alive[-1].data_ptr()

    def per_sequence(x: Tensor | None) -> int:
        return 0 if x is None or x.shape[0] == 1 else problem.q_len

    rows = [] if scales is None else [x if x.stride(2) == 1 else x.contiguous() for x in scales]
    alive += rows
    # A scale is a row of one element, so both have strides of three dims.
    tensors = [(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)) for x in (q, k, v, *rows)]
    storage = tuple(tensors[3:]) or _NO_SCALES
    described = (
        given.scale,
        given.softcap or 0.0,
        address(given.alibi_slopes),
        given.dropout_p,
        given.seed % (1 << 64),
        given.head,
        address(given.rows),
        address(given.keys),
        address(given.own),
        per_sequence(given.own),
    )
    bounds = (lo.data_ptr(), hi.data_ptr(), per_sequence(lo))
    isa = given.instruction_set or instruction_sets()[0]
    return (
        isa,
        _TYPES[k.dtype],
        problem[:7],
        *tensors[:3],
        storage,
        bounds,
        described,
        torch.get_num_threads(),
    ), alive


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors = [x if isinstance(x, Tensor) else None for x in inputs]
    ctx.save_for_backward(*output, *tensors)
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]


def _gradients(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    inputs = [other if x is None else x for x, other in zip(tensors, ctx.others, strict=True)]
    delta = (d_out * out).sum(dim=-1) - d_lse
    found = attention_backward(d_out, lse, delta, *inputs)
    return *(d_x.to(x.dtype) for d_x, x in zip(found, inputs, strict=False)), *[None] * (len(inputs) - 3)


def _no_gradients(ctx: Any, *gradients: Tensor) -> NoReturn:
    raise Unsupported("the native kernels have first derivatives only. Use ATen operations for further ones.")


_LIBRARY = Library("shardsum", "DEF")  # as long as it lives, torch knows the operators


def _register(name: str, arguments: str, results: str, run: Any, shapes: Any, gradients: Any, keep: Any) -> Any:
    """The operator; it runs whatever the device, to say itself which ones it takes."""
    _LIBRARY.define(f"{name}({arguments}) -> ({results})", tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    register_fake(f"shardsum::{name}", shapes, lib=_LIBRARY)
    register_autograd(f"shardsum::{name}", gradients, setup_context=keep, lib=_LIBRARY)
    return getattr(torch.ops.shardsum, name).default


attention_forward = _register(
    "attention_forward", _ARGUMENTS, "Tensor out, Tensor lse", _forward, _forward_shapes, _gradients, _keep
)
attention_backward = _register(
    "attention_backward",
    f"Tensor d_out, Tensor lse, Tensor delta, {_ARGUMENTS}",
    "Tensor d_q, Tensor d_k, Tensor d_v",
    _backward,
    _backward_shapes,
    _no_gradients,
    None,
)

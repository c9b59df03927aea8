"""The compiled module in `native/`: whether it can be used here, and what its operations are told."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..extension import TYPES, instruction_sets, native_module
from ..problem import Sizes
from .base import Dims

LARGEST_DIM = 512
# Up to so many rows for each KV head, decode is faster than prefill.
DECODE_ROWS = 16
# A leaf of the tree is of whole blocks of keys, and this is the largest block: tree.SEGMENT is a multiple of it.
SEGMENT_STEP = 256
_NO_SCALES, _NO_PAGES = ((0, 0, 0, 0),) * 2, (0, 0, 0)


def why_not_native(device: torch.device | None = None, dims: Dims = ()) -> str | None:
    """Return why the native kernels can't be used here, or not for such tensors; None where they can."""
    if native_module() is None:
        return "shardsum was built without its native kernels: install it again with a C++ compiler at hand."
    if device is not None and device.type not in ("cpu", "meta"):  # a tensor on meta only asks for shapes
        return f"the native kernels are for CPUs: got tensors on {device}."
    for dim in dims:
        if dim > LARGEST_DIM:
            return f"the native kernels take head_dim and v_dim up to {LARGEST_DIM}: got {dim}."
    return None


def few_rows(q: Tensor, kv_heads: int) -> bool:
    """Return whether decode takes these queries."""
    return q.shape[1] // kv_heads * q.shape[2] <= DECODE_ROWS


class Options(NamedTuple):
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
    segment: int = 0


def call(
    problem: Sizes,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    given: Options,
    scales: tuple[Tensor, Tensor] | None = None,
    table: Tensor | None = None,
) -> tuple[tuple[Any, ...], list[Tensor]]:
    """What all operations are told, as native/module.cpp takes it apart, and the tensors that it points to."""
    assert q.is_cpu, "tensors on meta have no addresses"
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
    of_scales = tuple(tensors[3:]) or _NO_SCALES
    pages = _NO_PAGES if table is None else (address(table), table.shape[1], k.shape[2])
    described = (
        given.scale,
        given.softcap or 0.0,
        address(None if given.alibi_slopes is None else given.alibi_slopes.double()),
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
        TYPES[k.dtype],
        problem[:7],
        *tensors[:3],
        (*of_scales, pages),
        bounds,
        described,
        torch.get_num_threads(),
        given.segment,
    ), alive

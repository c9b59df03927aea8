"""The compiled module in `native/`: whether it can be used here, and how its operations are called."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..blocks import Block, Dense, Int8, Paged
from ..errors import Unsupported
from ..extension import TYPES, instruction_sets, native_module
from ..masks import Bounds
from ..problem import state_dtype
from ..scores import Scores
from .base import Dims, Gradients, OutputGradient
from .registry import use_another

LARGEST_DIM = 512
# Up to so many rows for each KV head, decode is faster than prefill.
DECODE_ROWS = 16
# A leaf of the tree is of whole blocks of keys, and this is the largest block: tree.SEGMENT is a multiple of it.
SEGMENT_STEP = 256
_NOWHERE = (0, 0, 0, 0)


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


def check_device(q: Tensor, dims: Dims) -> None:
    """Refuse tensors that the native kernels don't take."""
    wrong = why_not_native(q.device, dims)
    if wrong is not None:
        raise Unsupported(f"{wrong} {use_another(q.device, dims)}")


class Operation(NamedTuple):
    """Which compiled operation is meant.

    `instruction_set`: None is the best that runs here. `segment`: how many keys a segment of the tree has that
    sums go along; 0 without a tree.
    """

    instruction_set: str | None = None
    segment: int = 0

    @property
    def isa(self) -> str:
        return self.instruction_set or instruction_sets()[0]


def forward(
    q: Tensor, block: Block, bounds: Bounds, scores: Scores, operation: Operation
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of a block of keys as it lies, by decode, prefill or along the tree."""
    kv_heads, kv_len, _, v_dim = block.shape
    out, lse = empty_state(q, v_dim)
    if not (out.numel() and kv_len):
        return out.zero_(), lse.fill_(-math.inf)
    native = native_module()
    if operation.segment:
        run = native.tree
    elif not isinstance(block, Dense) or few_rows(q, kv_heads):
        run = native.decode
    else:
        run = native.prefill
    attention, kept_alive = describe(q, block, bounds, scores, operation.segment)
    run(operation.isa, attention, out.data_ptr(), lse.data_ptr())
    del kept_alive
    return out, lse


def backward(
    q: Tensor, block: Dense, bounds: Bounds, scores: Scores, gradient: OutputGradient, operation: Operation
) -> Gradients:
    """Return the gradients of q, k and v; with a segment, along the trees of keys and of rows."""
    d_q, d_k, d_v = (x.new_zeros(x.shape, dtype=state_dtype(x.dtype)) for x in (q, block.k, block.v))
    d_out, lse, delta = (x.contiguous() for x in (gradient.out, gradient.lse, gradient.delta))
    if d_out.numel() and block.kv_len:
        attention, kept_alive = describe(q, block, bounds, scores, operation.segment)
        native_module().backward(
            operation.isa,
            attention,
            d_out=d_out.data_ptr(),
            lse=lse.data_ptr(),
            delta=delta.data_ptr(),
            d_q=d_q.data_ptr(),
            d_k=d_k.data_ptr(),
            d_v=d_v.data_ptr(),
        )
        del kept_alive
    return Gradients(d_q, d_k, d_v)


def empty_state(q: Tensor, v_dim: int | torch.SymInt) -> tuple[Tensor, Tensor]:
    """Return room for out and lse."""
    dtype, shape = state_dtype(q.dtype), q.shape[:3]
    return q.new_empty((*shape, v_dim), dtype=dtype), q.new_empty(shape, dtype=dtype)


def describe(
    q: Tensor, block: Block, bounds: Bounds, scores: Scores, segment: int = 0
) -> tuple[Any, list[Tensor]]:
    """Return the `Attention` of native/arguments.h, field by field, and the tensors that it points to."""
    assert q.is_cpu, "tensors on meta have no addresses"
    lo, hi = bounds
    if lo.shape != hi.shape:
        lo, hi = torch.broadcast_tensors(lo, hi)
    lo, hi = lo.contiguous(), hi.contiguous()
    alive = [lo, hi]
    (batch, q_heads, q_len, head_dim), (kv_heads, kv_len, _, v_dim) = q.shape, block.shape

    def strided(x: Tensor, dim: int = 3) -> tuple[int, int, int, int]:
        """A row of k lies in one piece; a scale is a row of one element, so both have strides of three dims."""
        x = x if x.stride(dim) == 1 else x.contiguous()
        alive.append(x)
        return (x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))

    def address(x: Tensor | None) -> int:
        if x is None:
            return 0
        alive.append(x.contiguous())
        return alive[-1].data_ptr()

    def per_sequence(x: Tensor | None) -> int:
        return 0 if x is None or x.shape[0] == 1 else q_len

    k_scales = v_scales = _NOWHERE
    pages = None
    if isinstance(block, Int8):
        k, v = block.k.numbers, block.v.numbers
        k_scales, v_scales = strided(block.k.scales, 2), strided(block.v.scales, 2)
    elif isinstance(block, Paged):
        k, v, pages = block.k_pages, block.v_pages, block.table.to(torch.int64)
    else:
        assert isinstance(block, Dense)
        k, v = block.k, block.v
    slopes = scores.alibi_slopes
    attention = native_module().Attention(
        type=TYPES[k.dtype],
        batch=batch,
        q_heads=q_heads,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=head_dim,
        v_dim=v_dim,
        q=strided(q),
        k=strided(k),
        v=strided(v),
        k_scales=k_scales,
        v_scales=v_scales,
        pages=address(pages),
        pages_batch=0 if pages is None else pages.shape[1],
        page_len=0 if pages is None else k.shape[2],
        lo=lo.data_ptr(),
        hi=hi.data_ptr(),
        bounds_batch=per_sequence(lo),
        scale=scores.scale,
        softcap=scores.softcap or 0.0,
        alibi_slopes=address(slopes if slopes is None else slopes.double()),
        dropout_p=scores.dropout_p,
        seed=scores.seed % (1 << 64),
        first_head=scores.head,
        rows=address(scores.rows),
        keys=address(scores.keys),
        diagonal=address(scores.diagonal),
        diagonal_batch=per_sequence(scores.diagonal),
        threads=torch.get_num_threads(),
        segment=segment,
    )
    return attention, alive

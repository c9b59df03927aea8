"""What an all-reduce can reduce by: the merge of packed attention states, the sum, the maximum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.compiled import native_module
from ..kernels.merging import merge_packed
from ..state import AttentionState


@dataclass(frozen=True)
class Operation:
    """An associative, commutative operation on tensors of rows: `combine(a, b, into)`, where `into` may be a or b.

    Rows are what a collective may cut between; all three tensors are contiguous and of one shape (rows, width).
    """

    name: str
    combine: Callable[[Tensor, Tensor, Tensor], None]


def pack_into(state: AttentionState, packed: Tensor) -> None:
    """Write the state, contiguous, to rows (rows, v_dim + 1)."""
    if not _natively("pack", state, packed):
        packed[:, :-1].copy_(state.out.view(len(packed), -1))
        packed[:, -1].copy_(state.lse.view(-1))


def unpack_into(packed: Tensor, state: AttentionState) -> None:
    """Write rows (rows, v_dim + 1) to the state, which is contiguous."""
    if not _natively("unpack", state, packed):
        state.out.copy_(packed[:, :-1].view_as(state.out))
        state.lse.copy_(packed[:, -1].view_as(state.lse))


def _natively(name: str, state: AttentionState, packed: Tensor) -> bool:
    native = native_module() if packed.is_cpu else None
    if native is None:
        return False
    rows, width = packed.shape
    item_bytes = packed.element_size()
    pointers = state.out.data_ptr(), state.lse.data_ptr(), packed.data_ptr()
    getattr(native, name)(*pointers, rows, (width - 1) * item_bytes, item_bytes)
    return True


def _add(a: Tensor, b: Tensor, into: Tensor) -> None:
    torch.add(a, b, out=into)


def _maximum(a: Tensor, b: Tensor, into: Tensor) -> None:
    torch.maximum(a, b, out=into)


MERGE = Operation("merge", merge_packed)
SUM = Operation("sum", _add)
MAXIMUM = Operation("maximum", _maximum)


def combine_all(pieces: Sequence[Tensor], operation: Operation, into: Tensor) -> None:
    """Write all pieces combined to `into`, which may be one of them: pairwise along one fixed binary tree.

    The pieces are working memory. Numerics: the tree depends only on the number of pieces, so equal pieces give
    equal bits on every rank.
    """
    step = 1
    while step < len(pieces):
        last = 2 * step >= len(pieces)
        for i in range(0, len(pieces) - step, 2 * step):
            operation.combine(pieces[i], pieces[i + step], into if last else pieces[i])
        step *= 2
    if len(pieces) == 1 and pieces[0] is not into:
        into.copy_(pieces[0])

"""What an all-reduce can reduce by: the merge of packed attention states, the sum, the maximum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.operators import native_module
from ..state import AttentionState, merge


@dataclass(frozen=True)
class Operation:
    """An associative, commutative operation on tensors of rows: `combine(a, b, into)`, where `into` may be a or b.

    Rows are what a collective may cut between; all three tensors are contiguous and of one shape (rows, width).
    """

    name: str
    combine: Callable[[Tensor, Tensor, Tensor], None]


def pack(state: AttentionState) -> Tensor:
    """The state as one tensor: lse is one more component of each row."""
    return torch.cat([state.out, state.lse.unsqueeze(-1)], dim=-1)


def unpack(packed: Tensor) -> AttentionState:
    """The state that `pack` made this tensor of."""
    v_dim = packed.shape[-1] - 1
    return AttentionState(packed.narrow(-1, 0, v_dim), packed.select(-1, v_dim))


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


def _merge(a: Tensor, b: Tensor, into: Tensor) -> None:
    native = native_module() if a.is_cpu else None
    if native is not None:
        wide = 3 if a.dtype == torch.float64 else 0
        native.merge(wide, a.data_ptr(), b.data_ptr(), into.data_ptr(), a.shape[0], a.shape[1])
        return
    merged = merge(unpack(a), unpack(b))
    into[..., :-1].copy_(merged.out)
    into[..., -1].copy_(merged.lse)


def _add(a: Tensor, b: Tensor, into: Tensor) -> None:
    torch.add(a, b, out=into)


def _maximum(a: Tensor, b: Tensor, into: Tensor) -> None:
    torch.maximum(a, b, out=into)


MERGE = Operation("merge", _merge)
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

"""Packed states and their merge: what kernels and collectives have in common, native where it is built."""

from __future__ import annotations

import torch
from torch import Tensor

from ..state import AttentionState, merge
from .compiled import native_module


def pack(state: AttentionState) -> Tensor:
    """The state as one tensor: lse is one more component of each row."""
    return torch.cat([state.out, state.lse.unsqueeze(-1)], dim=-1)


def unpack(packed: Tensor) -> AttentionState:
    """The state that `pack` made this tensor of."""
    v_dim = packed.shape[-1] - 1
    return AttentionState(packed.narrow(-1, 0, v_dim), packed.select(-1, v_dim))


def merge_packed(a: Tensor, b: Tensor, into: Tensor) -> None:
    """Write the merge of rows (rows, v_dim + 1) to `into`, which may be a or b; all are contiguous."""
    native = native_module() if a.is_cpu else None
    if native is not None:
        wide = 3 if a.dtype == torch.float64 else 0
        native.merge(wide, a.data_ptr(), b.data_ptr(), into.data_ptr(), a.shape[0], a.shape[1])
        return
    merged = merge(unpack(a), unpack(b))
    into[..., :-1].copy_(merged.out).add_(0.0)  # -0.0 becomes 0.0, as beside an empty state
    into[..., -1].copy_(merged.lse)


def merge_alike(a: AttentionState, b: AttentionState) -> AttentionState:
    """The merge of two states by `merge_packed`: the same bits wherever it happens."""
    packed, other = pack(a), pack(b)
    rows = packed.view(-1, packed.shape[-1])
    merge_packed(rows, other.view(rows.shape), rows)
    return unpack(packed)

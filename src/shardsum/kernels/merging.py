"""Packed states and their merge: what kernels and collectives have in common, native where it is built."""

from __future__ import annotations

import torch
from torch import Tensor

from ..state import AttentionState, merge
from .compiled import TYPES, native_module


def pack(state: AttentionState) -> Tensor:
    """The state as one tensor: lse is one more component of each row."""
    return torch.cat([state.out, state.lse.unsqueeze(-1)], dim=-1)


def unpack(packed: Tensor) -> AttentionState:
    """The state that `pack` made this tensor of."""
    v_dim = packed.shape[-1] - 1
    return AttentionState(packed.narrow(-1, 0, v_dim), packed.select(-1, v_dim))


def packed_shape(state: AttentionState) -> tuple[int, int]:
    """That of the state as rows (rows, v_dim + 1)."""
    return state.lse.numel(), state.out.shape[-1] + 1


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
    """Whether the native module was there to do it."""
    native = native_module() if packed.is_cpu else None
    if native is None:
        return False
    pointers = state.out.data_ptr(), state.lse.data_ptr(), packed.data_ptr()
    getattr(native, name)(TYPES[packed.dtype], *pointers, *packed.shape)
    return True


def merge_packed(a: Tensor, b: Tensor, into: Tensor) -> None:
    """Write the merge of rows (rows, v_dim + 1) to `into`, which may be a or b; all are contiguous."""
    native = native_module() if a.is_cpu else None
    if native is not None:
        rows, width = a.shape
        native.merge(TYPES[a.dtype], a.data_ptr(), b.data_ptr(), into.data_ptr(), rows, width)
        return
    merged = merge(unpack(a), unpack(b))
    into[..., :-1].copy_(merged.out).add_(0.0)  # -0.0 becomes 0.0, as beside an empty state
    into[..., -1].copy_(merged.lse)


def merge_into(a: Tensor, b: Tensor, state: AttentionState) -> None:
    """Write the merge of rows (rows, v_dim + 1), contiguous, to a state that is too; b is working memory."""
    native = native_module() if a.is_cpu else None
    if native is not None:
        pointers = a.data_ptr(), b.data_ptr(), state.out.data_ptr(), state.lse.data_ptr()
        native.merge_apart(TYPES[a.dtype], *pointers, *a.shape)
        return
    merge_packed(a, b, b)
    unpack_into(b, state)


def merge_alike(a: AttentionState, b: AttentionState) -> AttentionState:
    """The merge of two states by `merge_packed`: the same bits wherever it happens."""
    packed, other = pack(a), pack(b)
    rows = packed.view(-1, packed.shape[-1])
    merge_packed(rows, other.view(rows.shape), rows)
    return unpack(packed)

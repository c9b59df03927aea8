"""Packed states and their merge: what kernels and collectives have in common, native where it is built."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .extension import TYPES, native_module
from .state import AttentionState, merge

# What is prepared for rows in memory, and done again and again with one state or another.
OfState = Callable[[AttentionState], None]


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


def packer(packed: Tensor) -> OfState:
    """What writes a state, contiguous, to these rows (rows, v_dim + 1)."""
    native = _native(packed)
    if native is not None:
        return _of_pointers(native.pack, packed)

    def pack_into(state: AttentionState) -> None:
        packed[:, :-1].copy_(state.out.view(len(packed), -1))
        packed[:, -1].copy_(state.lse.view(-1))

    return pack_into


def unpacker(packed: Tensor) -> OfState:
    """What writes these rows (rows, v_dim + 1) to a state, which is contiguous."""
    native = _native(packed)
    if native is not None:
        return _of_pointers(native.unpack, packed)

    def unpack_into(state: AttentionState) -> None:
        state.out.copy_(packed[:, :-1].view_as(state.out))
        state.lse.copy_(packed[:, -1].view_as(state.lse))

    return unpack_into


def merge_packed(a: Tensor, b: Tensor, into: Tensor) -> None:
    """Write the merge of rows (rows, v_dim + 1) to `into`, which may be a or b; all are contiguous."""
    native = _native(a)
    if native is not None:
        native.merge(TYPES[a.dtype], *a.shape, a.data_ptr(), b.data_ptr(), into.data_ptr())
        return
    merged = merge(unpack(a), unpack(b))
    into[..., :-1].copy_(merged.out).add_(0.0)  # -0.0 becomes 0.0, as beside an empty state
    into[..., -1].copy_(merged.lse)


def merger(a: Tensor, b: Tensor) -> OfState:
    """What writes the merge of rows (rows, v_dim + 1) to a state; all are contiguous, b is working memory."""
    native = _native(a)
    if native is not None:
        return _of_pointers(native.merge_apart, a, b)
    unpack_b = unpacker(b)

    def merge_into(state: AttentionState) -> None:
        merge_packed(a, b, b)
        unpack_b(state)

    return merge_into


def _native(rows: Tensor) -> Any:
    return native_module() if rows.is_cpu else None


def _of_pointers(operation: Callable[..., None], *rows: Tensor) -> OfState:
    """An operation of the native module on a state and on rows that stay where they are."""
    of_rows = functools.partial(operation, TYPES[rows[0].dtype], *rows[0].shape, *(x.data_ptr() for x in rows))

    def of_state(state: AttentionState) -> None:
        assert rows  # held, since addresses do not hold memory
        of_rows(state.out.data_ptr(), state.lse.data_ptr())

    return of_state


def merge_alike(a: AttentionState, b: AttentionState) -> AttentionState:
    """The merge of two states by `merge_packed`: the same bits wherever it happens."""
    packed, other = pack(a), pack(b)
    rows = packed.view(-1, packed.shape[-1])
    merge_packed(rows, other.view(rows.shape), rows)
    return unpack(packed)

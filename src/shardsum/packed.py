"""Attention states packed as rows of numbers, and their merge: in C++ where it was built."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .extension import TYPES, native_module
from .state import AttentionState, merge

# What is prepared for rows at one place in memory, and done again and again with one state or another.
StateOperation = Callable[[AttentionState], None]


def pack(state: AttentionState) -> Tensor:
    """Return the state as one tensor, in which lse is one more component of each row."""
    return torch.cat([state.out, state.lse.unsqueeze(-1)], dim=-1)


def unpack(packed: Tensor) -> AttentionState:
    """Return the state that `pack` made a tensor of."""
    v_dim = packed.shape[-1] - 1
    return AttentionState(packed.narrow(-1, 0, v_dim), packed.select(-1, v_dim))


def packed_shape(state: AttentionState) -> tuple[int, int]:
    """Return the shape of a state as packed rows, (rows, v_dim + 1)."""
    return state.lse.numel(), state.out.shape[-1] + 1


def packer(packed: Tensor) -> StateOperation:
    """Return the operation that writes a contiguous state to these rows (rows, v_dim + 1)."""
    native = _native(packed)
    if native is not None:
        return _on_addresses(native.pack, packed)

    def pack_into(state: AttentionState) -> None:
        packed[:, :-1].copy_(state.out.view(len(packed), -1))
        packed[:, -1].copy_(state.lse.view(-1))

    return pack_into


def unpacker(packed: Tensor) -> StateOperation:
    """Return the operation that writes these rows (rows, v_dim + 1) to a contiguous state."""
    native = _native(packed)
    if native is not None:
        return _on_addresses(native.unpack, packed)

    def unpack_into(state: AttentionState) -> None:
        state.out.copy_(packed[:, :-1].view_as(state.out))
        state.lse.copy_(packed[:, -1].view_as(state.lse))

    return unpack_into


def merge_packed(a: Tensor, b: Tensor, into: Tensor) -> None:
    """Write the merge of two packed states, rows (rows, v_dim + 1), to `into`.

    All are contiguous; `into` may be a or b.
    """
    native = _native(a)
    if native is not None:
        native.merge(TYPES[a.dtype], *a.shape, a.data_ptr(), b.data_ptr(), into.data_ptr())
        return
    merged = merge(unpack(a), unpack(b))
    into[..., :-1].copy_(merged.out).add_(0.0)  # -0.0 becomes 0.0, as beside an empty state
    into[..., -1].copy_(merged.lse)


def merger(a: Tensor, b: Tensor) -> StateOperation:
    """Return the operation that writes the merge of two packed states to a contiguous state.

    b is working memory.
    """
    native = _native(a)
    if native is not None:
        return _on_addresses(native.merge_apart, a, b)
    unpack_b = unpacker(b)

    def merge_into(state: AttentionState) -> None:
        merge_packed(a, b, b)
        unpack_b(state)

    return merge_into


def _native(rows: Tensor) -> Any:
    return native_module() if rows.is_cpu else None


def _on_addresses(operation: Callable[..., None], *rows: Tensor) -> StateOperation:
    """Return an operation of the native module on a state and on rows that stay where they are."""
    on_rows = functools.partial(operation, TYPES[rows[0].dtype], *rows[0].shape, *(x.data_ptr() for x in rows))

    def on_state(state: AttentionState) -> None:
        assert rows  # so that they live as long as this function: an address keeps nothing alive
        on_rows(state.out.data_ptr(), state.lse.data_ptr())

    return on_state


def merge_alike(a: AttentionState, b: AttentionState) -> AttentionState:
    """Return the merge of two states by `merge_packed`: the same bits wherever it happens."""
    packed, other = pack(a), pack(b)
    rows = packed.view(-1, packed.shape[-1])
    merge_packed(rows, other.view(rows.shape), rows)
    return unpack(packed)

"""All-reduce of attention states and of gradients: the collectives in which the sum is finished.

A state travels as one buffer (out and lse side by side) in float32 or wider, and is merged locally in rank
order along one tree, so every rank that merges the same states gets the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .comm import Communicator
from .state import AttentionState, merge_all


def pack(state: AttentionState) -> Tensor:
    """The state as one tensor: lse is one more component of each row."""
    return torch.cat([state.out, state.lse.unsqueeze(-1)], dim=-1)


def unpack(packed: Tensor) -> AttentionState:
    """The state that `pack` made this tensor of."""
    return AttentionState(packed[..., :-1], packed[..., -1])


def all_reduce_states(comm: Communicator, state: AttentionState) -> AttentionState:
    """The merge of every rank's state over the same query rows, bit-equal on every rank.

    Traffic: each rank sends its packed state to every other, in one round.
    """
    if comm.size == 1:
        return state
    return merge_all([unpack(packed) for packed in comm.all_gather(pack(state))])


def reduce_scatter_states(comm: Communicator, states: Sequence[AttentionState]) -> AttentionState:
    """The merge of what all ranks computed for this rank's query rows; `states[r]` are for the rows of rank r.

    Traffic: each rank sends every other rank the packed state of that rank's rows, in one round.
    """
    own = pack(states[comm.rank])
    received = comm.all_to_all([pack(state) for state in states], [own.shape] * comm.size)
    return merge_all([unpack(packed) for packed in received])


def sum_over_ranks(comm: Communicator, part: Tensor) -> Tensor:
    """The sum of every rank's `part`, added in rank order: bit-equal on every rank.

    Traffic: each rank sends its part to every other, in one round.
    """
    return part if comm.size == 1 else functools.reduce(torch.add, comm.all_gather(part))


def sum_scatter(comm: Communicator, parts: Sequence[Tensor]) -> Tensor:
    """The sum of what all ranks have for this one, added in rank order; `parts[r]` is for rank r.

    Traffic: each rank sends every other rank its part, in one round.
    """
    if comm.size == 1:
        return parts[0]
    return functools.reduce(torch.add, comm.all_to_all(parts, [parts[comm.rank].shape] * comm.size))

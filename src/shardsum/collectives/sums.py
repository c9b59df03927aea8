"""What strategies ask for: states merged and gradients summed over ranks, for all or each its own rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..comm import Communicator
from ..packed import pack, unpack
from ..state import AttentionState
from .base import Collective
from .operations import MERGE, SUM, Operation, combine_all


def all_reduce_states(comm: Communicator, state: AttentionState, collective: Collective) -> AttentionState:
    """The merge of every rank's state over the same query rows, bit-equal on every rank.

    It takes the place of `state` in memory, if that is contiguous.
    Traffic: what the collective declares for as many rows, of v_dim + 1 numbers each.
    """
    if comm.size == 1 or not state.lse.numel():
        return state
    if not (state.out.is_contiguous() and state.lse.is_contiguous()):
        state = AttentionState(state.out.contiguous(), state.lse.contiguous())
    collective.all_reduce_state(comm, state)
    return state


def reduce_scatter_states(comm: Communicator, states: Sequence[AttentionState]) -> AttentionState:
    """The merge of what all ranks computed for this rank's query rows; `states[r]` are for the rows of rank r.

    Traffic: each rank sends every other rank the packed state of that rank's rows, in one round.
    """
    own = pack(states[comm.rank])
    received = comm.all_to_all([pack(state) for state in states], [own.shape] * comm.size)
    combine_all([packed.view(-1, own.shape[-1]) for packed in received], MERGE, own.view(-1, own.shape[-1]))
    return unpack(own)


def reduce_over_ranks(
    comm: Communicator, part: Tensor, collective: Collective, operation: Operation = SUM
) -> Tensor:
    """The sum (or maximum) of every rank's `part`, bit-equal on every rank.

    Traffic: what the collective declares for as many rows as `part` has numbers.
    """
    if comm.size == 1:
        return part
    total = part.detach().clone().contiguous()
    collective.all_reduce(comm, total.view(-1, 1), operation)
    return total


def sum_scatter(comm: Communicator, parts: Sequence[Tensor]) -> Tensor:
    """The sum of what all ranks have for this one, bit-equal to what it would be on any rank; `parts[r]` is for r.

    Traffic: each rank sends every other rank its part, in one round.
    """
    if comm.size == 1:
        return parts[0]
    total = torch.empty_like(parts[comm.rank], memory_format=torch.contiguous_format)
    combine_all(comm.all_to_all(parts, [total.shape] * comm.size), SUM, total)
    return total

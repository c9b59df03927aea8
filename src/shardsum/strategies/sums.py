"""Partial results of all ranks made one: for rows that every rank has, or for each rank its own rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor

from ..collectives import all_reduce_states, reduce_over_ranks, reduce_scatter_states, sum_scatter
from ..comm import Communicator
from ..geometry import Nodes, key_nodes, state_nodes
from ..partials import Partial, union
from ..state import AttentionState
from .call import Call

P = TypeVar("P", bound=Partial[Any])


def reduce_states(call: Call, state: Partial[AttentionState]) -> AttentionState:
    """The state of replicated rows over the keys of all ranks."""
    if not call.problem.reproducible:
        return all_reduce_states(call.comm, state.total(), call.collective)
    return _gathered(call.comm, state, state_nodes(call.problem)).total()


def reduce_sum(call: Call, part: Partial[Tensor]) -> Tensor:
    """The sum over the keys of all ranks, for replicated rows."""
    if not call.problem.reproducible:
        return reduce_over_ranks(call.comm, part.total(), call.collective)
    return _gathered(call.comm, part, key_nodes(call.problem)).total()


def scatter_states(call: Call, states: Sequence[Partial[AttentionState]]) -> AttentionState:
    """The state of this rank's rows over all keys; `states[r]` is what a rank has for the rows of rank r."""
    if not call.problem.reproducible:
        return reduce_scatter_states(call.comm, [state.total() for state in states])
    return _scattered(call.comm, states, state_nodes(call.problem)).total()


def scatter_sums(call: Call, parts: Sequence[Partial[Tensor]]) -> Tensor:
    """The sum for this rank's rows over all keys; `parts[r]` is what a rank has for the rows of rank r."""
    if not call.problem.reproducible:
        return sum_scatter(call.comm, [part.total() for part in parts])
    return _scattered(call.comm, parts, key_nodes(call.problem)).total()


def _gathered(comm: Communicator, part: P, nodes: Nodes) -> P:
    if comm.size == 1:
        return part
    return _joined(
        comm.all_gather(part.to_numbers(nodes.of_rank(comm.rank)), _shapes(comm, part, nodes)), nodes, part
    )


def _scattered(comm: Communicator, parts: Sequence[P], nodes: Nodes) -> P:
    own = parts[comm.rank]
    sent = [part.to_numbers(nodes.of_rank(comm.rank)) for part in parts]
    return _joined(comm.all_to_all(sent, _shapes(comm, own, nodes)), nodes, own)


def _shapes(comm: Communicator, part: Partial[Any], nodes: Nodes) -> list[tuple[int, ...]]:
    """The shape of each rank's nodes as numbers, for the rows of this part."""
    return [part.numbers_shape(nodes.count(rank)) for rank in range(comm.size)]


def _joined(received: Sequence[Tensor], nodes: Nodes, like: P) -> P:
    return union(like.from_numbers(numbers, nodes.of_rank(rank)) for rank, numbers in enumerate(received))

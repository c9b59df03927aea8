"""In which order partial results become one: as they come, or as forests along the fixed tree (`reproducible`)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from ..collectives import all_reduce_states, reduce_over_ranks, reduce_scatter_states, sum_scatter
from ..comm import Communicator
from ..packed import pack, unpack
from ..state import AttentionState, merge
from ..tree import Forest, Node

if TYPE_CHECKING:
    from .call import Call

# What a rank knows of the state of some rows, and of a gradient.
State = AttentionState | Forest[AttentionState]
Sum = Tensor | Forest[Tensor]
T = TypeVar("T", AttentionState, Tensor)


@dataclass(frozen=True)
class Nodes:
    """The nodes of one tree that each rank computes, in the order in which they travel, and those of all ranks.

    Parts that are no forests travel as one node would.
    """

    of_rank: tuple[tuple[Node, ...], ...]
    table: tuple[Node, ...]

    @classmethod
    def of(cls, of_rank: Iterable[Iterable[Node]]) -> Nodes:
        """Of forests: a table has a place for every node."""
        held = tuple(map(tuple, of_rank))
        return cls(held, tuple(itertools.chain.from_iterable(held)))


@dataclass(frozen=True)
class _Kind(Generic[T]):
    """How nodes travel: as numbers of each row, one node's beside another's.

    In a table that has a place for the nodes of all ranks, `blank` is what stands where nothing is yet, and `join`
    combines two tables of which at most one has something.
    """

    to_numbers: Callable[[T], Tensor]
    of_numbers: Callable[[Tensor], T]
    blank: float
    join: Callable[[Tensor, Tensor], Tensor]


def _state_of(numbers: Tensor) -> AttentionState:
    state = unpack(numbers)
    blank = (state.lse == -torch.inf).unsqueeze(-1) & (state.out == -torch.inf)
    return AttentionState(state.out.masked_fill(blank, 0.0), state.lse)


def _the_one_that_is_there(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a == -torch.inf, b, a)  # a maximum would change the bits of a NaN


_STATES = _Kind(pack, _state_of, -torch.inf, _the_one_that_is_there)
_SUMS: _Kind[Tensor] = _Kind(lambda x: x, lambda x: x, 0.0, torch.add)


def union(a: State, b: State) -> State:
    """What two disjoint sets of keys give together."""
    if isinstance(a, Forest):
        assert isinstance(b, Forest)
        return a.union(b)
    assert isinstance(b, AttentionState)
    return merge(a, b)


def whole(state: State) -> AttentionState:
    """The state itself, once all keys that are seen are in it."""
    return state.total() if isinstance(state, Forest) else state


def added(a: Sum, b: Sum) -> Sum:
    """The sum of what two disjoint sets contribute."""
    if isinstance(a, Forest):
        assert isinstance(b, Forest)
        return a.union(b)
    assert isinstance(b, Tensor)
    return a + b


def total(x: Sum) -> Tensor:
    """The sum itself, once all that contribute are in it."""
    return x.total() if isinstance(x, Forest) else x


def put(x: Sum, items: Tensor, part: Sum) -> Sum:
    """x with what `part` has for some items of dim 2; a tensor is changed in place."""
    if isinstance(x, Tensor):
        assert isinstance(part, Tensor)
        return x.index_add_(2, items.to(x.device), part)
    assert isinstance(part, Forest)
    nothing = x.nothing
    spread = {
        node: torch.zeros_like(nothing).index_copy_(2, items.to(nothing.device), value)
        for node, value in part.nodes.items()
    }
    return x.union(x.of(spread))


# What travels of a part: a tensor whose last dim has numbers for each of the nodes that a rank holds.


def on_wire(part: State | Sum, nodes: Sequence[Node]) -> Tensor:
    """The part as a tensor (..., numbers of each node side by side)."""
    if isinstance(part, Forest):
        kind = _kind(part)
        assert set(part.nodes) == set(nodes)
        numbers = [kind.to_numbers(part.nodes[node]) for node in nodes]
        return torch.cat(numbers, dim=-1) if numbers else kind.to_numbers(part.nothing)[..., :0]
    return pack(part) if isinstance(part, AttentionState) else part


def off_wire(numbers: Tensor, nodes: Sequence[Node], like: Any) -> Any:
    """The part, of the same kind as another, that `on_wire` or `in_table` made this tensor of."""
    if not isinstance(like, Forest):
        return unpack(numbers) if isinstance(like, AttentionState) else numbers
    kind, width = _kind(like), numbers.shape[-1] // max(1, len(nodes))
    parts = numbers.split(width, dim=-1) if nodes else ()
    return like.of({node: kind.of_numbers(part) for node, part in zip(nodes, parts, strict=True)})


def in_table(part: State | Sum, nodes: Nodes) -> Tensor:
    """The part in a table that has a place for the nodes of all ranks."""
    if not isinstance(part, Forest):
        return on_wire(part, nodes.table)
    kind = _kind(part)
    blank = torch.full_like(kind.to_numbers(part.nothing), kind.blank)
    numbers = [kind.to_numbers(part.nodes[node]) if node in part.nodes else blank for node in nodes.table]
    return torch.cat(numbers, dim=-1) if numbers else blank[..., :0]


def joined_states(reproducible: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """How two tables of states of the same rows become one; two tables of sums are added."""
    return _STATES.join if reproducible else _merge_packed


def _merge_packed(a: Tensor, b: Tensor) -> Tensor:
    return pack(merge(unpack(a), unpack(b)))


def _kind(forest: Forest[Any]) -> _Kind[Any]:
    return _STATES if isinstance(forest.nothing, AttentionState) else _SUMS


def reduce_states(call: Call, state: State) -> AttentionState:
    """The state of replicated rows over the keys of all ranks."""
    if not isinstance(state, Forest):
        return all_reduce_states(call.comm, state, call.collective)
    return _gathered(call.comm, state, call.state_nodes()).total()


def reduce_sum(call: Call, part: Sum) -> Tensor:
    """The sum over the keys of all ranks, for replicated rows."""
    if not isinstance(part, Forest):
        return reduce_over_ranks(call.comm, part, call.collective)
    return _gathered(call.comm, part, call.key_nodes()).total()


def scatter_states(call: Call, states: Sequence[Any]) -> AttentionState:
    """The state of this rank's rows over the keys of all ranks, if `states[r]` is what each has for rank r's."""
    if not isinstance(states[0], Forest):
        return reduce_scatter_states(call.comm, states)
    state: AttentionState = _scattered(call.comm, states, call.state_nodes()).total()
    return state


def scatter_sums(call: Call, parts: Sequence[Any]) -> Tensor:
    """The same of sums over keys."""
    if not isinstance(parts[0], Forest):
        return sum_scatter(call.comm, parts)
    found: Tensor = _scattered(call.comm, parts, call.key_nodes()).total()
    return found


def _gathered(comm: Communicator, part: Forest[T], nodes: Nodes) -> Forest[T]:
    if comm.size == 1:
        return part
    shapes = _shapes(part, nodes)
    return _union_of(comm.all_gather(on_wire(part, nodes.of_rank[comm.rank]), shapes), nodes, part)


def _scattered(comm: Communicator, parts: Sequence[Forest[T]], nodes: Nodes) -> Forest[T]:
    own = parts[comm.rank]
    sent = [on_wire(part, nodes.of_rank[comm.rank]) for part in parts]
    return _union_of(comm.all_to_all(sent, _shapes(own, nodes)), nodes, own)


def _shapes(part: Forest[Any], nodes: Nodes) -> list[tuple[int, ...]]:
    """What each rank's nodes are as a tensor, for the rows of this part."""
    *rows, width = _kind(part).to_numbers(part.nothing).shape
    return [(*rows, width * len(held)) for held in nodes.of_rank]


def _union_of(received: Sequence[Tensor], nodes: Nodes, like: Forest[T]) -> Forest[T]:
    found: dict[Node, T] = {}
    for numbers, held in zip(received, nodes.of_rank, strict=True):
        found |= off_wire(numbers, held, like).nodes
    return like.of(found)

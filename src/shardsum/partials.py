"""Partial results on their way to the whole: states and gradients, merged as they come or along the fixed tree.

A strategy adds partial results of disjoint keys by `union`, sends them as tensors and asks for the `total` at the
end; it need not know which of the two it has. Along the fixed tree (`reproducible`) a partial result is a forest:
what cannot be combined yet waits for its sibling, so that numbers meet in one order wherever they lie.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from .packed import merge_alike, pack, unpack
from .state import AttentionState, merge
from .tree import Forest, Node

T = TypeVar("T")
P = TypeVar("P", bound="Partial[Any]")
Combine = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Monoid(Generic[T]):
    """What partial results are combined by, and how they travel: as numbers of each row, the last dim.

    `combine` is for results in any order, `combine_numbers` the same for them as numbers, and `combine_in_tree`
    for siblings of the fixed tree. `blank` fills the place of a node that is not there yet in a table of nodes,
    `fill` puts two tables together of which at most one has a node, and `from_place` reads a place, blank or
    not.
    """

    combine: Callable[[T, T], T]
    combine_in_tree: Callable[[T, T], T]
    to_numbers: Callable[[T], Tensor]
    from_numbers: Callable[[Tensor], T]
    from_place: Callable[[Tensor], T]
    combine_numbers: Combine
    fill: Combine
    blank: float

    def combine_tables(self, along_tree: bool) -> Combine:
        """How the tables of two partial results of disjoint keys become one."""
        return self.fill if along_tree else self.combine_numbers


class Partial(ABC, Generic[T]):
    """What is known of a state, or of a sum, over some of the keys (or rows) that it is of."""

    monoid: Monoid[T]

    @abstractmethod
    def union(self: P, other: P) -> P:
        """The partial result of this one's keys (or rows) and of a disjoint set together."""

    @abstractmethod
    def put(self: P, items: Int[Tensor, " items"], part: P) -> P:
        """This sum with `part` added to some items of dim 2; this one's memory may be written to."""

    @abstractmethod
    def total(self) -> T:
        """The result itself, once all that contribute are in it."""

    @abstractmethod
    def values(self) -> Iterable[T]:
        """The results that are known, each of some of the keys."""

    @abstractmethod
    def to_numbers(self, nodes: Sequence[Node]) -> Tensor:
        """The numbers of these nodes, which are those that are known, side by side along the last dim."""

    @abstractmethod
    def to_table(self, nodes: Sequence[Node]) -> Tensor:
        """The numbers in a table that has a place for each of these nodes, known or not."""

    @abstractmethod
    def from_numbers(self: P, numbers: Tensor, nodes: Sequence[Node]) -> P:
        """The partial result, of this kind, that `to_numbers` or `to_table` made these numbers of."""

    @abstractmethod
    def numbers_shape(self, nodes: int) -> tuple[int, ...]:
        """The shape of the numbers of `nodes` nodes."""


class Merged(Partial[T]):
    """One result of all that is known, combined in the order in which it came."""

    def __init__(self, value: T, monoid: Monoid[T]) -> None:
        self.value, self.monoid = value, monoid

    def union(self, other: Merged[T]) -> Merged[T]:
        return Merged(self.monoid.combine(self.value, other.value), self.monoid)

    def put(self, items: Tensor, part: Merged[T]) -> Merged[T]:
        value = self.monoid.to_numbers(self.value).index_add_(
            2, items.to(self.monoid.to_numbers(self.value).device), part.to_numbers(())
        )
        return Merged(self.monoid.from_numbers(value), self.monoid)

    def total(self) -> T:
        return self.value

    def values(self) -> Iterable[T]:
        return (self.value,)

    def to_numbers(self, nodes: Sequence[Node]) -> Tensor:
        return self.monoid.to_numbers(self.value)

    def to_table(self, nodes: Sequence[Node]) -> Tensor:
        return self.monoid.to_numbers(self.value)

    def from_numbers(self, numbers: Tensor, nodes: Sequence[Node]) -> Merged[T]:
        return Merged(self.monoid.from_numbers(numbers), self.monoid)

    def numbers_shape(self, nodes: int) -> tuple[int, ...]:
        return tuple(self.monoid.to_numbers(self.value).shape)


class AlongTree(Partial[T]):
    """The results of nodes of the fixed tree, of which siblings have been combined."""

    def __init__(self, forest: Forest[T], monoid: Monoid[T]) -> None:
        self.forest, self.monoid = forest, monoid

    def union(self, other: AlongTree[T]) -> AlongTree[T]:
        return AlongTree(self.forest.union(other.forest), self.monoid)

    def put(self, items: Tensor, part: AlongTree[T]) -> AlongTree[T]:
        nothing, monoid = self.monoid.to_numbers(self.forest.nothing), self.monoid
        spread = {
            node: monoid.from_numbers(
                nothing.clone().index_copy_(2, items.to(nothing.device), monoid.to_numbers(x))
            )
            for node, x in part.forest.nodes.items()
        }
        return self.union(AlongTree(self.forest.of(spread), monoid))

    def total(self) -> T:
        return self.forest.total()

    def values(self) -> Iterable[T]:
        return self.forest.nodes.values()

    def to_numbers(self, nodes: Sequence[Node]) -> Tensor:
        known = self.forest.nodes
        assert set(known) == set(nodes)
        return self._side_by_side([self.monoid.to_numbers(known[node]) for node in nodes])

    def to_table(self, nodes: Sequence[Node]) -> Tensor:
        known, nothing = self.forest.nodes, self.monoid.to_numbers(self.forest.nothing)
        blank = torch.full_like(nothing, self.monoid.blank)
        numbers = [self.monoid.to_numbers(known[node]) if node in known else blank for node in nodes]
        return self._side_by_side(numbers)

    def from_numbers(self, numbers: Tensor, nodes: Sequence[Node]) -> AlongTree[T]:
        width = numbers.shape[-1] // max(1, len(nodes))
        parts = numbers.split(width, dim=-1) if nodes else ()
        known = {node: self.monoid.from_place(part) for node, part in zip(nodes, parts, strict=True)}
        return AlongTree(self.forest.of(known), self.monoid)

    def numbers_shape(self, nodes: int) -> tuple[int, ...]:
        *rows, width = self.monoid.to_numbers(self.forest.nothing).shape
        return (*rows, width * nodes)

    def _side_by_side(self, numbers: list[Tensor]) -> Tensor:
        return torch.cat(numbers, dim=-1) if numbers else self.monoid.to_numbers(self.forest.nothing)[..., :0]


def union(parts: Iterable[P]) -> P:
    """The partial result of all `parts` together: one at least, all of one kind."""
    return functools.reduce(lambda one, other: one.union(other), parts)


def total(parts: Iterable[Partial[T]]) -> T:
    """The result of all partial results together."""
    return union(parts).total()


def _state_of(numbers: Tensor) -> AttentionState:
    """The state of these numbers, in which a node that nobody had is a state of no keys."""
    state = unpack(numbers)
    blank = (state.lse == -torch.inf).unsqueeze(-1) & (state.out == -torch.inf)
    return AttentionState(state.out.masked_fill(blank, 0.0), state.lse)


def _merge_numbers(a: Tensor, b: Tensor) -> Tensor:
    return pack(merge(unpack(a), unpack(b)))


def _the_one_that_is_there(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a == -torch.inf, b, a)  # a maximum would change the bits of a NaN


def _as_it_is(x: Tensor) -> Tensor:
    return x


STATES = Monoid(
    combine=merge,
    combine_in_tree=merge_alike,
    to_numbers=pack,
    from_numbers=unpack,
    from_place=_state_of,
    combine_numbers=_merge_numbers,
    fill=_the_one_that_is_there,
    blank=-torch.inf,
)
SUMS: Monoid[Tensor] = Monoid(
    combine=torch.add,
    combine_in_tree=torch.add,
    to_numbers=_as_it_is,
    from_numbers=_as_it_is,
    from_place=_as_it_is,
    combine_numbers=torch.add,
    fill=torch.add,
    blank=0.0,
)

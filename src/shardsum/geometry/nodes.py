"""Which nodes of the fixed tree each rank computes: how partial results travel under `reproducible`."""

from __future__ import annotations

import functools
import itertools

from ..placement import Placement
from ..problem import Problem, per_problem
from ..tree import Node

_ONE = (Node(0, 0),)


class Nodes:
    """The nodes that each rank computes of one sum, in the order in which they travel, and those of all ranks.

    `placement` is None where sums take any order: what a rank has then travels as one node would. `parts`: for
    each of so many of a mask's intervals.
    """

    def __init__(self, placement: Placement | None, parts: int = 1) -> None:
        self._placement, self._parts = placement, parts
        self._of_rank: dict[int, tuple[Node, ...]] = {}

    def of_rank(self, rank: int) -> tuple[Node, ...]:
        """The nodes of one rank."""
        if self._placement is None:
            return _ONE
        if rank not in self._of_rank:
            spans = self._placement.runs(rank).spans(self._placement.end)
            parts = range(self._parts)
            self._of_rank[rank] = tuple(node._replace(part=part) for part in parts for node, _ in spans)
        return self._of_rank[rank]

    def count(self, rank: int) -> int:
        """How many nodes a rank has, without naming them."""
        return 1 if self._placement is None else int(self._placement.node_counts[rank]) * self._parts

    @property
    def table_count(self) -> int:
        """How many places a table has, without naming its nodes."""
        return 1 if self._placement is None else int(self._placement.node_counts.sum()) * self._parts

    @functools.cached_property
    def table(self) -> tuple[Node, ...]:
        """The nodes for which a table has a place: those of all ranks; one for all where sums take any order."""
        if self._placement is None:
            return _ONE
        return tuple(itertools.chain.from_iterable(map(self.of_rank, range(self._placement.size))))


@per_problem
def key_nodes(problem: Problem) -> Nodes:
    """The nodes that each rank's keys make: what a gradient of rows is a sum of."""
    return Nodes(problem.keys if problem.reproducible else None)


@per_problem
def row_nodes(problem: Problem) -> Nodes:
    """The nodes that each rank's rows make: what a gradient of keys is a sum of."""
    return Nodes(problem.queries if problem.reproducible else None)


@per_problem
def state_nodes(problem: Problem) -> Nodes:
    """The nodes that each rank's keys make, for each of the mask's intervals: what a state is merged of."""
    return Nodes(problem.keys if problem.reproducible else None, problem.mask.parts)

"""One tree for every sum: why `reproducible=True` gives the same bits on any number of ranks.

A sequence is cut into segments of SEGMENT positions, the last one shorter. What a segment contributes is found by
one fixed sequence of operations, and contributions are combined along one binary tree over the segments' numbers:
node (level, i) combines nodes (level - 1, 2 i) and (level - 1, 2 i + 1), or is the first of them where the second
has no segment. A rank that holds whole segments computes the largest nodes that it can, and whoever receives the
nodes of others computes the rest. So floating-point numbers meet in the same order wherever they lie.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

from .errors import Unsupported
from .scalars import shown

SEGMENT = 256

T = TypeVar("T")
N = TypeVar("N", int, Tensor)


class Node(NamedTuple):
    """The node of the segments [place 2^level, (place + 1) 2^level); `part`: of which of a mask's intervals."""

    level: int
    place: int
    part: int = 0

    @property
    def first(self) -> int:
        """The first segment of the node."""
        return self.place << self.level

    def positions(self, length: int) -> int:
        """How many positions the node has in a sequence of `length`."""
        end = (self.place + 1) << self.level
        return min(end * SEGMENT, length) - self.first * SEGMENT


class Forest(Generic[T]):
    """What is known of one sum: the nodes of its tree that no known sibling has been combined with yet.

    Other nodes of the same tree join by `union`; `total` is the root, where nodes that nobody had are empty.
    `nothing` is an empty sum.
    """

    def __init__(self, count: int, combine: Callable[[T, T], T], nothing: T, nodes: dict[Node, T]) -> None:
        self._count, self._combine, self.nothing = count, combine, nothing
        self.nodes = self._climb(nodes, False)

    def union(self, other: Forest[T]) -> Forest[T]:
        """The forest of the nodes of both, which have no segment in common."""
        return self.of({**self.nodes, **other.nodes})

    def of(self, nodes: dict[Node, T]) -> Forest[T]:
        """The forest of other nodes of the same tree."""
        return Forest(self._count, self._combine, self.nothing, nodes)

    def total(self) -> T:
        """The sum; of several parts, the first part's and the second's combined."""
        found = self._climb(self.nodes, True)
        roots = [found[root] for root in sorted(found, key=lambda node: node.part)]
        if not roots:
            return self.nothing
        first, *others = roots
        for other in others:
            first = self._combine(first, other)
        return first

    def _climb(self, nodes: dict[Node, T], whole: bool) -> dict[Node, T]:
        """Combine siblings. A node whose sibling has no segment, or if `whole` is missing, becomes the parent."""
        found = dict(nodes)
        for level in range((self._count - 1).bit_length() if self._count else 0):
            for node in sorted(node for node in found if node.level == level):
                sibling = node._replace(place=node.place ^ 1)
                if node not in found:  # its left sibling has taken it
                    continue
                parent = Node(level + 1, node.place // 2, node.part)
                if sibling in found:
                    found[parent] = self._combine(found.pop(node), found.pop(sibling))
                elif whole or sibling.first >= self._count:
                    found[parent] = found.pop(node)
        return found


def unit(reproducible: bool) -> int:
    """How many positions stay together on one rank. Raises: Unsupported for what is neither True nor False."""
    if reproducible is not True and reproducible is not False:
        raise Unsupported(
            f"reproducible must be True or False: got {shown(reproducible)}. "
            "The same bits across instruction sets (docs/reproducible.md, L3) are not offered."
        )
    return SEGMENT if reproducible else 1


def segments(length: N) -> N:
    """How many segments a sequence of `length` positions has."""
    return -(-length // SEGMENT)


@functools.lru_cache(maxsize=128)  # a token seldom begins a segment
def cover(held: tuple[int, ...], count: int) -> tuple[Node, ...]:
    """The largest nodes that have none but these of `count` segments, in the segments' order."""
    leaves: dict[Node, None] = {Node(0, segment): None for segment in held}
    forest = Forest(count, lambda a, b: None, None, leaves)
    return tuple(sorted(forest.nodes, key=lambda node: node.first))

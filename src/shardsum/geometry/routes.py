"""How items (keys, or query rows) go round a ring of ranks: each only as far as some rank has a use for it.

Items that are wanted by the same ranks are taken together, and ranks that want an item are ranges of ranks: so a
route is found at once for all items, and for 100,000 ranks as for two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ..comm import Traffic
from ..placement import Placement, parts
from ..problem import Problem, per_problem
from .visible import Ranges, keys_seen, rows_seeing

UP, DOWN = 1, -1  # towards the next rank, towards the one before; the last and the first are neighbours
Column = Int[Tensor, " pieces"]


class Route:
    """How many hops each item of every rank's shard goes up and how many down.

    An item reaches the ranks that want it by the fewest hops in all; where several ways have as few, by the one
    whose longer arm is shortest. All ranks find the same route.
    """

    def __init__(self, items: Placement, wanted: Ranges) -> None:
        """`items`: where they lie; `wanted`: by each rank, global numbers of items, its own among them or not."""
        self.size = items.size
        self._hops: dict[tuple[int, int], Tensor] = {}
        if items.size == 1:  # nothing moves
            self._owner, self._count = items.rank, items.count
            self._arms = {way: torch.zeros_like(items.count) for way in (UP, DOWN)}
            self._farthest = {UP: 0, DOWN: 0}
            return
        pieces = _pieces(items, wanted)
        self._owner, self._count = pieces.owner, pieces.items
        up, down = _hops(pieces, wanted, items.size)
        self._arms = {UP: up, DOWN: down}
        self._farthest = {way: int(arm.max()) if len(arm) else 0 for way, arm in self._arms.items()}

    def hops(self, owner: int, way: int) -> Int[Tensor, " items"]:
        """How many hops each item of an owner's shard goes up, or down, the ring."""
        if (owner, way) not in self._hops:
            first, last = torch.searchsorted(self._owner, torch.tensor([owner, owner + 1])).tolist()
            arm, count = self._arms[way][first:last], self._count[first:last]
            self._hops[owner, way] = arm.repeat_interleave(count)
        return self._hops[owner, way]

    def legs(self) -> list[tuple[int, int]]:
        """(way, hop) in the order in which all ranks go through them."""
        return [(way, hop) for way in (UP, DOWN) for hop in range(1, self._farthest[way] + 1)]

    def items(self, owner: int, way: int, hop: int) -> Int[Tensor, " items"]:
        """The indices of the owner's items that come to the rank `hop` hops away, that way round."""
        return (self.hops(owner, way) >= hop).nonzero().flatten()

    def ending(self, owner: int, way: int, hop: int) -> Int[Tensor, " items"]:
        """The indices of the owner's items that come to that rank and go no further."""
        return (self.hops(owner, way) == hop).nonzero().flatten()

    def leg(self, rank: int, way: int, hop: int) -> tuple[Tensor, int]:
        """Which of the items that a rank has go on, as indices into these, and how many items come to it."""
        leaving = self.hops((rank - way * (hop - 1)) % self.size, way)
        onward = (leaving[leaving >= hop - 1] >= hop).nonzero().flatten()
        return onward, len(self.items((rank - way * hop) % self.size, way, hop))

    def sent(self, rank: int, item_bytes: list[int]) -> Traffic:
        """What a rank sends of all shards; each part of an item, of these bytes, goes in a message of its own."""
        counts = [self._by_owner(hops > self._distance(rank, way)) for way, hops in self._arms.items()]
        return _traffic(torch.cat(counts), item_bytes)

    def returned(self, rank: int, item_bytes: int) -> Traffic:
        """What a rank sends of the results for other ranks' items: onward behind the items, or home."""
        counts: list[Tensor] = []
        for way, hops in self._arms.items():
            distance = self._distance(rank, way)
            moving = [way_on & (distance > 0) for way_on in (hops > distance, hops == distance)]
            counts += map(self._by_owner, moving)
        return _traffic(torch.cat(counts), [item_bytes])

    def _distance(self, rank: int, way: int) -> Column:
        """How many hops each piece has come, up or down the ring, when it is at the rank."""
        return (way * (rank - self._owner)) % self.size

    def _by_owner(self, moving: Tensor) -> Tensor:
        """The number of items in the pieces that are moving, by owner."""
        return torch.zeros(self.size, dtype=torch.int64).index_add_(0, self._owner[moving], self._count[moving])


@per_problem
def key_route(problem: Problem) -> Route:
    """How keys go round a ring: to every rank that has a row which sees them."""
    return Route(problem.keys, keys_seen(problem))


@per_problem
def row_route(problem: Problem) -> Route:
    """How query rows go round a ring: to every rank that has a key which they see."""
    return Route(problem.queries, rows_seeing(problem))


class _Pieces(NamedTuple):
    """Items that one owner has one behind the other and that the same ranks want: the first one's number."""

    owner: Column
    item: Column
    items: Column


def _pieces(items: Placement, wanted: Ranges) -> _Pieces:
    """All items, in their owners' order, in as few pieces as need be."""
    owner, start, count, _ = items.cut(items.step > 1)  # items that lie apart are pieces of their own
    cuts = torch.cat([wanted.start, wanted.stop]).unique()
    first, last = torch.searchsorted(cuts, start, right=True), torch.searchsorted(cuts, start + count)
    run, number = parts(last - first + 1)
    bounds = torch.cat([cuts, cuts.new_tensor([torch.iinfo(torch.int64).max])])
    cut = first[run] + number
    begin = torch.where(number == 0, start[run], bounds[(cut - 1).clamp(min=0)])
    return _Pieces(owner[run], begin, torch.minimum(bounds[cut], (start + count)[run]) - begin)


def _hops(pieces: _Pieces, wanted: Ranges, size: int) -> tuple[Column, Column]:
    """How far each piece goes up and down: round the ring but for the widest gap of ranks that do not want it."""
    owner = pieces.owner
    arcs = [arc for low, high in _ranks_wanting(wanted, pieces.item) for arc in _arcs(low, high, owner, size)]
    # The last stop is the owner again.
    begin = torch.stack([*(arc[0] for arc in arcs), torch.full_like(owner, size)], dim=1)
    begin, order = begin.sort(dim=1)
    end = torch.stack([*(arc[1] for arc in arcs), torch.zeros_like(owner)], dim=1).gather(1, order)
    up, down = torch.zeros_like(owner), torch.zeros_like(owner)
    least, reached = torch.full_like(owner, torch.iinfo(torch.int64).max), torch.zeros_like(owner)
    for first, last in zip(begin.unbind(1), end.unbind(1), strict=True):
        back = size - first
        cost = (reached + back) * (2 * size) + torch.maximum(reached, back)
        better = (first > reached) & (cost <= least)
        up, down = torch.where(better, reached, up), torch.where(better, back, down)
        least, reached = torch.where(better, cost, least), torch.maximum(reached, last)
    everyone = up + down == size - 1  # there is no gap: any way is as short
    return torch.where(everyone, size // 2, up), torch.where(everyone, size - 1 - size // 2, down)


def _arcs(low: Tensor, high: Tensor, owner: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """The ranks [low, high] in hops up from the owner: those behind it, and those before it, which come round.

    Where there are none the first hop is `size`, and the last 0.
    """
    arcs = []
    for first, last in (
        (torch.maximum(low - owner, owner.new_tensor(1)), high - owner),
        (low - owner + size, torch.minimum(high - owner, owner.new_tensor(-1)) + size),
    ):
        there = first <= last
        arcs.append((torch.where(there, first, size), torch.where(there, last, 0)))
    return arcs


def _ranks_wanting(wanted: Ranges, item: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For every item the ranks that want it, as ranges [low, high] of ranks; empty where high < low."""
    number = torch.arange(len(wanted.rank)) - torch.searchsorted(wanted.rank, wanted.rank)
    for family in range(
        int(number.max()) + 1 if len(number) else 0
    ):  # the first range of each rank, the second, ...
        rank, start, stop = (x[number == family] for x in wanted)
        for group, way in _monotone(rank, start, stop):
            first, last = start[group], stop[group]
            if way < 0:
                first, last = first.flip(0), last.flip(0)
            begun = torch.searchsorted(first, item, right=True)  # so many ranges have begun at the item
            ended = torch.searchsorted(last, item, right=True)
            low, high = (ended, begun - 1) if way > 0 else (len(first) - begun, len(first) - 1 - ended)
            yield low + rank[group.start], high + rank[group.start]


def _monotone(rank: Tensor, start: Tensor, stop: Tensor) -> Iterator[tuple[slice, int]]:
    """Groups of neighbouring ranks whose ranges rise (1), or fall (-1), from rank to rank."""
    next_to = rank.diff() == 1
    rises = (next_to & (start.diff() >= 0) & (stop.diff() >= 0)).tolist()
    falls = (next_to & (start.diff() <= 0) & (stop.diff() <= 0)).tolist()
    first = 0
    while first < len(rank):
        ends = [_end_of(flags, first) for flags in (rises, falls)]
        way = 1 if ends[0] >= ends[1] else -1
        yield slice(first, max(ends) + 1), way
        first = max(ends) + 1


def _end_of(flags: list[bool], first: int) -> int:
    """The last index that only flags that are set lead to."""
    try:
        return flags.index(False, first)
    except ValueError:
        return len(flags)


def _traffic(counts: Tensor, item_bytes: list[int]) -> Traffic:
    """The traffic of messages with these numbers of items; an empty one is not sent."""
    messages = len(item_bytes) * int((counts > 0).sum())
    return Traffic(int(counts.sum()) * sum(item_bytes), messages, messages)

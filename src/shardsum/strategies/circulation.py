"""Shards that go round a ring of ranks, each item only as far as some rank has a use for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..comm import Communicator, Traffic

Combine = Callable[[Tensor, Tensor], Tensor]
UP, DOWN = 1, -1  # towards the next rank, towards the one before; the last and the first are neighbours


@dataclass(frozen=True, eq=False)
class Route:
    """How many hops each item (a key, or a query row) of every rank's shard goes up and how many down.

    An item reaches the ranks that want it by the fewest hops in all; where several ways have as few, by the one
    whose longer arm is shortest. All ranks find the same route.
    """

    hops: dict[int, list[Tensor]]  # by direction, for each owner: (items,)

    @classmethod
    def of(cls, size: int, wanted: Callable[[int, int], Bool[Tensor, " items"]]) -> Route:
        """The route of items of which `wanted(rank, owner)` says which of the owner's the rank wants."""
        reach = []
        for owner in range(size if size > 1 else 0):
            others = [wanted((owner + hop) % size, owner) for hop in range(1, size)]
            reach.append(_reach(torch.stack(others)))
        return cls({UP: [up for up, _ in reach], DOWN: [down for _, down in reach]})

    def legs(self) -> list[tuple[int, int]]:
        """(way, hop) in the order in which all ranks go through them."""
        longest = {way: max((int(x.max()) for x in hops if len(x)), default=0) for way, hops in self.hops.items()}
        return [(way, hop) for way in (UP, DOWN) for hop in range(1, longest[way] + 1)]

    def items(self, owner: int, way: int, hop: int) -> Tensor:
        """The indices of the owner's items that come to the rank so many hops away, that way round."""
        return (self.hops[way][owner] >= hop).nonzero().flatten()

    def ending(self, owner: int, way: int, hop: int) -> Tensor:
        """Those of them that go no further."""
        return (self.hops[way][owner] == hop).nonzero().flatten()

    def leg(self, rank: int, way: int, hop: int) -> tuple[Tensor, int]:
        """What of that which a rank holds goes on, as indices into it, and how many items come to it."""
        hops, size = self.hops[way], len(self.hops[way])
        leaving = hops[(rank - way * (hop - 1)) % size]
        onward = (leaving[leaving >= hop - 1] >= hop).nonzero().flatten()
        return onward, len(self.items((rank - way * hop) % size, way, hop))

    def sent(self, rank: int, item_bytes: Sequence[int]) -> Traffic:
        """What a rank sends of all shards, of so many bytes an item in each message."""
        return _traffic([len(self.leg(rank, way, hop)[0]) for way, hop in self.legs()], item_bytes)

    def returned(self, rank: int, item_bytes: int) -> Traffic:
        """What it sends of their results: onward behind the shard, or home."""
        size, counts = len(self.hops[UP]), []
        for way, hop in self.legs():
            owner = (rank - way * hop) % size
            counts += [len(self.items(owner, way, hop + 1)), len(self.ending(owner, way, hop))]
        return _traffic(counts, [item_bytes])


def circulate(
    comm: Communicator,
    route: Route,
    shard: Sequence[Tensor],
    visit: Callable[[int, Tensor, Sequence[Tensor]], Tensor | None],
    combine: Combine | None = None,
) -> Tensor | None:
    """What all visits gave for this rank's shard together, if `combine` says how; items lie along dim 2.

    `visit(owner, items, held)` computes with what of the owner's shard is here, while the next one arrives: at
    most two are on a rank besides its own. Results travel one hop behind their items, each rank adding its own,
    and go straight home from the last.
    """
    rank, legs = comm.rank, route.legs()

    def depart(leg: tuple[int, int], held: Sequence[Tensor]) -> list[Callable[[], Tensor]]:
        onward, coming = route.leg(rank, *leg)
        return [_shift(comm, take(x, onward), leg[0], coming) for x in (shard if leg[1] == 1 else held)]

    arriving = depart(legs[0], shard) if legs else []
    own = visit(rank, torch.arange(shard[0].shape[2]), shard)
    results = None if own is None or combine is None else _Results(comm, route, own, combine)
    for (way, hop), following in itertools.zip_longest(legs, legs[1:]):
        owner = (rank - way * hop) % comm.size
        held, items = [wait() for wait in arriving], route.items(owner, way, hop)
        arriving = depart(following, held) if following is not None else []
        found = visit(owner, items, held) if len(items) else None
        if results is not None:
            results.send(way, hop, found)
    return own if results is None else results.home()


class _Results:
    """What visits gave: for this rank's own shard, to which the others' comes home, and for those of others."""

    def __init__(self, comm: Communicator, route: Route, own: Tensor, combine: Combine) -> None:
        self._comm, self._route, self._own, self._combine = comm, route, own, combine
        self._behind: Callable[[], Tensor] = lambda: own[:, :, :0]
        self._coming: Callable[[], Tensor] = lambda: own[:, :, :0]
        self._coming_items = torch.arange(0)

    def send(self, way: int, hop: int, found: Tensor | None) -> None:
        """Send what a visit found, with what earlier ranks on the way found: onward, or home where items end."""
        comm, route = self._comm, self._route
        owner = (comm.rank - way * hop) % comm.size
        found = self._own[:, :, :0] if found is None else found
        found = found if hop == 1 else self._combine(self._behind(), found)
        hops = route.hops[way][owner][route.items(owner, way, hop)]
        self.home()
        coming = len(route.items((owner - way) % comm.size, way, hop + 1))
        self._behind = _shift(comm, take(found, (hops > hop).nonzero().flatten()), way, coming)
        self._coming_items = route.ending(comm.rank, way, hop)
        ending = take(found, (hops == hop).nonzero().flatten())
        self._coming = _shift(comm, ending, -way * hop, len(self._coming_items))

    def home(self) -> Tensor:
        """This rank's own, once what was coming home is there."""
        arrived, items = self._coming(), self._coming_items.to(self._own.device)
        if len(items):
            self._own[:, :, items] = self._combine(self._own[:, :, items], arrived)
        return self._own


def _shift(comm: Communicator, part: Tensor, ranks: int, coming: int) -> Callable[[], Tensor]:
    """Every rank sends its part so many ranks up, and receives one of so many items."""
    to, source = (comm.rank + ranks) % comm.size, (comm.rank - ranks) % comm.size
    return comm.exchange(part, to, source, (*part.shape[:2], coming, *part.shape[3:]))


def take(x: Tensor, items: Int[Tensor, " items"]) -> Tensor:
    """Some increasing indices of dim 2: a view where they are consecutive."""
    count = len(items)
    if count == 0 or int(items[-1]) - int(items[0]) == count - 1:
        return x.narrow(2, int(items[0]) if count else 0, count)
    return x.index_select(2, items.to(x.device))


def item_bytes(x: Tensor) -> int:
    """Bytes of one item: of all sequences and heads at one index of dim 2."""
    return x.shape[0] * x.shape[1] * x.shape[3] * x.element_size()


def _reach(wanted: Bool[Tensor, "others items"]) -> tuple[Tensor, Tensor]:
    """Each item's hops (up, down), if the rank i + 1 hops up wants the items `wanted[i]`.

    Row n of `up` and `down`: as far as is needed if the last n of those ranks are served downwards.
    """
    others, items = wanted.shape
    hops, none = torch.arange(1, others + 1).unsqueeze(1), torch.zeros(1, items, dtype=torch.int64)
    up = torch.cat([none, (hops * wanted).cummax(dim=0).values]).flip(0)
    down = torch.cat([none, (hops * wanted.flip(0)).cummax(dim=0).values])
    best = ((up + down) * (others + 1) + torch.maximum(up, down)).argmin(dim=0, keepdim=True)
    return up.gather(0, best)[0], down.gather(0, best)[0]


def _traffic(counts: Sequence[int], item_bytes: Sequence[int]) -> Traffic:
    """Of messages with so many items; an empty one is not sent."""
    messages = len(item_bytes) * sum(count > 0 for count in counts)
    return Traffic(sum(counts) * sum(item_bytes), messages, messages)

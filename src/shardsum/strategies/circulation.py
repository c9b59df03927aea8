"""Shards that go round a ring of ranks, each item only as far as some rank has a use for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from ..comm import Communicator
from ..geometry import Route
from ..partials import Combine


def circulate(
    comm: Communicator,
    route: Route,
    shard: Sequence[Tensor],
    visit: Callable[[int, Tensor, Sequence[Tensor]], Tensor],
    combine: Combine | None = None,
) -> Tensor:
    """What all visits gave for this rank's shard together, as `combine` says, if it does; items lie along dim 2.

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
    results = None if combine is None else _Results(comm, route, own, combine)
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
        hops = route.hops(owner, way)[route.items(owner, way, hop)]
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

"""Heads in place of positions, inside a group of neighbouring ranks: who computes which heads."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..blocks import Dense
from ..collectives import slices
from ..comm import Communicator, subgroup
from ..placement import Placement
from ..problem import Problem, per_problem
from .call import Call, PlacedBlock


@dataclass(frozen=True, eq=False)
class Split:
    """How the heads of a problem are shared out over groups of `ranks` neighbouring ranks.

    `q_heads`, `kv_heads`: what each rank of a group computes; a KV head goes to every rank that has one of its
    query heads. `queries`, `keys`: the positions of each group.
    """

    problem: Problem
    ranks: int
    q_heads: list[slice]
    kv_heads: list[slice]
    queries: Placement
    keys: Placement

    def place(self, rank: int) -> int:
        """The number of a rank in its group."""
        return rank % self.ranks

    def members(self, rank: int) -> range:
        """The ranks of a rank's group."""
        first = rank // self.ranks * self.ranks
        return range(first, first + self.ranks)

    def between(self, rank: int) -> Problem:
        """The problem of the ranks that compute a rank's heads, one of each group.

        Heads that do not come in whole GQA groups get their KV head one by one.
        """
        return _between(self.problem, self.ranks, self.place(rank))

    def owners(self, rank: int) -> Tensor | None:
        """The KV head, among a rank's, of each of its query heads; None where these are whole groups."""
        own, readers = self.q_heads[self.place(rank)], self.problem.heads_per_kv_head
        if own.start % readers == 0 and own.stop % readers == 0:
            return None
        owners: Tensor = torch.arange(own.start, own.stop) // readers
        first: int = self.kv_heads[self.place(rank)].start
        return owners.sub(first)

    @functools.cached_property
    def _kv_heads_of_all(self) -> int:
        count: int = sum(part.stop - part.start for part in self.kv_heads)
        return count

    def gathered(self, heads: Sequence[slice], placement: Placement, rank: int) -> int:
        """How many (head, position) pairs a rank sends where each gathers its heads of the group's positions."""
        own = heads[self.place(rank)]
        mine: int = own.stop - own.start
        every = self.problem.q_heads if heads is self.q_heads else self._kv_heads_of_all
        return (every - mine) * placement.lengths[rank]

    def scattered(self, heads: Sequence[slice], placement: Placement, rank: int) -> int:
        """How many (head, position) pairs a rank sends where each gets all heads of its positions back."""
        own, members = heads[self.place(rank)], self.members(rank)
        others = int(placement.counts[members.start : members.stop].sum()) - placement.lengths[rank]
        count: int = own.stop - own.start
        return count * others


@per_problem
def split(problem: Problem, ranks: int) -> Split:
    """How the heads are shared out over groups of `ranks` ranks."""
    queries = _by_group(problem.queries, ranks)
    heads, readers = slices(problem.q_heads, ranks), problem.heads_per_kv_head
    return Split(
        problem,
        ranks,
        heads,
        [slice(own.start // readers, -(-own.stop // readers)) for own in heads],
        queries,
        queries if problem.keys is problem.queries else _by_group(problem.keys, ranks),
    )


@per_problem
def _between(problem: Problem, ranks: int, place: int) -> Problem:
    whole = split(problem, ranks)
    own, of_kv = whole.q_heads[place], whole.kv_heads[place]
    q_heads = own.stop - own.start
    kv_heads = of_kv.stop - of_kv.start if whole.owners(place) is None else q_heads
    return replace(
        problem,
        q_heads=q_heads,
        kv_heads=kv_heads,
        queries=whole.queries,
        keys=whole.keys,
        hosts=None if problem.hosts is None else problem.hosts[place::ranks],
        known={},
    )


class RankGroup:
    """A rank's group in one call: what its ranks exchange."""

    def __init__(self, call: Call, ranks: int) -> None:
        comm, problem = call.comm, call.problem
        self.split = split(problem, ranks)
        self._call, self._rank = call, comm.rank
        self._comm: Communicator = subgroup(comm, self.split.members(comm.rank))
        self._between: Communicator = subgroup(comm, range(self.split.place(comm.rank), comm.size, ranks))

    def call(self) -> Call:
        """The call between groups, of this rank's heads and its group's positions."""
        call, whole, dense, problem = self._call, self.split, self._call.dense, self._call.problem
        q = self.gather(call.q, whole.q_heads, problem.queries)
        k, v = (self.gather(x, whole.kv_heads, problem.keys) for x in (dense.k, dense.v))
        own, owners = whole.q_heads[self._comm.rank], whole.owners(self._rank)
        if owners is not None:
            k, v = (x.index_select(1, owners.to(x.device)) for x in (k, v))
        return replace(
            call,
            comm=self._between,
            problem=whole.between(self._rank),
            q=q,
            blocks=[PlacedBlock(Dense(k, v))],
            scores=call.scores.some_heads(own.start, own.stop),
            holder="group",
        )

    def of_kv_heads(self, d_kv: Tensor) -> Tensor:
        """Gradients of the KV heads that this rank received, from those of the heads in its call."""
        owners, own = self.split.owners(self._rank), self.split.kv_heads[self._comm.rank]
        if owners is None:
            return d_kv
        found = d_kv.new_zeros(d_kv.shape[0], own.stop - own.start, *d_kv.shape[2:])
        return found.index_add_(1, owners.to(d_kv.device), d_kv)

    def gather(self, x: Tensor, heads: Sequence[slice], placement: Placement) -> Tensor:
        """This rank's heads of all the group's positions, in order; x has all heads of this rank's positions."""
        own, inside = heads[self._comm.rank], self._inside(placement)
        shapes = [(x.shape[0], own.stop - own.start, len(places), x.shape[3]) for places in inside]
        parts = self._comm.all_to_all([x[:, part] for part in heads], shapes)
        whole = x.new_empty(x.shape[0], own.stop - own.start, sum(map(len, inside)), x.shape[3])
        for places, part in zip(inside, parts, strict=True):
            whole.index_copy_(2, places.to(x.device), part)
        return whole

    def scatter(self, x: Tensor, heads: Sequence[slice], placement: Placement) -> list[Tensor]:
        """Each rank's heads of this rank's positions; x has this rank's heads of all the group's positions."""
        inside = self._inside(placement)
        own = len(inside[self._comm.rank])
        shapes = [(x.shape[0], part.stop - part.start, own, x.shape[3]) for part in heads]
        return self._comm.all_to_all([x[:, :, places.to(x.device)] for places in inside], shapes)

    def _inside(self, placement: Placement) -> list[Tensor]:
        """Each rank's positions as indices into its group's."""
        whole = self.split.queries if placement is self.split.problem.queries else self.split.keys
        group = whole.runs(self._rank // self.split.ranks)
        return [group.below(placement.positions(rank)) for rank in self.split.members(self._rank)]


def _by_group(placement: Placement, ranks: int) -> Placement:
    """The positions of each group."""
    rank, start, count, _ = placement.cut(placement.step > 1)
    group = rank // ranks
    order = (group * (placement.end + 1) + start).argsort()
    return Placement(placement.size // ranks, group[order], start[order], count[order])

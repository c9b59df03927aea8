"""Who holds the positions of a sequence that grows at its end: what a token adds costs one token's work.

Positions belong to holder groups: the ranks of a group hold the same blocks, and one of them, the owner, computes.
Today each rank is a group of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import Unsupported
from ..placement import Placement, Runs, Subset


class Growing(NamedTuple):
    """Runs of which the last may still grow: the others, and (start, count, step) of the last, if there is one."""

    closed: Int[Tensor, "runs 3"]
    last: tuple[int, int, int] | None

    def extended(self, start: int, count: int, step: int) -> Growing:
        """The runs with one more behind them; it joins the last where their positions are evenly apart."""
        if self.last is None:
            return Growing(self.closed, (start, count, step))
        first, before, apart = self.last
        gap = start - first - (before - 1) * (apart if before > 1 else 0)
        if (before == 1 or gap == apart) and (count == 1 or gap == step):
            return Growing(self.closed, (first, before + count, gap))
        return Growing(self.table, (start, count, step))

    def cropped(self, length: int) -> Growing:
        """The runs without their positions from `length` on."""
        start, count, step = self.table.unbind(1)
        count = torch.minimum(count, ((length - start + step - 1) // step).clamp(min=0))
        table = torch.stack([start, count, step], dim=1)[count > 0]
        return Growing(table[:-1], tuple(table[-1].tolist())) if len(table) else _NO_RUNS

    @property
    def table(self) -> Int[Tensor, "runs 3"]:
        """Start, count and step of each run."""
        if self.last is None:
            return self.closed
        last = torch.tensor([self.last])
        return torch.cat([self.closed, last]) if len(self.closed) else last

    @property
    def runs(self) -> Runs:
        return Runs(*self.table.t().contiguous())


_NO_RUNS = Growing(torch.zeros(0, 3, dtype=torch.int64), None)


class Owners:
    """The holder groups of positions 0 to `length` - 1, decided once for each.

    Positions come from shards, or are given to the groups in turn, in units of `unit`. `holders`: the ranks of
    each group, its owner first. What `placement` returns stays as it is whatever comes later; `version` is
    another number after every change.
    """

    def __init__(self, size: int, unit: int, holders: Sequence[Sequence[int]] | None = None) -> None:
        self.size, self._unit = size, unit
        self.holders = [[rank] for rank in range(size)] if holders is None else [list(ranks) for ranks in holders]
        self.length = self.version = 0
        self._runs = [_NO_RUNS] * len(self.holders)
        self._known: tuple[int, list[Runs], Placement] | None = None  # for the length that was asked for last

    def placement(self, length: int) -> Placement:
        """Which of the first `length` positions each rank computes with: those of the groups that it owns."""
        return self._at(length)[1]

    def runs(self, group: int, length: int) -> Runs:
        """Which of the first `length` positions a group holds."""
        return self._at(length)[0][group]

    def held(self, rank: int) -> list[int]:
        """The groups whose positions a rank holds."""
        return [group for group, ranks in enumerate(self.holders) if rank in ranks]

    def owned(self, rank: int) -> list[int]:
        """The groups that a rank computes."""
        return [group for group, ranks in enumerate(self.holders) if ranks[0] == rank]

    def keys(self, group: int, length: int) -> Subset:
        """The positions of a group as indices among those that its owner computes with."""
        rank = self.holders[group][0]
        if len(self.owned(rank)) == 1:
            return slice(None)
        return self.placement(length).runs(rank).below(self.runs(group, length).positions)

    def take_turns(self, length: int) -> None:
        """Give those of the first `length` positions that nobody has to groups, unit after unit."""
        groups, unit = len(self.holders), self._unit
        begun = min(-self.length % unit, length - self.length)
        if begun > 0:  # a unit that has begun goes on where it is
            self._add(self._group_of_last(), self.length, begun)
            self.length += begun
        if unit == 1:
            for group in range(groups):
                first = self.length + (group - self.length) % groups
                self._add(group, first, -(-(length - first) // groups), groups)
        else:
            for first in range(self.length, length, unit):
                self._add(first // unit % groups, first, min(unit, length - first))
        self.length = max(self.length, length)

    def take_shards(self, base: int | None, end: int, shards: Placement) -> None:
        """Leave the positions [base, end) where shards of them and what follows lie.

        `base` is None where sequences end at different positions.
        Raises: Unsupported where that can't be; ValueError where positions lie elsewhere already.
        """
        if base is None:
            raise Unsupported(
                "sharded tokens can't follow sequences of different lengths. Append them without layout."
            )
        if base % self._unit:
            raise Unsupported(
                f"in a reproducible cache sharded tokens begin a segment of {self._unit} positions: "
                f"got tokens from position {base} on. Append them without layout."
            )
        if any(ranks != [group] for group, ranks in enumerate(self.holders)):
            raise Unsupported("tokens that several ranks hold come to all of them. Append them without layout.")
        bounds, new = torch.tensor([base, self.length]), []
        for rank in range(self.size):
            shard = shards.runs(rank)
            some = slice(*shard.below(torch.tensor([0, end - base])).tolist())
            positions = shard.positions[some] + base
            known, below = int(torch.searchsorted(positions, self.length)), self.runs(rank, self.length)
            first, last = below.below(torch.minimum(bounds, torch.tensor(end))).tolist()
            if not torch.equal(positions[:known], below.at(torch.arange(first, last))):
                raise ValueError("every layer must be sharded alike: these positions lie on other ranks already.")
            new.append(Runs.of(positions[known:]))
        for rank, runs in enumerate(new):
            for start, count, step in zip(
                runs.start.tolist(), runs.count.tolist(), runs.step.tolist(), strict=True
            ):
                self._add(rank, start, count, step)
        self.length = max(self.length, end)

    def crop(self, length: int) -> None:
        """Forget who holds positions from `length` on: they may come to lie elsewhere."""
        if length < self.length:
            self._runs = [growing.cropped(length) for growing in self._runs]
            self.length = length
            self._changed()

    def _at(self, length: int) -> tuple[list[Runs], Placement]:
        if self._known is None or self._known[0] != length:
            whole = length >= self.length
            runs = [(growing if whole else growing.cropped(length)).runs for growing in self._runs]
            self._known = (
                length,
                runs,
                Placement.of_runs([self._together(rank, runs) for rank in range(self.size)]),
            )
        return self._known[1], self._known[2]

    def _together(self, rank: int, runs: list[Runs]) -> Runs:
        """The positions that a rank computes with: of all groups that it owns, together."""
        groups = self.owned(rank)
        if len(groups) == 1:
            return runs[groups[0]]
        positions = [torch.zeros(0, dtype=torch.int64), *(runs[group].positions for group in groups)]
        return Runs.of(torch.cat(positions).sort().values)

    def _group_of_last(self) -> int:
        ends = [0 if last is None else last[0] + (last[1] - 1) * last[2] + 1 for _, last in self._runs]
        return ends.index(self.length)

    def _add(self, group: int, start: int, count: int, step: int = 1) -> None:
        if count > 0:
            self._runs[group] = self._runs[group].extended(start, count, step)
            self._changed()

    def _changed(self) -> None:
        self.version += 1
        self._known = None

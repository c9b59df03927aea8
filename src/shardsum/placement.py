"""Which positions of a sequence each rank holds, as runs (start, count, step): never lists of all positions."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .errors import Mismatch, Unsupported
from .memory import remembered
from .tree import SEGMENT, Node, cover, segments

Positions = Int[Tensor, " positions"]
Numbers = Int[Tensor, " runs"]
Subset = slice | Tensor  # a slice, or increasing indices


class Table(NamedTuple):
    """Runs of all ranks: run i is of rank_i, and has amount_i positions: start_i, start_i + step_i, ..."""

    rank: Numbers
    start: Numbers
    amount: Numbers
    step: Numbers


def parts(counts: Numbers) -> tuple[Tensor, Tensor]:
    """Where each run i is cut into counts_i parts: for every part the number of its run, and its number in that.

    >>> parts(torch.tensor([2, 0, 1]))
    (tensor([0, 0, 2]), tensor([0, 1, 0]))
    """
    run = torch.arange(len(counts)).repeat_interleave(counts)
    return run, torch.arange(len(run)) - (counts.cumsum(0) - counts)[run]


class Runs:
    """Increasing positions as runs: run i is start_i, start_i + step_i, ... of count_i positions.

    Runs follow each other: the next starts behind the last position of the one before. None is empty.
    """

    def __init__(self, start: Numbers, count: Numbers, step: Numbers) -> None:
        self.start, self.count, self.step = start, count, step
        self._spans: dict[int, list[tuple[Node, slice]]] = {}

    @classmethod
    def of(cls, positions: Positions) -> Runs:
        """The runs of increasing positions: consecutive ones, or all as one where they are evenly apart.

        >>> Runs.of(torch.tensor([4, 5, 6, 9])).count.tolist()
        [3, 1]
        """
        apart = positions.diff()
        if len(positions) > 1 and bool((apart == apart[0]).all()):
            return cls(positions[:1], positions.new_tensor([len(positions)]), apart[:1])
        first = torch.cat([positions.new_ones(min(1, len(positions))), apart != 1]).nonzero().flatten()
        count = torch.cat([first, first.new_tensor([len(positions)])]).diff()
        return cls(positions[first], count, torch.ones_like(count))

    def __len__(self) -> int:
        return self._length

    @functools.cached_property
    def _length(self) -> int:
        return int(self.count.sum())

    @functools.cached_property
    def _first(self) -> Numbers:
        """The local index of each run's first position."""
        return self.count.cumsum(0) - self.count

    @functools.cached_property
    def positions(self) -> Positions:
        """All positions, one by one."""
        return self.at(torch.arange(self._length))

    def at(self, indices: Int[Tensor, " some"]) -> Positions:
        """The positions that have these local indices."""
        if len(self.start) == 1:
            return self.start + indices * self.step
        run = torch.searchsorted(self._first, indices, right=True) - 1
        return self.start[run] + (indices - self._first[run]) * self.step[run]

    @property
    def end(self) -> int:
        """One past the last position."""
        return int(self.start[-1] + (self.count[-1] - 1) * self.step[-1]) + 1 if len(self.start) else 0

    def below(self, bound: Tensor) -> Tensor:
        """How many of the positions are less than each bound: its place among them.

        >>> Runs.of(torch.tensor([4, 5, 6, 9])).below(torch.tensor([4, 6, 8, 10]))
        tensor([0, 2, 3, 4])
        """
        if len(self.start) == 0:
            return torch.zeros_like(bound)
        if len(self.start) == 1:
            return _ceil_divided(bound - self.start, self.step).clamp(0, self._length)
        run = (torch.searchsorted(self.start, bound.contiguous()) - 1).clamp(min=0)
        within = _ceil_divided(bound - self.start[run], self.step[run]).clamp(min=0)
        return self._first[run] + torch.minimum(within, self.count[run])

    def some(self, some: Subset) -> Runs:
        """The runs of some of the positions."""
        if isinstance(some, slice) and some == slice(None):
            return self
        return Runs.of(self.positions[some])

    def spans(self, length: int) -> list[tuple[Node, slice]]:
        """The nodes of the fixed tree that the positions make, and where among them each node's lie.

        Raises: Unsupported where a segment of the sequence of `length` positions is cut.
        """
        if length not in self._spans:
            check_whole_segments(self, length)
            numbers = Runs(self.start // SEGMENT, segments(self.count), self.step).positions
            found, start = [], 0
            for node in cover(tuple(numbers.tolist()), segments(length)):
                end = start + node.positions(length)
                found.append((node, slice(start, end)))
                start = end
            self._spans[length] = found
        return self._spans[length]


class Placement:
    """Which positions of one sequence each of `size` ranks holds in one call: a table of runs, in rank order."""

    def __init__(
        self, size: int, rank: Numbers, start: Numbers, count: Numbers, step: Numbers | None = None
    ) -> None:
        """A table whose rows are sorted by rank, then start; empty runs are left out, touching ones become one."""
        self.size, self.table = size, _joined(rank, start, count, step)
        self._runs: dict[int, Runs] = {}

    @classmethod
    def of(cls, held: Sequence[Positions]) -> Placement:
        """The placement in which rank r holds the increasing positions held[r]."""
        runs = [Runs.of(positions) for positions in held]
        return cls.of_runs(runs)

    @classmethod
    def of_runs(cls, runs: Sequence[Runs]) -> Placement:
        """The placement in which rank r holds runs[r]."""
        placement = cls.__new__(cls)
        placement.size, placement._runs = len(runs), dict(enumerate(runs))
        return placement

    @classmethod
    def contiguous(cls, lengths: Sequence[int]) -> Placement:
        """The placement in which ranks hold pieces of these lengths, one behind the other."""
        return _contiguous(tuple(lengths))

    @classmethod
    def replicated(cls, lengths: Sequence[int]) -> Placement:
        """The placement of a sequence that every rank holds whole.

        Raises: Mismatch where the ranks' lengths differ.
        """
        if len(set(lengths)) > 1:
            raise Mismatch(f"q_replicated needs the same queries on every rank: got {list(lengths)} queries.")
        return _replicated(len(lengths), lengths[0])

    @functools.cached_property
    def table(self) -> Table:
        """The runs of all ranks, in rank order; made when it is asked for where the ranks' runs came first."""
        runs = [self._runs[rank] for rank in range(self.size)]
        rank = [torch.full_like(one.start, number) for number, one in enumerate(runs)]
        columns = zip(*((one.start, one.count, one.step) for one in runs), strict=True)
        return Table(torch.cat(rank), *map(torch.cat, columns))

    @property
    def rank(self) -> Numbers:
        return self.table.rank

    @property
    def start(self) -> Numbers:
        return self.table.start

    @property
    def count(self) -> Numbers:
        return self.table.amount

    @property
    def step(self) -> Numbers:
        return self.table.step

    @functools.cached_property
    def counts(self) -> Int[Tensor, " ranks"]:
        """How many positions each rank holds."""
        return torch.zeros(self.size, dtype=torch.int64).index_add_(0, self.rank, self.count)

    @functools.cached_property
    def lengths(self) -> list[int]:
        """How many positions each rank holds, as numbers of Python."""
        if len(self._runs) == self.size:
            return [len(self._runs[rank]) for rank in range(self.size)]
        lengths: list[int] = self.counts.tolist()
        return lengths

    @functools.cached_property
    def length(self) -> int:
        """The positions of all ranks together."""
        return sum(self.lengths)

    @functools.cached_property
    def end(self) -> int:
        """One past the last position that a rank holds."""
        return int((self.start + (self.count - 1) * self.step).max()) + 1 if len(self.start) else 0

    def cut(self, singly: Bool[Tensor, " runs"]) -> Table:
        """The table, with the runs that are to be taken singly cut into their positions."""
        if not bool(singly.any()):
            return self.table
        run, number = parts(torch.where(singly, self.count, 1))
        start = self.start[run] + number * self.step[run]
        return Table(self.rank[run], start, torch.where(singly, 1, self.count)[run], self.step[run])

    def rows(self, rank: int) -> slice:
        """Where in the table the runs of a rank stand."""
        first, last = torch.searchsorted(self.rank, torch.tensor([rank, rank + 1])).tolist()
        return slice(first, last)

    def runs(self, rank: int) -> Runs:
        """The runs of one rank; the same object at every call."""
        if rank not in self._runs:
            rows = self.rows(rank)
            self._runs[rank] = Runs(self.start[rows], self.count[rows], self.step[rows])
        return self._runs[rank]

    def positions(self, rank: int) -> Positions:
        """The positions of one rank, one by one."""
        return self.runs(rank).positions

    @functools.cached_property
    def order(self) -> Int[Tensor, " all_positions"]:
        """Where each position of the sequence stands if the ranks' are laid one behind the other."""
        return torch.cat([self.positions(rank) for rank in range(self.size)]).argsort()

    @functools.cached_property
    def node_counts(self) -> Int[Tensor, " ranks"]:
        """How many nodes of the fixed tree each rank's positions make, without naming them."""
        first = self.start // SEGMENT
        last = first + segments(self.count)
        nodes = torch.where(last == segments(self.end), _blocks_to_end(first, last), _aligned_blocks(first, last))
        return torch.zeros(self.size, dtype=torch.int64).index_add_(0, self.rank, nodes)

    def of_whole_segments(self) -> Placement:
        """The placement itself. Raises: Unsupported, on every rank alike, where a segment is cut."""
        check_whole_segments(self, self.end)
        return self


# What each call asks for is remembered.
@remembered
def _contiguous(lengths: tuple[int, ...]) -> Placement:
    count = torch.tensor(lengths, dtype=torch.int64)
    return Placement(len(lengths), torch.arange(len(lengths)), count.cumsum(0) - count, count)


@remembered
def _replicated(size: int, length: int) -> Placement:
    start = torch.zeros(size, dtype=torch.int64)
    return Placement(size, torch.arange(size), start, start + length)


def check_whole_segments(runs: Runs | Placement, length: int) -> None:
    """Raise Unsupported unless runs begin and end where segments of a sequence of `length` positions do."""
    end = runs.start + runs.count
    whole = (runs.step == 1) & (runs.start % SEGMENT == 0) & ((end % SEGMENT == 0) | (end == length))
    if not bool(whole.all()):
        raise Unsupported(
            f"reproducible needs whole segments of {SEGMENT} positions on every rank. Cut with "
            "shardsum.shard(..., reproducible=True), or hold tokens in KVCache(..., reproducible=True)."
        )


def _joined(rank: Tensor, start: Tensor, count: Tensor, step: Tensor | None) -> Table:
    step = torch.ones_like(count) if step is None else torch.where(count > 1, step, 1)
    kept = count > 0
    if not bool(kept.all()):
        rank, start, count, step = rank[kept], start[kept], count[kept], step[kept]
    touching = (rank.diff() == 0) & (start.diff() == count[:-1]) & (step[:-1] == 1) & (step[1:] == 1)
    if not bool(touching.any()):
        return Table(rank, start, count, step)
    first = torch.cat([touching.new_ones(1), ~touching])
    group = first.cumsum(0) - 1
    together = torch.zeros(int(group[-1]) + 1, dtype=torch.int64).index_add_(0, group, count)
    return Table(rank[first], start[first], together, step[first])


def _ceil_divided(x: Tensor, step: Tensor) -> Tensor:
    return torch.div(x + (step - 1), step, rounding_mode="floor")


def _aligned_blocks(first: Tensor, last: Tensor) -> Tensor:
    """How few aligned blocks [i 2^k, (i + 1) 2^k) make up each range [first, last)."""
    differing = first ^ last
    for shift in (1, 2, 4, 8, 16, 32):  # all bits below the highest that differs
        differing = differing | differing >> shift
    middle = last & ~(differing >> 1)  # the multiple of the largest power of two in the range
    return _ones(middle - first) + _ones(last - middle)


def _blocks_to_end(first: Tensor, end: Tensor) -> Tensor:
    """How few aligned blocks that begin in each range [first, end) cover it; they may reach beyond it."""
    blocks, at = torch.zeros_like(first), first
    while bool((at < end).any()):
        blocks = blocks + (at < end)
        at = torch.where(at == 0, end, at + (at & -at))
    return blocks


def _ones(x: Tensor) -> Tensor:
    """The number of bits that are set."""
    ones = torch.zeros_like(x)
    for bit in range(48):
        ones += x >> bit & 1
    return ones

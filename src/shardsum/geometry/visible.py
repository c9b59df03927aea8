"""Which keys the rows of a rank see, and which rows see keys of a rank: as ranges, for all ranks at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ..masks import Bounds, Mask
from ..placement import Placement, Runs, parts
from ..problem import Problem, per_problem
from ..tree import SEGMENT

Column = Int[Tensor, " ranges"]


class Ranges(NamedTuple):
    """Ranges [start, stop) of whole numbers that belong to ranks: by rank, each rank's apart and increasing."""

    rank: Column
    start: Column
    stop: Column

    @classmethod
    def joined(cls, rank: Tensor, start: Tensor, stop: Tensor) -> Ranges:
        """The ranges in order, each rank's that overlap or touch made one; empty ones are left out."""
        there = start < stop
        rank, start, stop = rank[there], start[there], stop[there]
        if len(rank) == 0:
            return cls(rank, start, stop)
        apart = int(stop.max()) + 1  # ranks do not touch
        order = (rank * apart + start).argsort()
        rank, start = rank[order], start[order]
        covered = (rank * apart + stop[order]).cummax(dim=0).values
        gap = (rank * apart + start)[1:] > covered[:-1]
        edge = gap.new_ones(1)
        first, last = torch.cat([edge, gap]), torch.cat([gap, edge])
        return cls(rank[first], start[first], covered[last] - rank[last] * apart)

    def of_rank(self, rank: int) -> tuple[Column, Column]:
        """The starts and stops of one rank's ranges."""
        first, last = torch.searchsorted(self.rank, torch.tensor([rank, rank + 1])).tolist()
        return self.start[first:last], self.stop[first:last]

    def of_whole_segments(self) -> Ranges:
        """The ranges widened to whole segments."""
        stop = (self.stop + (SEGMENT - 1)) // SEGMENT * SEGMENT
        return Ranges.joined(self.rank, self.start // SEGMENT * SEGMENT, stop)


@per_problem
def keys_seen(problem: Problem) -> Ranges:
    """The global keys that some query row of each rank sees; if reproducible, in whole segments."""
    mask, queries = problem.mask, problem.queries
    rank, start, last = _cut_into_documents(queries, mask, mask.cu_seqlens, mask.leaves_out(queries.step))
    ranges = _ranges(rank, mask.seen_between(start, last))
    return ranges.of_whole_segments() if problem.reproducible else ranges


@per_problem
def rows_seeing(problem: Problem) -> Ranges:
    """The global query rows that see some key of each rank; if reproducible, in whole segments."""
    mask, keys = problem.mask, problem.keys
    if mask.key_intervals is not None:
        ranges = _rows_one_by_one(problem)
    else:
        # Between the keys of a run that are not one behind the other, a row at its document's edge may see none.
        edges = mask.cu_seqlens is not None or mask.key_range is not None
        skipping = (keys.step > 1) & (edges | mask.leaves_out(keys.step))
        rank, start, last = _cut_into_documents(keys, mask, mask.cu_seqlens_k, skipping)
        ranges = _ranges(rank, mask.rows_seeing(start, last + 1))
    return ranges.of_whole_segments() if problem.reproducible else ranges


@per_problem
def intervals(problem: Problem, rows_of: int) -> list[Bounds]:
    """The global keys that each query row of a rank sees, as disjoint intervals."""
    return problem.mask.intervals(problem.queries.positions(rows_of))


@per_problem
def local_intervals(problem: Problem, rows_of: int, keys_of: int) -> list[Bounds]:
    """The keys of one rank that each query row of another sees, as local indices."""
    bounds = intervals(problem, rows_of)
    if problem.kv_len(keys_of) == problem.mask.kv_len:  # the rank has all keys
        return bounds
    return localized(bounds, problem.keys.runs(keys_of))


def localized(bounds: list[Bounds], keys: Runs) -> list[Bounds]:
    """The intervals of global keys as intervals of the indices among these keys."""
    return [Bounds(keys.below(lo), keys.below(hi)) for lo, hi in bounds]


@per_problem
def seen(problem: Problem, rows_of: int, keys_of: int) -> Int[Tensor, " keys"]:
    """The keys of one rank that some query row of another sees, as local indices: what has to travel."""
    keys = problem.keys.runs(keys_of)
    first, last = (keys.below(bound) for bound in keys_seen(problem).of_rank(rows_of))
    run, number = parts(last - first)
    return first[run] + number


@per_problem
def sent_counts(problem: Problem, keys_of: int) -> Int[Tensor, " ranks"]:
    """How many keys of one rank each other rank's rows see; none of its own go to itself."""
    ranges, keys = keys_seen(problem), problem.keys.runs(keys_of)
    counts = torch.zeros(problem.size, dtype=torch.int64)
    counts.index_add_(0, ranges.rank, keys.below(ranges.stop) - keys.below(ranges.start))
    counts[keys_of] = 0
    return counts


@per_problem
def seen_counts(problem: Problem, rows_of: int) -> Int[Tensor, " ranks"]:
    """How many keys of each other rank the rows of one rank see; none of its own come from itself."""
    keys, counts = problem.keys, torch.zeros(problem.size, dtype=torch.int64)
    for start, stop in zip(*keys_seen(problem).of_rank(rows_of), strict=True):
        below = [((bound - keys.start + keys.step - 1) // keys.step).clamp(min=0) for bound in (start, stop)]
        counts.index_add_(0, keys.rank, torch.minimum(below[1], keys.count) - torch.minimum(below[0], keys.count))
    counts[rows_of] = 0
    return counts


def _ranges(rank: Tensor, bounds: list[Bounds]) -> Ranges:
    """The ranges of all parts and sequences together."""
    starts = torch.cat([one.lo.flatten() for one in bounds])
    stops = torch.cat([one.hi.flatten() for one in bounds])
    ranks = torch.cat([rank.expand(one.lo.shape).flatten() for one in bounds])
    return Ranges.joined(ranks, starts, stops)


def _cut_into_documents(
    placement: Placement, mask: Mask, ends: Tensor | None, singly: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs cut where documents end, and where `singly` says so into their positions: (rank, first, last)."""
    rank, start, count, step = placement.cut(singly)
    last = start + (count - 1) * step
    if ends is None or len(start) == 0:
        return rank, start, last
    ends = ends.to(torch.int64).contiguous()
    first_document, last_document = (torch.searchsorted(ends, x, right=True) - 1 for x in (start, last))
    run, number = parts(last_document - first_document + 1)
    document = first_document[run] + number
    rank, start, last, step = (x[run] for x in (rank, start, last, step))
    begun, ended = ends[document] - start, ends[document + 1] - 1 - start
    first = start + ((begun + step - 1) // step).clamp(min=0) * step
    last = torch.minimum(last, start + ended // step * step)
    there = first <= last
    return rank[there], first[there], last[there]


def _rows_one_by_one(problem: Problem) -> Ranges:
    """The rows that see some key of each rank, where the mask has intervals of its own for each row."""
    bounds = problem.mask.intervals(torch.arange(problem.mask.q_len))
    ranks, rows = [], []
    for rank in range(problem.size):
        local = localized(bounds, problem.keys.runs(rank))
        seeing = torch.stack([(lo < hi).any(dim=0) for lo, hi in local]).any(dim=0).nonzero().flatten()
        rows.append(seeing)
        ranks.append(torch.full_like(seeing, rank))
    start = torch.cat(rows)
    return Ranges.joined(torch.cat(ranks), start, start + 1)

"""Halves of halves are exchanged and combined, until each rank has finished one part; then the way back."""

from __future__ import annotations

from torch import Tensor

from ..comm import Communicator, Ranks, Traffic
from .base import Collective, depth, distances
from .fold import Fold
from .operations import Operation


class Rabenseifner(Collective):
    """Reduce-scatter by recursive halving, all-gather by recursive doubling: few bytes in a logarithm of rounds.

    Any number of ranks: the surplus over a power of two is folded in and out.
    Source: Thakur, Rabenseifner, Gropp 2005 (section 4.5, Rabenseifner's algorithm).
    """

    name = "rabenseifner"

    def _all_reduce(self, comm: Communicator, rows: Tensor, operation: Operation) -> None:
        ranks = _power_of_two(comm.size)
        fold = Fold.of(comm.rank, comm.size, ranks)
        fold.enter(comm, rows, operation)
        if fold.index is not None:
            self._halve(comm, fold, rows, operation, ranks)
            for distance in distances(ranks)[::-1]:
                peer = fold.rank_of(fold.index ^ distance)
                own = _held(rows, ranks, fold.index, distance)
                theirs = _held(rows, ranks, fold.index ^ distance, distance)
                comm.start((own, peer, theirs, peer))()
        fold.leave(comm, rows)

    def _halve(self, comm: Communicator, fold: Fold, rows: Tensor, operation: Operation, ranks: int) -> None:
        assert fold.index is not None
        _, (spare,) = comm.buffers.get(rows)
        for distance in distances(ranks):
            peer = fold.rank_of(fold.index ^ distance)
            own = _held(rows, ranks, fold.index, distance)
            theirs = spare[: len(own)]
            comm.start((_held(rows, ranks, fold.index ^ distance, distance), peer, theirs, peer))()
            low, high = (theirs, own) if fold.index & distance else (own, theirs)
            operation.combine(low, high, own)

    def _traffic(self, ranks: Ranks, rows: int, row_bytes: int) -> Traffic:
        taking_part = _power_of_two(ranks.size)
        fold = Fold.of(ranks.rank, ranks.size, taking_part)
        total = fold.traffic(rows * row_bytes)
        for distance in distances(taking_part) if fold.index is not None else []:
            assert fold.index is not None
            for index in (fold.index ^ distance, fold.index):
                start, end = _range(rows, taking_part, index, distance)
                total += Traffic((end - start) * row_bytes, int(end > start), int(end > start))
        return total

    def _rounds(self, ranks: Ranks, rows: int, row_bytes: int) -> int:
        taking_part = _power_of_two(ranks.size)
        return 2 * depth(taking_part) + Fold.of(ranks.rank, ranks.size, taking_part).rounds


def _power_of_two(size: int) -> int:
    return 1 << (size.bit_length() - 1)


def _range(rows: int, ranks: int, index: int, distance: int) -> tuple[int, int]:
    """The rows that rank `index` is left with after the halving over this distance."""
    first = index // distance * distance
    return rows * first // ranks, rows * (first + distance) // ranks


def _held(rows: Tensor, ranks: int, index: int, distance: int) -> Tensor:
    start, end = _range(len(rows), ranks, index, distance)
    return rows[start:end]

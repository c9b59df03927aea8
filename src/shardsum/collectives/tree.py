"""A binomial tree: partial results go up to the first rank, the result comes down again."""

from __future__ import annotations

from torch import Tensor

from ..comm import Communicator, Ranks, Traffic
from .base import Collective, depth, distances
from .operations import Operation


class BinomialTree(Collective):
    """Reduce to rank 0, then broadcast: the fewest messages and bytes of all, on twice the depth.

    Source: Thakur, Rabenseifner, Gropp 2005 (sections 4.2 and 4.5); Chan et al. 2007 (section 3: minimum-spanning
    tree broadcast and reduce).
    """

    name = "tree"

    def _all_reduce(self, comm: Communicator, rows: Tensor, operation: Operation) -> None:
        reduce_to_first(comm, rows, operation)
        broadcast_from_first(comm, rows)

    def _traffic(self, ranks: Ranks, rows: int, row_bytes: int) -> Traffic:
        return tree_traffic(ranks, rows * row_bytes)

    def _rounds(self, ranks: Ranks, rows: int, row_bytes: int) -> int:
        return 2 * depth(ranks.size)


def reduce_to_first(comm: Communicator, rows: Tensor, operation: Operation) -> None:
    """Combine all ranks' rows in those of rank 0; on other ranks they become partial results."""
    _, (theirs,) = comm.buffers.get(rows)
    distance = 1
    while distance < comm.size:
        if comm.rank & distance:
            comm.send(rows, comm.rank - distance)
            return
        if comm.rank + distance < comm.size:
            comm.receive(theirs, comm.rank + distance)
            operation.combine(rows, theirs, rows)
        distance *= 2


def broadcast_from_first(comm: Communicator, rows: Tensor) -> None:
    """Replace all ranks' rows by those of rank 0."""
    for distance in distances(comm.size):
        if comm.rank % (2 * distance) == distance:
            comm.receive(rows, comm.rank - distance)
        elif comm.rank % (2 * distance) == 0 and comm.rank + distance < comm.size:
            comm.send(rows, comm.rank + distance)


def tree_traffic(ranks: Ranks, rows_bytes: int) -> Traffic:
    """What this rank sends in both: its partial result unless it is the first, and the result to its children."""
    children = sum(
        1
        for distance in distances(ranks.size)
        if ranks.rank % (2 * distance) == 0 and ranks.rank + distance < ranks.size
    )
    messages = children + (ranks.rank > 0)
    return Traffic(rows_bytes * messages, messages, messages)

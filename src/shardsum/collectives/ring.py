"""Blocks of rows go round: first they are combined from rank to rank, then they are handed on as they are."""

from __future__ import annotations

from torch import Tensor

from ..comm import Communicator, Ranks, Traffic
from .base import Collective, slices
from .operations import Operation


class RingReduce(Collective):
    """Reduce-scatter, then all-gather of blocks of rows round a ring: the fewest bytes on every rank, most rounds.

    Source: Patarasuk and Yuan 2009 (bandwidth optimal all-reduce algorithms, section 4).
    """

    name = "ring"

    def _all_reduce(self, comm: Communicator, rows: Tensor, operation: Operation) -> None:
        size = comm.size
        blocks = [rows[part] for part in slices(len(rows), size)]
        longest = max(blocks, key=len)
        _, (spare,) = comm.buffers.get(longest)
        to, source = (comm.rank + 1) % size, (comm.rank - 1) % size
        for step in range(size - 1):
            sent, own = blocks[(comm.rank - step) % size], blocks[(comm.rank - step - 1) % size]
            theirs = spare[: len(own)]
            comm.start((sent, to, theirs, source))()
            operation.combine(theirs, own, own)
        for step in range(size - 1):
            sent, own = blocks[(comm.rank + 1 - step) % size], blocks[(comm.rank - step) % size]
            comm.start((sent, to, own, source))()

    def _traffic(self, ranks: Ranks, rows: int, row_bytes: int) -> Traffic:
        # A rank never sends the block that it completes, nor hands on the last one that it receives.
        unsent = [
            rows * (block + 1) // ranks.size - rows * block // ranks.size
            for block in ((ranks.rank + 1) % ranks.size, (ranks.rank + 2) % ranks.size)
        ]
        messages = 2 * min(rows, ranks.size) - sum(map(bool, unsent))  # a block without rows is not sent
        return Traffic((2 * rows - sum(unsent)) * row_bytes, messages, messages)

    def _rounds(self, ranks: Ranks, rows: int, row_bytes: int) -> int:
        return 2 * (ranks.size - 1)

"""The choice between the algorithms, by bytes and ranks."""

from __future__ import annotations

from torch import Tensor

from ..comm import Communicator, Traffic
from ..state import AttentionState
from .all_gather import GatherAll
from .base import Collective
from .exchange import RecursiveDoubling
from .operations import Operation
from .rabenseifner import Rabenseifner

# From here on it pays to send each rank only its part of the rows. `shardsum bench collectives` over MPI, 2 ranks
# on 2 cores of an AMD EPYC, 2026-11-25: gathering took 0.76 of recursive doubling's time at 16 KB, 0.95 at 264 KB,
# 1.45 at 4 MB, where Rabenseifner's took 0.85.
SCATTERED_BYTES = 1 << 18
# Up to so many ranks one round costs less than two or more, though it sends more bytes.
GATHERED_RANKS = 4


class Auto(Collective):
    """One round for few ranks and bytes, few rounds for many ranks, few bytes from `SCATTERED_BYTES` on."""

    name = "auto"

    def of(self, size: int, buffer_bytes: int) -> Collective:
        """The collective for so many ranks and bytes."""
        if buffer_bytes >= SCATTERED_BYTES:
            return Rabenseifner()
        return GatherAll() if size <= GATHERED_RANKS else RecursiveDoubling()

    def messages_at_once(self, comm: Communicator) -> int:
        return comm.size - 1 if comm.size <= GATHERED_RANKS else 1

    def all_reduce_state(self, comm: Communicator, state: AttentionState) -> None:
        self.of(comm.size, state.out.nbytes + state.lse.nbytes).all_reduce_state(comm, state)

    def _all_reduce(self, comm: Communicator, rows: Tensor, operation: Operation) -> None:
        self.of(comm.size, rows.nbytes).all_reduce(comm, rows, operation)

    def _traffic(self, comm: Communicator, rows: int, row_bytes: int) -> Traffic:
        return self.of(comm.size, rows * row_bytes).traffic(comm, rows, row_bytes)

    def _rounds(self, comm: Communicator, rows: int, row_bytes: int) -> int:
        return self.of(comm.size, rows * row_bytes).rounds(comm, rows, row_bytes)

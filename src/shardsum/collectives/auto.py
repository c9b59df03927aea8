"""The choice between the algorithms, by bytes and ranks."""

from __future__ import annotations

from torch import Tensor

from ..comm import Communicator, Ranks, Traffic
from ..state import AttentionState
from .all_gather import GatherAll
from .base import Collective
from .exchange import RecursiveDoubling
from .operations import Operation
from .rabenseifner import Rabenseifner

# Up to so many ranks, and bytes of all of them together, one round costs less than two or more, though it sends
# more. `shardsum bench collectives` over MPI, 2 cores of an AMD EPYC, 2026-11-27: gathering took 0.52 of the time
# of Rabenseifner's for 264 KB on 2 ranks and 0.73 on 4; for 1 MB 0.69 and 1.3; for 4 MB 1.2 and 1.6.
GATHERED_RANKS, GATHERED_BYTES = 4, 3 << 20
# With more, it pays from here on to send each rank only its part of the rows.
SCATTERED_BYTES = 1 << 18
_ONE_ROUND, _FEW_ROUNDS, _FEW_BYTES = GatherAll(), RecursiveDoubling(), Rabenseifner()


class Auto(Collective):
    """One round for few ranks and bytes, else few rounds for few bytes and few bytes for many."""

    name = "auto"

    def of(self, size: int, buffer_bytes: int) -> Collective:
        """The collective for so many ranks and bytes."""
        if size <= GATHERED_RANKS and size * buffer_bytes <= GATHERED_BYTES:
            return _ONE_ROUND
        return _FEW_ROUNDS if buffer_bytes < SCATTERED_BYTES else _FEW_BYTES

    def messages_at_once(self, ranks: Ranks) -> int:
        return ranks.size - 1 if ranks.size <= GATHERED_RANKS else 1

    def all_reduce_state(self, comm: Communicator, state: AttentionState) -> None:
        self.of(comm.size, state.out.nbytes + state.lse.nbytes).all_reduce_state(comm, state)

    def _all_reduce(self, comm: Communicator, rows: Tensor, operation: Operation) -> None:
        self.of(comm.size, rows.nbytes).all_reduce(comm, rows, operation)

    def _traffic(self, ranks: Ranks, rows: int, row_bytes: int) -> Traffic:
        return self.of(ranks.size, rows * row_bytes).traffic(ranks, rows, row_bytes)

    def _rounds(self, ranks: Ranks, rows: int, row_bytes: int) -> int:
        return self.of(ranks.size, rows * row_bytes).rounds(ranks, rows, row_bytes)

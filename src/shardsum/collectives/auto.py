"""The choice between the algorithms, by bytes and ranks."""

from __future__ import annotations

from torch import Tensor

from ..comm import Communicator, Traffic
from .base import Collective
from .exchange import RecursiveDoubling
from .operations import Operation
from .rabenseifner import Rabenseifner

# From here on it pays to send each rank only its part of the rows.
SCATTERED_BYTES = 1 << 18


class Auto(Collective):
    """Few rounds while latency is everything, few bytes from `SCATTERED_BYTES` on; two ranks just exchange."""

    name = "auto"

    def of(self, size: int, buffer_bytes: int) -> Collective:
        """The collective for so many ranks and bytes."""
        if size <= 2 or buffer_bytes < SCATTERED_BYTES:
            return RecursiveDoubling()
        return Rabenseifner()

    def _all_reduce(self, comm: Communicator, rows: Tensor, operation: Operation) -> None:
        self.of(comm.size, rows.nbytes).all_reduce(comm, rows, operation)

    def _traffic(self, comm: Communicator, rows: int, row_bytes: int) -> Traffic:
        return self.of(comm.size, rows * row_bytes).traffic(comm, rows, row_bytes)

    def _rounds(self, comm: Communicator, rows: int, row_bytes: int) -> int:
        return self.of(comm.size, rows * row_bytes).rounds(comm, rows, row_bytes)

"""For algorithms that want a certain number of ranks: the surplus hands its rows to neighbours."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor

from ..comm import Communicator, Traffic
from .operations import Operation


@dataclass(frozen=True)
class Fold:
    """The first 2 * surplus ranks in pairs, of which the second takes part in the algorithm, and all other ranks.

    `index`: this rank's number among those that take part; None for the first of a pair.
    Source: Thakur, Rabenseifner, Gropp 2005 (section 4.4, "non-power-of-two number of processes").
    """

    surplus: int
    index: int | None
    rank: int

    @staticmethod
    @functools.lru_cache
    def of(rank: int, size: int, taking_part: int) -> Fold:
        surplus = size - taking_part
        assert 0 <= surplus <= taking_part
        paired = rank < 2 * surplus
        index = None if paired and rank % 2 == 0 else rank // 2 if paired else rank - surplus
        return Fold(surplus, index, rank)

    def rank_of(self, index: int) -> int:
        """The rank that takes part as number `index`."""
        return 2 * index + 1 if index < self.surplus else index + self.surplus

    @property
    def _has_partner(self) -> bool:
        return self.rank < 2 * self.surplus

    def enter(self, comm: Communicator, rows: Tensor, operation: Operation) -> None:
        """The first of each pair sends its rows, the second combines them with its own."""
        if not self._has_partner:
            return
        if self.index is None:
            comm.send(rows, self.rank + 1)
        else:
            _, (theirs,) = comm.buffers.get(rows)
            comm.receive(theirs, self.rank - 1)
            operation.combine(theirs, rows, rows)

    def leave(self, comm: Communicator, rows: Tensor) -> None:
        """The second of each pair sends the result."""
        if not self._has_partner:
            return
        if self.index is None:
            comm.receive(rows, self.rank + 1)
        else:
            comm.send(rows, self.rank - 1)

    def traffic(self, rows_bytes: int) -> Traffic:
        """What this rank sends besides the algorithm: its rows, or the result."""
        return Traffic(rows_bytes, 1, 1) if self._has_partner else Traffic()

    @property
    def rounds(self) -> int:
        return 2 if self.surplus else 0

"""What MPI knows of the other ranks when a wait is long: who has failed, who has given up, who is silent."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

# How long a rank that gave up waits to hear from the others, so as to name those that are silent.
ANSWER_SECONDS = 0.5
_GIVEN_UP = 1  # the tag of what a rank sends that gave up; all else has tag 0


class MpiPeers:
    """The other ranks of one MPI communicator, as far as this rank can find out alone."""

    def __init__(self, mpi: Any, error: type[Exception]) -> None:
        """`error`: what this MPI raises."""
        self._mpi, self._error = mpi, error

    def gone(self) -> list[int]:
        """The ranks that MPI knows to have failed: none where it does not look for that (without ULFM)."""
        try:
            failed = self._mpi.Get_failed()
            return list(failed.Translate_ranks(None, self._mpi.Get_group()))
        except (self._error, NotImplementedError):
            return []

    def one_gave_up(self) -> bool:
        """Whether another rank has asked, as `silent` does, who still answers."""
        return bool(self._mpi.Iprobe(tag=_GIVEN_UP))

    def silent(self) -> list[int]:
        """The ranks that do not answer: those that wait give up with this one, and all send each other a word."""
        rank, size = self._mpi.Get_rank(), self._mpi.Get_size()
        others = [other for other in range(size) if other != rank]
        self._words = [bytearray(1) for _ in range(2 * size)]  # MPI may write them later
        hearing = {other: self._mpi.Irecv(self._words[other], other, _GIVEN_UP) for other in others}
        self._sending = [self._mpi.Isend(self._words[size + other], other, _GIVEN_UP) for other in others]
        end = time.perf_counter() + ANSWER_SECONDS
        while hearing and time.perf_counter() < end:
            hearing = {other: request for other, request in hearing.items() if not request.Test()}
            os.sched_yield()
        return list(hearing)


def named(peers: Sequence[int]) -> str:
    """The ranks in a sentence about who was waited for; all others if there are none."""
    return " or ".join(f"rank {peer}" for peer in peers) or "all others"

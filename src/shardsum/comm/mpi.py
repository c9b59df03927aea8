"""Ranks as MPI processes, through mpi4py: buffers straight from torch's memory, nothing pickled."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import RankLost, Unsupported
from .base import DEFAULT_DEADLINE_SECONDS, Communicator

# A finished message is seen at once while polling; after this long it is no longer latency that counts, and
# the core goes to whoever needs it (more ranks than cores, or a neighbour that still computes).
SPIN_SECONDS = 0.0005
_MAX_BYTES = 2**31 - 1  # of one MPI message counted by a C int


class MpiCommunicator(Communicator):
    """All ranks of `mpi` (default MPI_COMM_WORLD), on a communicator of our own.

    Every operation is non-blocking and polled, so that no wait outlasts the deadline.
    """

    transport = "mpi"

    def __init__(self, mpi: Any = None, deadline_seconds: float = DEFAULT_DEADLINE_SECONDS) -> None:
        self._mpi = (_import_mpi().COMM_WORLD if mpi is None else mpi).Dup()
        super().__init__(self._mpi.Get_rank(), self._mpi.Get_size(), deadline_seconds)

    def close(self) -> None:
        super().close()
        self._mpi.Free()

    def _all_gather(self, send: Tensor, receive: Tensor, sizes: list[int]) -> None:
        to_all, from_all = _buffer(send, sum(sizes)), _buffer(receive)
        if len(set(sizes)) == 1:
            request = self._mpi.Iallgather(to_all, from_all)
        else:
            request = self._mpi.Iallgatherv(to_all, [from_all, sizes, _displacements(sizes), _import_mpi().BYTE])
        self._wait([request], "an all-gather")

    def _all_to_all(self, send: list[Tensor], receive: Tensor, sizes: list[int]) -> None:
        byte, sent = _import_mpi().BYTE, [part.nbytes for part in send]
        to_all, from_all = _buffer(torch.cat(send), sum(sizes)), _buffer(receive)
        request = self._mpi.Ialltoallv(
            [to_all, sent, _displacements(sent), byte], [from_all, sizes, _displacements(sizes), byte]
        )
        self._wait([request], "an all-to-all")

    def _exchange(self, send: Tensor, to: int, receive: Tensor, source: int) -> Callable[[], None]:
        requests = [self._mpi.Irecv(_buffer(receive), source=source)] if receive.nbytes else []
        if send.nbytes:
            requests.append(self._mpi.Isend(_buffer(send), dest=to))

        def wait() -> None:
            assert send is not None  # the message must live until it has left
            self._wait(requests, f"rank {source} or rank {to}")

        return wait

    def _wait(self, requests: Sequence[Any], what: str) -> None:
        """Poll until all requests are done. Raises: RankLost past the deadline, or where MPI saw a peer fail."""
        start = time.perf_counter()
        error = _import_mpi().Exception
        try:
            for request in requests:
                while not request.Test():
                    waited = time.perf_counter() - start
                    if waited > self.deadline_seconds:
                        raise RankLost(
                            f"rank {self.rank} waited {waited:.0f} s for {what}: a peer is gone or stuck."
                        )
                    if waited > SPIN_SECONDS:
                        os.sched_yield()
        except error as failure:
            raise RankLost(f"rank {self.rank} waited for {what}: MPI says {failure}.") from failure


def _import_mpi() -> Any:
    """mpi4py.MPI; importing it starts MPI, so nothing does before the first communicator."""
    try:
        from mpi4py import MPI
    except ImportError as missing:
        raise Unsupported(
            "the mpi transport needs mpi4py and an MPI library: pip install 'shardsum[mpi]'."
        ) from missing
    return MPI


def _buffer(flat: Tensor, total_bytes: int = 0) -> Any:
    """torch's own memory as MPI sees it."""
    if max(flat.nbytes, total_bytes) > _MAX_BYTES:
        raise Unsupported(
            f"one MPI message holds at most {_MAX_BYTES} bytes: got {max(flat.nbytes, total_bytes)}. "
            "Use the ring strategy, more ranks or another transport."
        )
    return flat.numpy()


def _displacements(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:rank]) for rank in range(len(sizes))]

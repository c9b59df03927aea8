"""Ranks as MPI processes, through mpi4py: buffers straight from torch's memory, nothing pickled."""

from __future__ import annotations

import os
import sys
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
# How often a rank that waits looks whether another has failed or given up, and how long one that gave up waits to
# hear from the others, so as to name those that are silent.
LOOK_SECONDS, ANSWER_SECONDS = 0.1, 0.5
_GIVEN_UP = 1  # the tag of what a rank sends that gave up; all else has tag 0
_MAX_BYTES = 2**31 - 1  # of one MPI message counted by a C int


class MpiCommunicator(Communicator):
    """All ranks of `mpi` (default MPI_COMM_WORLD), on a communicator of our own.

    Every operation is non-blocking and polled, so that no wait outlasts the deadline.
    """

    transport = "mpi"

    def __init__(self, mpi: Any = None, deadline_seconds: float = DEFAULT_DEADLINE_SECONDS) -> None:
        self._mpi = (_import_mpi().COMM_WORLD if mpi is None else mpi).Dup()
        super().__init__(self._mpi.Get_rank(), self._mpi.Get_size(), deadline_seconds)
        library = _import_mpi()
        self._error, self._byte, self._at = library.Exception, library.BYTE, library.buffer.fromaddress
        self._in_place, self._is_over = library.IN_PLACE, library.Is_finalized

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._mpi.Free()

    def _all_gather(self, send: Tensor, receive: Tensor, sizes: list[int]) -> None:
        start, to_all, from_all = self._mpi.Iallgather, self._buffer(send), self._buffer(receive)
        if sizes.count(sizes[0]) < len(sizes):
            start, from_all = self._mpi.Iallgatherv, [from_all, sizes, _displacements(sizes), self._byte]
        self._wait([start(to_all, from_all)])

    def _all_gather_again(self, pieces: Tensor) -> Callable[[], None]:
        try:
            request = self._mpi.Allgather_init(self._in_place, self._buffer(pieces))
        except NotImplementedError:  # an MPI older than 4.0, as Open MPI 4 is
            return super()._all_gather_again(pieces)
        except self._error as failure:
            raise self._lost_by(failure) from failure
        return _PersistentRequest(self, request, pieces).again

    def _all_to_all(self, send: list[Tensor], receive: Tensor, sizes: list[int]) -> None:
        sent, together = [part.nbytes for part in send], torch.cat(send)
        request = self._mpi.Ialltoallv(
            [self._buffer(together), sent, _displacements(sent), self._byte],
            [self._buffer(receive), sizes, _displacements(sizes), self._byte],
        )
        self._wait([request])

    def _exchange(self, send: Tensor, to: int, receive: Tensor, source: int) -> Callable[[], None]:
        requests = [self._mpi.Irecv(self._buffer(receive), source)] if receive.nbytes else []
        if send.nbytes:
            requests.append(self._mpi.Isend(self._buffer(send), to))
        held = send, receive  # memory that MPI writes and reads until it is done

        def wait() -> None:
            assert held
            self._wait(requests, source, to)

        return wait

    def _wait(self, requests: Sequence[Any], *peers: int) -> None:
        """Poll until all requests are done. Raises: RankLost past the deadline, or where a peer has failed."""
        start = time.perf_counter()
        look = LOOK_SECONDS
        try:
            for request in requests:
                while not request.Test():
                    waited = time.perf_counter() - start
                    if waited > SPIN_SECONDS:
                        if waited > min(look, self.deadline_seconds):
                            look = waited + LOOK_SECONDS
                            self._look(waited, peers)
                        os.sched_yield()
        except self._error as failure:
            raise self._lost_by(failure, peers) from failure

    def _lost_by(self, failure: Exception, peers: Sequence[int] = ()) -> RankLost:
        """What MPI's error means, in an operation with these peers (none: with all)."""
        who = _named(self._gone() or peers)
        return self.lost(f"{who} is gone: rank {self.rank} waited, and MPI says {failure}.")

    def _look(self, waited: float, peers: Sequence[int]) -> None:
        """Raise RankLost where a rank has failed, this one has waited too long, or another has."""
        if gone := self._gone():
            raise self.lost(f"{_named(gone)} is gone: rank {self.rank} waited for {_named(peers)}.")
        if waited > self.deadline_seconds or self._mpi.Iprobe(tag=_GIVEN_UP):
            stuck = _named(self._silent() or peers)
            raise self.lost(f"rank {self.rank} waited {waited:.1f} s for {stuck}: a peer is gone or stuck.")

    def _gone(self) -> list[int]:
        """The ranks that MPI knows to have failed: none where it does not look for that (without ULFM)."""
        try:
            failed = self._mpi.Get_failed()
            return list(failed.Translate_ranks(None, self._mpi.Get_group()))
        except (self._error, NotImplementedError):
            return []

    def _silent(self) -> list[int]:
        """The ranks that do not answer: those that wait give up with this one, and all send each other a word."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        self._words = [bytearray(1) for _ in range(2 * self.size)]  # MPI may write them later
        hearing = {rank: self._mpi.Irecv(self._words[rank], rank, _GIVEN_UP) for rank in others}
        self._sending = [self._mpi.Isend(self._words[self.size + rank], rank, _GIVEN_UP) for rank in others]
        end = time.perf_counter() + ANSWER_SECONDS
        while hearing and time.perf_counter() < end:
            hearing = {rank: request for rank, request in hearing.items() if not request.Test()}
            os.sched_yield()
        return list(hearing)

    def _buffer(self, x: Tensor) -> Any:
        """torch's own memory as MPI sees it; the tensor must be kept as long as MPI uses that."""
        if not x.is_cpu:
            raise Unsupported(f"the mpi transport moves CPU memory: got tensors on {x.device}.")
        size: int = x.nbytes
        if size > _MAX_BYTES:
            raise Unsupported(
                f"one MPI message holds at most {_MAX_BYTES} bytes: got {size}. "
                "Use the ring strategy, more ranks or another transport."
            )
        return self._at(x.data_ptr(), size)


_under_way: list[Tensor] = []  # memory that MPI may still write


class _PersistentRequest:
    """A request of MPI that is started again and again, and freed with this object."""

    def __init__(self, comm: MpiCommunicator, request: Any, held: Tensor) -> None:
        """`held`: memory that MPI writes and reads."""
        self._comm, self._requests, self._start, self._held = comm, [request], request.Start, held

    def again(self) -> None:
        try:
            self._start()
            self._comm._wait(self._requests)
        except self._comm._error as failure:
            raise self._comm._lost_by(failure) from failure
        except BaseException:  # Ctrl-C: it can't be started again
            self._comm.lost(f"rank {self._comm.rank} gave up a gather that is still under way.")
            raise

    def __del__(self) -> None:
        if self._comm._lost is not None:
            _under_way.append(self._held)
        elif not self._comm._is_over():
            self._requests[0].Free()


def _named(peers: Sequence[int]) -> str:
    return " or ".join(f"rank {peer}" for peer in peers) or "all others"


def _import_mpi() -> Any:
    """mpi4py.MPI; importing it starts MPI, so nothing does before the first communicator."""
    ours = {} if "mpi4py.MPI" in sys.modules else _without_sockets()
    os.environ.update(ours)
    try:
        from mpi4py import MPI
    except ImportError as missing:
        raise Unsupported(
            "the mpi transport needs mpi4py and an MPI library: pip install 'shardsum[mpi]'."
        ) from missing
    finally:
        for name in ours:
            del os.environ[name]
    return MPI


def _without_sockets() -> dict[str, str]:
    """Settings under which MPI listens on no address, where all ranks are on one host and the user has set none.

    Shared memory carries everything there; Open MPI and MPICH (UCX) open TCP ports all the same.
    """
    place = os.environ.get
    if place("OMPI_COMM_WORLD_SIZE", "") == place("OMPI_COMM_WORLD_LOCAL_SIZE"):
        wanted = {"OMPI_MCA_btl": "^tcp"}
    elif place("PMI_SIZE", "") == place("MPI_LOCALNRANKS"):
        wanted = {"UCX_TLS": "shm,self"}
    else:
        wanted = {}
    return {name: value for name, value in wanted.items() if name not in os.environ}


def _displacements(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:rank]) for rank in range(len(sizes))]

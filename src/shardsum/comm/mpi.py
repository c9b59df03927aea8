"""Ranks as MPI processes, through mpi4py: buffers straight from torch's memory, nothing pickled."""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RankLost, Unsupported
from .environment import check_before_mpi, check_mpi, launched_rank, share_cores, started_by_mpiexec
from .mpi_peers import MpiPeers, named
from .transport import DEFAULT_DEADLINE_SECONDS, Transport

# A finished message is seen at once while polling; after this long it is no longer latency that counts, and
# the core goes to whoever needs it (more ranks than cores, or a neighbour that still computes).
SPIN_SECONDS = 0.0005
LOOK_SECONDS = 0.1  # how often a rank that waits looks whether another has failed or given up
_RECOVERS = "OMPI_MCA_mpi_ft_enable"  # what `--with-ft ulfm` sets for each rank
_MAX_BYTES = 2**31 - 1  # of one MPI message counted by a C int
_MULTIPLE = 3  # MPI_THREAD_MULTIPLE, in Open MPI and in MPICH
_START_SECONDS = 60.0  # ranks import torch at different speeds; that is no collective's deadline


NEEDED = "the mpi transport needs mpi4py and an MPI library: pip install 'shardsum[mpi]'."


class MpiTransport(Transport):
    """All ranks of `mpi` (default MPI_COMM_WORLD), on a communicator of our own.

    Every operation is non-blocking and polled, so that no wait outlasts the deadline.
    """

    name = "mpi"
    started_by = "mpiexec"

    @staticmethod
    def abort() -> None:
        _import_mpi().COMM_WORLD.Abort(1)

    def __init__(self, mpi: Any = None, deadline_seconds: float = DEFAULT_DEADLINE_SECONDS) -> None:
        self._use((_world(deadline_seconds) if mpi is None else mpi).Dup(), deadline_seconds)

    def _use(self, own: Any, deadline_seconds: float) -> None:
        """`own`: a communicator of MPI that nobody else uses."""
        library = _import_mpi()
        self._mpi = own
        super().__init__(own.Get_rank(), own.Get_size(), deadline_seconds)
        self.error, self._byte, self._at = library.Exception, library.BYTE, library.buffer.fromaddress
        self._in_place, self.is_over = library.IN_PLACE, library.Is_finalized
        self._peers = MpiPeers(own, self.error)

    def close(self) -> None:
        if not self.closed:
            super().close()
            if self.loss is None:
                self._mpi.Free()

    @classmethod
    def why_not(cls) -> str | None:
        return None if _mpi_installed() else NEEDED

    @classmethod
    def is_offered(cls) -> bool:
        return started_by_mpiexec()

    @classmethod
    def connect(cls, deadline_seconds: float) -> Transport:
        share_cores()
        return cls(deadline_seconds=deadline_seconds)

    @classmethod
    def join(cls, directory: Path, rank: int | None, size: int, deadline_seconds: float) -> Transport:
        _world(max(deadline_seconds, _START_SECONDS))
        return cls(deadline_seconds=deadline_seconds)

    def why_not_shrink(self) -> str | None:
        if os.environ.get(_RECOVERS, "0").lower() in ("1", "true"):
            return None
        return "mpi goes on without a lost rank only under `mpiexec --with-ft ulfm` of Open MPI 5: start ranks so."

    def revoke(self) -> None:
        self._mpi.Revoke()

    def shrink(self) -> Transport:
        """The ranks that MPI knows to be alive. Source: Bland et al. 2013 (MPI_Comm_revoke, MPI_Comm_shrink)."""
        shrunk = MpiTransport.__new__(MpiTransport)
        shrunk._use(self._mpi.Shrink(), self.deadline_seconds)
        self.loss = self.loss or "the other ranks have gone on in a communicator of their own."
        self.close()
        return shrunk

    def all_gather(self, send: Tensor, receive: Tensor, sizes: list[int]) -> None:
        start, to_all, from_all = self._mpi.Iallgather, self._buffer(send), self._buffer(receive)
        if sizes.count(sizes[0]) < len(sizes):
            start, from_all = self._mpi.Iallgatherv, [from_all, sizes, _displacements(sizes), self._byte]
        self.wait([start(to_all, from_all)])

    def prepare_all_gather(self, pieces: Tensor) -> Callable[[], None]:
        try:
            request = self._mpi.Allgather_init(self._in_place, self._buffer(pieces))
        except NotImplementedError:  # an MPI older than 4.0, as Open MPI 4 is
            return super().prepare_all_gather(pieces)
        except self.error as failure:
            raise self.lost_by(failure) from failure
        return _PersistentRequest(self, request, pieces).again

    def all_to_all(self, send: list[Tensor], receive: Tensor, sizes: list[int]) -> None:
        sent, together = [part.nbytes for part in send], torch.cat(send)
        request = self._mpi.Ialltoallv(
            [self._buffer(together), sent, _displacements(sent), self._byte],
            [self._buffer(receive), sizes, _displacements(sizes), self._byte],
        )
        self.wait([request])

    def exchange(self, send: Tensor, to: int, receive: Tensor, source: int) -> Callable[[], None]:
        requests = [self._mpi.Irecv(self._buffer(receive), source)] if receive.nbytes else []
        if send.nbytes:
            requests.append(self._mpi.Isend(self._buffer(send), to))
        memory = send, receive  # which MPI writes and reads until it is done

        def wait() -> None:
            assert memory
            self.wait(requests, source, to)

        return wait

    def wait(self, requests: Sequence[Any], *peers: int) -> None:
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
        except self.error as failure:
            raise self.lost_by(failure, peers) from failure

    def lost_by(self, failure: Exception, peers: Sequence[int] = ()) -> RankLost:
        """What MPI's error means, in an operation with these peers (none: with all)."""
        who = named(self._peers.gone() or peers)
        return self.lost(f"{who} is gone: rank {self.rank} waited, and MPI says {failure}.")

    def _look(self, waited: float, peers: Sequence[int]) -> None:
        """Raise RankLost where a rank has failed, this one has waited too long, or another has."""
        if gone := self._peers.gone():
            raise self.lost(f"{named(gone)} is gone: rank {self.rank} waited for {named(peers)}.")
        if waited > self.deadline_seconds or self._peers.one_gave_up():
            stuck = named(self._peers.silent() or peers)
            raise self.lost(f"rank {self.rank} waited {waited:.1f} s for {stuck}: a peer is gone or stuck.")

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
_starting: threading.Thread | None = None  # MPI may be started once


class _PersistentRequest:
    """A request of MPI that is started again and again, and freed with this object."""

    def __init__(self, transport: MpiTransport, request: Any, memory: Tensor) -> None:
        """`memory`: what MPI writes and reads."""
        self._transport, self._requests, self._start, self._memory = transport, [request], request.Start, memory

    def again(self) -> None:
        try:
            self._start()
            self._transport.wait(self._requests)
        except self._transport.error as failure:
            raise self._transport.lost_by(failure) from failure
        except BaseException:  # Ctrl-C: it can't be started again
            self._transport.lost(f"rank {self._transport.rank} gave up a gather that is still under way.")
            raise

    def __del__(self) -> None:
        if self._transport.loss is not None:
            _under_way.append(self._memory)
        elif not self._transport.is_over():
            self._requests[0].Free()


def _world(deadline_seconds: float) -> Any:
    """MPI_COMM_WORLD. Raises: RankLost where its ranks do not come; ValueError where the launcher has others."""
    library = _import_mpi(deadline_seconds)
    check_mpi(library.COMM_WORLD.Get_size(), library.Get_library_version().split(",")[0].strip())
    return library.COMM_WORLD


def _import_mpi(deadline_seconds: float = DEFAULT_DEADLINE_SECONDS) -> Any:
    """mpi4py.MPI; importing it starts MPI, so nothing does before the first communicator."""
    ours = {} if "mpi4py.MPI" in sys.modules else _without_sockets()
    os.environ.update(ours)
    try:
        if "mpi4py.MPI" not in sys.modules:
            _start_mpi(deadline_seconds)
        from mpi4py import MPI
    except RankLost:
        raise
    except (ImportError, RuntimeError) as missing:  # no mpi4py, or no MPI library for it
        raise Unsupported(NEEDED) from missing
    finally:
        for name in ours:
            del os.environ[name]
    return MPI


def _start_mpi(deadline_seconds: float) -> None:
    """Start MPI before mpi4py does, which holds Python's lock as long as that takes: without end, if a rank died.

    Raises: RankLost after the deadline; the thread that waits inside MPI is left behind, and asked again by who
    comes again.
    """
    global _starting
    import mpi4py

    extension = importlib.util.find_spec("mpi4py.MPI")
    rc = mpi4py.rc
    if extension is None or extension.origin is None or not rc.initialize:
        return  # the program has its own way
    if not rc.threads or rc.thread_level != "multiple":
        return  # only the thread that starts MPI may use it then
    library, started = ctypes.CDLL(extension.origin), ctypes.c_int()
    library.MPI_Initialized(ctypes.byref(started))
    if started and _starting is None:
        return  # the program has started it otherwise, and ends it
    if _starting is None:
        check_before_mpi()
        call = (None, None, _MULTIPLE, ctypes.byref(ctypes.c_int()))
        start = library.MPI_Init_thread  # which lets go of that lock
        _starting = threading.Thread(target=start, args=call, daemon=True)
        _starting.start()
    _starting.join(deadline_seconds)
    if _starting.is_alive():
        raise RankLost(
            f"rank {launched_rank()} waited {deadline_seconds:g} s in MPI_Init: another rank is gone, or has not "
            "come there."
        )
    if rc.finalize is not False:
        atexit.register(_end_mpi)  # mpi4py ends what it has started itself


def _end_mpi() -> None:
    library = sys.modules.get("mpi4py.MPI")
    if library is not None and not library.Is_finalized():
        library.Finalize()


def _mpi_installed() -> bool:
    """Whether mpi4py is there; importing it would start MPI."""
    try:
        return importlib.util.find_spec("mpi4py") is not None
    except (ImportError, ValueError):  # it is kept from being imported
        return False


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

"""Finding this rank's communicator: from `launch`, torchrun, mpiexec, or none of them."""

from __future__ import annotations

import errno
import importlib.util
import os
import socket
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .base import DEFAULT_DEADLINE_SECONDS, Communicator
from .mpi import MpiCommunicator
from .threads import SingleCommunicator
from .torch_distributed import TorchCommunicator, connect_gloo, connect_nccl

TRANSPORTS = ("gloo", "nccl", "mpi", "threads", "single")

# Inside a rank started by `launch`: a context's own where ranks are threads of one process; where the rank is the
# process, one for all threads, because a new thread does not inherit the context.
rank_of_thread: ContextVar[Communicator | None] = ContextVar("rank_of_thread", default=None)
_rank_of_process: Communicator | None = None
MAIN = "__shardsum_main__"  # what the main script is called in such a process
_connected: dict[str, Communicator] = {}
_of_groups: WeakKeyDictionary[Any, TorchCommunicator] = WeakKeyDictionary()

# What the launchers of Open MPI, of MPICH and others, and of Slurm set in each of their processes.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")
_LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "LOCAL_WORLD_SIZE")


def connect(transport: str | None = None, deadline: float = DEFAULT_DEADLINE_SECONDS) -> Communicator:
    """This rank's communicator: found from the environment, or over the transport named.

    Inside `launch` it is that rank's (where ranks are threads, in the rank's own thread only), which `launch`
    closes; once you have, there is no other. Under mpiexec it
    is "mpi"; under torchrun "nccl" if there is a CUDA device, else "gloo"; otherwise the single rank. `deadline`
    is the longest wait in seconds. Called again, it returns the same communicator. Under a launcher that leaves
    each process one thread, torch gets this rank's share of the machine's cores.
    Raises: ValueError for an unknown transport or one that the environment does not offer.

    >>> connect().size
    1
    """
    if transport not in (None, *TRANSPORTS):
        raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}: got {transport!r}.")
    inside = rank_of_thread.get() or _rank_of_process
    if inside is not None and transport in (None, inside.transport):
        return inside
    name = _found() if transport is None else transport
    if name == "threads":
        raise ValueError("ranks that are threads exist inside shardsum.launch(..., transport='threads') only.")
    if name not in _connected or _connected[name].closed:
        _connected[name] = _connect(name, deadline)
    return _connected[name]


def set_rank_of_process(comm: Communicator) -> None:
    """What `connect` returns from now on in every thread of this process that is no rank itself."""
    global _rank_of_process
    _rank_of_process = comm


def as_communicator(comm: object) -> Communicator:
    """The communicator itself; one over a torch ProcessGroup or one-dimensional DeviceMesh; `connect()` for None.

    Raises: ValueError for anything else.
    """
    if comm is None:
        return connect()
    if isinstance(comm, Communicator):
        return comm
    from torch.distributed import ProcessGroup, get_backend
    from torch.distributed.device_mesh import DeviceMesh

    group = comm
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"comm must be one dimension of a DeviceMesh, as mesh['name']: got {group.ndim}.")
        group = group.get_group()
    if not isinstance(group, ProcessGroup):
        raise ValueError(f"comm must be a Communicator, ProcessGroup or DeviceMesh: got {type(comm).__name__}.")
    if group not in _of_groups or _of_groups[group].closed:
        _of_groups[group] = TorchCommunicator(group, group.rank(), group.size(), get_backend(group))
    return _of_groups[group]


def mpi_installed() -> bool:
    """Whether mpi4py is there; importing it would start MPI."""
    try:
        return importlib.util.find_spec("mpi4py") is not None
    except (ImportError, ValueError):  # it is kept from being imported
        return False


def _found() -> str:
    if any(name in os.environ for name in _MPI_SIZES):
        return "mpi"
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return "nccl" if torch.cuda.is_available() else "gloo"
    return "single"


def _connect(name: str, deadline: float) -> Communicator:
    if name == "single":
        return SingleCommunicator(deadline)
    _share_cores()
    if name == "mpi":
        return MpiCommunicator(deadline_seconds=deadline)
    if not os.environ.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}:
        raise ValueError(f"{name} needs the environment of torchrun (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).")
    store, rank, size = _rendezvous(timedelta(seconds=deadline))
    if name == "gloo":
        return connect_gloo(store, rank, size, deadline, _interfaces())
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return connect_nccl(store, rank, size, deadline)


def _rendezvous(timeout: timedelta) -> tuple[Any, int, int]:
    """The c10d store, this rank and the number of ranks, of the environment that torchrun sets.

    Where no agent of torchrun holds the store, rank 0 does: torch would listen on every address of the machine, so
    the socket is made here, on that of MASTER_ADDR.
    """
    from torch.distributed import TCPStore, rendezvous

    theirs: Iterator[tuple[Any, int, int]] = rendezvous("env://", timeout=timeout)  # which starts when it is asked
    if os.environ["RANK"] != "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return next(theirs)
    size, name, port = (os.environ[key] for key in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    try:
        if not 0 < int(port) < 1 << 16:
            raise ValueError("ports are numbered from 1 to 65535")
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        family, *_, (address, *_) = min(found, key=lambda entry: entry[0] != socket.AF_INET)
        listener = socket.create_server((address, int(port)), family=family, backlog=socket.SOMAXCONN)
    except (OSError, ValueError) as error:
        if (
            getattr(error, "errno", None) == errno.EADDRINUSE
        ):  # it may be the program's own store, which torch then shares
            return next(theirs)
        raise ValueError(
            f"rank 0 can't listen on MASTER_ADDR={name}, MASTER_PORT={port}, which must be an address of its "
            f"host and a free port: {error}"
        ) from error
    held = listener.detach()
    store = TCPStore(
        str(address),
        int(port),
        int(size),
        is_master=True,
        timeout=timeout,
        multi_tenant=True,  # a group that the program makes by itself can use it too
        master_listen_fd=held,
    )
    return store, 0, int(size)


def _interfaces() -> list[str]:
    """Those that Gloo is to use, named as torch.distributed wants them; the loopback if no rank is elsewhere."""
    named = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if not named and os.environ["MASTER_ADDR"] in ("localhost", "127.0.0.1"):
        named = "lo"
    return [name for name in named.split(",") if name]


def _share_cores() -> None:
    """Give torch this rank's share of the cores; launchers set OMP_NUM_THREADS=1 or nothing at all."""
    local = next((int(os.environ[name]) for name in _LOCAL_SIZES if name in os.environ), 0)
    if local and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0))
        pinned = cores < (os.cpu_count() or 1)
        torch.set_num_threads(cores if pinned else max(1, cores // local))

"""What torchrun, mpiexec and others say to their processes by the environment."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch

from ..errors import RankLost

# Where launchers of MPI processes say which one this is, and of how many: those of Open MPI, of MPICH (and Slurm's
# pmi2), of MVAPICH, and of PMIx, which does not say how many; Slurm does.
_MPI_PLACES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    ("PMIX_RANK", "SLURM_STEP_NUM_TASKS"),
    ("PMIX_RANK", "SLURM_NTASKS"),
)
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What a process has that is alone, where a program sets them for it.
_ALONE = {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
_MOST_PROCESSES, _LAST_PORT = 2**31 - 1, 2**16 - 1  # what a C int and a port can be
_LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "LOCAL_WORLD_SIZE")


def started_by_mpiexec() -> bool:
    return any(rank in os.environ or size in os.environ for rank, size in _MPI_PLACES[:3]) or (
        "PMIX_RANK" in os.environ
    )


def started_by_torchrun() -> bool:
    return torchrun_place() is not None


def torchrun_place() -> tuple[int, int] | None:
    """This rank and the number of ranks by torchrun's variables; None where they are not set.

    Raises: ValueError for some of them without the others, and for what is no rank.
    """
    if "RANK" not in os.environ and all(os.environ.get(name, one) == one for name, one in _ALONE.items()):
        return None
    if missing := [name for name in _TORCHRUN if not os.environ.get(name)]:
        present = [name for name in dict.fromkeys((*_TORCHRUN, *_ALONE)) if os.environ.get(name)]
        raise ValueError(
            f"{' and '.join(missing)} must be set beside {' and '.join(present) or 'the others'}, as torchrun "
            "does: set all of them or none."
        )
    rank, size = whole_number("RANK"), whole_number("WORLD_SIZE")
    local_rank, local_size = whole_number("LOCAL_RANK", 0), whole_number("LOCAL_WORLD_SIZE", size)
    whole_number("MASTER_PORT", least=1, most=_LAST_PORT)
    if not rank < size:
        raise ValueError(f"RANK must be less than WORLD_SIZE: got RANK={rank}, WORLD_SIZE={size}.")
    if not local_rank < local_size <= size:
        raise ValueError(
            "LOCAL_RANK must be less than LOCAL_WORLD_SIZE, and that at most WORLD_SIZE: "
            f"got LOCAL_RANK={local_rank}, LOCAL_WORLD_SIZE={local_size}, WORLD_SIZE={size}."
        )
    return rank, size


def launched_rank() -> int:
    """Which rank of a launcher's this process is, 0 without one. Raises: ValueError for what is no rank."""
    for name, _ in _MPI_PLACES:
        if name in os.environ:
            return whole_number(name)
    return (torchrun_place() or (0, 1))[0]


def check_before_mpi() -> None:
    """Raises: ValueError where MPI_Init would find no other process, or crash, by what the launcher has set."""
    for names in _MPI_PLACES[:3]:
        missing = [name for name in names if name not in os.environ]
        if len(missing) == 1:
            raise ValueError(f"{' and '.join(names)} must be set together, as mpiexec does: {missing[0]} is not.")
    if "PMIX_RANK" in os.environ and not any(name.startswith("PMIX_SERVER_URI") for name in os.environ):
        raise ValueError(
            f"PMIX_RANK={os.environ['PMIX_RANK']} is set, but no PMIX_SERVER_URI: without a PMIx server "
            "the processes do not find each other. Start them by mpiexec or srun --mpi=pmix."
        )


def check_mpi(size: int, library: str) -> None:
    """Raises: ValueError where MPI sees another number of processes than its launcher says that it has started."""
    if size == 1 and not started_by_mpiexec():
        check_alone()
    for rank_name, size_name in _MPI_PLACES:
        if rank_name not in os.environ or size_name not in os.environ:
            continue
        started, rank = whole_number(size_name), whole_number(rank_name)
        if started != size or rank >= size:
            raise ValueError(
                f"the launcher has started {started} processes ({rank_name}={rank}, {size_name}={started}), but "
                f"MPI sees {size}: it belongs to another MPI than mpi4py's, {library}. Use that one's mpiexec."
            )
        return


def check_alone() -> None:
    """Raises: ValueError where Slurm or torchrun has started other processes beside this one, which is alone."""
    _, size = torchrun_place() or (0, 1)
    if size > 1:
        raise ValueError(
            f"torchrun has started {size} processes, but MPI sees 1: leave transport out, or use mpiexec."
        )
    tasks, rank = whole_number("SLURM_STEP_NUM_TASKS", 1), whole_number("SLURM_PROCID", 0)
    if max(tasks, rank + 1) > 1:
        raise ValueError(
            f"srun has started {max(tasks, rank + 1)} tasks that do not know of each other (SLURM_PROCID={rank}). "
            "Start them by srun --mpi=pmix or torchrun, or mean each alone: connect('single')."
        )


def whole_number(name: str, default: int | None = None, least: int = 0, most: int = _MOST_PROCESSES) -> int:
    """A variable that a launcher sets. Raises: ValueError for what is no whole number of that range."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not (text.isascii() and text.isdigit() and len(text) <= 20 and least <= int(text) <= most):
        raise ValueError(
            f"{name} must be a whole number from {least} to {most}, as a launcher sets it: got {text!r}."
        )
    return int(text)


def rendezvous(transport: str, timeout: timedelta) -> tuple[Any, int, int]:
    """The c10d store, this rank and the number of ranks, of the environment that torchrun sets.

    Where no agent of torchrun holds the store, rank 0 does: torch would listen on every address of the machine, so
    the socket is made here, on that of MASTER_ADDR.
    Raises: ValueError, which names the transport, where there is no such environment.
    """
    place = torchrun_place()
    if place is None:
        raise ValueError(f"{transport} needs the environment of torchrun ({', '.join(_TORCHRUN)}).")
    if place[0] or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return _meet(timeout, place[0])
    from torch.distributed import TCPStore

    name, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        family, *_, (address, *_) = min(found, key=lambda entry: entry[0] != socket.AF_INET)
        listener = socket.create_server((address, int(port)), family=family, backlog=socket.SOMAXCONN)
    except (OSError, UnicodeError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            return _meet(timeout, 0)  # it may be the program's own store, which torch then shares
        raise ValueError(
            f"rank 0 can't listen on MASTER_ADDR={name}, MASTER_PORT={port}, which must be an address of its "
            f"host and a free port: {error}"
        ) from error
    descriptor = listener.detach()
    try:
        store = TCPStore(
            str(address),
            int(port),
            place[1],
            is_master=True,
            timeout=timeout,
            multi_tenant=True,  # a group that the program makes by itself can use it too
            master_listen_fd=descriptor,
        )
    except RuntimeError as error:
        raise not_come(*place, timeout.total_seconds(), error) from error
    return store, *place


def _meet(timeout: timedelta, rank: int) -> tuple[Any, int, int]:
    """Ask torch for the store of rank 0 or of an agent. Raises: RankLost where nobody answers in time."""
    from torch.distributed import rendezvous

    theirs: Iterator[tuple[Any, int, int]] = rendezvous("env://", timeout=timeout)  # which starts when it is asked
    try:
        return next(theirs)
    except (RuntimeError, ValueError) as error:
        where = f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ['MASTER_PORT']}"
        if rank == 0:
            raise ValueError(f"rank 0 can't listen at {where}: {_first_line(error)}") from error
        raise RankLost(
            f"rank {rank} found no rank 0 at {where} within {timeout.total_seconds():g} s: {_first_line(error)}"
        ) from error


def not_come(rank: int, size: int, seconds: float, error: Exception) -> RankLost:
    """The error of a rank that has waited for the others to meet it."""
    return RankLost(
        f"rank {rank} waited up to {seconds:g} s for the other {size - 1} ranks: one is gone or has not come "
        f"({_first_line(error)})."
    )


def _first_line(error: Exception) -> str:
    """What torch says, without its list of C++ frames."""
    return str(error).split("Exception raised from")[0].strip().splitlines()[0]


def interfaces() -> list[str]:
    """Return the network interfaces for Gloo, by name; the loopback if no rank is on another host."""
    named = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if not named and os.environ["MASTER_ADDR"] in ("localhost", "127.0.0.1"):
        named = "lo"
    return [name for name in named.split(",") if name]


def share_cores() -> None:
    """Give torch this rank's share of the cores; launchers set OMP_NUM_THREADS=1 or nothing at all."""
    local = next((whole_number(name) for name in _LOCAL_SIZES if name in os.environ), 0)
    if local and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0))
        pinned = cores < (os.cpu_count() or 1)
        torch.set_num_threads(cores if pinned else max(1, cores // local))

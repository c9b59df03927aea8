"""What torchrun, mpiexec and others say to their processes by the environment."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch

# What the launchers of Open MPI, of MPICH and others, and of Slurm set in each of their processes.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")
_LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "LOCAL_WORLD_SIZE")


def started_by_mpiexec() -> bool:
    return any(name in os.environ for name in _MPI_SIZES)


def started_by_torchrun() -> bool:
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def rendezvous(transport: str, timeout: timedelta) -> tuple[Any, int, int]:
    """The c10d store, this rank and the number of ranks, of the environment that torchrun sets.

    Where no agent of torchrun holds the store, rank 0 does: torch would listen on every address of the machine, so
    the socket is made here, on that of MASTER_ADDR.
    Raises: ValueError, which names the transport, where there is no such environment.
    """
    if not os.environ.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}:
        raise ValueError(
            f"{transport} needs the environment of torchrun (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT)."
        )
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
    descriptor = listener.detach()
    store = TCPStore(
        str(address),
        int(port),
        int(size),
        is_master=True,
        timeout=timeout,
        multi_tenant=True,  # a group that the program makes by itself can use it too
        master_listen_fd=descriptor,
    )
    return store, 0, int(size)


def interfaces() -> list[str]:
    """Return the network interfaces for Gloo, by name; the loopback if no rank is on another host."""
    named = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if not named and os.environ["MASTER_ADDR"] in ("localhost", "127.0.0.1"):
        named = "lo"
    return [name for name in named.split(",") if name]


def share_cores() -> None:
    """Give torch this rank's share of the cores; launchers set OMP_NUM_THREADS=1 or nothing at all."""
    local = next((int(os.environ[name]) for name in _LOCAL_SIZES if name in os.environ), 0)
    if local and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0))
        pinned = cores < (os.cpu_count() or 1)
        torch.set_num_threads(cores if pinned else max(1, cores // local))

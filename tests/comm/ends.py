"""The ways in which a rank can end, and the moments at which it does; a function for `launch` that tries one."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import shardsum
from shardsum import KVCache, RankLost
from shardsum.comm import Communicator

VICTIM = 1


class OwnError(Exception):
    """A class that the launching process does not know."""


def _close_sockets(how: int | None = socket.SHUT_RDWR) -> None:
    """Shut every connection of this process down, as a network that is gone does; None: close its descriptor."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # of the listing's own, and of a socket that only listens
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    connection.getpeername()
                    if how is None:
                        os.close(int(name))
                    else:
                        connection.shutdown(how)


def _raise(error: BaseException) -> None:
    raise error


def _recurse() -> None:
    _recurse()


def _wait_for_itself() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def _signal(name: str) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), getattr(signal, name))


HOW: dict[str, Callable[[], Any]] = {
    **{name: _signal(name) for name in ("SIGKILL", "SIGTERM", "SIGSTOP")},
    "Ctrl-C": _signal("SIGINT"),
    "segfault": lambda: ctypes.string_at(0),
    "abort": os.abort,
    "exception": lambda: _raise(ZeroDivisionError("on purpose")),
    "out of memory": lambda: _raise(MemoryError("on purpose")),
    "sys.exit": lambda: sys.exit(3),
    "os._exit": lambda: os._exit(5),
    "os._exit as if all were well": lambda: os._exit(0),
    "closed sockets": _close_sockets,
}
# Rarer ones, each at one moment.
ALSO: dict[str, Callable[[], Any]] = {
    **{name: _signal(name) for name in ("SIGHUP", "SIGQUIT", "SIGILL", "SIGBUS", "SIGFPE", "SIGUSR1", "SIGALRM")},
    "assertion": lambda: _raise(AssertionError("on purpose")),
    "StopIteration": lambda: _raise(StopIteration("on purpose")),
    "recursion without end": _recurse,
    "an exception of one's own": lambda: _raise(OwnError("on purpose")),
    "an exception that takes more than words": lambda: b"\xff".decode(),
    "no memory for a tensor": lambda: torch.empty(1 << 55),
    "sys.exit as if all were well": lambda: sys.exit(0),
    "sys.exit with words": lambda: sys.exit("on purpose"),
    "another program": lambda: os.execv("/bin/true", ["true"]),
    "asleep": lambda: time.sleep(1000),
    "asleep with the interpreter's lock": lambda: ctypes.PyDLL(None).sleep(1000),
    "waits for itself": _wait_for_itself,
    "half-closed sockets": lambda: _close_sockets(socket.SHUT_WR),
    "closed descriptors": lambda: _close_sockets(None),
}
WHEN = ("before the first call", "agreement", "payload", "between", "backward", "decode")


def _arm(comm: Communicator, operation: int, end: Callable[[], Any]) -> None:
    """End this rank when it comes to that operation from here on: 1 is the agreement, 2 the first payload."""
    count, numbers = comm._count, itertools.count(1)

    def counted(sent_bytes: int, messages: int) -> None:
        if next(numbers) == operation:
            end()
        count(sent_bytes, messages)

    mock.patch.object(comm, "_count", counted).start()


def end_at(comm: Communicator, how: str, when: str, directory: str) -> None:
    """Forward, backward and two decode steps; in one rank 1 ends, and the others write down what they heard."""

    def end() -> None:
        Path(directory, "ended").write_text(str(time.time()))
        {**HOW, **ALSO}[how]()

    at = {moment: comm.rank == VICTIM and moment == when for moment in WHEN}
    # Off in what a shell, or nohup, starts in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for ignored in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(ignored, signal.SIG_DFL)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 12, 4).requires_grad_() for _ in range(3))
    cache = KVCache(comm=comm, layers=1, kv_heads=2, head_dim=4)
    try:
        comm.barrier()
        if at["before the first call"]:
            end()
        if at["agreement"] or at["payload"]:
            _arm(comm, 1 + at["payload"], end)
        out = shardsum.attention(q, k, v, comm=comm, strategy="all_reduce")
        if at["between"]:
            end()
        if at["backward"]:
            _arm(comm, 2, end)
        out.sum().backward()
        with torch.no_grad():
            cache.append(0, k, v)
            cache.attend(0, q)
            if at["decode"]:
                _arm(comm, 2, end)
            cache.attend(0, q[:, :, :1])
    except RankLost as loss:
        heard = json.dumps([str(loss), time.time()])
        Path(directory, f"heard.{comm.rank}").write_text(heard)
        raise


def call_once_it_has_ended(comm: Communicator, directory: str) -> None:
    """Rank 1 is killed, and the others call when their transport knows of it already."""
    comm.barrier()
    if comm.rank == VICTIM:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)  # transports learn of it within 0.3 s (docs/log.md)
    try:
        comm.barrier()
    except RankLost as loss:
        Path(directory, f"heard.{comm.rank}").write_text(str(loss))
        raise

"""What every rank of these tests runs, by torchrun or mpiexec: `python -m tests.hosts.worker WHAT DIRECTORY`."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import shardsum
from shardsum import RankLost
from shardsum.collectives import MERGE, Collective, RecursiveDoubling, TwoLevel
from shardsum.comm import Communicator
from shardsum.strategies import STRATEGIES

from ..comm.sockets import addresses
from ..distributed.cases import recorded, supported
from ..distributed.random_problems import check, draw, plain
from ..test_cache import prefill_then_decode
from ..tolerances import STATE, assert_close
from .room import INTERFACE

START_SECONDS, DEADLINE_SECONDS = 60.0, 4.0
DRAWN = 16  # random problems, of which those of this number of ranks are solved
REPETITIONS = 3


def values(comm: Communicator) -> list[str]:
    """The strategies whose outputs and gradients are right on this rank; and so is the cache."""
    names = [name for name in sorted(STRATEGIES) if supported(name, comm.size, plain(name).tensors["q"].shape[1])]
    for name in names:
        check(comm, plain(name))
    for problem in filter(lambda problem: problem.ranks == comm.size, map(draw, range(DRAWN))):
        check(comm, problem)
    prefill_then_decode(comm, "zigzag", None)
    return names


def interface_bytes() -> int:
    """Bytes, with all headers, that this rank's host has sent so far."""
    (line,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if INTERFACE in line)
    return int(line.split(":")[1].split()[8])


def sent(comm: Communicator, call: Callable[[], object]) -> dict[str, Any]:
    """What a call sends from this rank and from its host, and the fastest of its repetitions after a first one."""
    call()
    _settle(comm)
    counted, wired, seconds = comm.traffic.snapshot(), interface_bytes(), []
    for _ in range(REPETITIONS):
        comm.barrier()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    found = comm.traffic - counted
    _settle(comm)
    return {
        "bytes": found.sent_bytes,
        "messages": found.messages,
        "wired": interface_bytes() - wired,
        "seconds": min(seconds),
        "bytes_of_one": found.sent_bytes // REPETITIONS,
    }


def _settle(comm: Communicator) -> None:
    """Return when all that any rank has sent has also arrived and been acknowledged."""
    comm.barrier()
    time.sleep(0.1)


def attention(
    comm: Communicator, strategy: str, keys: int, queries: int, window: int | None = None
) -> Callable[[], Any]:
    """A call of so many keys and queries in all: 2 heads of 64, float32, so that 1 KB are sent with each key.

    The strategy holds its closed form against what the communicator counts.
    """
    q, k, v = (torch.randn(1, 2, length // comm.size, 64) for length in (queries, keys, keys))
    checked = recorded(STRATEGIES[strategy]())
    mask = None if window is None else (window, 0)
    return lambda: shardsum.attention(q, k, v, comm=comm, strategy=checked, window=mask)


def traffic(comm: Communicator) -> dict[str, Any]:
    """What strategies send."""
    return {name: sent(comm, attention(comm, name, 1024, 256)) for name in ("all_reduce", "all_gather", "ring")}


def speed(comm: Communicator) -> dict[str, Any]:
    """What it takes to send all keys, and those of a window."""
    return {
        name: [sent(comm, attention(comm, name, 4096, 64, window)) for window in (None, 128)]
        for name in ("all_gather", "ring")
    }


def levels(comm: Communicator) -> dict[str, Any]:
    """What an all-reduce of states sends that looks at the hosts, and one that does not; both right."""
    states = [torch.randn(64, 1025, generator=torch.Generator().manual_seed(rank)) for rank in range(comm.size)]
    rows = states[comm.rank]
    lse = torch.stack([state[:, -1:].double() for state in states])
    out = (lse.softmax(dim=0) * torch.stack([state[:, :-1].double() for state in states])).sum(dim=0)
    expected = torch.cat([out, lse.logsumexp(dim=0)], dim=1)

    def reduce(collective: Collective) -> dict[str, Any]:
        found = rows.clone()
        collective.all_reduce(comm, found, MERGE)
        assert_close(found, expected, STATE[torch.float32], collective.name)
        declared = collective.traffic(collective.ranks(comm), len(rows), rows[0].nbytes)
        return {
            **sent(comm, lambda: collective.all_reduce(comm, rows.clone(), MERGE)),
            "declared": REPETITIONS * (declared.sent_bytes + comm.size - 1),  # and a barrier of one byte
        }

    found = {"two_level": reduce(TwoLevel()), "flat": reduce(RecursiveDoubling())}
    return {**found, "hosts": comm.hosts(), "state": REPETITIONS * rows.nbytes}


def sockets(comm: Communicator) -> list[Any]:
    """Where this rank listens."""
    return [comm.transport, sorted(addresses(Path("/proc/self")))]


def lost(comm: Communicator) -> dict[str, Any]:
    """How this rank hears of a rank that is killed, or of a link that is cut, in the midst of calls."""
    comm.deadline_seconds = DEADLINE_SECONDS
    call = attention(comm, "ring", 64, 64)
    call()
    (Path(sys.argv[2]) / f"pid.{comm.rank}").write_text(str(os.getpid()))
    while True:
        start = time.monotonic()
        try:
            call()
        except RankLost as error:
            return {"error": str(error), "seconds": time.monotonic() - start}


WORK = {work.__name__: work for work in (values, traffic, sockets, speed, levels, lost)}


def main(what: str, directory: Path) -> None:
    comm = shardsum.connect(deadline=START_SECONDS)
    found = {name: WORK[name](comm) for name in what.split(",")}
    report = {"host": socket.gethostname(), "transport": comm.transport, "found": found}
    unfinished = directory / f"unfinished.{comm.rank}"
    unfinished.write_text(json.dumps(report))
    unfinished.rename(directory / f"result.{comm.rank}")
    if what == "lost":
        time.sleep(60)  # or the next rank would hear of this one's end, not of the one that was lost


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

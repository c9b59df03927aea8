"""All-reduce of attention states by every algorithm and transport, beside the libraries' own operations."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.distributed import FileStore

from ..arguments import Arguments
from ..collectives import COLLECTIVES, all_reduce_states, as_collective
from ..comm import Communicator, Description, agree
from ..comm.mpi import MpiTransport
from ..comm.threads import ThreadTransport
from ..comm.torch_distributed import GlooTransport
from ..launching import launch
from ..problem import Sizes
from ..state import AttentionState
from .timing import alternate, machine, ratio

Sides = dict[str, Callable[[], object]]

# States of 32 heads and v_dim 128: from one query row to 64 MB.
HEADS, V_DIM = 32, 128
QUERIES = (1, 4, 16, 64, 256, 1024, 4096)
# An operation is done so long in a repetition, and that many times to find out how often that is: what comes first
# behind another side finds cold caches and threads that have not come to rest.
SECONDS_IN_A_REPETITION, TIMES_TO_ESTIMATE = 0.05, 3
GATHER, MAX_AND_SUM = "mpi4py Allgather", "gloo max+sum"
AGREEMENT = "agreement"  # what comes before the collective in every call
# By queries: how many times a raw all-gather the merge may take, and how many times as fast as Gloo it should be.
TARGETS = {1: (3.0, 8.0), 256: (None, 4.0)}


def measure(ranks: int, transport: str, queries: int, repetitions: int) -> dict[str, Any]:
    """The row as one JSON object: median seconds of each side on rank 0, and how long the others took beside ours.

    With "mpi" the same ranks have a Gloo group too, so that both transports alternate in one run.
    """
    before = machine()
    with TemporaryDirectory(prefix="shardsum-") as directory:
        store = str(Path(directory) / "store")
        times = launch(_times, ranks, transport, (store, queries, repetitions))[0]
    ours = f"{transport} auto"
    return {
        "benchmark": "collectives",
        "ranks": ranks,
        "transport": transport,
        "state_bytes": state_bytes(queries),
        "seconds": {name: sorted(t)[len(t) // 2] for name, t in times.items()},
        "ratio": {name: ratio(t, times[ours]) for name, t in times.items() if name != ours},
        "target": _targets(queries) if (ranks, transport) == (2, MpiTransport.name) else {},
        "repetitions": repetitions,
        **before,
    }


def state_bytes(queries: int) -> int:
    """Bytes of the packed state of so many query rows."""
    return queries * HEADS * (V_DIM + 1) * 4


def _targets(queries: int) -> dict[str, float]:
    """By side, how many times as long as ours it should take: an all-gather at least a third of ours."""
    gather, gloo = TARGETS.get(queries, (None, None))
    return ({GATHER: round(1 / gather, 3)} if gather else {}) | ({MAX_AND_SUM: gloo} if gloo else {})


def _times(comm: Communicator, store: str, queries: int, repetitions: int) -> dict[str, list[float]]:
    """Seconds of one operation in each repetition, on this rank."""
    sides = _sides(comm, queries)
    if comm.transport != ThreadTransport.name:
        gloo = GlooTransport.over(FileStore(store, comm.size), comm.rank, comm.size, comm.deadline_seconds, ["lo"])
        sides |= _raw_gloo(gloo, queries)
        if comm.transport == MpiTransport.name:
            sides |= _raw_mpi(queries) | _sides(Communicator(gloo), queries)
    counts = {name: _how_often(comm, side) for name, side in sides.items()}
    runs = {name: functools.partial(_repeat, side, counts[name]) for name, side in sides.items()}
    times = alternate(runs, repetitions, comm.barrier)
    return {name: [one / counts[name] for one in t] for name, t in times.items()}


def _repeat(side: Callable[[], object], count: int) -> None:
    for _ in range(count):
        side()


def _how_often(comm: Communicator, side: Callable[[], object]) -> int:
    """How often the slowest rank can do it in a repetition: the same number on every rank."""
    side()
    comm.barrier()
    start = time.perf_counter()
    _repeat(side, TIMES_TO_ESTIMATE)
    seconds = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
    slowest = max(map(float, comm.all_gather(seconds))) / TIMES_TO_ESTIMATE
    return max(1, int(SECONDS_IN_A_REPETITION / slowest))


def _state(queries: int) -> AttentionState:
    return AttentionState(torch.randn(1, HEADS, queries, V_DIM), torch.randn(1, HEADS, queries))


def _sides(comm: Communicator, queries: int) -> Sides:
    def side(name: str) -> Callable[[], object]:
        collective, state = as_collective(name), _state(queries)
        return lambda: all_reduce_states(comm, state, collective)

    q = torch.empty(1, HEADS, queries, V_DIM)
    described = Description.of(Arguments(q_replicated=True).describe(Sizes.of(q, q, q)))  # as a cache keeps it
    sides = {name: side(name) for name in ("auto", *COLLECTIVES)}
    sides[AGREEMENT] = lambda: agree(comm, described.called("attend"), queries, queries)
    sides[f"{AGREEMENT} and auto"] = lambda: (sides[AGREEMENT](), sides["auto"]())
    return {f"{comm.transport} {name}": work for name, work in sides.items()}


def _raw_mpi(queries: int) -> Sides:
    """MPI's own operations on the same bytes; a sum of them is not a merge, and the least that one could take."""
    from mpi4py import MPI

    world, count = MPI.COMM_WORLD, state_bytes(queries) // 4
    sent, gathered, total = torch.ones(count), torch.empty(world.Get_size() * count), torch.empty(count)
    buffers = [x.numpy() for x in (sent, gathered, total)]
    return {
        GATHER: lambda: world.Allgather(buffers[0], buffers[1]),
        "mpi4py Allreduce": lambda: world.Allreduce(buffers[0], buffers[2]),
    }


def _raw_gloo(gloo: GlooTransport, queries: int) -> Sides:
    from torch.distributed import AllreduceOptions, ReduceOp

    state, flat = _state(queries), torch.ones(state_bytes(queries) // 4)
    total, largest = AllreduceOptions(), AllreduceOptions()
    largest.reduceOp = ReduceOp(ReduceOp.MAX)

    def max_and_sum() -> AttentionState:
        """Shyam et al. 2024, algorithm 3, with numerator and denominator in one message."""
        top = state.lse.clone()
        gloo.group.allreduce([top], largest).wait()
        weight = (state.lse - top).exp().unsqueeze(-1)
        sums = torch.cat([state.out * weight, weight], dim=-1)
        gloo.group.allreduce([sums], total).wait()
        return AttentionState(sums[..., :-1] / sums[..., -1:], top + sums[..., -1].log())

    return {
        MAX_AND_SUM: max_and_sum,
        "gloo all_reduce": lambda: gloo.group.allreduce([flat], total).wait(),
    }

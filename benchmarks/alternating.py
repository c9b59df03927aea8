"""What the benchmarks share: sides that take turns on the same cores, and the machine they ran on.

Both sides use the same two cores. Rank 0 plays the one process too: while it does, rank 1 sleeps on a pipe and
uses no core. The machine must be otherwise idle: the load is written beside the figures.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import shardsum
from shardsum.bench import timing

CORES = 2
ALONE = "alone"
# A side that takes this many times as long as one process is measured once, in the round that warms the others up.
SLOW = 3.0

Work = Callable[[], object]
Round = dict[str, float]  # seconds of each side


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def two_ranks(fn: Callable[..., Any], transport: str, args: Sequence[Any]) -> Any:
    """What `fn(comm, *args, pipe)` returns on rank 0 of 2; `pipe` is for `alternate`."""
    with tempfile.TemporaryDirectory() as directory:
        pipe = str(Path(directory) / "wake")
        os.mkfifo(pipe)
        return shardsum.launch(fn, ranks=CORES, transport=transport, args=(*args, pipe))[0]


def alternate(
    comm: shardsum.Communicator, alone: Work, sides: dict[str, Work], repetitions: int, pipe: str
) -> list[Round]:
    """The seconds of one process, and of each side's slowest rank, in each round after one to warm up.

    Each round begins with another side. Slow sides are in the first alone, which holds no others.
    """
    if comm.rank == 0:  # torch's threads inherit these cores when they are first made
        _take_cores(range(CORES))
        alone()
    rounds: list[Round] = []
    slow: list[str] = []
    with open(pipe, "wb" if comm.rank == 0 else "rb", buffering=0) as wake:
        for repetition in range(repetitions + 1):
            seconds = {ALONE: _one_process(comm, alone, wake)}
            _take_cores([comm.rank])
            names = [name for name in sides if name not in slow]
            first = repetition % len(names) if names else 0
            seconds |= {name: _two_ranks(comm, sides[name]) for name in names[first:] + names[:first]}
            seconds[ALONE] = _slowest(comm, seconds[ALONE])  # so that all ranks decide alike
            rounds.append(seconds)
            if repetition == 0:
                slow = [name for name in names if seconds[name] > SLOW * seconds[ALONE]]
    once = [{name: rounds[0][name] for name in (ALONE, *slow)}] if slow else []
    return once + rounds[1:]


def _one_process(comm: shardsum.Communicator, alone: Work, wake: Any) -> float:
    if comm.rank:
        wake.read(1)
        return 0.0
    _take_cores(range(CORES))
    start = time.perf_counter()
    alone()
    seconds = time.perf_counter() - start
    wake.write(b"1")
    return seconds


def _two_ranks(comm: shardsum.Communicator, side: Work) -> float:
    comm.barrier()
    start = time.perf_counter()
    side()
    return _slowest(comm, time.perf_counter() - start)


def _slowest(comm: shardsum.Communicator, seconds: float) -> float:
    return float(max(comm.all_gather(torch.tensor([seconds]))))


def _take_cores(cores: Sequence[int]) -> None:
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))


def machine() -> dict[str, object]:
    """What a figure depends on besides the code."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    isa = torch.backends.cpu.get_cpu_capability()
    return timing.machine() | {"commit": commit.stdout.strip(), "isa": isa}

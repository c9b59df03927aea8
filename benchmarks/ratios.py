"""What distribution costs: 2 ranks x 1 thread against 1 process x 2 threads, in one run, the sides alternating.

    python benchmarks/ratios.py [--transport mpi] [--repetitions 9] [--write benchmarks/results/ratios.jsonl]

Both sides use the same two cores. Rank 0 plays the one process too: while it does, rank 1 sleeps on a pipe and
uses no core. A ratio is distributed time over the time of the one process right before it: 1.00 is a perfect
split of the work over the two ranks. The machine must be otherwise idle: the load is written beside the figures.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import shardsum

CORES = 2


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def decode(comm: shardsum.Communicator) -> tuple[Callable[[], object], Callable[[], object]]:
    """B1 H32/8 D128, one query over 131,072 keys; alone: ATen's operator with the GQA group folded."""
    q, k, v = normal(1, 32, 1, 128), normal(1, 8, 131072, 128), normal(1, 8, 131072, 128)
    mine = [shardsum.shard(x, comm=comm) for x in (k, v)]
    folded = q.view(1, 8, 4, 128)
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return lambda: operator(folded, k, v), lambda: shardsum.attention(q, *mine, comm=comm, q_replicated=True)


def prefill(comm: shardsum.Communicator) -> tuple[Callable[[], object], Callable[[], object]]:
    """B1 H8 D64, 8,192 tokens, causal, zigzag; alone: F.scaled_dot_product_attention."""
    q, k, v = (normal(1, 8, 8192, 64) for _ in range(3))
    mine = [shardsum.shard(x, comm=comm, layout="zigzag") for x in (q, k, v)]
    return (
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda: shardsum.attention(*mine, comm=comm, layout="zigzag", causal=True),
    )


WORK = {"decode": decode, "prefill": prefill}


def alternate(comm: shardsum.Communicator, name: str, repetitions: int, pipe: str) -> list[tuple[float, float]]:
    """On rank 0: (seconds alone, seconds of the slowest rank) of each repetition, after one to warm up."""
    alone, distributed = WORK[name](comm)
    cores = list(range(CORES))
    if comm.rank == 0:  # torch's threads inherit these cores when they are first made
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(CORES)
        alone()
    times = []
    with torch.no_grad(), open(pipe, "wb" if comm.rank == 0 else "rb", buffering=0) as wake:
        for _ in range(repetitions + 1):
            seconds = 0.0
            if comm.rank == 0:
                os.sched_setaffinity(0, cores)
                torch.set_num_threads(CORES)
                start = time.perf_counter()
                alone()
                seconds = time.perf_counter() - start
                wake.write(b"1")
            else:
                wake.read(1)
            os.sched_setaffinity(0, [comm.rank])
            torch.set_num_threads(1)
            comm.barrier()
            start = time.perf_counter()
            distributed()
            spent = comm.all_gather(torch.tensor([time.perf_counter() - start]))
            times.append((seconds, float(max(spent))))
    return times[1:]


def machine() -> dict[str, object]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "cpu": cpu or platform.processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "shardsum": shardsum.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", default="mpi", choices=["mpi", "gloo"])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--work", nargs="*", default=list(WORK), choices=list(WORK))
    parser.add_argument("--write", type=Path, help="append JSON lines to this file")
    options = parser.parse_args()
    for name in options.work:
        before = machine()
        with tempfile.TemporaryDirectory() as directory:
            pipe = str(Path(directory) / "wake")
            os.mkfifo(pipe)
            arguments = (name, options.repetitions, pipe)
            times = shardsum.launch(alternate, ranks=2, transport=options.transport, args=arguments)[0]
        ratios = [together / alone for alone, together in times]
        line = {
            "benchmark": name,
            "what": WORK[name].__doc__,
            "transport": options.transport,
            "ratio_median": round(statistics.median(ratios), 3),
            "ratio_min": round(min(ratios), 3),
            "ratio_max": round(max(ratios), 3),
            "alone_seconds_median": round(statistics.median(alone for alone, _ in times), 5),
            "distributed_seconds_median": round(statistics.median(together for _, together in times), 5),
            "repetitions": options.repetitions,
            **before,
        }
        print(json.dumps(line))
        if options.write:
            with options.write.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()

"""What distribution costs: 2 ranks x 1 thread against 1 process x 2 threads, in one run, the sides alternating.

    python benchmarks/ratios.py [--transport mpi] [--repetitions 9] [--write benchmarks/results/ratios.jsonl]

A ratio is distributed time over the time of the one process right before it: 1.00 is a perfect split of the work
over the two ranks.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from alternating import ALONE, alternate, machine, normal, two_ranks

import shardsum

OURS = "shardsum"


def decode(comm: shardsum.Communicator) -> tuple[Callable[[], object], Callable[[], object]]:
    """B1 H32/8 D128, one query over 131,072 keys; alone: ATen's operator with the GQA group folded."""
    q, k, v = normal(1, 32, 1, 128), normal(1, 8, 131072, 128), normal(1, 8, 131072, 128)
    mine = [shardsum.shard(x, comm=comm) for x in (k, v)]
    folded = q.view(1, 8, 4, 128)
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return lambda: operator(folded, k, v), lambda: shardsum.attention(q, *mine, comm=comm, q_replicated=True)


def decode_step(comm: shardsum.Communicator) -> tuple[Callable[[], object], Callable[[], object]]:
    """KVCache.attend: B1 H32/8 D128, one query over 131,072 keys; alone: the same, of one process."""
    q, k, v = normal(1, 32, 1, 128), normal(1, 8, 131072, 128), normal(1, 8, 131072, 128)
    caches = []
    for each in (shardsum.connect("single"), comm):
        cache = shardsum.KVCache(comm=each, layers=1, kv_heads=8, head_dim=128, dtype=torch.float32)
        cache.append(0, *(shardsum.shard(x, comm=each) for x in (k, v)), layout="contiguous")
        caches.append(cache)
    return lambda: caches[0].attend(0, q), lambda: caches[1].attend(0, q)


def prefill(comm: shardsum.Communicator) -> tuple[Callable[[], object], Callable[[], object]]:
    """B1 H8 D64, 8,192 tokens, causal, zigzag; alone: F.scaled_dot_product_attention."""
    q, k, v = (normal(1, 8, 8192, 64) for _ in range(3))
    mine = [shardsum.shard(x, comm=comm, layout="zigzag") for x in (q, k, v)]
    return (
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda: shardsum.attention(*mine, comm=comm, layout="zigzag", causal=True),
    )


WORK = {"decode": decode, "decode step": decode_step, "prefill": prefill}


def measure(comm: shardsum.Communicator, name: str, repetitions: int, pipe: str) -> list[dict[str, float]]:
    """The rounds of one work."""
    alone, distributed = WORK[name](comm)
    with torch.no_grad():
        return alternate(comm, alone, {OURS: distributed}, repetitions, pipe)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", default="mpi", choices=["mpi", "gloo"])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--work", nargs="*", default=list(WORK), choices=list(WORK))
    parser.add_argument("--write", type=Path, help="append JSON lines to this file")
    options = parser.parse_args()
    for name in options.work:
        before = machine()
        rounds = two_ranks(measure, options.transport, (name, options.repetitions))
        ratios = [seconds[OURS] / seconds[ALONE] for seconds in rounds]
        line = {
            "benchmark": name,
            "what": WORK[name].__doc__,
            "transport": options.transport,
            "ratio_median": round(statistics.median(ratios), 3),
            "ratio_min": round(min(ratios), 3),
            "ratio_max": round(max(ratios), 3),
            "alone_seconds_median": round(statistics.median(seconds[ALONE] for seconds in rounds), 5),
            "distributed_seconds_median": round(statistics.median(seconds[OURS] for seconds in rounds), 5),
            "repetitions": options.repetitions,
            **before,
        }
        print(json.dumps(line))
        if options.write:
            with options.write.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()

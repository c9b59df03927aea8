"""Peak memory of each rank in the ring's forward and backward pass, at one total length, on 1, 2 and 4 ranks.

    python benchmarks/memory.py [--length 4096] [--transport mpi] [--write benchmarks/results/memory.jsonl]

Each rank is a process that makes its own shards only. Its peak resident size is Linux's VmHWM, set back to the
present size (5 written to /proc/self/clear_refs) once a small call has loaded and made all that a call needs; the
figure is that peak minus the size before the inputs existed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from alternating import machine
from rich.console import Console
from rich.table import Table

import shardsum
from shardsum import Layout

HEADS, HEAD_DIM, LAYOUT = 64, 128, "zigzag"
RANKS = (1, 2, 4)


def step(comm: shardsum.Communicator, length: int, strategy: str) -> None:
    """Forward and backward over a sequence of which no rank ever holds the whole."""
    own = len(Layout(LAYOUT).positions(length, comm.rank, comm.size))
    q, k, v = (torch.randn(1, HEADS, own, HEAD_DIM).requires_grad_() for _ in range(3))
    out = shardsum.attention(q, k, v, comm=comm, layout=LAYOUT, strategy=strategy, kernel="aten", causal=True)
    out.backward(torch.randn_like(out))


def peak_bytes(comm: shardsum.Communicator, length: int, strategy: str) -> int:
    """By how much this rank's resident size grows at most."""
    step(comm, 64 * comm.size, strategy)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    step(comm, length, strategy)
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure(length: int, transport: str, strategy: str = "ring") -> dict[int, int]:
    """The peak of the rank that needs most, for each number of ranks."""
    args = (length, strategy)
    return {
        ranks: max(shardsum.launch(peak_bytes, ranks=ranks, transport=transport, args=args)) for ranks in RANKS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--transport", default="mpi", choices=["mpi", "gloo"])
    parser.add_argument("--strategy", default="ring")
    parser.add_argument("--write", type=Path, help="append a JSON line to this file")
    options = parser.parse_args()
    peaks = measure(options.length, options.transport, options.strategy)
    table = Table("ranks", "peak bytes of a rank", "of one rank's")
    for ranks, peak in peaks.items():
        table.add_row(str(ranks), f"{peak:,}", f"{peak / peaks[1]:.3f}")
    Console(highlight=False).print(table)
    line = {"benchmark": "memory", "strategy": options.strategy, "transport": options.transport, "causal": True}
    line |= {"layout": LAYOUT, "length": options.length, "heads": HEADS, "head_dim": HEAD_DIM, "dtype": "float32"}
    line |= {"peak_bytes": {str(ranks): peak for ranks, peak in peaks.items()}, **machine()}
    if options.write:
        with options.write.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()

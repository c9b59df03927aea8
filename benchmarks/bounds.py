"""How much larger than errors the bound on them is, on N(0,1) data, and what it costs; beside 50 digits.

    python -m benchmarks.bounds [--keys 4096] [--write benchmarks/results/bounds.jsonl]

In the repository's root: attention in 50 digits is the tests' own (tests/exact.py).
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tests import dense, exact
from torch import Tensor

import shardsum
from shardsum.bench.timing import alternate, machine, ratio
from shardsum.extension import instruction_sets
from shardsum.kernels import Kernel, NativeKernel

ROWS, HEAD_DIM = 16, 64


def sides() -> list[tuple[str, str | Kernel, torch.dtype]]:
    """Each kernel, every instruction set in float32, and the best in other dtypes."""
    native = [(f"native {isa}", NativeKernel(isa), torch.float32) for isa in instruction_sets()]
    native += [(native[0][0], native[0][1], x) for x in (torch.float64, torch.bfloat16, torch.float16)]
    others = [(name, name, dtype) for name in ("eager", "reference") for dtype in (torch.float32, torch.float64)]
    return [*native, *others]


@functools.cache
def data(keys: int, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], list[object]]:
    """q, k, v, and attention in 50 digits."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, 1, n, HEAD_DIM, generator=generator, dtype=torch.float64) for n in (ROWS, keys, keys)]
    q, k, v = (x.to(dtype) for x in made)
    return (q, k, v), exact.attention(q, k, v, dense.visible(ROWS, keys))


def cost(kernel: str | Kernel) -> dict[str, float]:
    """Time with a bound over that without."""
    q, k, v = (torch.randn(1, 8, 2048, HEAD_DIM) for _ in range(3))
    call = functools.partial(shardsum.attention, q, k, v, kernel=kernel, reproducible=True, causal=True)
    times = alternate({"with": lambda: call(return_bound=True), "without": call}, 7)
    return ratio(times["with"], times["without"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=4096)
    parser.add_argument("--write", type=Path, help="append JSON lines to this file")
    options = parser.parse_args()
    table = Table("kernel", "dtype", "largest error", "largest bound", "bound / error", "closest error / bound")
    for name, kernel, dtype in sides():
        (q, k, v), expected = data(options.keys, dtype)
        state, bound = shardsum.attention(
            q, k, v, kernel=kernel, reproducible=True, return_bound=True, return_state=True
        )
        errors = [float(error) for error in exact.errors(state.out, expected)]
        allowed = bound.flatten().tolist()
        closest = max(error / most for error, most in zip(errors, allowed, strict=True))
        sizes = {"largest_error": max(errors), "largest_bound": max(allowed), "closest": closest}
        times = max(allowed) / max(errors)
        figures = (f"{max(errors):.2e}", f"{max(allowed):.2e}", f"{times:.0f}", f"{closest:.4f}")
        table.add_row(name, str(dtype).removeprefix("torch."), *figures)
        line = {"benchmark": "bounds", "kernel": name, "dtype": str(dtype), "keys": options.keys, "rows": ROWS}
        line |= {"head_dim": HEAD_DIM, **sizes, "bound_over_error": round(times, 1), **machine()}
        if options.write:
            with options.write.open("a") as file:
                file.write(json.dumps(line) + "\n")
    Console(highlight=False).print(table)
    print("time with a bound over that without, B1 H8 D64 2,048 causal float32:", cost("auto"))


if __name__ == "__main__":
    main()

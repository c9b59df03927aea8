"""Attention over 2 ranks x 1 thread, ours beside others', against one process x 2 threads of torch's own.

    make peers                                              # installs the peers, runs every case, shows tables
    python benchmarks/peers.py --case causal --training     # one case; add --write FILE to append its lines
    python benchmarks/peers.py --show benchmarks/results/peers.jsonl

All sides of a case take turns in one run, over the same Gloo process group, and over MPI too for ours. Each side's
output, and gradients, are checked against attention written down in float64 before it is timed; one that is wrong
or fails is listed with the reason. Lines of several runs of one case are shown as one.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from adapters import BY_POSITIONS, Maker, Side, ours, peers
from alternating import ALONE, alternate, machine, normal, two_ranks
from rich.console import Console
from rich.table import Table
from torch import Tensor

import shardsum
from shardsum.comm import as_communicator

PACKAGES = Path(__file__).parents[1] / ".venv-peers"
# Relative norm of the error of an output or gradient that counts as right.
RIGHT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
ROWS = 1024  # of scores at a time, in float64
SECONDS_TO_WAIT = 60  # for a rank that failed alone


@dataclass(frozen=True)
class Case:
    what: str
    q_heads: int
    kv_heads: int
    length: int
    head_dim: int
    causal: bool
    dtype: torch.dtype = torch.float32

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, and the gradient of the output."""
        q = normal(1, self.q_heads, self.length, self.head_dim)
        k, v = normal(2, self.kv_heads, self.length, self.head_dim).split(1)
        d_out = normal(2, self.q_heads, self.length, self.head_dim)[:1]
        return tuple(x.to(self.dtype) for x in (q, k, v, d_out))


CASES = {
    "full": Case("H8 D64 S8192", 8, 8, 8192, 64, False),
    "causal": Case("H8 D64 S8192 causal", 8, 8, 8192, 64, True),
    "gqa": Case("H16/4 D128 S4096 causal", 16, 4, 4096, 128, True),
    "bfloat16": Case("H8 D64 S8192 causal, bfloat16", 8, 8, 8192, 64, True, torch.bfloat16),
}


def definition(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, causal: bool) -> list[Tensor]:
    """out, d_q, d_k, d_v in float64, written down from the definition, some rows of one head at a time."""
    q, k, v, d_out = (x.double() for x in (q, k, v, d_out))
    out, d_q, d_k, d_v = (torch.zeros_like(x) for x in (q, q, k, v))
    scale, group = q.shape[3] ** -0.5, q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        keys, values = k[0, head // group], v[0, head // group]
        for start in range(0, q.shape[2], ROWS):
            rows = slice(start, start + ROWS)
            seen = slice(0, start + ROWS if causal else None)
            scores = q[0, head, rows] @ keys[seen].T * scale
            if causal:
                scores.masked_fill_(torch.ones_like(scores).triu(start + 1) > 0, -torch.inf)
            weights = scores.softmax(dim=1)
            out[0, head, rows] = weights @ values[seen]
            gradient = d_out[0, head, rows]
            delta = (gradient * out[0, head, rows]).sum(dim=1, keepdim=True)
            d_scores = weights * (gradient @ values[seen].T - delta) * scale
            d_q[0, head, rows] = d_scores @ keys[seen]
            d_k[0, head // group, seen] += d_scores.T @ q[0, head, rows]
            d_v[0, head // group, seen] += weights.T @ gradient
    return [out, d_q, d_k, d_v]


class Work:
    """One side of one case on this rank: its own inputs, what is timed, and its error."""

    def __init__(self, comm: shardsum.Communicator, side: Side, case: Case, training: bool) -> None:
        self.side, self.training, self._comm = side, training, comm
        q, k, v, d_out = (shardsum.shard(x, comm=comm, layout=side.layout) for x in case.tensors())
        self._inputs = [_ordered(x, side.inputs).requires_grad_(training) for x in (q, k, v)]
        self._d_out = _ordered(d_out, side.output)

    def __call__(self) -> list[Tensor]:
        with torch.set_grad_enabled(self.training):
            out = self.side.call(*self._inputs)
        return [out, *torch.autograd.grad(out, self._inputs, self._d_out)] if self.training else [out]

    def error(self, expected: list[Tensor]) -> float:
        """The largest relative norm of the error of the output and the gradients."""
        orders = [self.side.output, *[self.side.inputs] * 3]
        wanted = [shardsum.shard(x, comm=self._comm, layout=self.side.layout) for x in expected]
        computed = [_ordered(x, order).double() for x, order in zip(self(), orders, strict=False)]
        return max(float((x - y).norm() / y.norm()) for x, y in zip(computed, wanted, strict=False))


def _ordered(x: Tensor, order: str) -> Tensor:
    """From our dim order to a side's, or back: the two differ by one transposition."""
    return x.detach().transpose(1, 2).contiguous() if order == BY_POSITIONS else x.detach()


def one_process(case: Case, training: bool) -> Callable[[], object]:
    q, k, v, d_out = case.tensors()
    inputs = [x.requires_grad_(training) for x in (q, k, v)]

    def work() -> object:
        with torch.set_grad_enabled(training):
            out = F.scaled_dot_product_attention(*inputs, is_causal=case.causal, enable_gqa=True)
        return torch.autograd.grad(out, inputs, d_out) if training else out

    return work


def on_rank(
    comm: shardsum.Communicator,
    name: str,
    training: bool,
    wanted: list[str],
    repetitions: int,
    expected: list[Tensor],
    store: str,
    pipe: str,
) -> tuple[list[dict[str, float]], list[dict[str, Any]]]:
    """The rounds of one case, and what is known about each side."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    rendezvous = dist.FileStore(store, comm.size)
    patience = datetime.timedelta(seconds=SECONDS_TO_WAIT)
    dist.init_process_group("gloo", store=rendezvous, rank=comm.rank, world_size=comm.size, timeout=patience)
    case, works, known = CASES[name], {}, {}
    gloo = as_communicator(dist.group.WORLD)
    makers = ours(comm, case.causal) | ours(gloo, case.causal) | peers(case.causal)
    for side, make in makers.items():
        if not any(part in side for part in wanted):
            continue
        known[side], work = _checked(comm, make, case, training, expected)
        if work is not None:
            works[side] = work
    rounds = alternate(comm, one_process(case, training), works, repetitions, pipe)
    dist.destroy_process_group()
    return rounds, known


def _checked(
    comm: shardsum.Communicator, make: Maker, case: Case, training: bool, expected: list[Tensor]
) -> tuple[dict[str, Any], Work | None]:
    """A side's layout, and its error or why it is not timed; and its work, if it is right."""
    known: dict[str, Any] = {}
    error, work, said = torch.inf, None, ""
    try:
        side = make()
        known["layout"] = side.layout
        work = Work(comm, side, case, training)
        error = work.error(expected)
    except Exception as failure:  # noqa: BLE001 (whatever a peer raises is its result)
        said = f"{type(failure).__name__}: {failure}"[:200]
    error = float(max(comm.all_gather(torch.tensor([error], dtype=torch.float64))))
    if error <= RIGHT[case.dtype]:
        return known | {"error": float(f"{error:.1e}")}, work
    return known | {"not_timed": said or f"wrong: relative error {error:.1e}"}, None


def measure(name: str, training: bool, wanted: list[str], repetitions: int) -> list[dict[str, Any]]:
    """One line for each side of one case."""
    before, case = machine() | {"versions": _versions()}, CASES[name]
    expected = definition(*case.tensors(), case.causal)
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        rounds, known = two_ranks(on_rank, "mpi", (name, training, wanted, repetitions, expected, store))
    lines = []
    for side, facts in known.items():
        timed = [seconds for seconds in rounds if side in seconds]
        line = {"benchmark": "peers", "case": name, "what": case.what, "training": training, "side": side, **facts}
        line |= {
            "seconds": [round(x[side], 4) for x in timed],
            "alone_seconds": [round(x[ALONE], 4) for x in timed],
        }
        lines.append(line | before)
    return lines


def _versions() -> dict[str, str]:
    names = ("axolotl-ringmaster", "deepspeed", "para-attn", "ring-attention-pytorch")
    versions = {entry.name: entry.version for entry in importlib.metadata.distributions() if entry.name in names}
    return {name: versions[name] for name in names if name in versions}


def show(lines: list[dict[str, Any]]) -> None:
    """A table for each case: each side's time over that of one process in the same round."""
    console = Console(highlight=False)
    for case, training in dict.fromkeys((line["case"], line["training"]) for line in lines):
        rows = [line for line in lines if (line["case"], line["training"]) == (case, training)]
        title = f"{CASES[case].what}, {'forward and backward' if training else 'forward'}"
        table = Table("side", "layout", "error", "ratio, median (smallest to largest)", "times", title=title)
        for side in dict.fromkeys(line["side"] for line in rows):
            of_side = [line for line in rows if line["side"] == side]
            last, ratios = of_side[-1], _ratios(of_side)
            if ratios:
                middle = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                table.add_row(side, last["layout"], f"{last['error']:.0e}", middle, str(len(ratios)))
            else:
                table.add_row(side, last.get("layout", ""), "", last["not_timed"], "")
        console.print(table)


def _ratios(lines: list[dict[str, Any]]) -> list[float]:
    pairs = [pair for line in lines for pair in zip(line["seconds"], line["alone_seconds"], strict=True)]
    return [seconds / alone for seconds, alone in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="*", default=list(CASES), choices=list(CASES))
    passes = parser.add_mutually_exclusive_group()
    passes.add_argument("--forward", dest="training", action="store_const", const=(False,), default=(False, True))
    passes.add_argument("--training", dest="training", action="store_const", const=(True,), help="and backward")
    parser.add_argument("--sides", nargs="*", default=[""], help="only sides whose names contain one of these")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--write", type=Path, help="append JSON lines to this file")
    parser.add_argument("--show", type=Path, help="measure nothing, show the lines of this file")
    options = parser.parse_args()
    if options.show:
        show([json.loads(line) for line in options.show.read_text().splitlines()])
        return
    sys.path.append(str(PACKAGES))  # the ranks get it too
    for name in options.case:
        for training in options.training:
            lines = measure(name, training, options.sides, options.repetitions)
            show(lines)
            if options.write:
                with options.write.open("a") as file:
                    file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    main()

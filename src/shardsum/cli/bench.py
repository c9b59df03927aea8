"""`shardsum bench`: how fast this machine does it, beside what else there is and beside the machine's limits."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.table import Table

from ..bench import collectives as collectives_bench
from ..bench import kernels as kernels_bench
from ..comm import LAUNCHED
from ..comm.mpi import MpiTransport
from ..comm.threads import ThreadTransport
from .common import console, launchers_rank, progress

Row = TypeVar("Row")


@click.group()
def bench() -> None:
    """Measure this machine: ratios of sides that alternate in one run. It should be otherwise idle."""
    if launchers_rank() is not None:
        raise click.UsageError(
            "bench measures the whole machine, with ranks of its own: run it without a launcher."
        )


@bench.command()
@click.option("--repetitions", type=click.IntRange(1), default=9, show_default=True)
@click.option("--only", default="", help='Only rows whose names contain this, as in "decode" or "bfloat16".')
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines, nothing else.")
@click.option("--write", type=click.Path(dir_okay=False, path_type=Path), help="Append JSON lines to this file.")
def kernels(repetitions: int, only: str, as_json: bool, write: Path | None) -> None:
    """The native kernels beside PyTorch's attention, all on all cores.

    \b
    Example:
      shardsum bench kernels --only decode
    """
    chosen = [work for work in kernels_bench.WORK if only in work.name]
    if not chosen:
        raise click.UsageError(f"--only {only!r} names none of: {', '.join(w.name for w in kernels_bench.WORK)}.")
    lines = _measured("kernels", chosen, lambda work: kernels_bench.measure(work, repetitions), as_json, write)
    if not as_json:
        console().print(_table(lines))


@bench.command()
@click.option("-n", "--ranks", type=click.IntRange(2), multiple=True, default=(2, 4), show_default=True)
@click.option(
    "--transport",
    type=click.Choice(LAUNCHED),
    multiple=True,
    default=(MpiTransport.name, ThreadTransport.name),
    show_default=True,
    help="mpi measures gloo too, alternating in the same run.",
)
@click.option(
    "--largest", type=click.IntRange(16384), default=1 << 26, show_default=True, help="Bytes of a state."
)
@click.option("--repetitions", type=click.IntRange(1), default=9, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines, nothing else.")
@click.option("--write", type=click.Path(dir_okay=False, path_type=Path), help="Append JSON lines to this file.")
def collectives(
    ranks: tuple[int, ...],
    transport: tuple[str, ...],
    largest: int,
    repetitions: int,
    as_json: bool,
    write: Path | None,
) -> None:
    """All-reduce of attention states by every algorithm, beside mpi4py's and torch.distributed's operations.

    \b
    Example:
      shardsum bench collectives -n 2 --transport mpi --largest 100000
    """
    sizes = [
        queries
        for queries in collectives_bench.QUERIES
        if collectives_bench.state_bytes(queries) <= 1.05 * largest
    ]
    rows = list(itertools.product(ranks, transport, sizes))
    lines = _measured(
        "collectives", rows, lambda row: collectives_bench.measure(*row, repetitions), as_json, write
    )
    if not as_json:
        console().print(_collectives_table(lines))


def _measured(
    what: str, rows: Sequence[Row], measure: Callable[[Row], dict[str, Any]], as_json: bool, write: Path | None
) -> list[dict[str, Any]]:
    """A line of each row; printed and written as soon as it is there, so that an end on the way loses none."""
    lines = []
    with write.open("a") if write else nullcontext() as file, progress() as bar:
        for row in bar.track(rows, description=what):
            lines.append(measure(row))
            text = json.dumps(lines[-1])
            if file is not None:
                file.write(f"{text}\n")
                file.flush()
            if as_json:
                click.echo(text)
    return lines


def _collectives_table(lines: list[dict[str, Any]]) -> Table:
    table = Table(
        "ranks", "state bytes", "side", "microseconds", "times auto's (least to most)", "target: at least"
    )
    for line in lines:
        table.add_section()
        for side, seconds in line["seconds"].items():
            ratio, target = line["ratio"].get(side), line["target"].get(side)
            times = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else ""
            state, wanted = f"{line['state_bytes']:,}", f"{target:g}" if target else ""
            table.add_row(str(line["ranks"]), state, side, f"{1e6 * seconds:,.1f}", times, wanted)
    return table


def _table(lines: list[dict[str, Any]]) -> Table:
    table = Table("work", "beside", "times as fast (least to most)", "target", "share of limit")
    for line in lines:
        for side, ratio in line["ratio"].items():
            speed = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
            target = line["target"].get(side)
            table.add_row(
                line["work"], side, speed, f"{target:g}" if target else "", f"{line['share_of_limit']:.0%}"
            )
    return table

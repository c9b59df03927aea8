"""`shardsum bench`: how fast this machine does it, beside what else there is and beside the machine's limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from ..bench import kernels as kernels_bench
from .common import console, progress


@click.group()
def bench() -> None:
    """Measure this machine: ratios of sides that alternate in one run. It should be otherwise idle."""


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
    lines = []
    with progress() as bar:
        for work in bar.track(chosen, description="kernels"):
            lines.append(kernels_bench.measure(work, repetitions))
            if as_json:
                click.echo(json.dumps(lines[-1]))
    if write is not None:
        with write.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    if not as_json:
        console().print(_table(lines))


def _table(lines: list[dict[str, Any]]) -> Table:
    table = Table("work", "beside", "times as fast (least to most)", "target", "share of limit")
    for line in lines:
        for side, found in line["ratio"].items():
            speed = f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"
            target = line["target"].get(side)
            table.add_row(
                line["work"], side, speed, f"{target:g}" if target else "", f"{line['share_of_limit']:.0%}"
            )
    return table

"""What the commands share: ranks and transport, tables, JSON, progress."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..comm import LAUNCHED, Communicator, SingleTransport, connect
from ..comm.environment import launched_rank
from ..launching import launch

MOST_RANKS = 256  # on one machine

Command = TypeVar("Command", bound=Callable[..., Any])
Result = TypeVar("Result")


def rank_options(default_ranks: int) -> Callable[[Command], Command]:
    """The options -n, --transport and --json."""

    def add(command: Command) -> Command:
        command = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else.")(
            command
        )
        command = click.option(
            "--transport",
            type=click.Choice(LAUNCHED),
            help="How the ranks talk. Default: mpi if mpi4py is installed, else gloo.",
        )(command)
        return click.option(
            "-n",
            "--ranks",
            type=click.IntRange(1, MOST_RANKS),
            help=f"Number of ranks on this machine; {default_ranks} unless a launcher has started them already.",
        )(command)

    return add


def on_ranks(
    fn: Callable[..., Result],
    ranks: int | None,
    transport: str | None,
    *args: Any,
    default_ranks: int,
    deadline: float = 300.0,
) -> Result | None:
    """What `fn(comm, *args)` returns on rank 0; None on the other ranks of mpiexec or torchrun.

    Raises: click.UsageError where -n or --transport contradict the launcher that started this process.
    """
    comm = launchers_rank(deadline)
    if comm is None:
        return launch(fn, ranks or default_ranks, transport, args, deadline)[0]
    if ranks not in (None, comm.size):
        raise click.UsageError(f"-n {ranks}, but the launcher has started {comm.size} ranks: leave -n out.")
    if transport not in (None, comm.transport):
        raise click.UsageError(f"--transport {transport}, but the launcher offers {comm.transport}: leave it out.")
    result = fn(comm, *args)
    return result if comm.rank == 0 else None


def launchers_rank(deadline: float = 300.0) -> Communicator | None:
    """This process's rank under mpiexec or torchrun; None where nothing has launched it."""
    comm = connect(deadline=deadline)
    return None if comm.transport == SingleTransport.name else comm


def is_first_rank() -> bool:
    """Whether this process is the one that speaks: rank 0, or not under a launcher."""
    try:
        return launched_rank() == 0
    except ValueError:  # nobody knows: each says it
        return True


def busy(what: str) -> AbstractContextManager[object]:
    """A sign on standard error that something goes on; nothing unless that is a terminal, and of rank 0 alone."""
    shown = is_first_rank() and sys.stderr.isatty()
    return Console(stderr=True).status(what) if shown else nullcontext()


def print_json(result: Any) -> None:
    click.echo(json.dumps(result))


def console() -> Console:
    """Standard output, for tables."""
    return Console(highlight=False)


def progress(visible: bool = True) -> Progress:
    """A bar on standard error; nothing unless that is a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not (visible and sys.stderr.isatty()),
    )


def numbers(text: str, what: str) -> list[float]:
    """The numbers of "1,2.5,3". Raises: click.UsageError naming the option."""
    try:
        values = [float(number) for number in text.split(",")]
        if all(map(math.isfinite, values)):
            return values
        raise click.UsageError(f"{what} must be finite numbers: got {text!r}.")
    except ValueError:
        raise click.UsageError(f"{what} must be numbers separated by commas: got {text!r}.") from None


def pair(text: str | None, what: str) -> Sequence[int | None] | None:
    """The two whole numbers of "3,5", either of which may be missing: "3," is (3, None)."""
    if text is None:
        return None
    parts = text.split(",")
    try:
        first, second = (int(part) if part.strip() else None for part in parts)
    except ValueError:
        raise click.UsageError(f"{what} must be two whole numbers, as in 3,5: got {text!r}.") from None
    return first, second

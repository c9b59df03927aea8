"""The command `shardsum`: one module for each subcommand."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import NoReturn

import click

from .. import __version__
from ..arrays import discard_unfinished
from ..errors import RankLost
from .common import is_first_rank

# The commands, and the module of this package that has each.
COMMANDS = {
    "demo": "generation",
    "generate": "generation",
    "attend": "attend",
    "explain": "explain",
    "verify": "verify",
    "bench": "bench",
    "doctor": "doctor",
}
FAILED, BAD_USAGE = 1, 2
# What ends a command, and the word for it; its exit status is 128 and the signal's number, as in shells.
ENDINGS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
# A launcher ends all ranks as soon as one fails: those that are silent leave the first one so long to say why.
SILENT_SECONDS = 5.0


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="shardsum", message="%(prog)s %(version)s")
def group() -> None:
    """Exact attention over keys and values that live on many machines, as one weighted sum.

    Every command but bench starts its own ranks on this machine, or runs as one rank under mpiexec or torchrun:

    \b
      shardsum demo -n 2
      mpiexec -n 2 shardsum demo
      torchrun --nproc-per-node 2 --no-python shardsum demo
    """


for name, module in COMMANDS.items():
    group.add_command(getattr(importlib.import_module(f".{module}", __name__), name))


class Ended(BaseException):
    """Raised where a signal ends the command. Arguments: the signal's number."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit: 0, 1 (it failed), 2 (bad usage or input, in one line), 130 or 143 (a signal)."""
    try:
        with _ended_by_signals():
            status = group.main(arguments, prog_name="shardsum", standalone_mode=False)
    except Ended as end:
        _end_at_once(signal.Signals(end.args[0]))
    except click.Abort:
        _end_at_once(signal.SIGINT)
    except click.exceptions.NoArgsIsHelpError as error:
        if is_first_rank():
            error.show()  # the whole help, as it is
        sys.exit(BAD_USAGE)
    except click.ClickException as error:
        _leave(error.format_message(), BAD_USAGE)
    except RankLost as error:
        _leave(str(error), FAILED)
    except (ValueError, OSError, ImportError) as error:
        _leave(str(error), BAD_USAGE)
    except Exception:
        _end_other_ranks()
        raise
    sys.exit(status if isinstance(status, int) else 0)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Raise `Ended` where the first signal comes inside the block; what follows cleans up undisturbed."""

    def end(number: int, _: object) -> NoReturn:
        for other in ENDINGS:
            signal.signal(other, signal.SIG_IGN)
        raise Ended(number)

    before = {number: signal.signal(number, end) for number in ENDINGS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_at_once(number: signal.Signals) -> NoReturn:
    """Say what has ended the command and exit, whatever ranks that are threads still compute."""
    if is_first_rank():
        click.echo(f"shardsum: {ENDINGS[number]}", err=True)
    discard_unfinished()
    sys.stdout.flush()
    # Python's own end would wait for no thread, and torch's abort the process.
    os._exit(128 + number)


def _leave(message: str, status: int) -> NoReturn:
    if is_first_rank():
        click.echo(f"shardsum: {' '.join(message.split())}", err=True)
    else:
        time.sleep(SILENT_SECONDS)
    sys.exit(status)


def _end_other_ranks() -> None:
    """Under mpiexec an exception in one rank leaves the others waiting; torchrun ends them by itself."""
    if "mpi4py.MPI" in sys.modules:
        traceback.print_exc()
        sys.modules["mpi4py.MPI"].COMM_WORLD.Abort(FAILED)

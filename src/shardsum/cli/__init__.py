"""The command `shardsum`: one module for each subcommand."""

from __future__ import annotations

import importlib
import sys
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from .. import __version__
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
FAILED, BAD_USAGE, INTERRUPTED = 1, 2, 130
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


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit: 0, 1 (it failed) or 2 (bad usage or input, said in one line)."""
    try:
        status = group.main(arguments, prog_name="shardsum", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        _leave("interrupted", INTERRUPTED)
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

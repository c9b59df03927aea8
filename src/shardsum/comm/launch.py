"""Starting ranks on this machine from plain Python, and bringing back every result or the first error."""

from __future__ import annotations

import builtins
import contextvars
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeVar

import torch

from .. import errors
from ..errors import RankLost, Unsupported
from . import wire
from .base import DEFAULT_DEADLINE_SECONDS
from .connect import MAIN, mpi_installed, rank_of_thread
from .processes import run_processes
from .threads import Hub, ThreadCommunicator

Result = TypeVar("Result")


def launch(
    fn: Callable[..., Result],
    ranks: int = 2,
    transport: str | None = None,
    args: Sequence[Any] = (),
    deadline: float = DEFAULT_DEADLINE_SECONDS,
) -> list[Result]:
    """The results of `fn(comm, *args)` on each of `ranks` local ranks, in rank order.

    `transport`: "mpi" (the default if mpi4py is installed), "gloo", or "threads". Threads take any function and
    any arguments. Processes are fresh interpreters: `fn` is a function of a module or of the main script, which
    must guard its main part; arguments and results are None, bool, numbers, strings, tensors, arrays,
    AttentionState, and lists, tuples and dicts of these. Each rank gets its share of the cores.
    `deadline`: the longest wait in a collective, in seconds.
    Raises: the exception of the lowest failed rank that did not merely lose a peer, with `.rank`: of the same
    class if it is built in or ours, else RuntimeError. RankLost where a process ended without a word.

    >>> launch(lambda comm, x: comm.rank + x, ranks=3, transport="threads", args=(10,))
    [10, 11, 12]
    """
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1: got {ranks}.")
    transport = transport or ("mpi" if mpi_installed() else "gloo")
    if transport == "threads":
        return _launch_threads(fn, ranks, args, deadline)
    if transport not in ("mpi", "gloo"):
        raise ValueError(f"launch starts ranks over mpi, gloo or threads: got {transport!r}.")
    if transport == "mpi" and not mpi_installed():
        raise Unsupported("the mpi transport needs mpi4py and an MPI library: pip install 'shardsum[mpi]'.")
    with tempfile.TemporaryDirectory(prefix=f"shardsum-{os.getpid()}-") as name:
        directory = Path(name)
        wire.save(directory / "arguments.safetensors", tuple(args))
        (directory / "job.json").write_text(json.dumps(_job(fn, ranks, transport, deadline)))
        ends = run_processes(directory, ranks, transport, _threads(ranks))
        _raise_first([_failure(directory, rank, ends.get(rank)) for rank in range(ranks)])
        return [wire.load(directory / f"result.{rank}") for rank in range(ranks)]


class _Blame(IntEnum):
    """Which of several ranks' errors is the one to raise: the one that can have caused the others."""

    FAILED = 0
    DIED = 1
    LOST_A_PEER = 2
    STOPPED = 3


_Failure = tuple[_Blame, BaseException]


def _blame(error: BaseException) -> _Blame:
    return _Blame.LOST_A_PEER if isinstance(error, RankLost) else _Blame.FAILED


def _launch_threads(fn: Callable[..., Result], ranks: int, args: Sequence[Any], deadline: float) -> list[Result]:
    hub = Hub(ranks)
    results: dict[int, Result] = {}
    failures: list[_Failure | None] = [None] * ranks

    def run(rank: int) -> None:
        torch.set_num_threads(_threads(ranks))  # of this thread: OpenMP counts for each caller
        comm = ThreadCommunicator(hub, rank, deadline)
        rank_of_thread.set(comm)
        try:
            results[rank] = fn(comm, *args)
        except SystemExit as end:
            failures[rank] = _died(rank, f"sys.exit({end})")
        except BaseException as error:  # noqa: BLE001 (raised again in the caller's thread)
            _note(error, f"on rank {rank} of {ranks}")
            failures[rank] = _blame(error), error
        hub.leave(rank, failed=failures[rank] is not None)

    before = torch.get_num_threads()
    contexts = [contextvars.copy_context() for _ in range(ranks)]
    threads = [
        threading.Thread(target=context.run, args=(run, rank), name=f"rank {rank}", daemon=True)
        for rank, context in enumerate(contexts)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        for rank in range(ranks):
            hub.leave(rank, failed=True)
        raise
    finally:
        torch.set_num_threads(before)
    _raise_first(failures)
    return [results[rank] for rank in range(ranks)]


def _threads(ranks: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def _job(fn: Callable[..., Any], ranks: int, transport: str, deadline: float) -> dict[str, Any]:
    name, module = getattr(fn, "__qualname__", None), getattr(fn, "__module__", None)
    found: Any = sys.modules.get(module or "")
    for part in (name or "").split("."):
        found = getattr(found, part, None)
    if name is None or found != fn:
        raise TypeError(
            f"{name or fn!r} can't be found by name in another process: pass a function defined at the top level "
            "of a module or script, or use transport='threads'."
        )
    file = None
    if module in ("__main__", MAIN):  # the latter where a rank launches ranks
        main = sys.modules[module]
        module = main.__spec__.name if main.__spec__ is not None and module != MAIN else None
        file = getattr(main, "__file__", None)
        if module is None and file is None:
            raise TypeError(f"{name} was defined in no file (an interactive session?): use transport='threads'.")
    cores, share = sorted(os.sched_getaffinity(0)), _threads(ranks)
    pinned = [cores[rank * share : (rank + 1) * share] for rank in range(ranks)] if ranks <= len(cores) else None
    return {
        "module": module,
        "file": file and os.path.abspath(file),
        "name": name,
        "argv": sys.argv,
        "path": [os.path.abspath(entry) for entry in sys.path],
        "transport": transport,
        "size": ranks,
        "deadline": deadline,
        "threads": share,
        "cores": pinned,
    }


def _failure(directory: Path, rank: int, end: str | None) -> _Failure | None:
    """What a rank that is a process failed of: its own report, or how it ended without one."""
    if (directory / f"error.{rank}").exists():
        report = json.loads((directory / f"error.{rank}").read_text())
        if (report["module"], report["name"]) == ("builtins", "SystemExit"):
            return _died(rank, f"sys.exit({report['message']})")
        error = _error(report)
        _note(error, f"on rank {rank}:\n{report['traceback']}")
        return _blame(error), error
    if (directory / f"result.{rank}").exists():
        return None
    if end is not None:
        return _died(rank, end)
    return _Blame.STOPPED, RankLost(f"rank {rank} was stopped because another rank failed.")


def _died(rank: int, end: str) -> _Failure:
    return _Blame.DIED, RankLost(f"rank {rank} ended without a result: {end}")


def _error(report: dict[str, str]) -> BaseException:
    """The error of a report: of its own class if that is built in or ours and takes one message."""
    home = {"builtins": builtins, "shardsum.errors": errors}.get(report["module"])
    kind = getattr(home, report["name"], None)
    if isinstance(kind, type) and issubclass(kind, BaseException):  # and not `exec`
        try:
            return kind(report["message"])
        except TypeError:  # UnicodeDecodeError takes five arguments
            pass
    return RuntimeError(f"{report['name']}: {report['message']}")


def _note(error: BaseException, note: str) -> None:
    if sys.version_info >= (3, 11):
        error.add_note(note)


def _raise_first(failures: Sequence[_Failure | None]) -> None:
    """Raise the error most to blame, of these the lowest rank's."""
    failed = [(failure[0], rank, failure[1]) for rank, failure in enumerate(failures) if failure is not None]
    if failed:
        _, rank, error = min(failed, key=lambda failure: failure[:2])
        error.rank = rank  # type: ignore[attr-defined]
        raise error

"""Starting ranks on this machine from plain Python, and bringing back every result or the first error."""

from __future__ import annotations

import builtins
import contextvars
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import torch

from .. import errors
from ..errors import RankLost, Unsupported
from . import wire
from .base import DEFAULT_DEADLINE_SECONDS, GRACE_SECONDS
from .connect import launched, mpi_installed
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
    with tempfile.TemporaryDirectory(prefix="shardsum-") as name:
        directory = Path(name)
        wire.save(directory / "arguments.safetensors", tuple(args))
        (directory / "job.json").write_text(json.dumps(_job(fn, ranks, transport, deadline)))
        ends = _run_processes(directory, ranks, transport)
        failures: dict[int, BaseException | None] = {rank: _read_error(directory, rank) for rank in range(ranks)}
        for rank, end in ends.items():
            if failures[rank] is None and not (directory / f"result.{rank}").exists():
                failures[rank] = end
        _raise_first(failures)
        return [wire.load(directory / f"result.{rank}") for rank in range(ranks)]


class _Died(RankLost):
    """A process ended without a word: it lost itself, not a peer."""


def _launch_threads(fn: Callable[..., Result], ranks: int, args: Sequence[Any], deadline: float) -> list[Result]:
    hub = Hub(ranks)
    results: dict[int, Result] = {}
    failures: dict[int, BaseException | None] = {}

    def run(rank: int) -> None:
        torch.set_num_threads(_threads(ranks))  # of this thread: OpenMP counts for each caller
        comm = ThreadCommunicator(hub, rank, deadline)
        launched.set(comm)
        try:
            results[rank] = fn(comm, *args)
        except BaseException as error:  # noqa: BLE001 (raised again in the caller's thread)
            error.add_note(f"on rank {rank} of {ranks}") if hasattr(error, "add_note") else None
            failures[rank] = error
            hub.abandon(rank)

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
    finally:
        torch.set_num_threads(before)
    _raise_first(failures)
    return [results[rank] for rank in range(ranks)]


def _threads(ranks: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def _job(fn: Callable[..., Any], ranks: int, transport: str, deadline: float) -> dict[str, Any]:
    name, module = getattr(fn, "__qualname__", None), getattr(fn, "__module__", None)
    if name is None or module is None or "<" in name:
        raise TypeError(
            f"{name or fn!r} can't be found by name in another process: pass a function defined at the top level "
            "of a module or script, or use transport='threads'."
        )
    file = None
    if module == "__main__":
        main = sys.modules["__main__"]
        module = main.__spec__.name if main.__spec__ is not None else None
        file = getattr(main, "__file__", None)
        if module is None and file is None:
            raise TypeError(f"{name} was defined in no file (an interactive session?): use transport='threads'.")
    cores, share = sorted(os.sched_getaffinity(0)), _threads(ranks)
    pinned = [cores[rank * share : (rank + 1) * share] for rank in range(ranks)] if ranks <= len(cores) else None
    return {
        "module": module,
        "file": file and os.path.abspath(file),
        "name": name,
        "path": [os.path.abspath(entry) for entry in sys.path],
        "transport": transport,
        "size": ranks,
        "deadline": deadline,
        "threads": share,
        "cores": pinned,
        "terminal": _terminal() if transport == "mpi" else None,
    }


def _terminal() -> str | None:
    try:
        return os.ttyname(2) if sys.stderr.isatty() and sys.stdout.isatty() else None
    except OSError:
        return None


def _run_processes(directory: Path, ranks: int, transport: str) -> dict[int, RankLost]:
    """Run all ranks to their ends; what to say of each if it left neither result nor error."""
    worker = [sys.executable, "-m", "shardsum.comm.worker", str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(_threads(ranks)), "PYTHONPATH": os.pathsep.join(sys.path)}
    if transport == "mpi":
        commands = [[*_mpiexec(ranks), *worker]]
        # On one host the shared-memory transport alone starts in 0.1 s instead of 1.0.
        environment |= {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "sm,self"}
    else:
        commands = [[*worker, str(rank)] for rank in range(ranks)]
    group = _Group(commands, environment)
    try:
        deadline: float | None = None
        while group.running() and (deadline is None or time.monotonic() < deadline):
            if deadline is None and (group.failed() or any(directory.glob("error.*[0-9]"))):
                deadline = time.monotonic() + 2 * GRACE_SECONDS
            time.sleep(0.005)
        return _ends(group, ranks, transport)
    finally:
        pids = [int(file.read_text() or 0) for file in directory.glob("pid.*")] if group.running() else []
        group.end(pids)


def _ends(group: _Group, ranks: int, transport: str) -> dict[int, RankLost]:
    codes = [process.returncode for process in group.processes]
    if transport == "gloo":
        return {rank: _end_of(rank, code, code is not None) for rank, code in enumerate(codes)}
    # mpiexec ends all ranks when one dies, and says which it was.
    said = re.findall(r"process rank (\d+)|Process name: \[.*,(\d+)\]", group.last_words())
    first = {int(a or b) for a, b in said}
    return {rank: _end_of(rank, codes[0], rank in first) for rank in range(ranks)}


def _end_of(rank: int, code: int | None, by_itself: bool) -> RankLost:
    if not by_itself:
        return RankLost(f"rank {rank} was stopped because another rank failed.")
    how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit status {code}"
    return _Died(f"rank {rank} ended without a result: {how}.")


def _mpiexec(ranks: int) -> list[str]:
    beside = Path(sys.executable).parent / "mpiexec"
    program = str(beside) if beside.exists() else shutil.which("mpiexec")
    if program is None:
        raise Unsupported("the mpi transport needs mpiexec: pip install 'shardsum[mpi]', or put mpiexec on PATH.")
    command = [program, "-n", str(ranks)]
    if os.geteuid() == 0:
        command.append("--allow-run-as-root")
    cores = len(os.sched_getaffinity(0))
    if ranks > cores:
        return [*command, "--oversubscribe", "--bind-to", "none"]
    return [*command, "--map-by", f"slot:PE={cores // ranks}", "--bind-to", "core"]


class _Group:
    """The processes of one launch, their output passed on as it comes, and their certain end."""

    def __init__(self, commands: list[list[str]], environment: dict[str, str]) -> None:
        self._ending = False
        self._said: list[str] = []
        self.processes = [
            subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            for command in commands
        ]
        self._forwarders = []
        for process in self.processes:
            for pipe, stream in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                assert pipe is not None
                forwarder = threading.Thread(target=self._forward, args=(pipe, stream), daemon=True)
                forwarder.start()
                self._forwarders.append(forwarder)

    def _forward(self, pipe: IO[str], stream: IO[str]) -> None:
        banner = False  # mpiexec's words about an end, between two rules: kept, and said better by our error
        for line in pipe:
            rule = line.startswith("-" * 60)
            if banner or rule:
                self._said.append(line)
            elif not self._ending:
                stream.write(line)
                stream.flush()
            banner ^= rule
        pipe.close()

    def last_words(self) -> str:
        return "".join(self._said)

    def running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def failed(self) -> bool:
        return any(process.poll() not in (None, 0) for process in self.processes)

    def end(self, pids: list[int]) -> None:
        """End what still runs, by asking, then by force; `pids`: ranks that mpiexec would leave behind."""
        self._ending = True
        for kill in (signal.SIGTERM, signal.SIGKILL):
            for process in self.processes:
                if process.poll() is None:
                    os.killpg(process.pid, kill)
            end = time.monotonic() + GRACE_SECONDS
            while self.running() and time.monotonic() < end:
                time.sleep(0.01)
        for pid in pids:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()
        for forwarder in self._forwarders:
            forwarder.join(GRACE_SECONDS)


def _read_error(directory: Path, rank: int) -> BaseException | None:
    file = directory / f"error.{rank}"
    if not file.exists():
        return None
    report = json.loads(file.read_text())
    home = {"builtins": builtins, "shardsum.errors": errors}.get(report["module"])
    kind = getattr(home, report["name"], RuntimeError)
    message = report["message"] if kind is not RuntimeError or home else f"{report['name']}: {report['message']}"
    error: BaseException = kind(message)
    if hasattr(error, "add_note"):
        error.add_note(f"on rank {rank}:\n{report['traceback']}")
    return error


def _raise_first(failures: dict[int, BaseException | None]) -> None:
    """Raise the lowest rank's exception; one that only lost its peer never hides the peer's own."""

    def order(rank: int) -> tuple[bool, bool, int]:
        error = failures[rank]
        return isinstance(error, RankLost), not isinstance(error, _Died), rank

    ranks = sorted((rank for rank, error in failures.items() if error is not None), key=order)
    if ranks:
        error = failures[ranks[0]]
        assert error is not None
        if isinstance(error, _Died):
            error = RankLost(str(error))
        error.rank = ranks[0]  # type: ignore[attr-defined]
        raise error

"""The processes of one launch: how they start, where their words go, and that all of them end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from . import wire
from .failures import raise_first, read_failure
from .job import describe_job, threads_per_rank

# When a rank has failed, the others get this long to say so too before they are ended.
GRACE_SECONDS = 1.0
SHARED_MEMORY = Path("/dev/shm")


def run_processes(kind: type[Processes]) -> Callable[..., list[Any]]:
    """What runs a function on ranks that are processes of this kind."""

    def run(fn: Callable[..., Any], ranks: int, transport: str, args: Sequence[Any], deadline: float) -> list[Any]:
        with tempfile.TemporaryDirectory(prefix=f"shardsum-{os.getpid()}-") as name:
            directory, threads = Path(name), str(threads_per_rank(ranks))
            wire.save(directory / "arguments.safetensors", tuple(args))
            (directory / "job.json").write_text(json.dumps(describe_job(fn, ranks, transport, deadline)))
            worker = [sys.executable, "-m", "shardsum.launching.worker", str(directory)]
            environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(sys.path)}
            ends = kind(directory, ranks).run(worker, environment)
            raise_first([read_failure(directory, rank, ends.get(rank)) for rank in range(ranks)])
            return [wire.load(directory / f"result.{rank}") for rank in range(ranks)]

    return run


def how_it_ended(code: int, words: str) -> str:
    """An exit status, negative if it is a signal, and what was said before it."""
    how = f"exit status {code}" if code >= 0 else f"signal {-code} ({signal.strsignal(-code)})"
    return f"{how}\n{words.strip()}" if words.strip() else how


class Processes:
    """Ranks that are started one by one, and what a launch has beside its directory: processes, pipes and
    the threads that pass on what ranks print.

    A rank takes its standard streams from the directory, once it is connected: a terminal, so that it can show a
    progress bar there, or a named pipe. What comes before that, and a launcher's own words, go into files.
    """

    def __init__(self, directory: Path, ranks: int) -> None:
        self.directory, self.ranks = directory, ranks
        self._forwarders: list[threading.Thread] = []
        self._descriptors: list[int] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self._words: list[Path] = []
        if SHARED_MEMORY.is_dir():
            (SHARED_MEMORY / directory.name).mkdir(mode=0o700)  # as mkdtemp made the directory
        os.mkfifo(directory / "alive")
        self._descriptors.append(os.open(directory / "alive", os.O_RDWR))  # closed when we end, however that is
        for rank in range(ranks):
            self._pass_on(f"stdout.{rank}", sys.stdout)
            self._pass_on(f"stderr.{rank}", sys.stderr)

    def commands(self, worker: list[str]) -> list[list[str]]:
        """What to start, where `worker` is a rank's command but for its number."""
        return [[*worker, str(rank)] for rank in range(self.ranks)]

    def environment(self) -> dict[str, str]:
        """What the commands need in their environment."""
        return {}

    def ends(self, codes: list[int | None], words: list[str]) -> dict[int, str]:
        """How each rank ended that ended by itself, of the commands' exit statuses and what they said."""
        return {rank: how_it_ended(code, words[rank]) for rank, code in enumerate(codes) if code is not None}

    def run(self, worker: list[str], environment: dict[str, str]) -> dict[int, str]:
        """Run all ranks to their ends; how those ended that ended by themselves.

        When one has failed, the others hear of it from their transport and have two `GRACE_SECONDS` left.
        """
        try:
            for command in self.commands(worker):
                self._start(command, environment | self.environment())
            deadline: float | None = None
            while self._running() and (deadline is None or time.monotonic() < deadline):
                if deadline is None and self._failed():
                    deadline = time.monotonic() + 2 * GRACE_SECONDS
                time.sleep(0.005)
            codes = [process.returncode for process in self.processes]
        finally:
            self._end()
        return self.ends(codes, [file.read_text(errors="replace") for file in self._words])

    def _pass_on(self, name: str, stream: TextIO) -> None:
        path, terminal = self.directory / name, _terminal(stream)
        if terminal is not None:
            path.symlink_to(terminal)
            return
        os.mkfifo(path)
        reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # or opening would wait for a writer
        self._descriptors.append(os.open(path, os.O_WRONLY))  # or the pipe would end before the rank has come
        os.set_blocking(reading, True)
        forwarder = threading.Thread(target=_forward, args=(reading, stream), daemon=True)
        forwarder.start()
        self._forwarders.append(forwarder)

    def _start(self, command: list[str], environment: dict[str, str]) -> None:
        self._words.append(self.directory / f"words.{len(self._words)}")
        with self._words[-1].open("ab") as words:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=words,
                start_new_session=True,  # Ctrl-C is for us: we end the ranks
            )
        self.processes.append(process)

    def _running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def _failed(self) -> bool:
        """Whether a rank has reported an error, or ended without a result."""
        directory, ended = self.directory, self.directory.glob("ended.*[0-9]")
        return (
            any(process.poll() not in (None, 0) for process in self.processes)
            or any(directory.glob("error.*[0-9]"))
            or any(not (directory / f"result{file.suffix}").exists() for file in ended)
        )

    def _end(self) -> None:
        """End what still runs, by asking, then by force; return when all that the ranks printed is passed on."""
        for kill in (signal.SIGTERM, signal.SIGKILL):
            for process in self.processes:
                if process.poll() is None:
                    os.killpg(process.pid, kill)
            end = time.monotonic() + 2 * GRACE_SECONDS
            while self._running() and time.monotonic() < end:
                time.sleep(0.005)
        for process in self.processes:
            _end_session(process.pid)
        shutil.rmtree(SHARED_MEMORY / self.directory.name, ignore_errors=True)
        os.write(self._descriptors[0], bytes(self.ranks))  # to each rank still there: end, the directory is ours
        for descriptor in self._descriptors:
            os.close(descriptor)
        for forwarder in self._forwarders:
            forwarder.join(GRACE_SECONDS)  # longer only where a process that a rank started still holds the pipe


def _end_session(leader: int) -> None:
    """End what is left of a process's session: ranks that were stopped, or whose mpiexec went before them."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if os.getsid(int(entry.name)) == leader:
                os.kill(int(entry.name), signal.SIGKILL)


def _terminal(stream: TextIO) -> str | None:
    try:
        name = os.ttyname(stream.fileno()) if stream.isatty() else None
    except OSError:
        return None
    return name if name is not None and os.access(name, os.W_OK) else None


def _forward(reading: int, stream: TextIO) -> None:
    with open(reading, errors="replace", newline="") as pipe:
        for line in pipe:
            with contextlib.suppress(OSError, ValueError):  # a reader who has gone stops no rank
                stream.write(line)
                stream.flush()

"""The processes of one launch: how they start, where their words go, and that all of them end."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

from ..errors import Unsupported
from .base import GRACE_SECONDS

EAGER_BYTES = 1 << 15
# How a rank under mpiexec ended is written down. An end without a result is made one by a signal: of no other does
# Open MPI tell the other ranks (5.0.11, `--with-ft ulfm`).
_RECORDED = """"$@"; status=$?; rank=${OMPI_COMM_WORLD_RANK:-$PMI_RANK}
echo $status > "$0/ended.$rank.unfinished" && mv "$0/ended.$rank.unfinished" "$0/ended.$rank"
test $status -eq 0 && test -e "$0/result.$rank" || kill -KILL $$"""
SHARED_MEMORY = Path("/dev/shm")


def run_processes(directory: Path, ranks: int, transport: str, threads: int) -> dict[int, str]:
    """Run all ranks of the job in `directory` to their ends; how the ranks ended that ended by themselves.

    When one has failed, the others hear of it from their transport and have two `GRACE_SECONDS` left.
    """
    worker = [sys.executable, "-m", "shardsum.comm.worker", str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(sys.path)}
    if transport == "mpi":
        commands = [[*_mpiexec(ranks), "sh", "-c", _RECORDED, str(directory), *worker]]
        # On one host the shared-memory transport alone starts in 0.1 s instead of 1.0.
        environment |= {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "sm,self"}
        # Up to this size a message is copied and gone; beyond it, both sides must be there at the same time. The
        # usual 4 KB are less than one attention state.
        environment |= {"OMPI_MCA_btl_sm_eager_limit": str(EAGER_BYTES)}
        environment |= {"UCX_TLS": "shm,self"}  # the same for MPICH
        if SHARED_MEMORY.is_dir():  # in a place of our own, which we can clear after any end
            environment["OMPI_MCA_btl_sm_backing_directory"] = str(SHARED_MEMORY / directory.name)
    else:
        commands = [[*worker, str(rank)] for rank in range(ranks)]
    group = _Group(directory, ranks)
    try:
        for command in commands:
            group.start(command, environment)
        deadline: float | None = None
        while group.running() and (deadline is None or time.monotonic() < deadline):
            if deadline is None and group.failed():
                deadline = time.monotonic() + 2 * GRACE_SECONDS
            time.sleep(0.005)
        codes = [process.returncode for process in group.processes]
    finally:
        group.end()
    said = [file.read_text(errors="replace") for file in group.said]
    if transport == "mpi":
        ends = {rank: _end(code, said[0]) for rank, code in _recorded_ends(directory).items()}
        if ends or codes[0] is None or any(directory.glob("error.*[0-9]")):
            return ends
        return dict.fromkeys(range(ranks), f"mpiexec: {_end(codes[0], said[0])}")
    return {rank: _end(code, said[rank]) for rank, code in enumerate(codes) if code is not None}


def _recorded_ends(directory: Path) -> dict[int, int]:
    """The status of each rank under mpiexec that has ended, negative if by a signal, as subprocess has it."""
    found = {int(file.suffix[1:]): int(file.read_text()) for file in directory.glob("ended.*[0-9]")}
    return {rank: status if status <= 128 else 128 - status for rank, status in found.items()}


def find_mpiexec() -> str | None:
    """The mpiexec beside this Python, or the one on PATH."""
    beside = Path(sys.executable).parent / "mpiexec"
    return str(beside) if beside.exists() else shutil.which("mpiexec")


@functools.cache
def _version(mpiexec: str) -> str:
    return subprocess.run([mpiexec, "--version"], capture_output=True, text=True, timeout=60).stdout


def reports_lost_ranks(mpiexec: str) -> bool:
    """Whether it knows `--with-ft ulfm`: Open MPI from 5 on does.

    Source: Bland et al. 2013 (Post-failure recovery of MPI communication capability).
    """
    version = re.search(r"Open MPI\D*(\d+)", _version(mpiexec))
    return version is not None and int(version[1]) >= 5


def _mpiexec(ranks: int) -> list[str]:
    program = find_mpiexec()
    if program is None:
        raise Unsupported("the mpi transport needs mpiexec: pip install 'shardsum[mpi]', or put mpiexec on PATH.")
    command, cores = [program, "-n", str(ranks)], len(os.sched_getaffinity(0))
    if "HYDRA" in _version(program):  # MPICH's
        return [*command, "-iface", "lo", "-bind-to", f"core:{cores // ranks}" if ranks <= cores else "none"]
    if reports_lost_ranks(program):
        command += ["--with-ft", "ulfm"]
    if os.geteuid() == 0:
        command.append("--allow-run-as-root")
    if ranks > cores:
        return [*command, "--oversubscribe", "--bind-to", "none"]
    return [*command, "--map-by", f"slot:PE={cores // ranks}", "--bind-to", "core"]


def _end(code: int, said: str) -> str:
    how = f"exit status {code}" if code >= 0 else f"signal {-code} ({signal.strsignal(-code)})"
    return f"{how}\n{said.strip()}" if said.strip() else how


class _Group:
    """What a launch holds beside its directory: processes, pipes, and the threads that pass on what ranks print.

    A rank takes its standard streams from the directory, once it is connected: a terminal, so that it can show a
    progress bar there, or a named pipe. What comes before that, and mpiexec's own words, go into files.
    """

    def __init__(self, directory: Path, ranks: int) -> None:
        self._directory, self._ranks = directory, ranks
        self._forwarders: list[threading.Thread] = []
        self._held: list[int] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.said: list[Path] = []
        if SHARED_MEMORY.is_dir():
            (SHARED_MEMORY / directory.name).mkdir(mode=0o700)  # as mkdtemp made the directory
        os.mkfifo(directory / "alive")
        self._held.append(os.open(directory / "alive", os.O_RDWR))  # closed when we end, however that is
        for rank in range(ranks):
            self._give(f"stdout.{rank}", sys.stdout)
            self._give(f"stderr.{rank}", sys.stderr)

    def _give(self, name: str, stream: TextIO) -> None:
        path, terminal = self._directory / name, _terminal(stream)
        if terminal is not None:
            path.symlink_to(terminal)
            return
        os.mkfifo(path)
        reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # or opening would wait for a writer
        self._held.append(os.open(path, os.O_WRONLY))  # or the pipe would end before the rank has come
        os.set_blocking(reading, True)
        forwarder = threading.Thread(target=_forward, args=(reading, stream), daemon=True)
        forwarder.start()
        self._forwarders.append(forwarder)

    def start(self, command: list[str], environment: dict[str, str]) -> None:
        self.said.append(self._directory / f"said.{len(self.said)}")
        with self.said[-1].open("ab") as said:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,  # Ctrl-C is for us: we end the ranks
            )
        self.processes.append(process)

    def running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def failed(self) -> bool:
        """Whether a rank has reported an error, or ended without a result."""
        directory, ended = self._directory, self._directory.glob("ended.*[0-9]")
        return (
            any(process.poll() not in (None, 0) for process in self.processes)
            or any(directory.glob("error.*[0-9]"))
            or any(not (directory / f"result{file.suffix}").exists() for file in ended)
        )

    def end(self) -> None:
        """End what still runs, by asking, then by force; return when all that the ranks printed is passed on."""
        for kill in (signal.SIGTERM, signal.SIGKILL):
            for process in self.processes:
                if process.poll() is None:
                    os.killpg(process.pid, kill)
            end = time.monotonic() + 2 * GRACE_SECONDS
            while self.running() and time.monotonic() < end:
                time.sleep(0.005)
        for process in self.processes:
            _end_session(process.pid)
        shutil.rmtree(SHARED_MEMORY / self._directory.name, ignore_errors=True)
        os.write(self._held[0], bytes(self._ranks))  # to each rank still there: end, the directory is ours
        for held in self._held:
            os.close(held)
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

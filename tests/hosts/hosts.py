"""The hosts of a test: starting programs on them, capping and cutting their links, and ending everything."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from .room import address

ROOM = Path(__file__).with_name("room.py")
ROOT = Path(__file__).parents[2]
# Another user than root gets a user namespace first, in which he is root.
AS_ROOT = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
UNSHARE = ["unshare", *AS_ROOT, "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]

# A shell on a host, given its arguments as ssh is: mpiexec starts its daemons by it. Each host has its own cores.
SHELL = """#!/bin/sh
host={directory}/$1
shift
exec nsenter --target "$(cat $host.pid)" --net --uts --mount -- taskset --cpu-list "$(cat $host.cores)" sh -c "$*"
"""


@functools.cache
def refused() -> str:
    """Why there can be no hosts here; empty where there can."""
    try:
        done = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError as missing:
        return str(missing)
    return "" if done.returncode == 0 else done.stderr.strip() or f"exit status {done.returncode}"


class Program:
    """One program on a host, and what it has said so far."""

    def __init__(self, process: subprocess.Popen[bytes], said: Path) -> None:
        self._process, self._said = process, said

    @property
    def said(self) -> str:
        return self._said.read_text(errors="replace")

    def wait(self, seconds: float) -> int:
        """Its exit status."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s, and said:\n{self.said}") from None


class Hosts:
    """So many hosts, called h1, h2, ..., in one network; within `with`, and gone after it.

    As Debian sets machines up, a host's own name means 127.0.1.1 on it; the others' mean their addresses.
    """

    def __init__(self, count: int, bytes_per_second: int | None = None) -> None:
        self.names = [f"h{number}" for number in range(1, count + 1)]
        self.addresses = dict(zip(self.names, map(address, range(1, count + 1)), strict=True))
        self._bytes_per_second = bytes_per_second
        self._programs: list[Program] = []

    def __enter__(self) -> Hosts:
        self._directory = tempfile.TemporaryDirectory(prefix="hosts-", ignore_cleanup_errors=True)
        self.directory = Path(self._directory.name)
        for number, name in enumerate(self.names):
            self._describe(name, number)
        self.shell = self.directory / "shell"
        self.shell.write_text(SHELL.format(directory=self.directory))
        self.shell.chmod(0o755)
        command = [*UNSHARE, sys.executable, str(ROOM), str(self.directory), *self.names]
        self._room = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self._hear("ready")
            if self._bytes_per_second is not None:
                self._order(do="cap", bytes_per_second=self._bytes_per_second)
        except BaseException:
            self._end()
            raise
        return self

    def _describe(self, name: str, number: int) -> None:
        """Write the host's cores, and the names that it knows; one for each address, or somebody asks a server."""
        cores = sorted(os.sched_getaffinity(0))
        own = cores[number :: len(self.names)] or [cores[number % len(cores)]]
        (self.directory / f"{name}.cores").write_text(",".join(map(str, own)))
        known = ["127.0.0.1 localhost", f"127.0.1.1 {name}"]
        for other, where in self.addresses.items():
            known.append(f"{where} {other}.net" + (f" {other}" if other != name else ""))
        (self.directory / f"{name}.hosts").write_text("\n".join(known) + "\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        """End the room, and with it every process, interface and mount in it."""
        self._room.communicate(timeout=30)  # no more orders: it ends
        for program in self._programs:
            program.wait(10)
        self._directory.cleanup()

    def _order(self, **order: object) -> None:
        _pipe(self._room.stdin).write(json.dumps(order) + "\n")
        _pipe(self._room.stdin).flush()
        self._hear("done")

    def _hear(self, word: str) -> None:
        said = _pipe(self._room.stdout).readline()
        if said != f"{word}\n":
            raise RuntimeError(f"the room of the hosts said {said!r} in place of {word!r}.")

    def cut(self, host: str) -> None:
        """Let nothing through to or from the host from now on."""
        self._order(do="cut", host=host)

    def start(self, host: str, command: str, environment: Mapping[str, str] | None = None) -> Program:
        """Start a program on a host, by the shell, in the root of the repository."""
        said = self.directory / f"said.{len(self._programs)}"
        given = {"TMPDIR": "/dev/shm", **(environment or {})}
        room = [
            "nsenter",
            "--target",
            str(self._room.pid),
            *(["--user", "--preserve-credentials"] if AS_ROOT else []),
        ]
        room += ["--net", "--mount", f"--pid=/proc/{self._room.pid}/ns/pid_for_children", "--"]
        words = [str(self.shell), host, f"cd {ROOT} && {command}"]
        with said.open("wb") as file:
            process = subprocess.Popen(
                [*room, *words],
                env={**os.environ, **given},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._programs.append(Program(process, said))
        return self._programs[-1]

    def run(self, host: str, command: str, seconds: float = 20) -> str:
        """What a program says on a host, once it has ended well."""
        program = self.start(host, command)
        status = program.wait(seconds)
        assert status == 0, f"exit status {status}: {program.said}"
        return program.said

    def wait_for(self, files: Sequence[Path], seconds: float) -> None:
        """Return when the programs have made all files."""
        end = time.monotonic() + seconds
        while missing := [file.name for file in files if not file.exists()]:
            said = "\n".join(program.said for program in self._programs)
            assert time.monotonic() < end, f"{missing} not there after {seconds} s, and the programs said:\n{said}"
            time.sleep(0.02)


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream

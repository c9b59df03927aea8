"""Running the command as the shell does: its exit status and what it wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from shardsum.cli import main

BESIDE = Path(sys.executable).parent
LAUNCHERS = {
    "mpiexec": ["mpiexec", "-n", "2", "--allow-run-as-root", "--oversubscribe", sys.executable, "-m", "shardsum"],
    "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "-m", "shardsum"],
}


class Done(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def shardsum(capsys: pytest.CaptureFixture[str], *arguments: object) -> Done:
    """The command in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return Done(int(ended.value.code or 0), *capsys.readouterr())


def launched(launcher: str, *arguments: object) -> Done:
    """The command as two ranks of mpiexec or torchrun."""
    command = [str(BESIDE / LAUNCHERS[launcher][0]), *LAUNCHERS[launcher][1:], *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def assert_refused(done: Done, *words: str) -> None:
    """Exit status 2, one line on standard error that has these words, nothing on standard output."""
    assert (done.status, done.out) == (2, ""), done
    assert done.err.startswith("shardsum: ")
    assert done.err.count("\n") == 1, done.err
    assert all(word in done.err for word in words), done.err

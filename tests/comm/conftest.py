"""That nothing stays behind, whatever the end of a launch, and nothing is unpickled."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ..unpickling import nothing_is_unpickled

__all__ = ["nothing_is_unpickled", "nothing_stays_behind"]


@pytest.fixture
def nothing_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """No process, directory, shared memory or thread that was not there before."""
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    monkeypatch.setenv("SHARDSUM_TEST_MARK", mark)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    threads = set(threading.enumerate())
    yield
    end = time.monotonic() + 5
    while (_processes(mark) or not set(threading.enumerate()) <= threads) and time.monotonic() < end:
        time.sleep(0.05)
    assert _processes(mark) == []
    assert not [name for name in os.listdir(tmp_path) if name.startswith(("shardsum", "ompi", "prte", "pmix"))]
    assert _shared_memory_of_nobody() == []
    assert set(threading.enumerate()) <= threads


def _shared_memory_of_nobody() -> list[str]:
    """What launches left there of this process, or of one that has ended; others may run beside the tests."""
    found = [name for name in os.listdir("/dev/shm") if name.startswith("shardsum-")]
    owners = {name: int(name.split("-")[1]) for name in found}
    return [name for name in found if owners[name] == os.getpid() or not Path(f"/proc/{owners[name]}").exists()]


def _processes(mark: str) -> list[int]:
    """The live processes that inherited this test's mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if f"SHARDSUM_TEST_MARK={mark}".encode() in environment:
                found.append(int(entry.name))
    return found

"""How commands end: by a signal at any moment, or without a place for the result; nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from .run import BESIDE, assert_refused, shardsum

ENDINGS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}
MOMENTS = (0.3, 1.5, 3.0, 4.5, 6.0)  # seconds: from the first imports to the sum


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seconds of work for the eager kernel."""
    folder, generator = tmp_path_factory.mktemp("arrays"), np.random.default_rng(0)
    for name, rows in (("q", 8192), ("k", 16384), ("v", 16384)):
        np.save(folder / f"{name}.npy", generator.standard_normal((1, 8, rows, 64)).astype("f4"))
    return folder


def attend(arrays: Path, output: Path, *options: str) -> list[str]:
    inputs = [option for name in "qkv" for option in (f"-{name}", str(arrays / f"{name}.npy"))]
    return [str(BESIDE / "shardsum"), "attend", *inputs, "-o", str(output), "-n", "2", *options]


def working_in(folder: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if (entry / "cwd").readlink() == folder and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


EACH = [
    pytest.param(transport, number, moment, marks=[] if at == index % 5 else pytest.mark.nightly)
    for index, (transport, number) in enumerate((t, n) for t in ("threads", "gloo", "mpi") for n in ENDINGS)
    for at, moment in enumerate(MOMENTS)
]


@pytest.mark.parametrize(("transport", "number", "moment"), EACH)
def test_a_signal_ends_it_in_one_line(
    arrays: Path, tmp_path: Path, transport: str, number: signal.Signals, moment: float
) -> None:
    temporary, results = tmp_path / "temporary", tmp_path / "results"
    temporary.mkdir()
    results.mkdir()
    run = subprocess.Popen(
        attend(arrays, results / "o.npy", "--transport", transport, "--kernel", "eager"),
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(moment)
    run.send_signal(number)
    _, said = run.communicate(timeout=30)
    status, word = ENDINGS[number]
    assert (run.returncode, said) == (status, f"shardsum: {word}\n")
    end = time.monotonic() + 5.0
    while working_in(tmp_path) and time.monotonic() < end:
        time.sleep(0.05)
    assert working_in(tmp_path) == []
    assert [*temporary.iterdir(), *results.iterdir()] == []


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_what_can_not_be_written_is_said_before_the_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    np.save(tmp_path / "w.npy", np.ones((3, 5), "f4"))
    np.save(tmp_path / "v.npy", np.ones((5, 7), "f4"))
    given = ["attend", "--weights", tmp_path / "w.npy", "-v", tmp_path / "v.npy", "--transport", "threads", "-o"]
    monkeypatch.setattr("shardsum.cli.attend.weighted_sum", None)  # which is not to be reached
    long = "x" * 252 + suffix
    assert_refused(shardsum(capsys, *given, tmp_path / long), "name has", "bytes, more than the folder's 255")
    assert_refused(shardsum(capsys, *given, tmp_path / "no" / f"o{suffix}"), "no such folder")
    (tmp_path / f"folder{suffix}").mkdir()
    assert_refused(shardsum(capsys, *given, tmp_path / f"folder{suffix}"), "is a folder")
    usage = type("Usage", (), {"free": 3 * 7 * 4 - 1})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    assert_refused(
        shardsum(capsys, *given, tmp_path / f"o{suffix}"), "no space for", "takes 84 bytes, and 83 are free"
    )
    monkeypatch.setattr("os.access", lambda *_: False)
    assert_refused(shardsum(capsys, *given, tmp_path / f"o{suffix}"), "can't be written to")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"folder{suffix}", "v.npy", "w.npy"]


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_a_disk_that_fills_up_while_it_is_written(tmp_path: Path, suffix: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in "qkv":
        np.save(tmp_path / f"{name}.npy", torch.randn((1, 2, 256, 64), generator=generator).numpy())
    results = tmp_path / "results"
    results.mkdir()
    limit = 64 << 10  # bytes of a file; the result has twice that
    done = subprocess.run(
        attend(tmp_path, results / f"o{suffix}", "--transport", "threads"),
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"can't write {results / f'o{suffix}'}: " in done.stderr
    assert "too large" in done.stderr
    assert list(results.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system of 256 KB")
def test_a_full_disk(tmp_path: Path) -> None:
    for name in "qkv":
        np.save(tmp_path / f"{name}.npy", np.ones((1, 2, 4096, 64), "f4"))
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        command = [sys.executable, "-m", "shardsum", *attend(tmp_path, small / "o.npy", "--transport", "gloo")[1:]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "no space for" in done.stderr
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)

"""The C++ kernels alone, on random problems in memory of exactly their size: native/tests/fuzz.cpp."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from shardsum.extension import instruction_sets

NATIVE = Path(__file__).parents[2] / "native"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all -g"
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def built(folder: Path, *options: str) -> Path:
    """The program, compiled with these options of CMake."""
    configure = ["cmake", "-S", str(NATIVE), "-B", str(folder), "-DSHARDSUM_FUZZ=ON", *options]
    for command in (configure, ["cmake", "--build", str(folder), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "fuzz"


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "problems right, on" in done.stdout


@pytest.mark.timeout(600)
def test_random_problems(tmp_path: Path) -> None:
    """The best instruction set, compiled in half the time; the next one has all of them, as they are installed."""
    best = (*instruction_sets(), "portable")[0]
    run(built(tmp_path, "-DSHARDSUM_OPTIMIZATION=-O1", f"-DSHARDSUM_ISA={best}"), "100")


@pytest.mark.nightly
@pytest.mark.timeout(3000)
def test_many_random_problems(tmp_path: Path) -> None:
    run(built(tmp_path), "10000", "1000")


@pytest.mark.nightly
@pytest.mark.timeout(3000)
def test_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    """Compiled with -O1, which takes less than half as long."""
    run(built(tmp_path, f"-DCMAKE_CXX_FLAGS={SANITIZERS}", "-DSHARDSUM_OPTIMIZATION=-O1"), "2000", "20000")


@pytest.mark.nightly
@pytest.mark.timeout(3000)
@pytest.mark.skipif(
    not (shutil.which(CROSS) and shutil.which(EMULATOR)),
    reason=f"needs {CROSS} and {EMULATOR} (Debian's packages)",
)
def test_on_aarch64(tmp_path: Path) -> None:
    target = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={CROSS}")
    run(EMULATOR, "-L", "/usr/aarch64-linux-gnu", built(tmp_path, *target), "500")

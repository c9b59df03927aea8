"""Building the C++ kernels: what is said where something is missing, and the suite with other builds of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from shardsum.extension import instruction_sets

from .test_fuzz import NATIVE, SANITIZERS

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
REMEDY = "SHARDSUM_NATIVE=0 pip install shardsum"


def configured(folder: Path, **environment: str) -> str:
    """What CMake says in this environment; it must have failed if this names a compiler."""
    command = ["cmake", "-S", str(NATIVE), "-B", str(folder), "-DSHARDSUM_FUZZ=ON"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert (done.returncode != 0) == ("CXX" in environment), done.stdout + done.stderr
    return " ".join(done.stderr.split())


def test_without_a_compiler_and_once_there_is_one(tmp_path: Path) -> None:
    said = configured(tmp_path, CXX="/nonexistent")
    assert "need a C++ compiler: install g++ or clang" in said
    assert REMEDY in said
    configured(tmp_path)


def test_without_openmp(tmp_path: Path) -> None:
    compiler = tmp_path / "clang without libomp"
    compiler.write_text('#!/bin/sh\ncase "$*" in *openmp*) exit 1;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    said = configured(tmp_path / "build", CXX=str(compiler))
    assert "need OpenMP" in said
    assert REMEDY in said


def run_suite(*arguments: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-m", "not nightly", *arguments]
    done = subprocess.run(
        command, cwd=NATIVE.parent, capture_output=True, text=True, check=False, env=os.environ | environment
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.nightly
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("isa", instruction_sets()[1:])
def test_the_suite_with_every_instruction_set(isa: str) -> None:
    """The best is what all other tests run."""
    distributed = (f"tests/distributed/test_{name}.py" for name in ("strategies", "gradients"))
    run_suite("tests/kernels/test_kernels.py", *distributed, "--instruction-set", isa)


@pytest.mark.nightly
@pytest.mark.timeout(6000)
def test_the_suite_under_sanitizers(tmp_path: Path) -> None:
    """Of memory and of undefined behaviour, in the module that Python loads."""
    options = {"SHARDSUM_OPTIMIZATION": "-O1", "CMAKE_CXX_FLAGS": SANITIZERS}
    settings = [f"-Ccmake.define.{name}={value}" for name, value in options.items()]
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), *settings]
    wheel += [f"-Cbuild-dir={tmp_path / 'build'}", "-Cinstall.strip=false", str(NATIVE.parent)]
    done = subprocess.run(wheel, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as files:
        (name,) = (name for name in files.namelist() if Path(name).name.startswith("_native."))
        module = files.extract(name, tmp_path)
    suite = ["tests/kernels/test_kernels.py", *map(str, Path(__file__).parent.glob("test_native_*.py"))]
    # The first library passes on the second's exceptions. Python and torch keep memory to their ends, which is not
    # what is looked for.
    before = f"{library('libasan.so')} {library('libstdc++.so')}"
    run_suite(*suite, "-s", "--native", module, LD_PRELOAD=before, ASAN_OPTIONS="detect_leaks=0")


def library(name: str) -> str:
    found = subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()

"""Building the C++ kernels where something is missing: one sentence says what, and its remedy works."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from .test_fuzz import NATIVE

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

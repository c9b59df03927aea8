"""`shardsum doctor` says what is used, and why."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys

import pytest
import torch

from shardsum.kernels import NativeKernel, as_kernel, compiled

from .run import assert_refused, shardsum


def test_it_names_the_kernel_that_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    found = shardsum(capsys, "doctor", "--json").json
    assert found["kernel_on_cpu"] == as_kernel("auto").name
    assert found["torch"] == torch.__version__
    assert "portable" in found["instruction_sets"]  # `make test` builds the native kernels
    assert "instruction sets" in shardsum(capsys, "doctor").out


def test_it_says_what_becomes_of_the_others_when_a_rank_of_mpi_dies(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "of your own pass it too" in shardsum(capsys, "doctor", "--json").json["mpi_lost_ranks"]
    module = importlib.import_module("shardsum.cli.doctor")  # the package has a command of that name
    for found, words in (("true", "ends the whole job"), (None, "no mpiexec")):  # `true` is no Open MPI
        monkeypatch.setattr(module, "find_mpiexec", lambda found=found: found)
        assert words in shardsum(capsys, "doctor", "--json").json["mpi_lost_ranks"]


def test_without_native_kernels_it_says_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "native_module", lambda: None)
    found = shardsum(capsys, "doctor", "--json").json
    assert found["kernel_on_cpu"] == "aten"
    assert found["native_kernels"] == NativeKernel.why_not()
    with pytest.raises(ValueError, match="built without its native kernels: install it again"):
        NativeKernel()
    with pytest.warns(UserWarning, match=r"built without its native kernels: .* kernel='auto' is 'aten'"):
        assert as_kernel("auto").name == "aten"
    as_kernel("auto")  # it warns once
    as_kernel("aten")


def test_without_optional_packages_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Blocker:
        """Neither found, nor looked for elsewhere."""

        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name.partition(".")[0] in ("mpi4py", "transformers"):
                raise ModuleNotFoundError(f"No module named {name!r}")

    real = importlib.metadata.version

    def version(package: str) -> str:
        if package in ("mpi4py", "transformers"):
            raise importlib.metadata.PackageNotFoundError(package)
        return real(package)

    for name in ("mpi4py", "transformers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Blocker, *sys.meta_path])
    monkeypatch.setattr(importlib.metadata, "version", version)
    found = shardsum(capsys, "doctor", "--json").json
    assert "pip install 'shardsum[mpi]'" in found["mpi"]
    assert "pip install 'shardsum[hf]'" in found["models"]
    assert shardsum(capsys, "explain", "--numbers", "1/2", "--json").json["result"] == [3]
    done = shardsum(capsys, "explain", "--transport", "mpi")
    assert_refused(done, "pip install 'shardsum[mpi]'")

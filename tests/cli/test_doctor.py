"""`shardsum doctor` says what is used, and why."""

from __future__ import annotations

import pytest
import torch

from shardsum.kernels import NativeKernel, as_kernel, operators, why_not_native

from .run import shardsum


def test_it_names_the_kernel_that_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    found = shardsum(capsys, "doctor", "--json").json
    assert found["kernel_on_cpu"] == as_kernel("auto").name
    assert found["torch"] == torch.__version__
    assert "portable" in found["instruction_sets"]  # `make test` builds the native kernels
    assert "instruction sets" in shardsum(capsys, "doctor").out


def test_without_native_kernels_it_says_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "native_module", lambda: None)
    found = shardsum(capsys, "doctor", "--json").json
    assert found["kernel_on_cpu"] == "aten"
    assert found["native_kernels"] == why_not_native()
    with pytest.raises(ValueError, match="built without its native kernels: install it again"):
        NativeKernel()

"""Shapes in signatures of the inner modules are checked while the tests run; options for the native kernels."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# Not the public operations and what they refuse: their own errors for wrong shapes are tested.
INNER = ["masks", "collectives", "geometry", "kernels", "partials", "strategies"]
install_import_hook([f"shardsum.{name}" for name in INNER], "beartype.beartype")

# The machine is shared: how long an example takes says nothing.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("native kernels")
    group.addoption("--instruction-set", help="Run them as compiled for this one alone: avx2, portable, ...")
    group.addoption("--native", metavar="FILE", help="The module to run in place of the installed one.")


def pytest_configure(config: pytest.Config) -> None:
    """Before any test asks for the native kernels. Ranks in processes of their own run what is installed."""
    file, name = config.getoption("--native"), config.getoption("--instruction-set")
    if file is not None:
        spec = importlib.util.spec_from_file_location("shardsum._native", file)
        assert spec is not None
        assert spec.loader is not None
        sys.modules["shardsum._native"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["shardsum._native"])
    if name is not None:
        native = importlib.import_module("shardsum._native")
        if name not in native.instruction_sets():
            raise pytest.UsageError(f"--instruction-set must be of {native.instruction_sets()}: got {name!r}.")
        native.instruction_sets = lambda: [name]
    if hasattr(config, "workerinput"):  # several of pytest-xdist: threads that wait for a core spin
        torch.set_num_threads(1)

"""Shapes in the signatures of the inner modules are checked while the tests run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# Not the public operations and what they refuse: their own errors for wrong shapes are tested.
INNER = ["masks", "collectives", "kernels", "strategies"]
install_import_hook([f"shardsum.{name}" for name in INNER], "beartype.beartype")

# The machine is shared: how long an example takes says nothing.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(
        config, "workerinput"
    ):  # one of several of pytest-xdist: threads that wait for each other's core spin
        torch.set_num_threads(1)

"""Hosts for the tests of this folder; skipped where the kernel refuses namespaces."""

from __future__ import annotations

import pytest

from .hosts import refused


@pytest.fixture(autouse=True, scope="session")
def hosts_are_allowed() -> None:
    if refused():
        pytest.skip(f"hosts are made of namespaces, which are not allowed here: {refused()}")

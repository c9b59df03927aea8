"""`shardsum bench collectives`: what it prints."""

from __future__ import annotations

import pytest

from shardsum.collectives import COLLECTIVES

from .run import shardsum


def test_collectives_has_every_side_with_ratios_and_targets(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-n", "2", "--transport", "mpi", "--largest", "16384", "--repetitions", "1", "--json"]
    line = shardsum(capsys, "bench", "collectives", *arguments).json
    sides = ("auto", "agreement", "agreement and auto", *COLLECTIVES)
    ours = {f"{transport} {name}" for transport in ("mpi", "gloo") for name in sides}
    raw = {"mpi4py Allgather", "mpi4py Allreduce", "gloo max+sum", "gloo all_reduce"}
    assert line["seconds"].keys() == ours | raw
    assert line["ratio"].keys() == (ours | raw) - {"mpi auto"}
    assert line["state_bytes"] == 32 * 129 * 4
    assert line["target"] == {"mpi4py Allgather": 0.333, "gloo max+sum": 8.0}
    assert all(seconds > 0 for seconds in line["seconds"].values())

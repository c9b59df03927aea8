"""A rank on another host that is killed, a host whose link is cut: RankLost on every rank left, in time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from .hosts import Hosts
from .jobs import report, start
from .worker import DEADLINE_SECONDS

LOST = 1


def lose(launcher: str, count: int, how: str, directory: Path) -> tuple[float, dict[int, Any]]:
    """What the ranks say once rank 1 is lost, those that can, and how long it took all of them in seconds."""
    with Hosts(count) as hosts:
        start(launcher, hosts, 1, "lost", directory)
        hosts.wait_for([directory / f"pid.{rank}" for rank in range(count)], 60)
        begin = time.monotonic()
        if how == "cut":
            hosts.cut("h2")
        else:
            hosts.run("h2", f"kill -9 {(directory / 'pid.1').read_text()}")
        left = [rank for rank in range(count) if how == "cut" or rank != 1]
        hosts.wait_for([directory / f"result.{rank}" for rank in left], 3 * DEADLINE_SECONDS)
        seconds = time.monotonic() - begin
    return seconds, {rank: report(directory, rank)["found"]["lost"] for rank in left}


@pytest.mark.parametrize(
    ("launcher", "count", "how"),
    [
        ("torchrun", 2, "kill"),
        ("mpiexec", 3, "cut"),
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in [
                ("torchrun", 3, "kill"),
                ("torchrun", 3, "cut"),
                ("mpiexec", 2, "kill"),
                ("mpiexec", 3, "kill"),
            ]
        ),
    ],
)
def test_every_rank_hears_of_it_in_time(launcher: str, count: int, how: str, tmp_path: Path) -> None:
    seconds, found = lose(launcher, count, how, tmp_path)
    for rank, said in found.items():
        # The others name it; a host that is cut off misses any of them.
        assert (f"rank {LOST}" if rank != LOST else "rank 0" if count == 2 else "waited") in said["error"], found
        assert said["seconds"] < DEADLINE_SECONDS + 1, found
    # Who waits for the lost rank itself hears of its end at once; who waits for another, by the deadline.
    assert seconds < (1 if how == "kill" and count == 2 else DEADLINE_SECONDS + 2)

"""A rank that ends, however and whenever: the others hear which one it was, soon, and nothing is left behind."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path

import pytest

from shardsum import RankLost
from shardsum.comm import launch

from .ends import HOW, VICTIM, WHEN, end_at

pytestmark = pytest.mark.usefixtures("nothing_stays_behind")

RANKS = 3
DEADLINE = 4.0
# Of these the transport tells nobody: a rank that is stopped is one that takes its time.
SILENT = ("SIGSTOP",)
RAISED = {"exception": ZeroDivisionError, "out of memory": MemoryError, "Ctrl-C": KeyboardInterrupt}


def _soon() -> float:
    """One second, as many times as there is work for the cores."""
    return max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


def _check(transport: str, how: str, when: str, directory: Path) -> None:
    deadline = DEADLINE if how in SILENT else 60.0
    start = time.monotonic()
    with pytest.raises(RAISED.get(how, RankLost)) as raised:
        launch(end_at, RANKS, transport, (how, when, str(directory)), deadline)
    assert time.monotonic() - start < 50
    ended = float((directory / "ended").read_text())
    if how not in (*SILENT, "closed sockets"):
        assert raised.value.rank == VICTIM  # type: ignore[attr-defined]
    for rank in range(RANKS):
        heard = directory / f"heard.{rank}"
        if rank == VICTIM or (how == "exception" and not heard.exists()):
            continue
        message, at = json.loads(heard.read_text())
        # A rank whose own sockets are closed misses another itself, and may be the first to say so.
        assert ("rank" if how == "closed sockets" else f"rank {VICTIM}") in message, message
        assert at - ended < (deadline if how in SILENT else 0.0) + 1.0 + _soon(), message


SOME = [
    ("gloo", "SIGKILL", "payload"),
    ("gloo", "SIGSTOP", "agreement"),
    ("mpi", "SIGKILL", "backward"),
    ("mpi", "os._exit", "payload"),
    ("mpi", "SIGSTOP", "decode"),
]
# Between ranks of one machine MPI has memory in common, and no sockets.
ALL = [x for x in itertools.product(("gloo", "mpi"), HOW, WHEN) if x[:2] != ("mpi", "closed sockets")]


@pytest.mark.parametrize(("transport", "how", "when"), SOME)
def test_a_rank_that_ends(transport: str, how: str, when: str, tmp_path: Path) -> None:
    _check(transport, how, when, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize(("transport", "how", "when"), ALL)
def test_a_rank_that_ends_however_and_whenever(transport: str, how: str, when: str, tmp_path: Path) -> None:
    _check(transport, how, when, tmp_path)

"""A rank that ends, however and whenever: the others hear which one it was, soon, and nothing is left behind."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path

import pytest

from shardsum import RankLost
from shardsum.launching import launch

from .ends import ALSO, HOW, VICTIM, WHEN, call_once_it_has_ended, end_at

pytestmark = pytest.mark.usefixtures("nothing_stays_behind")

RANKS = 3
DEADLINE = 4.0
# Of these the transport tells nobody: a rank that is stopped is one that takes its time.
SILENT = ("SIGSTOP", "asleep", "asleep with the interpreter's lock", "waits for itself")
RAISED: dict[str, type[BaseException]] = {
    "exception": ZeroDivisionError,
    "out of memory": MemoryError,
    "Ctrl-C": KeyboardInterrupt,
    "assertion": AssertionError,
    "StopIteration": StopIteration,
    "recursion without end": RecursionError,
    "an exception of one's own": RuntimeError,
    "an exception that takes more than words": RuntimeError,
    "no memory for a tensor": RuntimeError,
}
# Between ranks of one machine MPI has memory in common, and no sockets.
SOCKETS = ("closed sockets", "half-closed sockets", "closed descriptors")


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
    if how not in (*SILENT, *SOCKETS):
        assert raised.value.rank == VICTIM  # type: ignore[attr-defined]
    for rank in range(RANKS):
        heard = directory / f"heard.{rank}"
        if rank == VICTIM or (how in RAISED and not heard.exists()):
            continue
        message, at = json.loads(heard.read_text())
        # A rank whose own sockets are closed misses another itself, and may be the first to say so.
        assert ("rank" if how in SOCKETS else f"rank {VICTIM}") in message, message
        assert at - ended < (deadline if how in SILENT else 0.0) + 1.0 + _soon(), message


SOME = [
    ("gloo", "SIGKILL", "payload"),
    ("gloo", "SIGSTOP", "agreement"),
    ("mpi", "SIGKILL", "backward"),
    ("mpi", "os._exit", "payload"),
    ("mpi", "SIGSTOP", "decode"),
]
ALL = [
    *itertools.product(("gloo", "mpi"), HOW, WHEN),
    *((transport, how, WHEN[i % len(WHEN)]) for transport in ("gloo", "mpi") for i, how in enumerate(ALSO)),
]


@pytest.mark.parametrize(("transport", "how", "when"), SOME)
def test_a_rank_that_ends(transport: str, how: str, when: str, tmp_path: Path) -> None:
    _check(transport, how, when, tmp_path)


@pytest.mark.parametrize("transport", ["gloo", "mpi"])
def test_a_call_that_begins_once_a_rank_has_ended(transport: str, tmp_path: Path) -> None:
    with pytest.raises(RankLost):
        launch(call_once_it_has_ended, RANKS, transport, (str(tmp_path),), deadline=60.0)
    for rank in {*range(RANKS)} - {VICTIM}:
        assert f"rank {VICTIM}" in (tmp_path / f"heard.{rank}").read_text()


@pytest.mark.nightly
@pytest.mark.parametrize(("transport", "how", "when"), [x for x in ALL if x[0] == "gloo" or x[1] not in SOCKETS])
def test_a_rank_that_ends_however_and_whenever(transport: str, how: str, when: str, tmp_path: Path) -> None:
    _check(transport, how, when, tmp_path)

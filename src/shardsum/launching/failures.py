"""What ranks failed of, and which of several errors is the one to raise."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path

from .. import errors
from ..errors import RankLost


class Blame(IntEnum):
    """Which of several ranks' errors is the one to raise: the one that can have caused the others."""

    FAILED = 0
    DIED = 1
    LOST_A_PEER = 2
    STOPPED = 3


Failure = tuple[Blame, BaseException]


def blame(error: BaseException) -> Blame:
    return Blame.LOST_A_PEER if isinstance(error, RankLost) else Blame.FAILED


def read_failure(directory: Path, rank: int, end: str | None) -> Failure | None:
    """What a rank that is a process failed of: its own report, or how it ended without one."""
    if (directory / f"error.{rank}").exists():
        report = json.loads((directory / f"error.{rank}").read_text())
        if (report["module"], report["name"]) == ("builtins", "SystemExit"):
            return died(rank, f"sys.exit({report['message']})")
        error = _error(report)
        note(error, f"on rank {rank}:\n{report['traceback']}")
        return blame(error), error
    if (directory / f"result.{rank}").exists():
        return None
    if end is not None:
        return died(rank, end)
    return Blame.STOPPED, RankLost(f"rank {rank} was stopped because another rank failed.")


def died(rank: int, end: str) -> Failure:
    return Blame.DIED, RankLost(f"rank {rank} ended without a result: {end}")


def _error(report: dict[str, str]) -> BaseException:
    """The error of a report: of its own class if that is built in or ours and takes one message."""
    home = {"builtins": builtins, "shardsum.errors": errors}.get(report["module"])
    kind = getattr(home, report["name"], None)
    if isinstance(kind, type) and issubclass(kind, BaseException):  # and not `exec`
        try:
            return kind(report["message"])
        except TypeError:  # UnicodeDecodeError takes five arguments
            pass
    return RuntimeError(f"{report['name']}: {report['message']}")


def note(error: BaseException, text: str) -> None:
    if sys.version_info >= (3, 11):
        error.add_note(text)


def raise_first(failures: Sequence[Failure | None]) -> None:
    """Raise the error most to blame, of these the lowest rank's."""
    failed = [(failure[0], rank, failure[1]) for rank, failure in enumerate(failures) if failure is not None]
    if failed:
        _, rank, error = min(failed, key=lambda failure: failure[:2])
        error.rank = rank  # type: ignore[attr-defined]
        raise error

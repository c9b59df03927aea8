"""How many ranks there are, which one this is, and where each runs: enough to ask what a collective costs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """This rank's number among all ranks of a group, and the host of each rank where these are known."""

    rank: int
    size: int
    hosts: tuple[str, ...] | None = None

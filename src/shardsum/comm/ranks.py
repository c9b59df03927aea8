"""How many ranks there are, which one this is, and where each runs: enough to ask what a collective costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """This rank's number among all ranks of a group, and the host of each rank where these are known."""

    rank: int
    size: int
    hosts: tuple[str, ...] | None = None

    def subgroup(self, members: Sequence[int]) -> Ranks:
        """The ranks `members`, this one among them, in that order."""
        hosts = None if self.hosts is None else tuple(self.hosts[member] for member in members)
        return Ranks(members.index(self.rank), len(members), hosts)

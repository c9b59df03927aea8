"""Two dimensions: heads are shared out over neighbouring ranks, keys over the groups of these."""

from __future__ import annotations

from ..errors import Unsupported
from ..problem import Problem
from .base import Strategy
from .heads import split
from .ring import Ring
from .ulysses import Ulysses


class Hybrid(Ulysses):
    """`ulysses` inside each group of `ranks` neighbouring ranks, another strategy between the groups.

    `ranks` divides the number of ranks; by default it is the largest divisor that leaves two groups.
    Source: Fang and Zhao 2024 (USP: a unified sequence parallelism, section 3).
    """

    name = "hybrid"

    def __init__(self, ranks: int | None = None, between: Strategy | None = None) -> None:
        self._ranks, self._between = ranks, Ring() if between is None else between
        if isinstance(self._between, Ulysses):
            raise Unsupported("hybrid's strategy between groups must be one that does not share out heads itself.")
        if ranks is not None or between is not None:
            self.name = f"hybrid, {ranks or 'some'} ranks in a group, {self._between.name} between"

    def ranks_in_group(self, size: int) -> int:
        if self._ranks is None:
            return max((ranks for ranks in range(1, size) if size % ranks == 0), default=1)
        return self._ranks

    def between_groups(self) -> Strategy:
        return self._between

    def why_not(self, problem: Problem) -> str | None:
        if self._ranks is not None and problem.size % self._ranks:
            return f"hybrid's groups must divide the ranks: got groups of {self._ranks}, {problem.size} ranks."
        why_not = super().why_not(problem)
        if why_not is not None or problem.q_replicated:
            return why_not
        return self._between.why_not(split(problem, self.ranks_in_group(problem.size)).between(0))

"""Two dimensions: heads are shared out over neighbouring ranks, keys over the groups of these."""

from __future__ import annotations

from ..errors import Unsupported
from .base import Strategy
from .ring import Ring
from .ulysses import Ulysses


class Hybrid(Ulysses):
    """`ulysses` inside each node of `ranks` neighbouring ranks, another strategy between the nodes.

    `ranks` divides the number of ranks; by default it is the largest divisor that leaves two nodes.
    Source: Fang and Zhao 2024 (USP: a unified sequence parallelism, section 3).
    """

    name = "hybrid"

    def __init__(self, ranks: int | None = None, between: Strategy | None = None) -> None:
        self._ranks, self._between = ranks, Ring() if between is None else between
        if isinstance(self._between, Ulysses):
            raise Unsupported("hybrid's strategy between nodes must be all_reduce, all_gather, ring or pass_q.")
        if ranks is not None or between is not None:
            self.name = f"hybrid, {ranks or 'some'} ranks in a node, {self._between.name} between"

    def ranks_in_node(self, size: int) -> int:
        if self._ranks is None:
            return max((ranks for ranks in range(1, size) if size % ranks == 0), default=1)
        if size % self._ranks:
            raise Unsupported(f"hybrid's nodes must divide the ranks: got nodes of {self._ranks}, {size} ranks.")
        return self._ranks

    def between_nodes(self) -> Strategy:
        return self._between

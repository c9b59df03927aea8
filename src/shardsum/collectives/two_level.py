"""Inside each node first, then between nodes: what crosses the network crosses it once for each node."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Hashable, Sequence

from torch import Tensor

from ..comm import Communicator, Ranks, Traffic, subgroup
from .base import Collective, depth
from .exchange import RecursiveDoubling
from .operations import Operation
from .tree import broadcast_from_first, reduce_to_first, tree_traffic


class TwoLevel(Collective):
    """Reduce to one rank of each node along a tree, all-reduce between those, broadcast inside the nodes.

    `nodes`: of each rank, what is the same for the ranks of one node; by default its host's name. `between`: the
    collective between nodes, recursive doubling by default.
    Source: Karonis et al. 2000 (exploiting hierarchy in parallel computer networks, section 3).
    """

    def __init__(self, nodes: Sequence[Hashable] | None = None, between: Collective | None = None) -> None:
        self._nodes = None if nodes is None else tuple(nodes)
        self._between = RecursiveDoubling() if between is None else between
        if isinstance(self._between, TwoLevel):
            raise ValueError("two_level's collective between nodes must not be two_level itself.")
        of = "" if nodes is None else f" of {list(map(str, nodes))}"
        self.name = f"two_level{of}" + ("" if between is None else f", {between.name} between")

    @property
    def needs_hosts(self) -> bool:
        return self._nodes is None

    def _all_reduce(self, comm: Communicator, rows: Tensor, operation: Operation) -> None:
        own, leaders = self._groups(self.ranks(comm))
        inside = subgroup(comm, own)
        reduce_to_first(inside, rows, operation)
        if comm.rank == own[0]:
            self._between.all_reduce(subgroup(comm, leaders), rows, operation)
        broadcast_from_first(inside, rows)

    def _traffic(self, ranks: Ranks, rows: int, row_bytes: int) -> Traffic:
        own, leaders = self._groups(ranks)
        sent = tree_traffic(ranks.subgroup(own), rows * row_bytes)
        if ranks.rank != own[0]:
            return sent
        return sent + self._between.traffic(ranks.subgroup(leaders), rows, row_bytes)

    def _rounds(self, ranks: Ranks, rows: int, row_bytes: int) -> int:
        leaders, largest = _leaders(self._nodes_of(ranks))
        return 2 * depth(largest) + self._between.rounds(Ranks(0, len(leaders)), rows, row_bytes)

    def messages_at_once(self, ranks: Ranks) -> int:
        leaders, _ = _leaders(self._nodes_of(ranks))
        return max(1, self._between.messages_at_once(Ranks(0, len(leaders))))

    def _groups(self, ranks: Ranks) -> tuple[list[int], list[int]]:
        """The ranks of this rank's node, and the first rank of every node."""
        nodes = self._nodes_of(ranks)
        return [rank for rank, node in enumerate(nodes) if node == nodes[ranks.rank]], _leaders(nodes)[0]

    def _nodes_of(self, ranks: Ranks) -> tuple[Hashable, ...]:
        """The node of each rank. Raises: ValueError where it is not known of each."""
        nodes = ranks.hosts if self._nodes is None else self._nodes
        if nodes is None:
            raise ValueError("two_level without nodes needs the host of each rank: pass Ranks(rank, size, hosts).")
        if len(nodes) != ranks.size:
            raise ValueError(f"two_level needs the node of each of {ranks.size} ranks: got {len(nodes)} nodes.")
        return nodes


@functools.lru_cache(maxsize=8)
def _leaders(nodes: tuple[Hashable, ...]) -> tuple[list[int], int]:
    """The first rank of each node, and the number of ranks of the largest node."""
    first = dict(zip(reversed(nodes), reversed(range(len(nodes))), strict=True))
    return sorted(first.values()), max(Counter(nodes).values())

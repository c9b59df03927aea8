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
        nodes = self._nodes_of(self.ranks(comm))
        own = [rank for rank, node in enumerate(nodes) if node == nodes[comm.rank]]
        inside = subgroup(comm, own)
        reduce_to_first(inside, rows, operation)
        if comm.rank == own[0]:
            leaders = [nodes.index(node) for node in _sizes(nodes)]
            self._between.all_reduce(subgroup(comm, leaders), rows, operation)
        broadcast_from_first(inside, rows)

    # Costs count ranks and nodes instead of listing them: a planner asks for those of 100,000 ranks.

    def _traffic(self, ranks: Ranks, rows: int, row_bytes: int) -> Traffic:
        nodes = self._nodes_of(ranks)
        node, before = nodes[ranks.rank], nodes[: ranks.rank]
        place, sizes = before.count(node), _sizes(nodes)
        sent = tree_traffic(Ranks(place, sizes[node]), rows * row_bytes)
        if place > 0:
            return sent
        return sent + self._between.traffic(Ranks(len(set(before)), len(sizes)), rows, row_bytes)

    def _rounds(self, ranks: Ranks, rows: int, row_bytes: int) -> int:
        sizes = _sizes(self._nodes_of(ranks))
        return 2 * depth(max(sizes.values())) + self._between.rounds(Ranks(0, len(sizes)), rows, row_bytes)

    def messages_at_once(self, ranks: Ranks) -> int:
        return max(1, self._between.messages_at_once(Ranks(0, len(_sizes(self._nodes_of(ranks))))))

    def _nodes_of(self, ranks: Ranks) -> tuple[Hashable, ...]:
        """The node of each rank. Raises: ValueError where it is not known of each."""
        nodes = ranks.hosts if self._nodes is None else self._nodes
        if nodes is None:
            raise ValueError("two_level without nodes needs the host of each rank: pass Ranks(rank, size, hosts).")
        if len(nodes) != ranks.size:
            raise ValueError(f"two_level needs the node of each of {ranks.size} ranks: got {len(nodes)} nodes.")
        return nodes


@functools.lru_cache(maxsize=8)
def _sizes(nodes: tuple[Hashable, ...]) -> Counter[Hashable]:
    """How many ranks each node has, in the order of the nodes' first ranks."""
    return Counter(nodes)

"""Inside each node first, then between nodes: what crosses the network crosses it once for each node."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor

from ..comm import Communicator, Traffic, subgroup
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

    def _all_reduce(self, comm: Communicator, rows: Tensor, operation: Operation) -> None:
        inside, between = self._groups(comm)
        reduce_to_first(inside, rows, operation)
        if between is not None:
            self._between.all_reduce(between, rows, operation)
        broadcast_from_first(inside, rows)

    def _traffic(self, comm: Communicator, rows: int, row_bytes: int) -> Traffic:
        inside, between = self._groups(comm)
        sent = tree_traffic(inside, rows * row_bytes)
        return sent if between is None else sent + self._between.traffic(between, rows, row_bytes)

    def _rounds(self, comm: Communicator, rows: int, row_bytes: int) -> int:
        members = self._members(comm)
        largest = max(map(len, members))
        leaders = subgroup(comm, [comm.rank, *range(len(members) - 1)])
        return 2 * depth(largest) + (self._between.rounds(leaders, rows, row_bytes) if len(members) > 1 else 0)

    def messages_at_once(self, comm: Communicator) -> int:
        count = len(self._members(comm))
        leaders = subgroup(comm, [comm.rank, *range(count - 1)])
        return max(1, self._between.messages_at_once(leaders)) if count > 1 else 1

    def _members(self, comm: Communicator) -> list[list[int]]:
        """The ranks of each node."""
        nodes = comm.hosts() if self._nodes is None else self._nodes
        if len(nodes) != comm.size:
            raise ValueError(f"two_level needs the node of each of {comm.size} ranks: got {len(nodes)} nodes.")
        members: dict[Hashable, list[int]] = {}
        for rank, node in enumerate(nodes):
            members.setdefault(node, []).append(rank)
        return list(members.values())

    def _groups(self, comm: Communicator) -> tuple[Communicator, Communicator | None]:
        """The ranks of this rank's node, and for the first of these the first ranks of all nodes."""
        members = self._members(comm)
        own = next(ranks for ranks in members if comm.rank in ranks)
        between = subgroup(comm, [ranks[0] for ranks in members]) if comm.rank == own[0] else None
        return subgroup(comm, own), between

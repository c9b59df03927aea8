"""Heads in place of positions: an all-to-all gives each rank all rows and keys of some heads, another returns.

With several nodes it has two dimensions: heads are shared out inside a node, keys between nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..collectives import slices
from ..comm import Communicator, Traffic, subgroup
from ..errors import Unsupported
from ..kernels import Gradients, OutputGradient
from ..layouts import Placement
from ..packed import pack, unpack
from ..problem import state_dtype
from ..state import AttentionState
from .all_reduce import AllReduce
from .base import Strategy, pack_gradient, unpack_gradient
from .call import Call


class Ulysses(Strategy):
    """Each rank computes some heads over all positions.

    Query heads are shared out evenly; a KV head goes to every rank that has one of its query heads. Replicated
    queries are everywhere already: there it is `all_reduce`.
    Raises: Unsupported where there are more ranks than query heads.
    Source: Jacobs et al. 2023 (DeepSpeed Ulysses, section 3).
    """

    name = "ulysses"

    def ranks_in_node(self, size: int) -> int:
        """How many of `size` ranks share out the heads."""
        return size

    def between_nodes(self) -> Strategy:
        return AllReduce()

    def forward(self, call: Call) -> AttentionState:
        if call.q_replicated:
            return AllReduce().forward(call)
        node = _Node.of(call, self.ranks_in_node(call.comm.size))
        state = self.between_nodes().forward(node.call(call, *node.inputs(call)))
        return unpack(torch.cat(node.scatter(pack(state), node.q_heads, node.queries), dim=1))

    def _backward(self, call: Call, gradient: OutputGradient) -> Gradients:
        node = _Node.of(call, self.ranks_in_node(call.comm.size))
        inner = node.call(call, *node.inputs(call))
        rows = unpack_gradient(node.gather(pack_gradient(gradient), node.q_heads, node.queries))
        found = self.between_nodes().backward(inner, rows)
        d_q = torch.cat(node.scatter(found.q, node.q_heads, node.queries), dim=1)
        d_kv = node.of_kv_heads(torch.cat([found.k, found.v], dim=3))
        total = d_kv.new_zeros(*call.k.shape[:3], d_kv.shape[3])
        for heads, part in zip(node.kv_heads, node.scatter(d_kv, node.kv_heads, node.keys), strict=True):
            total[:, heads] += part
        d_k, d_v = total.split([call.k.shape[3], call.v.shape[3]], dim=3)
        return Gradients(d_q, d_k, d_v)

    def _traffic(self, call: Call) -> Traffic:
        if call.q_replicated:
            return AllReduce().traffic(call)
        node = _Node.of(call, self.ranks_in_node(call.comm.size))
        states = node.scattered(node.q_heads, node.queries) * (call.v.shape[3] + 1)
        return node.traffic(call, states, 4, self.between_nodes().traffic(node.empty_call(call)))

    def _traffic_backward(self, call: Call) -> Traffic:
        node = _Node.of(call, self.ranks_in_node(call.comm.size))
        head_dim, v_dim = call.q.shape[3], call.v.shape[3]
        numbers = node.gathered(node.q_heads, node.queries) * (v_dim + 2)
        numbers += node.scattered(node.q_heads, node.queries) * head_dim
        numbers += node.scattered(node.kv_heads, node.keys) * (head_dim + v_dim)
        return node.traffic(call, numbers, 6, self.between_nodes().traffic_backward(node.empty_call(call)))


@dataclass(frozen=True, eq=False)
class _Node:
    """This rank's node: who in it computes which heads, and holds which of the node's rows and keys.

    `queries`, `keys`: each rank's positions, as indices into the node's; `nodes`: all nodes' positions.
    """

    comm: Communicator
    between: Communicator
    q_heads: list[slice]
    kv_heads: list[slice]
    group: int
    queries: Placement
    keys: Placement
    nodes: tuple[Placement, Placement]

    @classmethod
    def of(cls, call: Call, ranks: int) -> _Node:
        size, q_heads, group = call.comm.size, call.q.shape[1], call.q.shape[1] // call.k.shape[1]
        if ranks > q_heads:
            raise Unsupported(
                f"ulysses needs a query head for each rank: got {ranks} ranks, {q_heads} q_heads. Use all_reduce, "
                "ring or pass_q, or Hybrid with fewer ranks in a node."
            )
        node, place = divmod(call.comm.rank, ranks)
        heads = slices(q_heads, ranks)
        if call.reproducible and any(own.start % group for own in heads):
            raise Unsupported(
                "reproducible ulysses needs whole groups of query heads on every rank: got "
                f"{ranks} ranks, {call.k.shape[1]} kv_heads. Use all_gather, ring or pass_q."
            )
        queries, all_queries = _by_node(call.queries, ranks, node)
        keys, all_keys = _by_node(call.keys, ranks, node)
        return cls(
            comm=subgroup(call.comm, range(node * ranks, (node + 1) * ranks)),
            between=subgroup(call.comm, range(place, size, ranks)),
            q_heads=heads,
            kv_heads=[slice(own.start // group, -(-own.stop // group)) for own in heads],
            group=group,
            queries=queries,
            keys=keys,
            nodes=(all_queries, all_keys),
        )

    def inputs(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of this rank's heads and the node's positions."""
        return (
            self.gather(call.q, self.q_heads, self.queries),
            self.gather(call.k, self.kv_heads, self.keys),
            self.gather(call.v, self.kv_heads, self.keys),
        )

    def call(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> Call:
        """The call between nodes. Heads that do not come in whole GQA groups get their KV head one by one."""
        own = self.q_heads[self.comm.rank]
        if self._owners is not None:
            k, v = (x.index_select(1, self._owners.to(x.device)) for x in (k, v))
        queries, keys = self.nodes
        return Call(
            self.between,
            call.kernel,
            q,
            k,
            v,
            call.mask,
            queries,
            keys,
            call.scores.some_heads(own.start, own.stop),
            call.q_replicated,
            call.collective,
            name=call.name,
            holder="node",
            reproducible=call.reproducible,
        )

    def empty_call(self, call: Call) -> Call:
        """The same with tensors that have sizes only."""
        queries, keys = (len(positions.positions[self.between.rank]) for positions in self.nodes)
        heads = [own[self.comm.rank].stop - own[self.comm.rank].start for own in (self.q_heads, self.kv_heads)]
        sizes = [(heads[0], queries, call.q), (heads[1], keys, call.k), (heads[1], keys, call.v)]
        q, k, v = (
            torch.empty(x.shape[0], count, length, x.shape[3], dtype=x.dtype, device="meta")
            for count, length, x in sizes
        )
        return self.call(call, q, k, v)

    def of_kv_heads(self, d_kv: Tensor) -> Tensor:
        """Gradients of the KV heads that this rank received, from those of the heads in its call."""
        if self._owners is None:
            return d_kv
        own = self.kv_heads[self.comm.rank]
        found = d_kv.new_zeros(d_kv.shape[0], own.stop - own.start, *d_kv.shape[2:])
        return found.index_add_(1, self._owners.to(d_kv.device), d_kv)

    @property
    def _owners(self) -> Tensor | None:
        """The KV head, among this rank's, of each of its query heads; None where these are whole groups."""
        own = self.q_heads[self.comm.rank]
        if own.start % self.group == 0 and own.stop % self.group == 0:
            return None
        owners: Tensor = torch.arange(own.start, own.stop) // self.group
        return owners - self.kv_heads[self.comm.rank].start  # type: ignore[no-any-return]

    def gather(self, x: Tensor, heads: Sequence[slice], placement: Placement) -> Tensor:
        """This rank's heads of all the node's positions, in order; x has all heads of this rank's positions."""
        own = heads[self.comm.rank]
        shapes = [(x.shape[0], own.stop - own.start, len(p), x.shape[3]) for p in placement.positions]
        parts = self.comm.all_to_all([x[:, part] for part in heads], shapes)
        whole = x.new_empty(x.shape[0], own.stop - own.start, placement.length, x.shape[3])
        for positions, part in zip(placement.positions, parts, strict=True):
            whole.index_copy_(2, positions.to(x.device), part)
        return whole

    def scatter(self, x: Tensor, heads: Sequence[slice], placement: Placement) -> list[Tensor]:
        """Each rank's heads of this rank's positions; x has this rank's heads of all the node's positions."""
        own = len(placement.positions[self.comm.rank])
        shapes = [(x.shape[0], part.stop - part.start, own, x.shape[3]) for part in heads]
        return self.comm.all_to_all([x[:, :, p.to(x.device)] for p in placement.positions], shapes)

    # How many (head, position) pairs this rank sends in each.

    def gathered(self, heads: Sequence[slice], placement: Placement) -> int:
        others: int = sum(part.stop - part.start for rank, part in enumerate(heads) if rank != self.comm.rank)
        return others * len(placement.positions[self.comm.rank])

    def scattered(self, heads: Sequence[slice], placement: Placement) -> int:
        own = heads[self.comm.rank]
        others = sum(len(p) for rank, p in enumerate(placement.positions) if rank != self.comm.rank)
        count: int = own.stop - own.start
        return count * others

    def traffic(self, call: Call, numbers: int, exchanges: int, between: Traffic) -> Traffic:
        """Of q, k and v as they came, so many numbers of state dtype a sequence, and what goes between nodes."""
        sent = self.gathered(self.q_heads, self.queries) * call.q.shape[3] * call.q.element_size()
        kv_bytes = (call.k.shape[3] + call.v.shape[3]) * call.k.element_size()
        sent += self.gathered(self.kv_heads, self.keys) * kv_bytes
        sent += numbers * state_dtype(call.q.dtype).itemsize
        sent_bytes, others = sent * call.q.shape[0], self.comm.size - 1
        messages, rounds = exchanges * others + between.messages, exchanges * (others > 0) + between.rounds
        return Traffic(sent_bytes + between.sent_bytes, messages, rounds)


def _by_node(placement: Placement, ranks: int, node: int) -> tuple[Placement, Placement]:
    """Each rank's positions as indices into its node's, and the nodes' positions."""
    held = placement.positions
    nodes = [torch.cat(held[first : first + ranks]).sort().values for first in range(0, len(held), ranks)]
    own = held[node * ranks : (node + 1) * ranks]
    inside = Placement(tuple(torch.searchsorted(nodes[node], positions) for positions in own))
    return inside, Placement(tuple(nodes))

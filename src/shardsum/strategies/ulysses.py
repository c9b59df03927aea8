"""Heads in place of positions: an all-to-all gives each rank all rows and keys of some heads, another returns.

With several groups of ranks it has two dimensions: heads are shared out inside a group, keys between groups.
"""

from __future__ import annotations

import torch

from ..collectives import Collective
from ..comm import Traffic
from ..kernels import Gradients, OutputGradient
from ..packed import pack, unpack
from ..problem import Problem
from ..state import AttentionState
from .all_reduce import AllReduce
from .base import Strategy, pack_gradient, unpack_gradient
from .call import Call
from .heads import RankGroup, Split, split


class Ulysses(Strategy):
    """Each rank computes some heads over all positions.

    Query heads are shared out evenly; a KV head goes to every rank that has one of its query heads. Replicated
    queries are everywhere already: there it is `all_reduce`. It needs a query head for each rank.
    Source: Jacobs et al. 2023 (DeepSpeed Ulysses, section 3).
    """

    name = "ulysses"

    def ranks_in_group(self, size: int) -> int:
        """How many of `size` ranks share out the heads."""
        return size

    def between_groups(self) -> Strategy:
        """The strategy by which the ranks that have the same heads share out the keys."""
        return AllReduce()

    def why_not(self, problem: Problem) -> str | None:
        if problem.q_replicated:
            return None
        ranks = self.ranks_in_group(problem.size)
        if ranks > problem.q_heads:
            return (
                f"{self.name} needs a query head for each rank of a group: "
                f"got {ranks} ranks, {problem.q_heads} q_heads."
            )
        heads = split(problem, ranks).q_heads
        if problem.reproducible and any(own.start % problem.heads_per_kv_head for own in heads):
            return (
                f"reproducible {self.name} needs whole groups of query heads on every rank: got {ranks} ranks, "
                f"{problem.kv_heads} kv_heads."
            )
        return super().why_not(problem)

    def forward(self, call: Call) -> AttentionState:
        if call.problem.q_replicated:
            return AllReduce().forward(call)
        group = RankGroup(call, self.ranks_in_group(call.comm.size))
        state = self.between_groups().forward(group.call())
        return unpack(torch.cat(group.scatter(pack(state), group.split.q_heads, call.problem.queries), dim=1))

    def _backward(self, call: Call, gradient: OutputGradient) -> Gradients:
        group, problem = RankGroup(call, self.ranks_in_group(call.comm.size)), call.problem
        heads, kv_heads = group.split.q_heads, group.split.kv_heads
        inner = group.call()
        rows = unpack_gradient(group.gather(pack_gradient(gradient), heads, problem.queries))
        found = self.between_groups().backward(inner, rows)
        d_q = torch.cat(group.scatter(found.q, heads, problem.queries), dim=1)
        d_kv = group.of_kv_heads(torch.cat([found.k, found.v], dim=3))
        total = d_kv.new_zeros(*problem.k_shape(problem.kv_len(call.comm.rank))[:3], d_kv.shape[3])
        for some, part in zip(kv_heads, group.scatter(d_kv, kv_heads, problem.keys), strict=True):
            total[:, some] += part
        return Gradients(d_q, *call.halves(total))

    def memory_bytes(self, problem: Problem, rank: int) -> int:
        if problem.q_replicated:
            return AllReduce().memory_bytes(problem, rank)
        whole = split(problem, self.ranks_in_group(problem.size))
        inner, group = whole.between(rank), rank // whole.ranks
        rows, keys = inner.q_len(group), inner.kv_len(group)
        gathered = inner.q_bytes(rows) + inner.kv_bytes(keys) + 2 * inner.row_bytes(rows, inner.v_dim + 1)
        return gathered + self.between_groups().memory_bytes(inner, group)

    def _traffic(self, problem: Problem, rank: int, collective: Collective) -> Traffic:
        if problem.q_replicated:
            return AllReduce().traffic(problem, rank, collective)
        whole = split(problem, self.ranks_in_group(problem.size))
        states = whole.scattered(whole.q_heads, problem.queries, rank) * (problem.v_dim + 1)
        between = self.between_groups().traffic(whole.between(rank), rank // whole.ranks, collective)
        return _traffic(whole, rank, states, 4, between)

    def _traffic_backward(self, problem: Problem, rank: int) -> Traffic:
        whole = split(problem, self.ranks_in_group(problem.size))
        head_dim, v_dim = problem.head_dim, problem.v_dim
        numbers = whole.gathered(whole.q_heads, problem.queries, rank) * (v_dim + 2)
        numbers += whole.scattered(whole.q_heads, problem.queries, rank) * head_dim
        numbers += whole.scattered(whole.kv_heads, problem.keys, rank) * (head_dim + v_dim)
        between = self.between_groups().traffic_backward(whole.between(rank), rank // whole.ranks)
        return _traffic(whole, rank, numbers, 6, between)


def _traffic(whole: Split, rank: int, numbers: int, exchanges: int, between: Traffic) -> Traffic:
    """What a rank sends of q, k and v as they came, of sums `numbers` a sequence, and what goes between groups."""
    problem = whole.problem
    q = whole.gathered(whole.q_heads, problem.queries, rank) * problem.head_dim * problem.row_dtype.itemsize
    kv = whole.gathered(whole.kv_heads, problem.keys, rank) * (problem.head_dim + problem.v_dim)
    sent_bytes = problem.batch * (q + kv * problem.dtype.itemsize + numbers * problem.sum_bytes)
    others = whole.ranks - 1
    return Traffic(sent_bytes, exchanges * others, exchanges * (others > 0)) + between

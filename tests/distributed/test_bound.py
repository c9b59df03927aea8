"""The least that must travel, against every pair of row and key looked at by itself; and what strategies send."""

from __future__ import annotations

import pytest

import shardsum
from shardsum.comm import Communicator
from shardsum.state import AttentionState
from shardsum.strategies import AllGather, Call, lower_bound_bytes

from .. import dense
from .cases import MASKS, Case, layout_of


class Bounded(AllGather):
    """all_gather that notes every rank's lower bound, and what it declares itself."""

    def forward(self, call: Call) -> AttentionState:
        self.bounds = [lower_bound_bytes(call.problem, rank) for rank in range(call.comm.size)]
        self.declared = self.traffic(call.problem, call.comm.rank).sent_bytes
        return super().forward(call)


def bounds(comm: Communicator, case: Case, q_replicated: bool) -> tuple[list[int], int]:
    q, k, v = case.tensors()
    layout, strategy = layout_of(case.layout, comm.size), Bounded()
    k, v = (shardsum.shard(x, comm=comm, layout=layout) for x in (k, v))
    q = q if q_replicated else shardsum.shard(q, comm=comm, layout=layout)
    shardsum.attention(
        q, k, v, comm=comm, layout=layout, strategy=strategy, q_replicated=q_replicated, **case.options()
    )
    return strategy.bounds, strategy.declared


def by_pairs(case: Case, size: int, q_replicated: bool) -> list[int]:
    """The same from the dense mask: a key counts for a rank if any of its rows sees it and it is elsewhere."""
    layout = layout_of(case.layout, size)
    seen = dense.visible(case.q_len, case.kv_len, 2, **case.options())
    found = []
    for rank in range(size):
        rows = range(case.q_len) if q_replicated else layout.positions(case.q_len, rank, size).tolist()
        held = set(layout.positions(case.kv_len, rank, size).tolist())
        count = sum(
            any(bool(seen[b, i, j]) for i in rows) for b in range(2) for j in range(case.kv_len) if j not in held
        )
        found.append(count * case.kv_heads * (case.head_dim + case.v_dim) * 4)
    return found


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped", "weighted"])
def test_against_every_pair(mask: str, layout: str) -> None:
    case = Case(mask, layout)
    for size, q_replicated in ((1, False), (2, False), (3, False), (3, True), (5, False)):
        found = shardsum.launch(bounds, ranks=size, transport="threads", args=(case, q_replicated))
        expected = by_pairs(case, size, q_replicated)
        assert [rank_bounds for rank_bounds, _ in found] == [expected] * size
        # Slices hold every key that is seen.
        assert sum(declared for _, declared in found) >= sum(expected)


@pytest.mark.parametrize(
    ("mask", "layout"),
    [("full", "zigzag"), ("full", "striped"), ("causal", "contiguous"), ("window", "contiguous")],
)
def test_slices_are_the_least_where_what_is_seen_lies_together(mask: str, layout: str) -> None:
    found = shardsum.launch(bounds, ranks=3, transport="threads", args=(Case(mask, layout), False))
    assert sum(declared for _, declared in found) == sum(found[0][0])

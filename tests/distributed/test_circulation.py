"""Shards on a ring go only where they are wanted, the shortest way; and what that saves in bytes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardsum import Layout
from shardsum.comm import Communicator, CountingTransport, Traffic
from shardsum.kernels import as_kernel
from shardsum.layouts import Placement
from shardsum.masks import Mask
from shardsum.scores import Scores
from shardsum.strategies import STRATEGIES, Call
from shardsum.strategies.circulation import DOWN, UP, Route

wants = st.integers(2, 7).flatmap(
    lambda size: st.lists(st.lists(st.booleans(), min_size=size, max_size=size), min_size=1, max_size=5).map(
        lambda rows: torch.tensor(rows)
    )
)


@given(wants)
def test_every_item_reaches_who_wants_it_by_the_fewest_hops(wanted: torch.Tensor) -> None:
    """`wanted[i, rank]`, of rank 0's items. A way that leaves out the widest gap on the circle is the shortest."""
    items, size = wanted.shape
    route = Route.of(size, lambda rank, owner: wanted[:, rank] & (owner == 0))
    for item in range(items):
        up, down = int(route.hops[UP][0][item]), int(route.hops[DOWN][0][item])
        there = [rank for rank in range(1, size) if bool(wanted[item, rank])]
        assert all(rank <= up or size - rank <= down for rank in there)
        stops = [0, *there, size]
        assert up + down == size - max(after - before for before, after in itertools.pairwise(stops))
        if len(there) == size - 1:  # as far up as down, or once more
            assert up - down in (0, 1)
    assert sum(int(hops.sum()) for ways in route.hops.values() for hops in ways[1:]) == 0


def calls(length: int, size: int, layout: str, mask: dict[str, Any]) -> list[Call]:
    """The call as each of `size` ranks sees it, with tensors that have sizes only."""
    placement = Placement.of(Layout(layout), Layout(layout).lengths(length, size), "positions")
    found = []
    for rank in range(size):
        comm = Communicator(CountingTransport(rank, size))
        x = torch.empty(1, 2, len(placement.positions[rank]), 4, device="meta")
        found.append(
            Call(
                comm,
                as_kernel("aten"),
                x,
                x,
                x,
                Mask(length, length, **mask),
                placement,
                placement,
                Scores(1.0),
                False,
            )
        )
    return found


def lower_bound_keys(call: Call) -> int:
    """How many keys this rank's rows see and it does not hold, found row by row."""
    positions = call.queries.positions[call.comm.rank]
    seen = torch.zeros(call.keys.length + 1, dtype=torch.int64)
    for lo, hi in call.mask.intervals(positions):
        for first, last in zip(lo.flatten().tolist(), hi.flatten().tolist(), strict=True):
            seen[first:last] = 1
    seen[positions] = 0
    return int(seen.sum())


def sent(strategy: str, each: list[Call], backward: bool = False) -> Traffic:
    made = STRATEGIES[strategy]()
    found = [made.traffic_backward(call) if backward else made.traffic(call) for call in each]
    return sum(found[1:], start=found[0])


DOCUMENTS = {
    "causal": True,
    "cu_seqlens": (ends := torch.tensor([0, 70, 90, 300, 301, 480])),
    "cu_seqlens_k": ends,
}
KV_BYTES = 2 * (4 + 4) * 4  # of one key and value


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"causal": True, "window": (30, None)}, DOCUMENTS])
def test_all_gather_sends_what_is_seen_and_nothing_else(layout: str, mask: dict[str, Any]) -> None:
    each = calls(480, 6, layout, mask)
    bound = sum(map(lower_bound_keys, each))
    assert sent("all_gather", each).sent_bytes == KV_BYTES * bound
    assert sent("all_gather", each, backward=True).sent_bytes == 2 * KV_BYTES * bound  # gradients are float32 too


@pytest.mark.parametrize(
    ("layout", "mask", "most"),
    [
        ("contiguous", {}, 1.0),
        ("contiguous", {"causal": True}, 1.0),
        ("contiguous", {"causal": True, "window": (30, None)}, 1.0),  # each shard one hop
        ("contiguous", {"window": (30, 12)}, 1.0),  # some of it up, some of it down
        ("contiguous", DOCUMENTS, 1.0),
        ("zigzag", {"causal": True}, 1.0),
        ("zigzag", {"causal": True, "window": (30, None)}, 1.0),  # one chunk up, the other down
        ("zigzag", DOCUMENTS, 1.35),  # a document's ranks may lie on both sides of one that has no use for it
        ("striped", {"causal": True, "window": (30, None)}, 1.0),
    ],
)
@pytest.mark.parametrize("size", [2, 3, 6, 8])
def test_a_ring_sends_close_to_what_is_seen(layout: str, mask: dict[str, Any], most: float, size: int) -> None:
    each = calls(480, size, layout, mask)
    bound = KV_BYTES * sum(map(lower_bound_keys, each))
    forward, backward = sent("ring", each), sent("ring", each, backward=True)
    assert bound <= forward.sent_bytes <= most * bound
    assert backward.sent_bytes == 2 * forward.sent_bytes  # each hop of a key has one of its gradient


def test_a_shard_that_nobody_else_sees_is_not_sent() -> None:
    ends = torch.tensor([0, 120, 240, 360, 480])
    each = calls(480, 4, "contiguous", {"causal": True, "cu_seqlens": ends, "cu_seqlens_k": ends})
    for strategy in ("ring", "pass_q"):
        for backward in (False, True):
            assert sent(strategy, each, backward) == Traffic()


@pytest.mark.parametrize("size", [2, 5])
def test_rows_that_see_nothing_of_a_rank_do_not_go_there(size: int) -> None:
    """Causal: the rows of rank r go down to the ranks before it, and nowhere else."""
    each = calls(60 * size, size, "contiguous", {"causal": True})
    hops = sum(range(size))
    rows, states = 60 * 2 * 4 * 4, 60 * 2 * (4 + 1) * 4
    assert sent("pass_q", each).sent_bytes == hops * (rows + states)

"""Layouts: every position on exactly one rank, in order, for any length and number of ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardsum import Layout
from shardsum.layouts import NAMES, Placement
from shardsum.masks import Mask, localize

weights = st.lists(st.floats(0, 5), min_size=1, max_size=6).filter(lambda shares: sum(shares) > 0)
layouts = st.one_of(
    st.tuples(st.sampled_from(NAMES).map(Layout), st.integers(1, 7)),
    weights.map(lambda shares: (Layout.weighted(shares), len(shares))),
)


@given(layouts, st.integers(0, 200))
def test_every_position_lies_on_exactly_one_rank_in_order(
    layout_and_size: tuple[Layout, int], length: int
) -> None:
    layout, size = layout_and_size
    parts = [layout.positions(length, rank, size) for rank in range(size)]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(length))
    assert all(bool((part.diff() > 0).all()) for part in parts)
    assert [len(part) for part in parts] == layout.lengths(length, size)


@given(st.integers(0, 200), st.integers(1, 7))
def test_contiguous_and_zigzag_cut_as_tensor_split(length: int, size: int) -> None:
    whole = torch.arange(length)
    chunks = torch.tensor_split(whole, 2 * size)
    for rank, piece in enumerate(torch.tensor_split(whole, size)):
        assert torch.equal(Layout("contiguous").positions(length, rank, size), piece)
        expected = torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])
        assert torch.equal(Layout("zigzag").positions(length, rank, size), expected)


def test_weighted_layouts_share_causal_work_in_proportion() -> None:
    layout, length = Layout.weighted([3, 1, 2]), 6000
    assert layout.lengths(length, 3) == [3000, 1000, 2000]
    work = torch.stack([(layout.positions(length, rank, 3) + 1).sum() for rank in range(3)]).double()
    torch.testing.assert_close(work / work.sum(), torch.tensor([3.0, 1.0, 2.0]).double() / 6, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["zigzag", "striped"])
@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_causal_work_is_even(name: str, size: int) -> None:
    length = 100 * size + 7
    layout = Layout(name)
    work = []
    for rank in range(size):
        ((lo, hi),) = Mask(length, length, causal=True).intervals(layout.positions(length, rank, size))
        own = [localize(lo, hi, layout.positions(length, other, size)) for other in range(size)]
        work.append(sum(int((high - low).sum()) for low, high in own))
    assert max(work) * size / sum(work) <= 1.02


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="layout must be one of"):
        Layout("zagzig")
    with pytest.raises(ValueError, match="one weight for each rank"):
        Layout.weighted([1, 2]).positions(10, 0, 3)
    with pytest.raises(ValueError, match="not all zero"):
        Layout.weighted([0, 0])
    with pytest.raises(ValueError, match=r"cuts 6 keys into \[3, 3\]: got \[2, 4\]"):
        Placement.of(Layout("zigzag"), [2, 4], "keys")
    with pytest.raises(ValueError, match="same queries on every rank"):
        Placement.replicated([1, 2])

"""Layouts: every position on exactly one rank, in order, for any length and number of ranks."""

from __future__ import annotations

import math
import random
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardsum import Layout
from shardsum.layouts import NAMES
from shardsum.masks import Mask
from shardsum.placement import Placement

weights = st.lists(st.floats(0, 5), min_size=1, max_size=6).filter(lambda shares: sum(shares) > 0)
documents = st.lists(st.integers(0, 60), min_size=1, max_size=6).map(lambda lengths: [0, *accumulate(lengths)])
layouts = st.one_of(
    st.tuples(st.sampled_from(NAMES).map(Layout), st.integers(1, 7), st.integers(0, 200)),
    weights.flatmap(lambda w: st.tuples(st.just(Layout.weighted(w)), st.just(len(w)), st.integers(0, 200))),
    documents.flatmap(lambda ends: st.tuples(st.just(Layout.packed(ends)), st.integers(1, 7), st.just(ends[-1]))),
)


@given(layouts)
def test_every_position_lies_on_exactly_one_rank_in_order(drawn: tuple[Layout, int, int]) -> None:
    layout, size, length = drawn
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


def work_of(layout: Layout, length: int, size: int, ends: list[int] | None = None) -> torch.Tensor:
    """How many (row, key) pairs each rank's rows see under a causal mask."""
    cu_seqlens = None if ends is None else torch.tensor(ends)
    mask = Mask(length, length, causal=True, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens)
    ((lo, hi),) = mask.intervals(torch.arange(length))
    seen = (hi - lo)[0]
    return torch.stack([seen[layout.positions(length, rank, size)].sum() for rank in range(size)]).double()


def largest_over_mean(work: torch.Tensor) -> float:
    return float(work.max() / work.mean())


@pytest.mark.parametrize("name", ["zigzag", "striped"])
def test_causal_work_is_even_on_any_number_of_ranks(name: str) -> None:
    """Every number of ranks to 64, and lengths just over 100 a rank with many remainders: the worst there are."""
    worst = 0.0
    for size in range(1, 65):
        remainders = (
            {1, size // 2 + 1, size - 1, size, size + 1, 2 * size - 1} if size > 8 else range(1, 2 * size + 1)
        )
        for length in (100 * size + rest for rest in remainders if rest > 0):
            worst = max(worst, largest_over_mean(work_of(Layout(name), length, size)))
    assert worst <= 1.02
    # The cases are not too easy: rows are whole, so work is not quite even.
    assert worst > 1.009


@given(st.sampled_from(["zigzag", "striped"]), st.integers(1, 64), st.data())
def test_causal_work_is_even_at_any_length(name: str, size: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(100 * size + 1, 400 * size))
    assert largest_over_mean(work_of(Layout(name), length, size)) <= 1.02


@given(weights, st.integers(600, 6000))
def test_weighted_layouts_share_causal_work_in_proportion(shares: list[float], length: int) -> None:
    work = work_of(Layout.weighted(shares), length, len(shares))
    wanted = torch.tensor(shares, dtype=torch.float64)
    # Rows are whole: each of a rank's two chunks may be one row longer or shorter than its share.
    assert float((work / work.sum() - wanted / wanted.sum()).abs().max()) <= 4 / length


def test_weighted_layouts_hold_keys_in_proportion() -> None:
    assert Layout.weighted([3, 1, 2]).lengths(6000, 3) == [3000, 1000, 2000]


def drawn_lengths(kind: str, length: int, seed: int) -> list[int]:
    """Documents as they come in training data, in a random order; together `length` tokens."""
    pick = random.Random(seed)
    if kind == "log-normal":
        found = [max(1, round(600 * math.exp(1.2 * pick.gauss(0, 1)))) for _ in range(length)]
    elif kind == "one long, many short":
        found = [length // 2] + [128] * length
    else:
        found = [700] * length
    ends = [end for end in accumulate(found) if end < length]
    lengths = [end - start for start, end in pairwise([0, *ends, length])]
    pick.shuffle(lengths)
    return lengths


@pytest.mark.parametrize("kind", ["log-normal", "one long, many short", "all equal"])
@pytest.mark.parametrize("size", [2, 3, 8, 16])
@pytest.mark.parametrize("seed", range(3))
def test_packed_documents_are_even_work_and_even_memory(kind: str, size: int, seed: int) -> None:
    length = 4096 * size
    ends = [0, *accumulate(drawn_lengths(kind, length, seed))]
    layout = Layout.packed(ends)
    assert largest_over_mean(work_of(layout, length, size, ends)) <= 1.02
    assert max(layout.lengths(length, size)) - min(layout.lengths(length, size)) <= 1
    # Each rank takes from two ends of a line, so it cuts two documents at most, each for the ranks after it.
    positions = [layout.positions(length, rank, size) for rank in range(size)]
    document = torch.bucketize(torch.arange(length), torch.tensor(ends[1:]), right=True)
    holders = torch.stack([torch.bincount(document[p], minlength=len(ends) - 1) > 0 for p in positions]).sum(dim=0)
    assert int((holders - 1).clamp(min=0).sum()) <= 2 * (size - 1)


def test_packed_documents_that_share_out_evenly_stay_whole() -> None:
    layout = Layout.packed(range(0, 8001, 500))
    for rank in range(4):
        starts = layout.positions(8000, rank, 4).view(4, 500)
        assert torch.equal(starts, starts[:, :1] + torch.arange(500))
        assert bool((starts[:, 0] % 500 == 0).all())


def test_one_packed_document_is_cut_like_zigzag() -> None:
    for length in (960, 961, 967):
        assert largest_over_mean(work_of(Layout.packed([0, length]), length, 4)) <= 1.02
        lengths = Layout.packed([0, length]).lengths(length, 4)
        assert max(lengths) - min(lengths) <= 1


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="layout must be one of"):
        Layout("zagzig")
    with pytest.raises(ValueError, match="one weight for each rank"):
        Layout.weighted([1, 2]).positions(10, 0, 3)
    with pytest.raises(ValueError, match=r"Layout.packed is of 10 positions: got a sequence of 9"):
        Layout.packed([0, 4, 10]).positions(9, 0, 3)
    for ends in ([], [0], [1, 5], [0, 5, 4]):
        with pytest.raises(ValueError, match="rising from 0"):
            Layout.packed(ends)
    with pytest.raises(ValueError, match="zigzag has no documents"):
        Layout("zigzag", documents=(0, 4))
    with pytest.raises(ValueError, match="not all zero"):
        Layout.weighted([0, 0])
    with pytest.raises(ValueError, match=r"cuts 6 keys into \[3, 3\]: got \[2, 4\]"):
        Layout("zigzag").of_lengths([2, 4], "keys")
    with pytest.raises(ValueError, match="same queries on every rank"):
        Placement.replicated([1, 2])

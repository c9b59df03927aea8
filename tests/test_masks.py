"""Intervals against the definition, pair by pair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsum.errors import Unsupported
from shardsum.geometry import localized
from shardsum.kernels.rectangles import pieces
from shardsum.masks import Bounds, Mask
from shardsum.placement import Runs

from . import dense

side = st.one_of(st.none(), st.integers(0, 12))


def seen_by(lo: torch.Tensor, hi: torch.Tensor, keys: int) -> torch.Tensor:
    j = torch.arange(keys)
    return (lo.unsqueeze(-1) <= j) & (j < hi.unsqueeze(-1))


@settings(max_examples=300)
@given(st.data())
def test_intervals_are_the_mask(data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 3))
    causal, window = data.draw(st.booleans()), data.draw(st.one_of(st.none(), st.tuples(side, side)))
    options: dict[str, object] = {"causal": causal, "window": window}
    tensors: dict[str, object] = {"causal": causal, "window": window or (None, None)}
    if data.draw(st.booleans()):
        documents = data.draw(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=4))
        ends = torch.tensor([(0, 0), *documents]).cumsum(0)
        q_len, kv_len = ends[-1].tolist()
        options |= {"cu_seqlens": ends[:, 0].tolist(), "cu_seqlens_k": ends[:, 1].tolist()}
        tensors |= {"cu_seqlens": ends[:, 0], "cu_seqlens_k": ends[:, 1]}
    else:
        q_len, kv_len = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 14))
        if data.draw(st.booleans()):
            start = data.draw(st.lists(st.integers(-3, 15), min_size=batch, max_size=batch))
            options["q_start"], tensors["q_start"] = start, torch.tensor(start)
    if data.draw(st.booleans()):
        bounds = data.draw(
            st.lists(st.tuples(st.integers(0, 9), st.integers(0, 14)), min_size=batch, max_size=batch)
        )
        low, high = [b[0] for b in bounds], [b[1] for b in bounds]
        options["key_range"], tensors["key_range"] = (low, high), (torch.tensor(low), torch.tensor(high))
    if data.draw(st.booleans()):
        options["sink_tokens"] = tensors["sink_tokens"] = data.draw(st.integers(0, 5))
    if data.draw(st.booleans()):
        prefix = data.draw(st.lists(st.integers(0, 9), min_size=batch, max_size=batch))
        options["prefix"], tensors["prefix"] = prefix, torch.tensor(prefix)
    if data.draw(st.booleans()):
        rows = st.lists(st.integers(0, 14), min_size=q_len, max_size=q_len)
        bounds = tuple(torch.tensor([data.draw(rows)], dtype=torch.int64) for _ in range(2))
        options["key_intervals"] = tensors["key_intervals"] = bounds
    found = Mask(q_len, kv_len, **tensors).intervals(torch.arange(q_len))  # type: ignore[arg-type]
    expected = dense.visible(q_len, kv_len, batch, **options)  # type: ignore[arg-type]
    assert all(bool((lo <= hi).all()) for lo, hi in found)
    times = sum(seen_by(lo, hi, kv_len).expand(batch, -1, -1).long() for lo, hi in found)
    assert torch.equal(times, expected.long())  # a key is in one interval, not in two


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.data())
def test_the_visible_part_of_any_shard_is_one_interval(held: list[bool], data: st.DataObject) -> None:
    positions = torch.tensor(held).nonzero().flatten()
    bounds = data.draw(st.lists(st.tuples(*[st.integers(0, len(held))] * 2), min_size=1, max_size=5))
    lo, hi = (torch.tensor(sorted_bounds).unsqueeze(0) for sorted_bounds in zip(*map(sorted, bounds), strict=True))
    (local,) = localized([Bounds(lo, hi)], Runs.of(positions))
    assert torch.equal(seen_by(*local, len(positions)), seen_by(lo, hi, len(held))[..., positions])


@settings(max_examples=150)
@given(st.data())
def test_pieces_hold_each_visible_pair_once(data: st.DataObject) -> None:
    keys = data.draw(st.sampled_from([1, 40, 300, 700]))
    rows: list[tuple[int, int]] = []
    for _ in range(data.draw(st.integers(0, 5))):  # runs of rows of several kinds
        count, low = data.draw(st.sampled_from([1, 3, 70, 280])), data.draw(st.integers(0, keys))
        high, rise, fall = (
            data.draw(st.integers(low, keys)),
            data.draw(st.integers(0, 2)),
            data.draw(st.integers(0, 1)),
        )
        rows += [(min(low + i * fall, keys), min(high + i * rise, keys)) for i in range(count)]
    lo, hi = (torch.tensor([row[side] for row in rows], dtype=torch.int64) for side in (0, 1))
    hi = torch.maximum(lo, hi)
    times = torch.zeros(len(rows), keys, dtype=torch.int64)
    for kind, row, row_end, key, key_end in pieces(lo, hi):
        block = seen_by(lo[row:row_end], hi[row:row_end], keys)[:, key:key_end]
        if kind == "full":
            assert bool(block.all())
        elif kind == "causal":
            assert torch.equal(block, torch.ones_like(block).tril())
            assert block.shape[0] == block.shape[1]
        times[row:row_end, key:key_end] += block
    assert torch.equal(times, seen_by(lo, hi, keys).long())


def test_a_causal_mask_needs_two_operator_calls_however_long() -> None:
    ((lo, hi),) = Mask(1000, 3000, causal=True).intervals(torch.arange(1000))
    assert [piece.kind for piece in pieces(lo[0], hi[0])] == ["full", "causal"]


def test_masks_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="rise from 0 to 4, the number of queries"):
        Mask(4, 4, cu_seqlens=torch.tensor([0, 3]), cu_seqlens_k=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="same documents"):
        Mask(4, 4, cu_seqlens=torch.tensor([0, 4]), cu_seqlens_k=torch.tensor([0, 2, 4]))
    with pytest.raises(Unsupported, match="q_start"):
        Mask(4, 4, cu_seqlens=torch.tensor([0, 4]), cu_seqlens_k=torch.tensor([0, 4]), q_start=torch.tensor([0]))

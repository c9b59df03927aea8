"""The laws of the attention state: commutative, associative, an identity, and equal to the sum over all keys."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsum import AttentionState, merge
from shardsum.collectives import MERGE, combine_all
from shardsum.packed import pack, unpack

from ..tolerances import assert_close

ROWS, V_DIM = 5, 3
dtypes = st.sampled_from([torch.float32, torch.float64])
scores = st.one_of(st.floats(-80, 80), st.just(-math.inf), st.floats(-1e4, 1e4))


@st.composite
def states(draw: st.DrawFn, dtype: torch.dtype = torch.float32) -> AttentionState:
    lse = torch.tensor(draw(st.lists(scores, min_size=ROWS, max_size=ROWS)), dtype=dtype)
    seed = draw(st.integers(0, 2**31))
    out = torch.randn(ROWS, V_DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return AttentionState(out.masked_fill((lse == -math.inf).unsqueeze(1), 0.0), lse)


def same(a: AttentionState, b: AttentionState) -> bool:
    return torch.equal(a.out, b.out) and torch.equal(a.lse, b.lse)


@given(states(), states())
def test_commutative_to_the_bit(a: AttentionState, b: AttentionState) -> None:
    assert same(merge(a, b), merge(b, a))


@given(states())
def test_empty_is_the_identity_to_the_bit(a: AttentionState) -> None:
    empty = AttentionState.empty(ROWS, V_DIM)
    assert same(merge(a, empty), a)
    assert same(merge(empty, a), a)
    assert same(merge(empty, empty), empty)


@given(states(torch.float64), states(torch.float64), states(torch.float64))
def test_associative(a: AttentionState, b: AttentionState, c: AttentionState) -> None:
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    torch.testing.assert_close(left.lse, right.lse, rtol=1e-13, atol=1e-13)
    # Two scores of 1e4 differ by up to 1e4 * 2^-53 in their last bit, and weights by that factor.
    torch.testing.assert_close(left.out, right.out, rtol=0, atol=1e-11)


@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(0, 2**31), st.booleans(), dtypes)
def test_any_cut_in_any_order_is_the_sum_over_all_keys(
    parts: int, seed: int, large: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = 23
    score = torch.randn(ROWS, keys, generator=generator, dtype=torch.float64) * (40 if large else 1)
    v = torch.randn(keys, V_DIM, generator=generator, dtype=torch.float64)
    owner = torch.randint(parts, (keys,), generator=generator)
    pieces = []
    for part in torch.randperm(parts, generator=generator).tolist():
        s = score[:, owner == part]
        lse = s.logsumexp(dim=1) if s.shape[1] else torch.full((ROWS,), -math.inf, dtype=torch.float64)
        out = (s - lse.unsqueeze(1)).exp() @ v[owner == part] if s.shape[1] else torch.zeros(ROWS, V_DIM).double()
        pieces.append(AttentionState(out.to(dtype), lse.to(dtype)))
    packed = [pack(piece) for piece in pieces]
    combine_all(packed, MERGE, packed[0])
    whole = unpack(packed[0])
    # A score of 100 in float32 is uncertain by 4e-6, and its weight by that factor.
    tolerance = 1e-13 if dtype == torch.float64 else 2e-5 if large else 1e-6
    assert_close(whole.out, score.softmax(dim=1) @ v, tolerance, "out")
    assert_close(whole.lse, score.logsumexp(dim=1), tolerance, "lse")


def test_nan_stays_nan_and_reaches_no_other_row() -> None:
    a = AttentionState(torch.tensor([[1.0], [1.0], [2.0]]), torch.tensor([0.0, math.nan, 0.0]))
    b = AttentionState(torch.tensor([[math.nan], [1.0], [4.0]]), torch.zeros(3))
    merged = merge(a, b)
    assert merged.out[:2].isnan().all()
    assert merged.lse[1].isnan()
    assert merged.out[2].item() == 3.0
    assert not merge(a, AttentionState.empty(3, 1)).is_finite()


def test_a_state_of_narrow_floats_or_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="float32 or float64"):
        AttentionState(torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"lse\.shape"):
        AttentionState(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="same query rows"):
        merge(AttentionState.empty(2, 3), AttentionState.empty(1, 3))


def test_large_float64_sums_are_finite() -> None:
    """Their sum is not: 40 * 4e306."""
    assert AttentionState(torch.full((40, 4), 4e306, dtype=torch.float64), torch.zeros(40).double()).is_finite()

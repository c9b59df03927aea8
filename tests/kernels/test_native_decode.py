"""Decode in C++ on every instruction set that this machine has, against the float64 definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsum.blocks import Dense
from shardsum.kernels.compiled import DECODE_ROWS
from shardsum.kernels.native import NativeKernel
from shardsum.masks import Bounds
from shardsum.scores import Scores

from .. import dense
from ..tolerances import relative_norm
from .native import causal, check, drawn, each_dtype, each_instruction_set, normal, visible


@each_instruction_set
@settings(max_examples=60)
@given(st.data())
def test_any_shape_interval_dtype_stride_and_option(isa: str, data: st.DataObject) -> None:
    problem, options = drawn(
        data,
        (3, 2, 9),
        lambda group: DECODE_ROWS // group,
        [1, 15, 33, 64, 130, 511, 512, 513, 1700],
        dims := [1, 2, 31, 64, 80, 96, 128, 129, 512],
        dims,
        steepest=0.01,
    )
    check(isa, *problem, **options)


@each_instruction_set
@each_dtype
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 16])
def test_many_chunks_of_sequences_of_different_lengths(isa: str, dtype: torch.dtype, group: int) -> None:
    q = normal(0, 4, 2 * group, 1, 64, dtype=dtype)
    k, v = (normal(i, 4, 2, 3000, 64, dtype=dtype) for i in (1, 2))
    hi = torch.tensor([[3000], [1], [0], [1500]])
    for b in range(4):
        k[b, :, int(hi[b]) :] = v[b, :, int(hi[b]) :] = math.nan
    state = NativeKernel(isa).forward(q, Dense(k, v), Bounds((hi - 2000).clamp(min=0), hi), Scores(0.125))
    assert torch.equal(state.out[2], torch.zeros_like(state.out[2]))
    assert bool((state.lse[2] == -torch.inf).all())
    kept = visible(torch.zeros_like(hi), hi, 3000).squeeze(1)[:, None, :, None]
    check(isa, q, k.masked_fill(~kept, 0), v.masked_fill(~kept, 0), (hi - 2000).clamp(min=0), hi, Scores(0.125))
    clean = NativeKernel(isa).forward(
        q,
        Dense(k.masked_fill(~kept, 0), v.masked_fill(~kept, 0)),
        Bounds((hi - 2000).clamp(min=0), hi),
        Scores(0.125),
    )
    assert torch.equal(state.out, clean.out)
    assert torch.equal(state.lse, clean.lse)


@each_instruction_set
@each_dtype
def test_dropout_keeps_what_scores_says(isa: str, dtype: torch.dtype) -> None:
    q, k, v = (
        normal(i, 2, heads, length, 16, dtype=dtype)
        for i, (heads, length) in enumerate([(4, 3), (2, 900), (2, 900)])
    )
    lo, hi = causal(3, 900)
    scores = Scores(0.25, dropout_p=0.3, seed=9, head=1, rows=torch.arange(3) * 3, keys=torch.arange(900) + 7)
    kept = scores.kept(torch.zeros(2, 4, 3, 900, dtype=torch.float64))
    check(isa, q, k, v, lo, hi, scores, kept=kept)


@each_instruction_set
@each_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_value_reaches_the_rows_that_see_it_and_no_other(isa: str, dtype: torch.dtype, bad: float) -> None:
    q, k, v = (
        normal(i, 2, heads, length, 5, dtype=dtype)
        for i, (heads, length) in enumerate([(2, 6), (1, 700), (1, 700)])
    )
    v[0, 0, 697, 3] = v[1, 0, 17, 1] = k[1, 0, 699, 2] = bad
    lo, hi = causal(6, 699)
    check(isa, q, k, v, lo, hi, Scores(0.4))
    clean = NativeKernel(isa).forward(
        q, Dense(k.nan_to_num(0, 0, 0), v.nan_to_num(0, 0, 0)), Bounds(lo, hi), Scores(0.4)
    )
    state = NativeKernel(isa).forward(q, Dense(k, v), Bounds(lo, hi), Scores(0.4))
    unseen = hi[0] <= 697
    assert bool(unseen.any())
    assert torch.equal(state.out[0][:, unseen], clean.out[0][:, unseen])


@each_instruction_set
@each_dtype
def test_scores_of_80_of_either_sign(isa: str, dtype: torch.dtype) -> None:
    q, k, v = (
        torch.ones(1, 2, 1, 16, dtype=dtype),
        normal(1, 1, 2, 1300, 16, dtype=dtype),
        normal(2, 1, 2, 1300, 8, dtype=dtype),
    )
    k[:, 0], k[:, 1] = k[:, 0] / 16 + 5, k[:, 1] / 16 - 5
    state = NativeKernel(isa).forward(q, Dense(k, v), Bounds(*causal(1, 1300)), Scores(1.0))
    out, lse = dense.attention(q, k, v, visible(*causal(1, 1300), 1300), 1.0)
    # A score of 80 is uncertain by 80 * 2^-24.
    assert relative_norm(state.out, out) <= (1e-13 if dtype == torch.float64 else 2e-5)
    assert relative_norm(state.lse, lse) <= (1e-13 if dtype == torch.float64 else 2e-6)


@each_instruction_set
@each_dtype
def test_a_row_has_the_same_bits_alone_in_a_batch_and_on_any_number_of_threads(
    isa: str, dtype: torch.dtype
) -> None:
    q, k, v = (
        normal(i, 2, heads, length, 48, dtype=dtype)
        for i, (heads, length) in enumerate([(4, 5), (2, 2700), (2, 2700)])
    )
    lo, hi = causal(5, 2700)
    lo = (hi - 1450).clamp(min=0)
    kernel, threads = NativeKernel(isa), torch.get_num_threads()
    whole = kernel.forward(q, Dense(k, v), Bounds(lo, hi), Scores(0.15))
    try:
        torch.set_num_threads(3 - min(threads, 2))
        other = kernel.forward(q, Dense(k, v), Bounds(lo, hi), Scores(0.15))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole.out, other.out)
    assert torch.equal(whole.lse, other.lse)

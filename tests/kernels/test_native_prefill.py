"""Prefill in C++ on every instruction set that this machine has, against the float64 definition."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsum.blocks import Dense
from shardsum.kernels.compiled import DECODE_ROWS
from shardsum.kernels.native import NativeKernel
from shardsum.masks import Bounds
from shardsum.scores import Scores

from .. import dense
from ..tolerances import relative_norm
from .native import causal, check, drawn, each_dtype, each_instruction_set, normal


@each_instruction_set
@settings(max_examples=40)
@given(st.data())
def test_any_shape_interval_dtype_stride_and_option(isa: str, data: st.DataObject) -> None:
    problem, options = drawn(
        data,
        (2, 2, 4),
        lambda group: 150,
        [1, 15, 33, 64, 130, 257, 400],
        dims := [1, 2, 31, 64, 80, 129, 256, 512],
        dims,
        steepest=0.04,
    )
    check(isa, *problem, **options)


@each_instruction_set
@each_dtype
@pytest.mark.parametrize("window", [None, 40])
def test_many_tiles_strips_and_blocks(isa: str, dtype: torch.dtype, window: int | None) -> None:
    q, k, v = (normal(i, 1, heads, 1100, 64, dtype=dtype) for i, heads in enumerate((3, 1, 1)))
    lo, hi = causal(1100, 1100)
    check(isa, q, k, v, lo if window is None else (hi - window).clamp(min=0), hi, Scores(0.125))


@each_instruction_set
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_a_score_of_many_elements_is_as_exact_as_one_of_few(isa: str, head_dim: int) -> None:
    """Each row sees one key, and lse is its score."""
    q, k, v = (normal(i, 4, 4, length, head_dim, dtype=torch.float32) for i, length in enumerate((150, 1, 1)))
    lo = torch.zeros(1, 150, dtype=torch.int64)
    lse = NativeKernel(isa).forward(q, Dense(k, v), Bounds(lo, lo + 1), Scores(head_dim**-0.5)).lse
    exact = (q.double() @ k.double().mT).squeeze(-1) * head_dim**-0.5
    assert float(((lse - exact).abs() / exact.abs().clamp(min=1)).max()) < 1.5e-6


@each_instruction_set
@each_dtype
def test_dropout_keeps_what_scores_says(isa: str, dtype: torch.dtype) -> None:
    q, k, v = (normal(i, 2, heads, 300, 16, dtype=dtype) for i, heads in enumerate((4, 2, 2)))
    lo, hi = causal(300, 300)
    scores = Scores(0.25, dropout_p=0.3, seed=9, head=1, rows=torch.arange(300) * 3, keys=torch.arange(300) + 7)
    kept = scores.kept(torch.zeros(2, 4, 300, 300, dtype=torch.float64))
    check(isa, q, k, v, lo, hi, scores, kept=kept)


@each_instruction_set
@each_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_value_reaches_the_rows_that_see_it_and_no_other(isa: str, dtype: torch.dtype, bad: float) -> None:
    q, k, v = (normal(i, 2, heads, 300, 5, dtype=dtype) for i, heads in enumerate((2, 1, 1)))
    v[0, 0, 270, 3] = v[1, 0, 17, 1] = k[1, 0, 299, 2] = bad
    lo, hi = causal(300, 299)
    check(isa, q, k, v, lo, hi, Scores(0.4))
    clean = NativeKernel(isa).forward(
        q, Dense(k.nan_to_num(0, 0, 0), v.nan_to_num(0, 0, 0)), Bounds(lo, hi), Scores(0.4)
    )
    state = NativeKernel(isa).forward(q, Dense(k, v), Bounds(lo, hi), Scores(0.4))
    unseen = hi[0] <= 270
    assert torch.equal(state.out[0][:, unseen], clean.out[0][:, unseen])


@each_instruction_set
@each_dtype
def test_a_row_has_the_same_bits_alone_in_a_batch_and_on_any_number_of_threads(
    isa: str, dtype: torch.dtype
) -> None:
    q, k, v = (normal(i, 2, heads, 700, 48, dtype=dtype) for i, heads in enumerate((4, 2, 2)))
    lo, hi = causal(700, 700)
    lo = (hi - 450).clamp(min=0)
    kernel, threads = NativeKernel(isa), torch.get_num_threads()
    whole = kernel.forward(q, Dense(k, v), Bounds(lo, hi), Scores(0.15))
    try:
        torch.set_num_threads(3 - min(threads, 2))
        other = kernel.forward(q, Dense(k, v), Bounds(lo, hi), Scores(0.15))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole.out, other.out)
    assert torch.equal(whole.lse, other.lse)
    for i in (0, 1, 95, 300, 699 - DECODE_ROWS):  # without the keys behind the last row's last, too
        row = slice(i, i + DECODE_ROWS + 1)  # so many that it is prefill
        end = int(hi[0, row][-1])
        alone = kernel.forward(
            q[1:, :2, row], Dense(k[1:, :1, :end], v[1:, :1, :end]), Bounds(lo[:, row], hi[:, row]), Scores(0.15)
        )
        assert torch.equal(alone.out, whole.out[1:, :2, row])
        assert torch.equal(alone.lse, whole.lse[1:, :2, row])


@each_instruction_set
def test_float32_is_no_less_accurate_than_aten(isa: str) -> None:
    q, k, v = (normal(i, 1, 2, 1024, 64, dtype=torch.float32) for i in range(3))
    lo, hi = causal(1024, 1024)
    state = NativeKernel(isa).forward(q, Dense(k, v), Bounds(lo, hi), Scores(0.125))
    aten, aten_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[:2]
    out, lse = dense.attention(q, k, v, dense.visible(1024, 1024, causal=True))
    assert relative_norm(state.out, out) <= 1.05 * relative_norm(aten, out)
    assert relative_norm(state.lse, lse) <= 1.05 * relative_norm(aten_lse, lse)
    assert torch.allclose(aten, F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-5)


@each_instruction_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 40])  # by decode, and by prefill
@pytest.mark.parametrize("by_tree", [False, True])
def test_one_key_has_all_the_weight_however_large_its_score(
    isa: str, dtype: torch.dtype, rows: int, by_tree: bool
) -> None:
    q = normal(0, 1, 2, rows, 24, dtype=dtype) * 2.0 ** torch.arange(10, 58, 48 / 24).to(dtype)
    k, v = normal(1, 1, 2, rows, 24, dtype=dtype), normal(2, 1, 2, rows, 24, dtype=dtype)
    lo = torch.arange(rows).unsqueeze(0)  # row i sees key i alone
    kernel = NativeKernel(isa)
    state = (kernel.forward_tree if by_tree else kernel.forward)(q, Dense(k, v), Bounds(lo, lo + 1), Scores(0.3))
    assert relative_norm(state.out, v.double()) < (1e-15 if dtype == torch.float64 else 3e-7)
    scores = 0.3 * (q.double() * k.double()).sum(dim=-1)
    terms = 0.3 * (q.double() * k.double()).abs().sum(dim=-1)
    assert float(((state.lse - scores).abs() / terms).max()) < (1e-13 if dtype == torch.float64 else 4e-6)

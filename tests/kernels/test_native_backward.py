"""The backward in C++ on every instruction set that this machine has, against the float64 definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardsum.blocks import Dense
from shardsum.kernels import Gradients, OutputGradient
from shardsum.kernels.compiled import few_rows
from shardsum.kernels.native import NativeKernel
from shardsum.masks import Bounds
from shardsum.problem import state_dtype
from shardsum.scores import Scores

from .. import dense
from ..tolerances import ROUNDED_GRADIENTS, STATE, assert_close, relative_norm
from .native import causal, drawn, each_dtype, each_instruction_set, normal, visible


def check(
    isa: str, q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, scores: Scores, **options: object
) -> Gradients:
    """The gradients, found equal to autograd's. What flows back into out has q's dtype, and into lse, too."""
    exact = [x.double().detach().requires_grad_() for x in (q, k, v)]
    seen = visible(lo, hi, k.shape[2]).expand(q.shape[0], -1, -1)
    out, lse = dense.attention(*exact, seen, scores.scale, **options)  # type: ignore[arg-type]
    d_out, d_lse = normal(5, *out.shape, dtype=q.dtype), normal(6, *lse.shape).masked_fill(lse == -math.inf, 0.0)
    expected = torch.autograd.grad((out, lse), exact, (d_out.double(), d_lse))
    delta = (d_out.double() * out).sum(dim=-1) - d_lse
    gradient = OutputGradient(*(x.detach().to(state_dtype(q.dtype)) for x in (d_out, lse, delta)))
    found = NativeKernel(isa).backward(q, Dense(k, v), Bounds(lo, hi), scores, gradient)
    sizes = _sizes_of_terms(q, k, v, seen, scores, gradient)
    rounded = q.dtype == torch.bfloat16 and isa in ("amx", "avx512_bf16") and not few_rows(q, k.shape[1])
    for what, mine, whole, size in zip("qkv", (found.q, found.k, found.v), expected, sizes, strict=True):
        assert mine.dtype == state_dtype(q.dtype)
        # Of the size of the terms: they cancel, and dP - delta is 0 for a row that sees one key.
        cancelling = max(1.0, size / float(whole.norm().clamp(min=1e-30)))
        tolerance = ROUNDED_GRADIENTS if rounded else STATE[q.dtype]
        assert_close(mine, whole, tolerance * cancelling, f"d{what} on {isa}")
    return found


def _sizes_of_terms(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scores: Scores, gradient: OutputGradient
) -> list[float]:
    """The norms of sums as those of dq, dk and dv, of the terms' sizes."""
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    s, _ = scores.of(q.double() @ wide_k.mT)
    weights = torch.where(seen.unsqueeze(1), (s - gradient.lse.unsqueeze(-1)).exp(), 0.0)
    d_out, delta = gradient.out.double().abs(), gradient.delta.double().abs()
    d_scores = abs(scores.scale) * weights * (d_out @ wide_v.abs().mT + delta.unsqueeze(-1))
    d_k, d_v = d_scores.mT @ q.double().abs(), weights.mT @ d_out
    of_group = (x.unflatten(1, (-1, group)).sum(dim=2) for x in (d_k, d_v))
    return [float(x.norm()) for x in (d_scores @ wide_k.abs(), *of_group)]


@each_instruction_set
@settings(max_examples=25)
@given(st.data())
def test_any_shape_interval_dtype_stride_and_option(isa: str, data: st.DataObject) -> None:
    problem, options = drawn(
        data,
        (2, 2, 3),
        lambda group: 80,
        [1, 15, 33, 96, 130, 220],
        [1, 2, 31, 64, 80, 129, 512],
        [1, 3, 31, 64, 130],
        steepest=0.04,
    )
    check(isa, *problem, **options)


@each_instruction_set
@each_dtype
@pytest.mark.parametrize("window", [None, 40])
def test_many_tiles_blocks_and_chunks(isa: str, dtype: torch.dtype, window: int | None) -> None:
    q, k, v = (normal(i, 1, heads, 700, 64, dtype=dtype) for i, heads in enumerate((2, 1, 1)))
    lo, hi = causal(700, 700)
    check(isa, q, k, v, lo if window is None else (hi - window).clamp(min=0), hi, Scores(0.125))


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
def test_a_bad_key_value_row_or_gradient_reaches_those_it_meets_and_no_other(
    isa: str, dtype: torch.dtype, bad: float
) -> None:
    q, k, v, d_out = (normal(i, 2, heads, 300, 5, dtype=dtype) for i, heads in enumerate((2, 1, 1, 2)))
    lo, hi = causal(300, 300)
    lo = (hi - 100).clamp(min=0)
    state = NativeKernel(isa).forward(q, Dense(k, v), Bounds(lo, hi), Scores(0.4))
    gradient = OutputGradient(d_out.to(state.out), state.lse, (d_out * state.out).sum(dim=-1))
    clean = NativeKernel(isa).backward(q, Dense(k, v), Bounds(lo, hi), Scores(0.4), gradient)
    k[0, 0, 270, 3] = v[1, 0, 271, 1] = q[0, 1, 10, 2] = bad
    gradient.out[1, 0, 20, 4] = bad
    found = NativeKernel(isa).backward(q, Dense(k, v), Bounds(lo, hi), Scores(0.4), gradient)
    met_rows, met_keys = torch.zeros(2, 2, 300, dtype=torch.bool), torch.zeros(2, 1, 300, dtype=torch.bool)
    met_rows[0, :, 270:] = met_rows[1, :, 271:] = met_rows[0, 1, 10] = met_rows[1, 0, 20] = True
    met_keys[0, 0, 270] = met_keys[1, 0, 271] = met_keys[0, 0, :11] = met_keys[1, 0, :21] = True
    for mine, before, met in zip(
        (found.q, found.k, found.v), (clean.q, clean.k, clean.v), (met_rows, met_keys, met_keys), strict=True
    ):
        assert torch.equal(mine[~met], before[~met])
    if math.isnan(bad):
        assert bool(found.q[met_rows].isnan().all())
        assert bool(found.k[met_keys].isnan().any(dim=-1).all())


@each_instruction_set
@each_dtype
def test_rows_that_see_nothing_and_weights_of_an_infinite_lse_give_nothing(isa: str, dtype: torch.dtype) -> None:
    q, k, v = (normal(i, 1, heads, 100, 20, dtype=dtype) for i, heads in enumerate((2, 1, 1)))
    lo, hi = causal(100, 90)
    k[:, :, 90:], v[:, :, 90:] = math.nan, math.nan  # and keys that nobody sees
    found = check(isa, q, k[:, :, :90], v[:, :, :90], lo, hi, Scores(0.3))
    assert torch.equal(found.q[:, :, :10], torch.zeros_like(found.q[:, :, :10]))
    gradient = OutputGradient(*(normal(i, 1, 2, 100, *size).float() for i, size in ((3, [20]), (4, []), (5, []))))
    nothing = NativeKernel(isa).backward(
        q,
        Dense(k, v),
        Bounds(hi * 0, hi),
        Scores(0.3),
        OutputGradient(gradient.out, gradient.lse + math.inf, gradient.delta),
    )
    for some in (nothing.q, nothing.k, nothing.v):
        assert torch.equal(some, torch.zeros_like(some))


@each_instruction_set
@pytest.mark.parametrize("dims", [(512, 24), (24, 512)])
def test_the_largest_dims(isa: str, dims: tuple[int, int]) -> None:
    for dtype in STATE:
        q, k, v = (
            normal(i, 1, 1, length, dim, dtype=dtype)
            for i, length, dim in zip(range(3), (40, 110, 110), (dims[0], *dims), strict=True)
        )
        check(isa, q, k, v, *causal(40, 110), Scores(dims[0] ** -0.5))


@each_instruction_set
@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 7), (7, 0), (0, 0)])
def test_no_rows_or_no_keys(isa: str, q_len: int, kv_len: int) -> None:
    q, k, v = (
        normal(0, 1, 2, q_len, 8).float(),
        normal(1, 1, 1, kv_len, 8).float(),
        normal(2, 1, 1, kv_len, 5).float(),
    )
    bounds, row = torch.zeros(1, q_len).long(), torch.zeros(1, 2, q_len)
    gradient = OutputGradient(torch.zeros(1, 2, q_len, 5), row - math.inf, row)
    found = NativeKernel(isa).backward(q, Dense(k, v), Bounds(bounds, bounds), Scores(1.0), gradient)
    for some, like in zip((found.q, found.k, found.v), (q, k, v), strict=True):
        assert torch.equal(some, torch.zeros_like(like))


@each_instruction_set
@each_dtype
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_again_and_the_same_sums_on_any_number_of_threads(
    isa: str, dtype: torch.dtype, threads: int
) -> None:
    """One KV head on several threads is cut into parts of its rows."""
    q, k, v = (normal(i, 1, heads, 700, 48, dtype=dtype) for i, heads in enumerate((2, 1, 1)))
    lo, hi = causal(700, 700)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        first, again = (check(isa, q, k, v, lo, hi, Scores(0.15)) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    for one, other in zip((first.q, first.k, first.v), (again.q, again.k, again.v), strict=True):
        assert torch.equal(one, other)


@each_instruction_set
def test_float32_is_about_as_accurate_as_aten(isa: str) -> None:
    q, k, v, d_out = (normal(i, 1, 2, 1024, 64, dtype=torch.float32) for i in range(4))
    exact = [x.double().detach().requires_grad_() for x in (q, k, v)]
    out, lse = dense.attention(*exact, dense.visible(1024, 1024, causal=True))
    expected = torch.autograd.grad(out, exact, d_out.double())
    operators = torch.ops.aten
    aten_out, aten_lse = operators._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[:2]
    theirs = operators._scaled_dot_product_flash_attention_for_cpu_backward(
        d_out, q, k, v, aten_out, aten_lse, 0.0, True
    )
    gradient = OutputGradient(d_out, lse.detach().float(), (d_out * out).sum(dim=-1).detach().float())
    ours = NativeKernel(isa).backward(q, Dense(k, v), Bounds(*causal(1024, 1024)), Scores(0.125), gradient)
    for mine, other, whole in zip((ours.q, ours.k, ours.v), theirs, expected, strict=True):
        assert relative_norm(mine, whole) <= 1.2 * relative_norm(other, whole)


@each_instruction_set
@pytest.mark.parametrize("head_dim", [64, 512])
def test_scores_are_those_of_the_forward(isa: str, head_dim: int) -> None:
    """A row that sees one key has all of its weight there: what the two differ by is in dv."""
    q, k = (2 * normal(i, 1, 2, 150, head_dim, dtype=torch.float32) for i in range(2))
    v, d_out = (normal(i, 1, 2, 150, 16, dtype=torch.float32) for i in range(2))
    lo, scores = torch.arange(150).unsqueeze(0), Scores(head_dim**-0.5)
    lse = NativeKernel(isa).forward(q, Dense(k, v), Bounds(lo, lo + 1), scores).lse
    gradient = OutputGradient(d_out, lse, (d_out * v).sum(dim=-1))
    found = NativeKernel(isa).backward(q, Dense(k, v), Bounds(lo, lo + 1), scores, gradient)
    assert relative_norm(found.v, d_out) < 3e-7

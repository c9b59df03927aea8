"""Decode over int8 keys and values on every instruction set that this machine has, against dequantized ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardsum.blocks import Int8
from shardsum.kernels.compiled import DECODE_ROWS
from shardsum.kernels.native import NativeKernel
from shardsum.masks import Bounds
from shardsum.quantized import Quantized
from shardsum.scores import Scores

from .. import dense
from ..tolerances import OF_16_BITS, STATE, relative_norm
from .native import causal, check_state, each_instruction_set, normal


def quantized(seed: int, *shape: int) -> Quantized:
    return Quantized.of(normal(seed, *shape) * torch.logspace(-0.5, 0.3, shape[2]).unsqueeze(1))


def of_16_bits(q: Tensor) -> Tensor:
    """The queries that products of integers take: each row's largest element as 32767, computed in float32."""
    factor = q.float().abs().amax(dim=3, keepdim=True) / 32767
    return (q.float() * (1 / factor)).round() * factor


def check_quantized(
    isa: str, q: Tensor, k: Quantized, v: Quantized, lo: Tensor, hi: Tensor, scores: Scores, **options: object
) -> None:
    state = NativeKernel(isa).forward(q, Int8(k, v), Bounds(lo, hi), scores)
    exact = [x.dequantized(torch.float64) for x in (k, v)]
    integers = isa in ("amx", "avx512_bf16") and q.dtype != torch.float64
    tolerance = OF_16_BITS if integers else STATE[q.dtype]
    check_state(state, tolerance, of_16_bits(q) if integers else q, *exact, lo, hi, scores, **options)


@each_instruction_set
def test_queries_and_values_of_any_size(isa: str) -> None:
    q = normal(0, 1, 4, 1, 64, dtype=torch.float32) * torch.tensor([1e-30, 1e-3, 1.0, 0.0]).view(1, 4, 1, 1)
    k, v = quantized(1, 1, 4, 300, 64), quantized(2, 1, 4, 300, 64)
    k, v = Quantized(k.numbers, k.scales * 10), Quantized(v.numbers, v.scales * 1e-20)
    lo, hi = causal(1, 300)
    state = NativeKernel(isa).forward(q, Int8(k, v), Bounds(lo, hi), Scores(0.125))
    exact = [x.dequantized(torch.float64) for x in (k, v)]
    expected, _ = dense.attention(q, *exact, torch.ones(1, 1, 300).bool(), 0.125)
    for head in range(4):
        assert relative_norm(state.out[:, head].double(), expected[:, head]) < 1e-3


@each_instruction_set
def test_what_is_not_finite_shows(isa: str) -> None:
    q, k, v = normal(0, 1, 4, 1, 64, dtype=torch.float32), quantized(1, 1, 4, 100, 64), quantized(2, 1, 4, 100, 64)
    q[0, 0, 0, 3], k.scales[0, 1, 70], v.scales[0, 2, 70] = math.nan, math.nan, math.nan
    lo, hi = causal(1, 100)
    out = NativeKernel(isa).forward(q, Int8(k, v), Bounds(lo, hi), Scores(0.125)).out
    assert out.isnan().all(dim=3).flatten().tolist() == [True, True, True, False]


@each_instruction_set
@settings(max_examples=60)
@given(st.data())
def test_any_shape_interval_dtype_stride_and_option(isa: str, data: st.DataObject) -> None:
    draw = data.draw
    batch, kv_heads, group = (draw(st.integers(1, high)) for high in (3, 2, 9))
    q_len = draw(st.integers(1, DECODE_ROWS // group))
    kv_len = draw(st.sampled_from([1, 15, 33, 64, 130, 511, 512, 513, 1700]))
    head_dim, v_dim = (draw(st.sampled_from([1, 2, 31, 64, 80, 96, 128, 129, 512])) for _ in range(2))
    dtype, seed = draw(st.sampled_from(list(STATE))), draw(st.integers(0, 2**31))
    q = normal(seed, batch, q_len, kv_heads * group, head_dim, dtype=dtype).transpose(1, 2)
    k, v = (
        quantized(seed + 1, batch, kv_heads, kv_len + 5, head_dim),
        quantized(seed, batch, kv_heads, kv_len, v_dim),
    )
    k = Quantized(k.numbers[:, :, 2:-3], k.scales[:, :, 2:-3])  # as a cache with room to grow
    bounds = torch.randint(kv_len + 1, (2, batch, q_len), generator=torch.Generator().manual_seed(seed))
    lo, hi = bounds.sort(dim=0).values if draw(st.booleans()) else causal(q_len, kv_len)
    softcap = draw(st.sampled_from([None, 0.5, 20.0]))
    scores = Scores(draw(st.sampled_from([1.0, -0.7])) / math.sqrt(head_dim), softcap=softcap)
    check_quantized(isa, q, k, v, lo, hi, scores, softcap=softcap)


@each_instruction_set
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 16])
def test_rows_beyond_a_sequence_do_not_matter(isa: str, group: int) -> None:
    q = normal(0, 4, 2 * group, 1, 64, dtype=torch.bfloat16)
    k, v = (quantized(i, 4, 2, 3000, 64) for i in (1, 2))
    hi = torch.tensor([[3000], [1], [0], [1500]])
    lo = (hi - 2000).clamp(min=0)
    clean = NativeKernel(isa).forward(q, Int8(k, v), Bounds(lo, hi), Scores(0.125))
    for b in range(4):
        for x in (k, v):
            x.scales[b, :, int(hi[b]) :] = x.scales[b, :, : int(lo[b])] = math.nan
    state = NativeKernel(isa).forward(q, Int8(k, v), Bounds(lo, hi), Scores(0.125))
    assert torch.equal(state.out, clean.out)
    assert torch.equal(state.lse, clean.lse)
    assert torch.equal(state.out[2], torch.zeros_like(state.out[2]))
    assert bool((state.lse[2] == -torch.inf).all())


@each_instruction_set
def test_dropout_keeps_what_scores_says(isa: str) -> None:
    q, k, v = normal(0, 2, 4, 3, 16, dtype=torch.float32), quantized(1, 2, 2, 900, 16), quantized(2, 2, 2, 900, 16)
    lo, hi = causal(3, 900)
    scores = Scores(0.25, dropout_p=0.3, seed=9, head=1, rows=torch.arange(3) * 3, keys=torch.arange(900) + 7)
    kept = scores.kept(torch.zeros(2, 4, 3, 900, dtype=torch.float64))
    check_quantized(isa, q, k, v, lo, hi, scores, kept=kept)

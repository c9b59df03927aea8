"""Decode over int8 keys and values on every instruction set that this machine has, against dequantized ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsum.kernels.native import NativeKernel
from shardsum.kernels.operators import DECODE_ROWS
from shardsum.quantized import Quantized
from shardsum.scores import Scores

from ..tolerances import STATE
from .native import causal, check_state, each_instruction_set, normal


def quantized(seed: int, *shape: int) -> Quantized:
    return Quantized.of(normal(seed, *shape) * torch.logspace(-0.5, 0.3, shape[2]).unsqueeze(1))


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
    state = NativeKernel(isa).forward_quantized(q, k, v, lo, hi, scores)
    exact = [x.dequantized(torch.float64) for x in (k, v)]
    check_state(state, STATE[dtype], q, *exact, lo, hi, scores, softcap=softcap)


@each_instruction_set
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 16])
def test_rows_beyond_a_sequence_do_not_matter(isa: str, group: int) -> None:
    q = normal(0, 4, 2 * group, 1, 64, dtype=torch.bfloat16)
    k, v = (quantized(i, 4, 2, 3000, 64) for i in (1, 2))
    hi = torch.tensor([[3000], [1], [0], [1500]])
    lo = (hi - 2000).clamp(min=0)
    clean = NativeKernel(isa).forward_quantized(q, k, v, lo, hi, Scores(0.125))
    for b in range(4):
        for x in (k, v):
            x.scales[b, :, int(hi[b]) :] = x.scales[b, :, : int(lo[b])] = math.nan
    state = NativeKernel(isa).forward_quantized(q, k, v, lo, hi, Scores(0.125))
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
    exact = [x.dequantized(torch.float64) for x in (k, v)]
    state = NativeKernel(isa).forward_quantized(q, k, v, lo, hi, scores)
    check_state(state, STATE[torch.float32], q, *exact, lo, hi, scores, kept=kept)

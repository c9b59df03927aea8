"""What the tests of the C++ kernels share: tensors, intervals, and the comparison with the definition."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from shardsum.blocks import Dense
from shardsum.extension import instruction_sets
from shardsum.kernels.compiled import DECODE_ROWS
from shardsum.kernels.native import NativeKernel
from shardsum.masks import Bounds
from shardsum.scores import Scores
from shardsum.state import AttentionState

from .. import dense
from ..tolerances import ROUNDED_WEIGHTS, STATE, assert_close

each_dtype = pytest.mark.parametrize("dtype", list(STATE))
each_instruction_set = pytest.mark.parametrize("isa", instruction_sets())
# The best and the plainest; those between at night.
best_and_plainest = pytest.mark.parametrize(
    "isa",
    [
        pytest.param(isa, marks=pytest.mark.nightly if 0 < i < len(instruction_sets()) - 1 else ())
        for i, isa in enumerate(instruction_sets())
    ],
)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def causal(q_len: int, kv_len: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, q_len).long(), (torch.arange(q_len) + kv_len - q_len + 1).clamp(0, kv_len).unsqueeze(0)


def visible(lo: Tensor, hi: Tensor, kv_len: int) -> Tensor:
    j = torch.arange(kv_len)
    return (lo.unsqueeze(-1) <= j) & (j < hi.unsqueeze(-1))


def drawn(
    data: st.DataObject,
    most: tuple[int, int, int],
    most_queries: Callable[[int], int],
    kv_lens: Sequence[int],
    head_dims: Sequence[int],
    v_dims: Sequence[int],
    steepest: float,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Scores], dict[str, object]]:
    """(q, k, v, lo, hi, scores) of any dtype, stride, interval and option, and dense.attention's options for them.

    `most`: sequences, KV heads, and query heads of each; `most_queries` is a function of the last. `steepest`: the
    largest ALiBi slope. Scores stay below 20: one of 200 is uncertain by 200 * 2^-24, and so is its weight.
    """
    draw = data.draw
    batch, kv_heads, group = (draw(st.integers(1, high)) for high in most)
    q_len, kv_len = draw(st.integers(1, most_queries(group))), draw(st.sampled_from(kv_lens))
    head_dim, v_dim = draw(st.sampled_from(head_dims)), draw(st.sampled_from(v_dims))
    dtype, seed = draw(st.sampled_from(list(STATE))), draw(st.integers(0, 2**31))
    q = normal(seed, batch, q_len, kv_heads * group, head_dim, dtype=dtype).transpose(1, 2)
    k = normal(seed + 1, batch, kv_len, kv_heads, head_dim + 3, dtype=dtype)[..., 1:-2].transpose(1, 2)
    v = normal(seed + 2, batch, kv_heads, kv_len, v_dim, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    bounds = torch.randint(kv_len + 1, (2, draw(st.sampled_from([1, batch])), q_len), generator=generator)
    lo, hi = bounds.sort(dim=0).values if draw(st.booleans()) else causal(q_len, kv_len)
    softcap = draw(st.sampled_from([None, 0.5, 20.0]))
    slopes = steepest * torch.rand(kv_heads * group, generator=generator) if draw(st.booleans()) else None
    own, keys = torch.arange(q_len).unsqueeze(0) + 5, torch.arange(kv_len)
    scale = draw(st.sampled_from([1.0, -0.7])) / math.sqrt(head_dim)
    scores = Scores(scale, softcap=softcap, alibi_slopes=slopes, keys=keys, diagonal=own)
    distance = (own.unsqueeze(-1) - keys).abs().float()
    alibi = None if slopes is None else (slopes, distance)
    return (q, k, v, lo, hi, scores), {"softcap": softcap, "alibi": alibi}


def check(
    isa: str, q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, scores: Scores, **options: object
) -> None:
    many = q.shape[1] // k.shape[1] * q.shape[2] > DECODE_ROWS
    rounded = many and q.dtype == torch.bfloat16 and isa in ("amx", "avx512_bf16")
    tolerance = ROUNDED_WEIGHTS if rounded else STATE[q.dtype]
    check_state(
        NativeKernel(isa).forward(q, Dense(k, v), Bounds(lo, hi), scores),
        tolerance,
        q,
        k,
        v,
        lo,
        hi,
        scores,
        **options,
    )


def check_state(
    state: AttentionState,
    tolerance: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    scores: Scores,
    **options: object,
) -> None:
    """That a state is the definition's, `tolerance` being that of an out without cancellation."""
    seen = visible(lo, hi, k.shape[2]).expand(q.shape[0], -1, -1)
    out, lse = dense.attention(q, k, v, seen, scores.scale, **options)  # type: ignore[arg-type]
    terms, _ = dense.attention(q, k, v.double().abs(), seen, scores.scale, **options)  # type: ignore[arg-type]
    cancelling = max(1.0, float((terms.norm() / out.norm()).nan_to_num(nan=1.0)))
    assert_close(state.out, out, tolerance * cancelling, "out")
    finite = lse.isfinite()
    assert torch.equal(state.lse[~finite].double(), lse[~finite])
    error = (state.lse - lse)[finite].abs() / lse[finite].abs().clamp(min=1)
    allowed = 1e-13 if q.dtype == torch.float64 else 2e-6
    assert not bool(finite.any()) or float(error.max()) <= allowed, f"lse: {float(error.max()):.2e}"

"""What the tests of the C++ kernels share: tensors, intervals, and the comparison with the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shardsum.kernels.native import NativeKernel
from shardsum.kernels.operators import DECODE_ROWS, instruction_sets
from shardsum.scores import Scores
from shardsum.state import AttentionState

from .. import dense
from ..tolerances import ROUNDED_WEIGHTS, STATE, assert_close

each_instruction_set = pytest.mark.parametrize("isa", instruction_sets())


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def causal(q_len: int, kv_len: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, q_len).long(), (torch.arange(q_len) + kv_len - q_len + 1).clamp(0, kv_len).unsqueeze(0)


def visible(lo: Tensor, hi: Tensor, kv_len: int) -> Tensor:
    j = torch.arange(kv_len)
    return (lo.unsqueeze(-1) <= j) & (j < hi.unsqueeze(-1))


def check(
    isa: str, q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, scores: Scores, **options: object
) -> None:
    many = q.shape[1] // k.shape[1] * q.shape[2] > DECODE_ROWS
    rounded = many and q.dtype == torch.bfloat16 and isa in ("amx", "avx512_bf16")
    tolerance = ROUNDED_WEIGHTS if rounded else STATE[q.dtype]
    check_state(NativeKernel(isa).forward(q, k, v, lo, hi, scores), tolerance, q, k, v, lo, hi, scores, **options)


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

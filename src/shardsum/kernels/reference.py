"""The definition of attention, in float64: what every other kernel and strategy is tested against."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..problem import state_dtype
from ..state import AttentionState
from .base import Kernel


class ReferenceKernel(Kernel):
    """Scores, exponentials and sums written out in float64, the result rounded once at the end.

    Holds the (batch, q_heads, q_len, kv_len) matrix of weights: for tests and small sums.
    """

    name = "reference"

    def forward(
        self,
        q: Float[Tensor, "batch q_heads q_len head_dim"],
        k: Float[Tensor, "batch kv_heads kv_len head_dim"],
        v: Float[Tensor, "batch kv_heads kv_len v_dim"],
        lo: Int[Tensor, "batch_or_1 q_len"],
        hi: Int[Tensor, "batch_or_1 q_len"],
        *,
        scale: float,
    ) -> AttentionState:
        group = q.shape[1] // k.shape[1]
        q64, k64, v64 = q.double(), k.double(), v.double()
        k64, v64 = k64.repeat_interleave(group, dim=1), v64.repeat_interleave(group, dim=1)
        keys = torch.arange(k.shape[2], device=q.device)
        lo, hi = lo.to(q.device).unsqueeze(-1), hi.to(q.device).unsqueeze(-1)
        visible = ((lo <= keys) & (keys < hi)).unsqueeze(1)
        scores = (scale * q64 @ k64.transpose(-1, -2)).masked_fill(~visible, -torch.inf)
        lse = scores.logsumexp(dim=-1) if k.shape[2] else scores.new_full(scores.shape[:-1], -torch.inf)
        weights = (scores - lse.unsqueeze(-1)).exp().masked_fill(~visible, 0.0)
        out = _sum_of_visible(weights, v64, visible)
        dtype = state_dtype(q.dtype)
        return AttentionState(out.to(dtype), lse.to(dtype))


def _sum_of_visible(weights: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """weights @ v, except that an invisible value of NaN or Inf adds nothing (0 * NaN would be NaN)."""
    finite = v.isfinite()
    out = weights @ v.masked_fill(~finite, 0.0)
    for j in (~finite).any(dim=3).flatten(0, 1).any(dim=0).nonzero().flatten().tolist():
        bad = v[:, :, j].masked_fill(finite[:, :, j], 0.0).unsqueeze(2)
        seen = visible[..., j].unsqueeze(-1)
        # Masked before and after: a finite component of the same value is already in the sum.
        out = out + torch.where(seen & ~finite[:, :, j].unsqueeze(2), weights[..., j].unsqueeze(-1) * bad, 0.0)
    return out

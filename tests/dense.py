"""Attention written down a second time, from the words of the documentation: no code of the library is used.

Every (row, key) pair is decided by itself, so a mistake in intervals, layouts or merging has no counterpart here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def visible(
    q_len: int,
    kv_len: int,
    batch: int = 1,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    cu_seqlens: Sequence[int] | None = None,
    cu_seqlens_k: Sequence[int] | None = None,
    key_range: tuple[Sequence[int], Sequence[int]] | None = None,
    q_start: int | Sequence[int] | None = None,
) -> Tensor:
    """Which row sees which key: (batch, q_len, kv_len), bool."""
    q_ends = list(cu_seqlens or [0, q_len])
    k_ends = list(cu_seqlens_k or cu_seqlens or [0, kv_len])
    left, right = window or (None, None)
    seen = torch.zeros(batch, q_len, kv_len, dtype=torch.bool)
    for b in range(batch):
        for d in range(len(q_ends) - 1):
            tq, tk = q_ends[d + 1] - q_ends[d], k_ends[d + 1] - k_ends[d]
            start = tk - tq
            if q_start is not None:
                start = q_start if isinstance(q_start, int) else q_start[b]
            t, j = torch.arange(tq).unsqueeze(1), torch.arange(tk).unsqueeze(0)
            i = t + start
            see = torch.ones(tq, tk, dtype=torch.bool)
            if causal:
                see &= j <= i
            if left is not None and left >= 0:
                see &= j >= i - left
            if right is not None and right >= 0:
                see &= j <= i + right
            seen[b, q_ends[d] : q_ends[d + 1], k_ends[d] : k_ends[d + 1]] = see
        if key_range is not None:
            j = torch.arange(kv_len)
            seen[b] &= (j >= key_range[0][b]) & (j < key_range[1][b])
    return seen


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) in float64; a key that a row does not see is dropped, not multiplied by zero."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    see = seen.unsqueeze(1)
    scores = torch.where(see, torch.einsum("bhid,bhjd->bhij", q, k) * scale, -math.inf)
    top = scores.amax(dim=-1, keepdim=True).nan_to_num(nan=math.nan, neginf=0.0) if k.shape[2] else 0.0
    weights = torch.where(see, (scores - top).exp(), 0.0)
    total = weights.sum(dim=-1)
    products = torch.where(see.unsqueeze(-1), weights.unsqueeze(-1) * v.unsqueeze(2), 0.0)
    out = products.sum(dim=3) / torch.where(total == 0, 1.0, total).unsqueeze(-1)
    lse = total.log() + (top.squeeze(-1) if isinstance(top, Tensor) else top)
    return out, torch.where(see.any(dim=-1), lse, -math.inf)

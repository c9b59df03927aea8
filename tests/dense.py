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
    prefix: int | Sequence[int] = 0,
    sink_tokens: int = 0,
    key_intervals: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Which row sees which key: (batch, q_len, kv_len), bool."""
    q_ends = list(cu_seqlens or [0, q_len])
    k_ends = list(cu_seqlens_k or cu_seqlens or [0, kv_len])
    left, right = window or (None, None)
    seen = torch.zeros(batch, q_len, kv_len, dtype=torch.bool)
    for b in range(batch):
        start, end = (key_range[0][b], key_range[1][b]) if key_range is not None else (0, kv_len)
        seen_first = prefix if isinstance(prefix, int) else prefix[b]
        for d in range(len(q_ends) - 1):
            tq, tk = q_ends[d + 1] - q_ends[d], k_ends[d + 1] - k_ends[d]
            shift = tk - tq
            if q_start is not None:
                shift = q_start if isinstance(q_start, int) else q_start[b]
            t, j = torch.arange(tq).unsqueeze(1), torch.arange(tk).unsqueeze(0)
            i = t + shift
            first = max(0, start - k_ends[d])
            near = torch.ones(tq, tk, dtype=torch.bool)
            if left is not None and left >= 0:
                near &= j >= i - left
            if right is not None and right >= 0:
                near &= j <= i + right
            see = near | (j < first + sink_tokens)
            if causal:
                see &= j <= i
            see |= j < first + seen_first
            seen[b, q_ends[d] : q_ends[d + 1], k_ends[d] : k_ends[d + 1]] = see
        j = torch.arange(kv_len)
        seen[b] &= (j >= start) & (j < end)
        if key_intervals is not None:
            lo, hi = (bound.expand(batch, -1)[b].unsqueeze(1) for bound in key_intervals)
            seen[b] &= (j >= lo) & (j < hi)
    return seen


def distances(q_len: int, kv_len: int, batch: int = 1, **masks: object) -> Tensor:
    """How far each key lies from each row's own position, in their document: (batch, q_len, kv_len)."""
    q_ends: Sequence[int] = masks.get("cu_seqlens") or [0, q_len]  # type: ignore[assignment]
    k_ends: Sequence[int] = masks.get("cu_seqlens_k") or masks.get("cu_seqlens") or [0, kv_len]  # type: ignore[assignment]
    q_start = masks.get("q_start")
    found = torch.zeros(batch, q_len, kv_len)
    for b in range(batch):
        for d in range(len(q_ends) - 1):
            tq, tk = q_ends[d + 1] - q_ends[d], k_ends[d + 1] - k_ends[d]
            shift = tk - tq if q_start is None else q_start[b]  # type: ignore[index]
            i, j = torch.arange(tq).unsqueeze(1) + shift, torch.arange(tk).unsqueeze(0)
            found[b, q_ends[d] : q_ends[d + 1], k_ends[d] : k_ends[d + 1]] = (i - j).abs().float()
    return found


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    scale: float | Tensor | None = None,
    *,
    softcap: float | None = None,
    alibi: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    kept: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """(out, lse) in `dtype`, differentiable; a key that a row does not see is dropped, not multiplied by zero.

    `alibi`: (slopes, distances (batch or 1, q_len, kv_len)). `kept`: what dropout multiplies each weight by.
    """
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    see = seen.unsqueeze(1)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi is not None:
        scores = scores - alibi[0].to(dtype).view(-1, 1, 1) * alibi[1].to(dtype).unsqueeze(1)
    if bias is not None:
        scores = scores + bias.to(dtype)
    scores = torch.where(see, scores, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(dtype).view(-1, 1, 1).expand(*scores.shape[:3], 1)], dim=3)
    top = (
        scores.detach().amax(dim=-1, keepdim=True).nan_to_num(nan=math.nan, neginf=0.0) if scores.shape[3] else 0.0
    )
    weights = torch.where(scores > -math.inf, (torch.where(scores > -math.inf, scores, 0.0) - top).exp(), 0.0)
    weights = torch.where(scores.isnan(), scores, weights)
    total = weights.sum(dim=-1)
    weights = weights[..., : k.shape[2]] if kept is None else weights[..., : k.shape[2]] * kept
    if bool(v.isfinite().all()):
        out = weights @ v  # to zero times a number the next lines come too, by v_dim times the memory
    else:
        out = torch.where(see.unsqueeze(-1), weights.unsqueeze(-1) * v.unsqueeze(2), 0.0).sum(dim=3)
    out = out / torch.where(total == 0, 1.0, total).unsqueeze(-1)
    blind = total == 0
    lse = torch.where(blind, 1.0, total).log() + (top.squeeze(-1) if isinstance(top, Tensor) else top)
    return out, torch.where(blind, -math.inf, lse)

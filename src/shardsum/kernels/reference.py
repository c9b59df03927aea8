"""The definition of attention and of its gradients: what every other kernel is tested against."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..blocks import Block, Dense
from ..masks import Bounds
from ..problem import state_dtype
from ..scores import Scores
from ..state import AttentionState
from ..tree import SEGMENT
from .along_tree import gradients_by_pieces, state_by_pieces
from .base import Gradients, Kernel, Leaf, OutputGradient, Queries

# Rows are taken so many at a time that a matrix of weights has about this many elements (64 MB in float32).
WEIGHTS = 1 << 24
# What a value may meet in a leaf: torch's products add up the keys of a segment in any order.
TORCH_ROUNDINGS = SEGMENT


class EagerKernel(Kernel):
    """Scores, exponentials and sums written out, some rows at a time: whatever a score is made of.

    Numerics: a row's weights add up to 1 in the forward pass, however large its scores are.
    Source: Dao et al. 2022 (FlashAttention, appendix B.4) for the gradients.
    """

    name = "eager"

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return state_dtype(dtype)

    def _forward(self, q: Queries, block: Block, bounds: Bounds, scores: Scores) -> AttentionState:
        assert isinstance(block, Dense)
        k, v, (lo, hi) = block.k, block.v, bounds
        dtype, compute = state_dtype(q.dtype), self.compute_dtype(q.dtype)
        state = AttentionState.empty(*q.shape[:3], v.shape[3], dtype=dtype, device=q.device)
        if state.out.numel() == 0 or k.shape[2] == 0:
            return state
        k, v = k.to(compute), v.to(compute)
        for rows in _row_slices(q, k):
            part, visible = scores.some_rows(rows), _visible(lo[:, rows], hi[:, rows], k)
            s, _ = part.of(_products(q[:, :, rows].to(compute), k))
            s = s.masked_fill(~visible, -torch.inf)
            # The largest score is taken out by itself: of -1e9 + log(12) nothing is left of the log.
            # All of a row's scores may be -inf: exp(-inf - 0) is the 0 that is meant, -inf - (-inf) is NaN.
            top = s.amax(dim=-1, keepdim=True)
            top = top.masked_fill(top == -torch.inf, 0.0)
            weights = (s - top).exp().masked_fill(~visible, 0.0)
            total = weights.sum(dim=-1, keepdim=True)
            weights = weights / total.masked_fill(total == 0.0, 1.0)
            kept = part.kept(s)
            if kept is not None:
                weights = weights * kept
            state.out[:, :, rows] = _sum_of_visible(weights, v, visible).to(dtype)
            state.lse[:, :, rows] = (top + total.log()).squeeze(-1).to(dtype)
        return state

    def backward(
        self, q: Queries, block: Dense, bounds: Bounds, scores: Scores, gradient: OutputGradient
    ) -> Gradients:
        k, v, (lo, hi) = block.k, block.v, bounds
        compute, kv_heads = self.compute_dtype(q.dtype), k.shape[1]
        d_q, d_k, d_v = (torch.zeros_like(x, dtype=compute) for x in (q, k, v))
        d_bias = None if scores.bias is None else torch.zeros_like(scores.bias, dtype=compute)
        # A row or key that is not finite makes NaN of the weights of those who see it, and is nothing to others.
        finite_k = _finite(k.to(compute))
        for rows in _row_slices(q, k):
            part, visible = scores.some_rows(rows), _visible(lo[:, rows], hi[:, rows], k)
            own_q = q[:, :, rows].to(compute)
            d_out, lse, delta = (x[:, :, rows].to(compute) for x in (gradient.out, gradient.lse, gradient.delta))
            lse = lse.masked_fill(lse == -torch.inf, torch.inf)
            s, slope = part.of(_products(own_q, k.to(compute)))
            p = torch.where(visible, (s - lse.unsqueeze(-1)).exp(), 0.0)
            kept = part.kept(s)
            d_p = _products(d_out, v.to(compute))
            d_p = d_p if kept is None else d_p * kept
            d_s = torch.where(visible, p * (d_p - delta.unsqueeze(-1)), 0.0)
            p = p if kept is None else p * kept
            p = torch.where(visible & ~d_out.isfinite().all(dim=-1, keepdim=True), torch.nan, p)
            d_v += _folded(p, kv_heads).mT @ _folded(_finite(d_out), kv_heads)
            if d_bias is not None:
                d_bias[:, :, rows] += d_s.sum_to_size(*d_bias.shape[:2], *d_s.shape[2:])
            d_s = scores.scale * (d_s if slope is None else torch.where(visible, d_s * slope, 0.0))
            d_q[:, :, rows] = (_folded(d_s, kv_heads) @ finite_k).view(own_q.shape)
            d_k += _folded(d_s, kv_heads).mT @ _folded(_finite(own_q), kv_heads)
        dtype = state_dtype(q.dtype)
        return Gradients(
            d_q.to(dtype), d_k.to(dtype), d_v.to(dtype), d_bias if d_bias is None else d_bias.to(dtype)
        )

    def _forward_tree(self, q: Queries, block: Dense, bounds: Bounds, scores: Scores) -> AttentionState:
        return state_by_pieces(self, q, block, bounds, scores)

    def backward_leaf(
        self, q: Queries, block: Dense, bounds: Bounds, scores: Scores, gradient: OutputGradient
    ) -> Gradients:
        return gradients_by_pieces(self, q, block, bounds, scores, gradient)

    def rounding(self, dtype: torch.dtype, *, bias: bool) -> Leaf:
        return Leaf(torch.finfo(self.compute_dtype(dtype)).eps / 2, TORCH_ROUNDINGS)


class ReferenceKernel(EagerKernel):
    """Scores, exponentials and sums in float64, rounded once at the end: for tests and small sums."""

    name = "reference"
    definition = True

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64


def _row_slices(q: Tensor, k: Tensor) -> Iterator[slice]:
    step = max(1, WEIGHTS // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    return (slice(row, min(row + step, q.shape[2])) for row in range(0, q.shape[2], step))


def _visible(lo: Tensor, hi: Tensor, k: Tensor) -> Tensor:
    """(batch or 1, 1, rows, keys)"""
    keys = torch.arange(k.shape[2], device=k.device)
    lo, hi = lo.to(k.device).unsqueeze(-1), hi.to(k.device).unsqueeze(-1)
    return ((lo <= keys) & (keys < hi)).unsqueeze(1)


def _folded(x: Tensor, kv_heads: int) -> Tensor:
    """(batch, q_heads, rows, n) with the query heads of one KV head folded into the rows."""
    return x.reshape(x.shape[0], kv_heads, x.shape[1] // kv_heads * x.shape[2], x.shape[3])


def _products(q: Tensor, k: Tensor) -> Tensor:
    return (_folded(q, k.shape[1]) @ k.mT).view(*q.shape[:3], k.shape[2])


def _finite(x: Tensor) -> Tensor:
    """Rows that hold NaN or Inf as zeros."""
    return x.masked_fill(~x.isfinite().all(dim=-1, keepdim=True), 0.0)


def _sum_of_visible(weights: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """weights @ v, except that an invisible value of NaN or Inf adds nothing (0 * NaN would be NaN)."""
    finite, group = v.isfinite(), weights.shape[1] // v.shape[1]
    clean = v.masked_fill(~finite, 0.0)
    out = (_folded(weights, v.shape[1]) @ clean).view(*weights.shape[:3], v.shape[3])
    for j in (~finite).any(dim=3).flatten(0, 1).any(dim=0).nonzero().flatten().tolist():
        good = finite[:, :, j].repeat_interleave(group, dim=1).unsqueeze(2)
        bad = v[:, :, j].repeat_interleave(group, dim=1).unsqueeze(2).masked_fill(good, 0.0)
        # Masked before and after: a finite component of the same value is already in the sum.
        out = out + torch.where(visible[..., j].unsqueeze(-1) & ~good, weights[..., j].unsqueeze(-1) * bad, 0.0)
    return out

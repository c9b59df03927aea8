"""A kernel that computes nothing, and counts what computing would cost: attention as sizes alone."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..blocks import Block, Dense
from ..masks import Bounds
from ..problem import state_dtype
from ..scores import Scores
from ..state import AttentionState
from .base import Gradients, Kernel, OutputGradient, Queries


class CostingKernel(Kernel):
    """States and gradients on meta, which have shapes and no values, and the sum of what its calls would cost.

    `multiply_adds`: of the products alone, over the pairs that the bounds say, or all where they are on meta, too.
    `read_bytes`: of keys and values, each call reading its block once.
    """

    name = "costing"
    computes: ClassVar[bool] = False

    def __init__(self) -> None:
        self.calls = self.multiply_adds = self.read_bytes = 0

    def reads(self, q: Queries, block: Block, scores: Scores) -> bool:
        return True

    def _forward(self, q: Queries, block: Block, bounds: Bounds, scores: Scores) -> AttentionState:
        self._count(q, block, bounds, block.head_dim + block.v_dim)
        dtype = state_dtype(q.dtype)
        out = q.new_empty((*q.shape[:3], block.v_dim), dtype=dtype, device="meta")
        return AttentionState(out, out[..., 0])

    def backward(
        self, q: Queries, block: Dense, bounds: Bounds, scores: Scores, gradient: OutputGradient
    ) -> Gradients:
        self._count(q, block, bounds, 3 * block.head_dim + 2 * block.v_dim)
        dtype = state_dtype(q.dtype)
        d_q, d_k, d_v = (torch.empty_like(x, dtype=dtype, device="meta") for x in (q, block.k, block.v))
        bias = scores.bias
        return Gradients(
            d_q, d_k, d_v, None if bias is None else torch.empty_like(bias, dtype=dtype, device="meta")
        )

    def _forward_tree(self, q: Queries, block: Dense, bounds: Bounds, scores: Scores) -> AttentionState:
        return self._forward(q, block, bounds, scores)

    def backward_leaf(
        self, q: Queries, block: Dense, bounds: Bounds, scores: Scores, gradient: OutputGradient
    ) -> Gradients:
        return self.backward(q, block, bounds, scores, gradient)

    def backward_by_trees(self, scores: Scores) -> bool:
        return True

    def _count(self, q: Tensor, block: Block, bounds: Bounds, dims: int) -> None:
        """Add one call that does `dims` multiplications and additions for each pair of a row and a key."""
        self.calls += 1
        self.multiply_adds += q.shape[1] * _pairs(q, block, bounds) * dims
        self.read_bytes += block.nbytes


def _pairs(q: Tensor, block: Block, bounds: Bounds) -> int:
    """Return how many keys the rows of all sequences see together."""
    batch, rows = q.shape[0], q.shape[2]
    if bounds.lo.is_meta:
        return batch * rows * block.kv_len
    lo, hi = (bound.clamp(0, block.kv_len) for bound in bounds)
    return int((hi - lo).clamp(min=0).sum()) * (batch // lo.shape[0])

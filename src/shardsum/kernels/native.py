"""Our own kernels for CPUs, in C++: keys outside a row's interval are never read into its sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import Unsupported
from ..extension import instruction_sets
from ..problem import state_dtype
from ..quantized import Quantized
from ..scores import Scores
from ..state import AttentionState
from ..tree import SEGMENT
from .base import Bounds, Gradients, Kernel, Keys, OutputGradient, Queries, Values
from .compiled import few_rows, why_not_native
from .operators import attention_backward, dense_forward, paged_forward, quantized_forward
from .reference import EagerKernel


class NativeKernel(Kernel):
    """The C++ kernels in `native/`, compiled for several instruction sets; by default the best that runs here.

    Scores with an additive bias go to the eager kernel.
    Raises: Unsupported where the package was built without them, for an instruction set that this machine does
    not have, and for tensors that are not on the CPU.
    """

    name = "native"

    def __init__(self, instruction_set: str | None = None) -> None:
        missing = why_not_native()
        if missing is not None:
            raise Unsupported(f"{missing} kernel='aten' needs none.")
        available = instruction_sets()
        if instruction_set not in (None, *available):
            raise Unsupported(f"this machine runs {', '.join(available)}: got {instruction_set!r}.")
        self.instruction_set = instruction_set or available[0]

    def forward(self, q: Queries, k: Keys, v: Values, lo: Bounds, hi: Bounds, scores: Scores) -> AttentionState:
        if scores.bias is not None:
            return EagerKernel().forward(q, k, v, lo, hi, scores)
        return AttentionState(*dense_forward(*self._arguments(q, k, v, lo, hi, scores)))

    def forward_quantized(
        self, q: Queries, k: Quantized, v: Quantized, lo: Bounds, hi: Bounds, scores: Scores
    ) -> AttentionState:
        if scores.bias is not None or q.dtype == torch.float64 or not few_rows(q, k.numbers):
            return super().forward_quantized(q, k, v, lo, hi, scores)
        options = self._options(scores)
        return AttentionState(
            *quantized_forward(q.float(), k.numbers, v.numbers, (k.scales, v.scales), lo, hi, *options)
        )

    def forward_paged(
        self, q: Queries, k_pages: Tensor, v_pages: Tensor, table: Tensor, lo: Bounds, hi: Bounds, scores: Scores
    ) -> AttentionState:
        """The same over keys in pages, which `shardsum.decode_paged` describes and checks."""
        return AttentionState(*paged_forward(q, k_pages, v_pages, table, lo, hi, *self._options(scores)))

    def backward(
        self, q: Queries, k: Keys, v: Values, lo: Bounds, hi: Bounds, scores: Scores, gradient: OutputGradient
    ) -> Gradients:
        if scores.bias is not None:
            return EagerKernel().backward(q, k, v, lo, hi, scores, gradient)
        return self._backward(q, k, v, lo, hi, scores, gradient, 0)

    def forward_tree(
        self, q: Queries, k: Keys, v: Values, lo: Bounds, hi: Bounds, scores: Scores
    ) -> AttentionState:
        if scores.bias is not None:
            return EagerKernel().forward_tree(q, k, v, lo, hi, scores)
        return AttentionState(*dense_forward(*self._arguments(q, k, v, lo, hi, scores), SEGMENT))

    def backward_leaf(
        self, q: Queries, k: Keys, v: Values, lo: Bounds, hi: Bounds, scores: Scores, gradient: OutputGradient
    ) -> Gradients:
        if scores.bias is not None:
            return EagerKernel().backward_leaf(q, k, v, lo, hi, scores, gradient)
        return self._backward(q, k, v, lo, hi, scores, gradient, SEGMENT)

    def backward_by_trees(self, scores: Scores) -> bool:
        return scores.bias is None

    def _backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lo: Tensor,
        hi: Tensor,
        scores: Scores,
        gradient: OutputGradient,
        segment: int,
    ) -> Gradients:
        if not segment and few_rows(q, k):
            q = q.to(state_dtype(q.dtype))  # 16 bits of few rows' weights: their roundings do not average out
        given = (x.to(state_dtype(q.dtype)) for x in (gradient.out, gradient.lse, gradient.delta))
        return Gradients(*attention_backward(*given, *self._arguments(q, k, v, lo, hi, scores), segment))

    def _arguments(
        self, q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, scores: Scores
    ) -> tuple[Any, ...]:
        """What both operators take; keys and values in q's dtype (a scale that is a tensor widens it)."""
        k, v = (x if x.dtype == q.dtype else x.to(q.dtype) for x in (k, v))
        return (q, k, v, lo, hi, *self._options(scores))

    def _options(self, scores: Scores) -> tuple[Any, ...]:
        slopes = scores.alibi_slopes if scores.alibi_slopes is None else scores.alibi_slopes.double()
        indices = (scores.rows, scores.keys, scores.own)
        dropout = (scores.dropout_p, scores.seed, scores.head)
        return (scores.scale, scores.softcap, slopes, *dropout, *indices, self.instruction_set)

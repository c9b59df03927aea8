"""Our own kernels for CPUs, in C++: keys outside a row's interval are never read into its sum."""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import Block, Dense, Int8, Paged
from ..errors import Unsupported
from ..extension import instruction_sets
from ..masks import Bounds
from ..problem import state_dtype
from ..scores import Scores
from ..state import AttentionState
from ..tree import SEGMENT
from .base import Dims, Gradients, Kernel, Leaf, OutputGradient, Queries
from .compiled import Operation, backward, check_device, few_rows, forward, why_not_native
from .reference import EagerKernel
from .registry import use_another

# Instruction sets whose prefill multiplies bfloat16, and rounds the weights to it.
MULTIPLY_BFLOAT16 = ("amx", "avx512_bf16")
WEIGHT_OF_BFLOAT16 = 2.0**-8  # the unit roundoff of these weights
# What a value may meet in a leaf: in blocks of 128 keys, or where bfloat16 is multiplied in pairs, in any order.
ROUNDINGS, PAIR_ROUNDINGS = 131, SEGMENT + 3


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
            raise Unsupported(f"{missing} {use_another()}")
        available = instruction_sets()
        if instruction_set not in (None, *available):
            raise Unsupported(f"this machine runs {', '.join(available)}: got {instruction_set!r}.")
        self.instruction_set = instruction_set or available[0]

    @classmethod
    def why_not(cls, device: torch.device | None = None, dims: Dims = ()) -> str | None:
        return why_not_native(device, dims)

    def reads(self, q: Queries, block: Block, scores: Scores) -> bool:
        if isinstance(block, Dense):
            return True
        if scores.bias is not None:
            return False
        few = q.dtype != torch.float64 and few_rows(q, block.kv_heads)
        return isinstance(block, Paged) or (isinstance(block, Int8) and few)

    def _forward(self, q: Queries, block: Block, bounds: Bounds, scores: Scores) -> AttentionState:
        if scores.bias is not None:
            return EagerKernel().forward(q, block, bounds, scores)
        if isinstance(block, Dense):
            return self._state(q, block, bounds, scores, 0)
        check_device(q, block.shape[2:])
        q = q.float() if isinstance(block, Int8) else q
        return AttentionState(*forward(q, block, bounds, scores, Operation(self.instruction_set)))

    def backward(
        self, q: Queries, block: Dense, bounds: Bounds, scores: Scores, gradient: OutputGradient
    ) -> Gradients:
        if scores.bias is not None:
            return EagerKernel().backward(q, block, bounds, scores, gradient)
        return self._backward(q, block, bounds, scores, gradient, 0)

    def _forward_tree(self, q: Queries, block: Dense, bounds: Bounds, scores: Scores) -> AttentionState:
        if scores.bias is not None:
            return EagerKernel().forward_tree(q, block, bounds, scores)
        return self._state(q, block, bounds, scores, SEGMENT)

    def backward_leaf(
        self, q: Queries, block: Dense, bounds: Bounds, scores: Scores, gradient: OutputGradient
    ) -> Gradients:
        if scores.bias is not None:
            return EagerKernel().backward_leaf(q, block, bounds, scores, gradient)
        return self._backward(q, block, bounds, scores, gradient, SEGMENT)

    def backward_by_trees(self, scores: Scores) -> bool:
        return scores.bias is None

    def rounding(self, dtype: torch.dtype, *, bias: bool) -> Leaf:
        if bias:
            return EagerKernel().rounding(dtype, bias=bias)
        unit = torch.finfo(state_dtype(dtype)).eps / 2
        if dtype == torch.bfloat16 and self.instruction_set in MULTIPLY_BFLOAT16:
            return Leaf(unit, PAIR_ROUNDINGS, WEIGHT_OF_BFLOAT16)
        return Leaf(unit, ROUNDINGS)

    def _backward(
        self, q: Tensor, block: Dense, bounds: Bounds, scores: Scores, gradient: OutputGradient, segment: int
    ) -> Gradients:
        if not segment and few_rows(q, block.kv_heads):
            q = q.to(state_dtype(q.dtype))  # 16 bits of few rows' weights: their roundings do not average out
        dtype, operation = state_dtype(q.dtype), Operation(self.instruction_set, segment)
        check_device(q, block.shape[2:])
        gradient = OutputGradient(gradient.out.to(dtype), gradient.lse.to(dtype), gradient.delta.to(dtype))
        return backward(q, block.dense(q.dtype), bounds, scores, gradient, operation)

    def _state(self, q: Tensor, block: Dense, bounds: Bounds, scores: Scores, segment: int) -> AttentionState:
        """Compute with keys and values in q's dtype: a scale that is a tensor widens it."""
        check_device(q, block.shape[2:])
        operation = Operation(self.instruction_set, segment)
        return AttentionState(*forward(q, block.dense(q.dtype), bounds, scores, operation))

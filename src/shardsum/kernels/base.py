"""The interface of a kernel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..blocks import Block, Dense
from ..errors import Unsupported
from ..masks import Bounds
from ..scores import Scores
from ..state import AttentionState

Dims = tuple[int | torch.SymInt, ...]  # under torch.compile, sizes are symbols
Queries = Float[Tensor, "batch q_heads q_len head_dim"]


@dataclass(frozen=True, eq=False)
class OutputGradient:
    """What flows back into query rows, beside what a kernel needs to compute their weights again.

    Shapes: out (batch, q_heads, q_len, v_dim), the gradient of the *final* output; lse and delta
    (batch, q_heads, q_len): the final log-sum-exp, and sum(out_gradient * out) - lse_gradient.
    """

    out: Float[Tensor, "batch q_heads q_len v_dim"]
    lse: Float[Tensor, "batch q_heads q_len"]
    delta: Float[Tensor, "batch q_heads q_len"]


@dataclass(frozen=True, eq=False)
class Gradients:
    """The gradients of q, k, v, float32 or wider, and of the bias if there is one."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None

    def __add__(self, other: Gradients) -> Gradients:
        bias = self.bias if self.bias is None or other.bias is None else self.bias + other.bias
        return Gradients(self.q + other.q, self.k + other.k, self.v + other.v, bias)


@dataclass(frozen=True)
class Leaf:
    """How a kernel computes a leaf of the tree, for a bound on its rounding.

    `unit`: the unit roundoff. `roundings`: how many a value meets. `weight`: the unit roundoff of weights, where
    they are rounded further.
    """

    unit: float
    roundings: int
    weight: float = 0.0


class Kernel(ABC):
    """Attention of all queries over a block of keys on one device, under one interval of keys per query row.

    `computes`: whether it gives values; else "auto" and tests of values leave it out.
    `definition`: whether it is written as the definition is, which the others are compared with.
    """

    name: str
    computes: ClassVar[bool] = True
    definition: ClassVar[bool] = False

    @classmethod
    def why_not(cls, device: torch.device | None = None, dims: Dims = ()) -> str | None:
        """Return why it can't be used here, or not for such tensors, as a sentence; None where it can.

        `dims`: head_dim and v_dim.
        """
        return None

    def reads(self, q: Queries, block: Block, scores: Scores) -> bool:
        """Return whether it computes with this block as it lies; else it is given a dense copy in q's dtype."""
        return isinstance(block, Dense)

    def forward(self, q: Queries, block: Block, bounds: Bounds, scores: Scores) -> AttentionState:
        """Return the state of softmax(scores(q k)) v in which each row sees the keys of its interval only.

        Shapes: bounds (batch or 1, q_len), on the CPU; out (batch, q_heads, q_len, v_dim). Query head h reads KV
        head h // (q_heads / kv_heads).
        Numerics: out and lse are float32, or float64 for float64 inputs. A row that sees nothing gives
        (0, -inf). What a key outside a row's interval holds, NaN and Inf included, does not reach that row.
        """
        return self._forward(q, block if self.reads(q, block, scores) else block.dense(q.dtype), bounds, scores)

    @abstractmethod
    def _forward(self, q: Queries, block: Block, bounds: Bounds, scores: Scores) -> AttentionState:
        """Compute `forward` over a block that it reads."""

    @abstractmethod
    def backward(
        self, q: Queries, block: Dense, bounds: Bounds, scores: Scores, gradient: OutputGradient
    ) -> Gradients:
        """Return what these keys contribute to the gradients, the weights computed again from the final lse.

        The keys may be a part of those that the final output saw: contributions of disjoint keys add up, and so
        do those of disjoint rows.
        Numerics: as in `forward`; a row and a key that it does not see contribute nothing to each other.
        """

    def forward_tree(self, q: Queries, block: Block, bounds: Bounds, scores: Scores) -> AttentionState:
        """Return the state of `forward`, summed along the fixed tree over the block's segments (tree.py).

        Numerics: a row's bits do not depend on the other rows, the batch, the threads, or the keys behind its own.
        """
        return self._forward_tree(q, block if isinstance(block, Dense) else block.dense(q.dtype), bounds, scores)

    @abstractmethod
    def _forward_tree(self, q: Queries, block: Dense, bounds: Bounds, scores: Scores) -> AttentionState:
        """Compute `forward_tree` over dense keys."""

    @abstractmethod
    def backward_leaf(
        self, q: Queries, block: Dense, bounds: Bounds, scores: Scores, gradient: OutputGradient
    ) -> Gradients:
        """Return the gradients of at most one segment of rows and one of keys, by one sequence of operations.

        Of whole nodes of both trees where `backward_by_trees`: d_q along that of the keys, d_k and d_v along that
        of the rows.
        """

    def backward_by_trees(self, scores: Scores) -> bool:
        """Return whether `backward_leaf` sums along the trees under such scores; else along_tree.py does."""
        return False

    def rounding(self, dtype: torch.dtype, *, bias: bool) -> Leaf:
        """Return how it rounds within a leaf, for queries of this dtype and scores with a bias or without.

        Raises: Unsupported where its order of operations is not known.
        """
        raise Unsupported(
            f"return_bound needs a kernel that declares how it rounds: got {self.name}. Use kernel='auto'."
        )

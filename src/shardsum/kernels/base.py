"""The interface of a kernel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from ..quantized import Quantized
from ..scores import Scores
from ..state import AttentionState

Queries = Float[Tensor, "batch q_heads q_len head_dim"]
Keys = Float[Tensor, "batch kv_heads kv_len head_dim"]
Values = Float[Tensor, "batch kv_heads kv_len v_dim"]
Bounds = Int[Tensor, "batch_or_1 q_len"]


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


class Kernel(ABC):
    """Attention of all queries over the keys of one device, under one interval of keys per query row."""

    name: str

    def forward(self, q, block, bounds, scores):
        if block.kind == "int8":
            return self.forward_quantized(q, block.k, block.v, *bounds, scores)
        return self.forward_dense(q, block.k, block.v, *bounds, scores)

    def backward(self, q, block, bounds, scores, gradient):
        return self.backward_dense(q, block.k, block.v, *bounds, scores, gradient)

    def forward_tree(self, q, block, bounds, scores):
        block = block.dense(q.dtype)
        return self.forward_tree_dense(q, block.k, block.v, *bounds, scores)

    @abstractmethod
    def forward_dense(
        self, q: Queries, k: Keys, v: Values, lo: Bounds, hi: Bounds, scores: Scores
    ) -> AttentionState:
        """The state of softmax(scores(q k)) v in which row i sees the keys lo_i <= j < hi_i only.

        Shapes: `lo`, `hi` on the CPU; out (batch, q_heads, q_len, v_dim). Query head h reads KV head
        h // (q_heads / kv_heads).
        Numerics: out and lse are float32, or float64 for float64 inputs. A row that sees nothing gives
        (0, -inf). What a key outside a row's interval holds, NaN and Inf included, does not reach that row.
        """

    def forward_quantized(
        self, q: Queries, k: Quantized, v: Quantized, lo: Bounds, hi: Bounds, scores: Scores
    ) -> AttentionState:
        """The same over int8 keys and values; a kernel that can't read these is given copies in q's dtype."""
        return self.forward_dense(q, k.dequantized(q.dtype), v.dequantized(q.dtype), lo, hi, scores)

    @abstractmethod
    def backward_dense(
        self, q: Queries, k: Keys, v: Values, lo: Bounds, hi: Bounds, scores: Scores, gradient: OutputGradient
    ) -> Gradients:
        """What these keys contribute to the gradients, the weights computed again from the final lse.

        The keys may be some of those that the final output saw: contributions of disjoint keys add up, and so do
        those of disjoint rows.
        Numerics: as in `forward`; a row and a key that it does not see contribute nothing to each other.
        """

    @abstractmethod
    def forward_tree_dense(
        self, q: Queries, k: Keys, v: Values, lo: Bounds, hi: Bounds, scores: Scores
    ) -> AttentionState:
        """`forward` along the fixed tree over the segments of k (tree.py).

        Numerics: a row's bits do not depend on the other rows, the batch, the threads, or the keys behind its own.
        """

    @abstractmethod
    def backward_leaf_dense(
        self, q: Queries, k: Keys, v: Values, lo: Bounds, hi: Bounds, scores: Scores, gradient: OutputGradient
    ) -> Gradients:
        """`backward` of at most one segment of rows and one of keys, by one sequence of operations.

        Of whole nodes of both trees where `backward_by_trees`: d_q along that of the keys, d_k and d_v along that
        of the rows.
        """

    def backward_by_trees(self, scores: Scores) -> bool:
        """Whether `backward_leaf` sums along the trees under such scores; or else Blocks (fixed.py) does."""
        return False

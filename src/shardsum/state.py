"""The whole idea: a partial attention result is a pair (out, lse), and pairs merge.

Attention over a set of keys is the weighted sum of their values, normalised by the sum of the weights
exp(score). Cut the keys into two disjoint sets, and each set gives a pair: its own normalised sum `out`, and
`lse`, the logarithm of its own denominator. The pair of the union follows from the two pairs alone:

    lse = log(exp(lse_a) + exp(lse_b))        out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

This operation is commutative and associative, and the empty set's pair (0, -inf) is its identity. So the keys
may be cut anywhere, over any number of machines, and merged in any order.

Source: Milakov and Gimelshein 2018 (online softmax, section 3.1); Dao et al. 2022 (FlashAttention, appendix C).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class AttentionState:
    """The attention over one set of keys: the normalised sum of values and the log of its denominator.

    Shapes: `lse.shape == out.shape[:-1]`, usually (batch, q_heads, q_len) and (..., v_dim).
    Numerics: float32 or float64, never narrower: partial sums rounded to bfloat16 drift. `lse` is the natural
    logarithm. A row that sees no key has out = 0 and lse = -inf.
    Raises: ValueError for other dtypes or shapes that do not belong together.
    """

    out: Float[Tensor, "*rows v_dim"]
    lse: Float[Tensor, "*rows"]

    def __post_init__(self) -> None:
        if self.out.dtype not in (torch.float32, torch.float64) or self.lse.dtype != self.out.dtype:
            raise ValueError(
                "an AttentionState is float32 or float64, out and lse alike: "
                f"got out {self.out.dtype}, lse {self.lse.dtype}. Convert with .float() first."
            )
        if self.lse.shape != self.out.shape[:-1]:
            raise ValueError(
                f"lse.shape must be out.shape[:-1]: got out {tuple(self.out.shape)}, lse {tuple(self.lse.shape)}."
            )

    def is_finite(self) -> bool:
        """Return whether no row holds NaN or Inf; an empty row, whose lse is -inf, is as it should be.

        On meta there are no values, and nothing to report.
        """
        if self.lse.is_meta:
            return True
        # The largest of numbers among which there is NaN is NaN.
        return not self.lse.numel() or (self.lse.max().item() < math.inf and all_finite(self.out))

    @classmethod
    def empty(
        cls,
        *shape: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> AttentionState:
        """The state of no keys at all, (0, -inf): what `merge` leaves unchanged. `shape` is that of `out`.

        >>> AttentionState.empty(1, 1, 2, 3).lse
        tensor([[[-inf, -inf]]])
        """
        out = torch.zeros(shape, dtype=dtype, device=device)
        return cls(out, torch.full(shape[:-1], -torch.inf, dtype=dtype, device=device))


def all_finite(x: Tensor) -> bool:
    """Whether no element is NaN or Inf.

    A sum over one that is not is not finite either, and is one pass without a temporary; only a sum of finite
    elements that overflows needs another look.
    """
    return math.isfinite(x.sum().item()) or bool(x.isfinite().all())


def merge(a: AttentionState, b: AttentionState) -> AttentionState:
    """The state over the union of two disjoint sets of keys.

    Numerics: commutative to the bit; the identity (0, -inf) returns the other state unchanged; NaN in either
    state stays NaN. The larger lse is taken out before the exponentials, so nothing overflows.
    Raises: ValueError where the states' shapes differ.

    >>> a = AttentionState(torch.tensor([[1.0]]), torch.tensor([0.0]))
    >>> b = AttentionState(torch.tensor([[4.0]]), torch.tensor([2.0]).log())
    >>> merge(a, b).out, merge(a, b).lse.exp()
    (tensor([[3.]]), tensor([3.]))
    """
    if a.out.shape != b.out.shape:
        raise ValueError(
            "merge needs two states over the same query rows: "
            f"got out {tuple(a.out.shape)} and {tuple(b.out.shape)}."
        )
    top = torch.maximum(a.lse, b.lse)
    # Two empty rows: subtract 0, because (-inf) - (-inf) is NaN where exp(-inf - 0) is the 0 that is meant.
    shift = top.masked_fill(top == -torch.inf, 0.0)
    weight_a, weight_b = (a.lse - shift).exp(), (b.lse - shift).exp()
    total = weight_a + weight_b
    lse = shift + total.log()
    # An empty row divides 0 by 1; every other total is at least 1.
    total = total.masked_fill(total == 0.0, 1.0)
    out = (a.out * (weight_a / total).unsqueeze(-1)).add_(b.out * (weight_b / total).unsqueeze(-1))
    return AttentionState(out, lse)

"""How a product q.k becomes a score, and a score a weight: scale, softcap, ALiBi, bias and dropout.

    s = scale * q.k        then softcap * tanh(s / softcap)        then - slope_h * |i - j|        then + bias

Dropout multiplies weights, never the denominator: a weight is kept by a hash of (seed, batch, head, query, key),
so the same ones fall whatever the ranks, layout and strategy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Odd 64-bit constants of splitmix64 (Steele, Lea, Flood 2014), as signed integers.
_MIX_1, _MIX_2, _STEP = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of one call, of all rows and keys; or, once `localize`d, of some.

    Shapes: alibi_slopes (q_heads,); bias (batch or 1, q_heads or 1, rows, keys).
    `sequence`, `head`, `rows`, `keys`, `diagonal`: the first sequence and head, global query and key indices, and
    each row's own position among the keys (batch or 1, rows), of a localized one.
    Raises: ValueError for a softcap that is not above 0, and a dropout_p that is no probability below 1.
    """

    scale: float
    softcap: float | None = None
    alibi_slopes: Float[Tensor, " q_heads"] | None = None
    bias: Tensor | None = None
    dropout_p: float = 0.0
    seed: int = 0
    sequence: int = 0
    head: int = 0
    rows: Int[Tensor, " rows"] | None = None
    keys: Int[Tensor, " keys"] | None = None
    diagonal: Int[Tensor, "batch_or_1 rows"] | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0.0:
            raise ValueError(f"softcap must be above 0, or None: got {self.softcap}.")
        if not 0.0 <= self.dropout_p < 1.0:
            raise ValueError(f"dropout_p must be at least 0 and below 1: got {self.dropout_p}.")

    @property
    def plain(self) -> bool:
        """Whether a score is scale * q.k and nothing else: what fused operators compute."""
        return self.softcap is None and self.alibi_slopes is None and self.bias is None and not self.dropout_p

    def localize(self, rows: Tensor, keys: Tensor, diagonal: Tensor) -> Scores:
        """The scores of the given rows against the given keys; the bias has this rank's rows already."""
        bias = self.bias if self.bias is None else self.bias[..., keys.to(self.bias.device)]
        return replace(self, rows=rows, keys=keys, diagonal=diagonal, bias=bias)

    def some_rows(self, rows: slice) -> Scores:
        """The localized scores of some of the rows."""
        if self.rows is None or self.diagonal is None:
            return self
        bias = self.bias if self.bias is None else self.bias[:, :, rows]
        return replace(self, rows=self.rows[rows], diagonal=self.diagonal[:, rows], bias=bias)

    def some_keys(self, keys: slice) -> Scores:
        """The localized scores of some of the keys."""
        if self.keys is None:
            return self
        return replace(self, keys=self.keys[keys], bias=self.bias if self.bias is None else self.bias[..., keys])

    def some(self, sequence: int, head: int, rows: Tensor, keys: Tensor) -> Scores:
        """The localized scores of one sequence and head, some of the rows and some of the keys."""
        one = replace(self.some_heads(head, head + 1), sequence=self.sequence + sequence)
        if self.rows is None or self.keys is None or self.diagonal is None:
            return one
        bias = one.bias
        if bias is not None:
            bias = bias[sequence % len(bias)][None, :, rows.to(bias.device)][..., keys.to(bias.device)]
        diagonal = self.diagonal[sequence % len(self.diagonal), rows].unsqueeze(0)
        return replace(one, rows=self.rows[rows], keys=self.keys[keys], diagonal=diagonal, bias=bias)

    def some_heads(self, head: int, head_end: int) -> Scores:
        """The scores of some of the heads."""
        slopes = self.alibi_slopes if self.alibi_slopes is None else self.alibi_slopes[head:head_end]
        bias = self.bias if self.bias is None or self.bias.shape[1] == 1 else self.bias[:, head:head_end]
        return replace(self, head=self.head + head, alibi_slopes=slopes, bias=bias)

    def of(self, products: Float[Tensor, "batch q_heads rows keys"]) -> tuple[Tensor, Tensor | None]:
        """The scores of q.k products, and their derivative by scale * q.k where that is not 1."""
        scores, slope = self.scale * products, None
        if self.softcap is not None:
            tanh = torch.tanh(scores / self.softcap)
            scores, slope = self.softcap * tanh, 1.0 - tanh.square()
        if self.alibi_slopes is not None:
            assert self.diagonal is not None
            assert self.keys is not None
            distance = (self.diagonal.unsqueeze(-1) - self.keys).abs().unsqueeze(1).to(scores)
            scores = scores - self.alibi_slopes.to(scores).view(-1, 1, 1) * distance
        if self.bias is not None:
            scores = scores + self.bias.to(scores)
        return scores, slope

    def kept(self, scores: Float[Tensor, "batch q_heads rows keys"]) -> Tensor | None:
        """What dropout multiplies the weights of these scores by: 0 or 1 / (1 - p); None without dropout."""
        if not self.dropout_p:
            return None
        assert self.rows is not None
        assert self.keys is not None
        batch, q_heads, device = scores.shape[0], scores.shape[1], scores.device
        heads = torch.arange(self.head, self.head + q_heads, device=device).view(-1, 1, 1)
        seed = torch.tensor(self.seed, device=device) * _STEP  # a tensor's integers wrap
        sequences = torch.arange(self.sequence, self.sequence + batch, device=device)
        word = _mixed(sequences.view(-1, 1, 1, 1) + seed)
        for counter in (heads, self.rows.to(device).unsqueeze(-1), self.keys.to(device)):
            word = _mixed(word + (counter + 1) * _STEP)
        uniform = (word >> 40 & 0xFFFFFF).to(torch.float64) / (1 << 24)
        return (uniform >= self.dropout_p).to(scores) / (1.0 - self.dropout_p)


def _mixed(word: Tensor) -> Tensor:
    """The finalizer of splitmix64 in wrapping 64-bit integers. Source: Steele, Lea, Flood 2014, figure 16."""
    word = (word ^ (word >> 30 & (1 << 34) - 1)) * _MIX_1
    word = (word ^ (word >> 27 & (1 << 37) - 1)) * _MIX_2
    return word ^ (word >> 31 & (1 << 33) - 1)

"""One batch of whole sequences of which each rank runs the model on its own tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attention import attention
from ..comm import Communicator
from ..kernels import Kernel
from ..layouts import Layout
from ..strategies import Strategy
from ..tree import unit
from .masks import IntervalMask, kept_range

IGNORED = -100  # Transformers' label of a token that is not to be predicted


@dataclass(frozen=True)
class Ways:
    """How attention over all ranks is done."""

    comm: Communicator
    layout: Layout
    strategy: str | Strategy
    kernel: str | Kernel
    reproducible: bool = False

    def positions(self, length: int) -> Tensor:
        """Which of so many tokens are this rank's."""
        return self.layout.positions(length, self.comm.rank, self.comm.size, unit(self.reproducible))


@dataclass(eq=False)
class Batch:
    """What an attention call has to know of the whole sequences.

    It travels with the mask, so that a layer which is computed again in the backward pass finds the same one.
    Shapes: rows (this rank's tokens,), their positions in the sequence; masking is arguments of `attention`.
    """

    ways: Ways
    length: int
    rows: Tensor
    masking: dict[str, Any]
    seed: int | None = None

    @classmethod
    def of(
        cls,
        ways: Ways,
        length: int,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        seed: int | None = None,
    ) -> Batch:
        """The batch of these sequences. Raises: Unsupported where the mask has holes."""
        rows = ways.positions(length)
        kept = kept_range(attention_mask, length)
        masking = {} if kept is None else {"key_range": kept}
        # As Transformers does it: a mask says that the sequence is one document.
        if attention_mask is None and position_ids is not None:
            masking |= _documents(position_ids.cpu(), rows)
        return cls(ways, length, rows, masking, seed)

    def own(self, x: Tensor) -> Tensor:
        """This rank's columns of `x`, or the first where it has none: no model runs on zero tokens.

        Shapes: x (batch, length), the result (batch, this rank's tokens, at least 1).
        """
        rows = self.rows if len(self.rows) else torch.zeros(1, dtype=torch.int64)
        return x[:, rows.to(x.device)]

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        left: int | None,
        scale: float | None,
        dropout_p: float,
        **scores: Any,
    ) -> Tensor:
        """The attention of this rank's queries over the keys of all ranks; a stand-in token gets zeros.

        Shapes: q (batch, q_heads, tokens, head_dim), k, v (batch, kv_heads, tokens, head_dim or v_dim).
        """
        count = len(self.rows)
        out: Tensor = attention(
            q[:, :, :count],
            k[:, :, :count],
            v[:, :, :count],
            comm=self.ways.comm,
            layout=self.ways.layout,
            strategy=self.ways.strategy,
            kernel=self.ways.kernel,
            reproducible=self.ways.reproducible,
            causal=True,
            window=None if left is None else (left, 0),
            scale=scale,
            dropout_p=dropout_p,
            seed=self._seed() + layer if dropout_p else None,
            **self.masking,
            **scores,
        )
        return F.pad(out, (0, 0, 0, q.shape[2] - count))

    def _seed(self) -> int:
        """The seed of the batch, drawn by rank 0 when it is first needed; each layer adds its number."""
        if self.seed is None:
            drawn = torch.randint(1 << 62, (1,))
            self.seed = int(self.ways.comm.all_gather(drawn)[0])
        return self.seed


@dataclass(frozen=True, eq=False)
class BatchMask(IntervalMask):
    """A mask over the sequences of `batch`; None while the model is probed."""

    batch: Batch | None = None


def shifted(labels: Tensor) -> Tensor:
    """At each token, the label of the next: the shift comes before tokens are dealt out to ranks."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _documents(position_ids: Tensor, rows: Tensor) -> dict[str, Any]:
    """Packed documents as arguments of `attention`: one begins wherever positions do not go on by one.

    Shapes: position_ids (batch or 1, length), rows (this rank's tokens,).
    """
    begins = F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True)
    length = position_ids.shape[1]
    if bool((begins == begins[:1]).all()):
        first = begins[0].nonzero().flatten()
        return {} if len(first) == 1 else {"cu_seqlens": F.pad(first, (0, 1), value=length)}
    start = torch.where(begins, torch.arange(length), 0).cummax(dim=1).values
    return {"key_intervals": (start[:, rows], (rows + 1).expand(len(start), -1))}

"""One batch of whole sequences of which each rank runs the model on its own tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attention import attention
from ..comm import Communicator
from ..errors import Unsupported
from ..kernels import Kernel
from ..layouts import Layout
from ..strategies import Strategy
from ..tree import unit
from .bound_model import AttentionCall
from .masks import IntervalMask, Padding


@dataclass(frozen=True)
class Execution:
    """How attention over all ranks is computed, whichever ranks these are."""

    layout: Layout
    strategy: str | Strategy
    kernel: str | Kernel
    reproducible: bool = False


@dataclass(eq=False)
class Batch:
    """What an attention call has to know of the whole sequences.

    It travels with the mask, so that a layer which is computed again in the backward pass finds the same one. For
    that it keeps the communicator over which the step began; the next step's batch takes it from the model again.
    Shapes: rows (this rank's tokens,), their positions in the sequence; masking is arguments of `attention`.
    """

    comm: Communicator
    execution: Execution
    length: int
    rows: Tensor
    masking: dict[str, Any]
    seed: int | None = None

    @classmethod
    def of(
        cls,
        comm: Communicator,
        execution: Execution,
        length: int,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        seed: int | None = None,
    ) -> Batch:
        """Cut sequences of `length` tokens. Raises: Unsupported where the mask has holes."""
        rows = execution.layout.positions(length, comm.rank, comm.size, unit(execution.reproducible))
        padding = Padding.of(attention_mask, length)
        if padding.problem is not None:
            raise Unsupported(padding.problem)
        masking: dict[str, Any] = {}
        if padding.start is not None:
            masking["key_range"] = (padding.start, padding.end)
        # As Transformers does it: a mask says that the sequence is one document.
        if attention_mask is None and position_ids is not None:
            masking |= _document_masking(position_ids.cpu(), rows)
        return cls(comm, execution, length, rows, masking, seed)

    def local(self, x: Tensor) -> Tensor:
        """Return this rank's columns of `x`, or the first where it has none: no model runs on zero tokens.

        Shapes: x (batch, length), the result (batch, this rank's tokens, at least 1).
        """
        rows = self.rows if len(self.rows) else torch.zeros(1, dtype=torch.int64)
        return x[:, rows.to(x.device)]

    def attend(self, call: AttentionCall, dropout_p: float, **scores: Any) -> Tensor:
        """Attend with this rank's queries over the keys of all ranks; a stand-in token gets zeros.

        `scores` are further arguments of `attention`.
        """
        count, left, execution = len(self.rows), call.mask.left, self.execution
        layer: Any = getattr(call.module, "layer_idx", 0)
        out: Tensor = attention(
            call.q[:, :, :count],
            call.k[:, :, :count],
            call.v[:, :, :count],
            comm=self.comm,
            layout=execution.layout,
            strategy=execution.strategy,
            kernel=execution.kernel,
            reproducible=execution.reproducible,
            causal=True,
            window=None if left is None else (left, 0),
            scale=call.scale,
            dropout_p=dropout_p,
            seed=self._seed() + layer if dropout_p else None,
            **self.masking,
            **scores,
        )
        return F.pad(out, (0, 0, 0, call.q.shape[2] - count))

    def _seed(self) -> int:
        """Return the batch's seed, drawn by rank 0 when it is first needed; each layer adds its number."""
        if self.seed is None:
            with torch._C.DisableTorchFunction():  # the model may draw none here, see `NoRandomNumbers`
                drawn = torch.randint(1 << 62, (1,))
            self.seed = int(self.comm.all_gather(drawn)[0])
        return self.seed


@dataclass(frozen=True, eq=False)
class BatchMask(IntervalMask):
    """A mask over the sequences of `batch`; None while the model is probed."""

    batch: Batch | None = None


def _document_masking(position_ids: Tensor, rows: Tensor) -> dict[str, Any]:
    """Describe packed documents by arguments of `attention`: one begins where positions do not go on by one.

    Shapes: position_ids (batch or 1, length), rows (this rank's tokens,).
    """
    begins = F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True)
    length = position_ids.shape[1]
    if bool((begins == begins[:1]).all()):
        first = begins[0].nonzero().flatten()
        return {} if len(first) == 1 else {"cu_seqlens": F.pad(first, (0, 1), value=length)}
    start = torch.where(begins, torch.arange(length), 0).cummax(dim=1).values
    return {"key_intervals": (start[:, rows], (rows + 1).expand(len(start), -1))}

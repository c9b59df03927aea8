"""The interface of a strategy, and the call it works on."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..comm import Communicator, Traffic
from ..errors import NonFiniteWarning
from ..kernels import Kernel
from ..layouts import Placement
from ..masks import Mask, localize
from ..problem import state_dtype
from ..state import AttentionState


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call as a rank sees it once all ranks have agreed: its shards, and where all shards lie.

    `queries`, `keys`: which global rows and keys each rank holds. With `q_replicated` every rank holds all rows.
    """

    comm: Communicator
    kernel: Kernel
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    queries: Placement
    keys: Placement
    scale: float
    q_replicated: bool

    def partial(self, q: Tensor, k: Tensor, v: Tensor, *, rows_of: int, keys_of: int) -> AttentionState:
        """The state of the query rows of one rank over the keys of one rank, computed here.

        Warns: NonFiniteWarning, naming the rank whose keys gave NaN or Inf.
        """
        lo, hi = self.mask.intervals(self.queries.positions[rows_of])
        lo, hi = localize(lo, hi, self.keys.positions[keys_of])
        state = self.kernel.forward(q, k, v, lo, hi, scale=self.scale)
        if not state.is_finite():
            bad = state.lse.isnan() | (state.lse == torch.inf) | ~state.out.isfinite().all(dim=-1)
            first = tuple(bad.nonzero()[0].tolist())
            warnings.warn(
                f"rank {self.comm.rank}: the attention over the keys of rank {keys_of} gave NaN or Inf, "
                f"first at (batch, head, row) {first} of the queries of rank {rows_of}.",
                NonFiniteWarning,
                stacklevel=2,
            )
        return state

    def q_shape(self, rank: int) -> tuple[int, ...]:
        return (*self.q.shape[:2], len(self.queries.positions[rank]), self.q.shape[3])

    def k_shape(self, rank: int) -> tuple[int, ...]:
        return (*self.k.shape[:2], len(self.keys.positions[rank]), self.k.shape[3])

    def v_shape(self, rank: int) -> tuple[int, ...]:
        return (*self.v.shape[:2], len(self.keys.positions[rank]), self.v.shape[3])

    def kv_bytes(self, rank: int) -> int:
        """Bytes of one rank's keys and values."""
        positions = len(self.keys.positions[rank]) * self.k.shape[0] * self.k.shape[1]
        return positions * (self.k.shape[3] + self.v.shape[3]) * self.k.element_size()

    def state_bytes(self, rank: int) -> int:
        """Bytes of the packed state of one rank's query rows."""
        rows = len(self.queries.positions[rank]) * self.q.shape[0] * self.q.shape[1]
        return rows * (self.v.shape[3] + 1) * state_dtype(self.q.dtype).itemsize


class Strategy(ABC):
    """A way to distribute the sum. Every rank calls `forward`, and gets the state of its own query rows."""

    name: str

    @abstractmethod
    def forward(self, call: Call) -> AttentionState:
        """The state of this rank's query rows over all keys; of all rows, bit-equal, if q is replicated."""

    @abstractmethod
    def traffic(self, call: Call) -> Traffic:
        """What this rank sends in `forward`, in closed form: the communicator must count exactly this."""

"""The interface of a kernel."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float, Int
from torch import Tensor

from ..state import AttentionState


class Kernel(ABC):
    """Attention of all queries over the keys of one device, under one interval of keys per query row."""

    name: str

    @abstractmethod
    def forward(
        self,
        q: Float[Tensor, "batch q_heads q_len head_dim"],
        k: Float[Tensor, "batch kv_heads kv_len head_dim"],
        v: Float[Tensor, "batch kv_heads kv_len v_dim"],
        lo: Int[Tensor, "batch_or_1 q_len"],
        hi: Int[Tensor, "batch_or_1 q_len"],
        *,
        scale: float,
    ) -> AttentionState:
        """The state of softmax(scale * q k) v in which row i sees the keys lo_i <= j < hi_i only.

        Shapes: `lo`, `hi` on the CPU; out (batch, q_heads, q_len, v_dim). Query head h reads KV head
        h // (q_heads / kv_heads).
        Numerics: out and lse are float32, or float64 for float64 inputs. A row that sees nothing gives
        (0, -inf). What a key outside a row's interval holds, NaN and Inf included, does not reach that row.
        """

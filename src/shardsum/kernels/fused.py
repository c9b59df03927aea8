"""What a call of a fused attention operator is told beside q, k and v, on the CPU and on CUDA."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Masking(NamedTuple):
    """Which scores count and their scale: causal counts from the top left corner, `bias` is (rows, keys)."""

    bias: Tensor | None
    causal: bool
    scale: float


class Outputs(NamedTuple):
    """The gradient of out, and out and lse themselves, for a backward."""

    d_out: Tensor
    out: Tensor
    lse: Tensor

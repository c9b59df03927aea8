"""Keys and values as int8, with one scale for each token and head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

LARGEST = 127  # symmetric: -128 is not used


@dataclass(frozen=True, eq=False)
class Quantized:
    """What stands for numbers * scales: keys or values, each row of which has a scale of its own."""

    numbers: Int8[Tensor, "batch kv_heads kv_len dim"]
    scales: Float[Tensor, "batch kv_heads kv_len"]

    @classmethod
    def of(cls, x: Float[Tensor, "batch kv_heads kv_len dim"]) -> Quantized:
        """x with each row's largest element as 127 and the others rounded to whole numbers.

        Numerics: within half a scale, |x| max / 254, of x. A row that holds NaN or Inf becomes NaN as a whole.

        >>> held = Quantized.of(torch.tensor([[[[127.0, -3.4, 0.0]]]]))
        >>> held.numbers.tolist(), held.scales.tolist()
        ([[[[127, -3, 0]]]], [[[1.0]]])
        """
        x = x.float()
        largest = x.abs().amax(dim=3, keepdim=True)
        scales = torch.where(largest.isfinite(), largest / LARGEST, torch.nan)
        numbers = (x / scales).nan_to_num(nan=0.0).round().clamp(-LARGEST, LARGEST)
        return cls(numbers.to(torch.int8), scales.squeeze(3))

    def __getitem__(self, some: tuple[slice | Tensor, ...]) -> Quantized:
        """Return some sequences, heads and tokens, all dims of them."""
        assert len(some) <= 3
        return Quantized(self.numbers[some], self.scales[some])

    def dequantized(self, dtype: torch.dtype) -> Float[Tensor, "batch kv_heads kv_len dim"]:
        """The tensor that this stands for, in `dtype`."""
        return (self.numbers.to(torch.promote_types(dtype, torch.float32)) * self.scales.unsqueeze(3)).to(dtype)

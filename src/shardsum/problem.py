"""The sizes of one attention call, checked once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Problem:
    """What one rank brings to a call; q_len and kv_len are this rank's own, the rest is equal on all ranks.

    Raises: ValueError where q, k and v do not fit together.
    """

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, *, quantized: bool = False) -> Problem:
        """The sizes of q, k and v; k and v may be int8 if `quantized`."""
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{name} must be a torch tensor: got {type(tensor).__name__}.")
            if tensor.ndim != 4:
                raise ValueError(
                    f"{name} must be (batch, heads, length, dim): got {tuple(tensor.shape)}. Add the missing dims."
                )
        shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}."
        if k.shape[:3] != v.shape[:3]:
            raise ValueError(f"k and v must have the same batch, heads and length: {shapes}")
        if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
            raise ValueError(f"q and k must have the same batch and head_dim: {shapes}")
        if not (q.shape[3] and v.shape[3]):
            raise ValueError(f"head_dim and v_dim must be at least 1: {shapes}")
        if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
            raise ValueError(f"kv_heads must divide q_heads: {shapes}")
        of_keys = torch.int8 if quantized else q.dtype
        if not of_keys == k.dtype == v.dtype or q.dtype not in DTYPES:
            raise ValueError(
                "q, k and v must have one dtype of float64, float32, bfloat16, float16: "
                f"got {q.dtype}, {k.dtype}, {v.dtype}."
            )
        if not q.device == k.device == v.device:
            raise ValueError(f"q, k and v must be on one device: got {q.device}, {k.device}, {v.device}.")
        batch, q_heads, q_len, head_dim = q.shape
        return cls(batch, q_heads, k.shape[1], q_len, k.shape[2], head_dim, v.shape[3], q.dtype)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over inputs of `dtype` are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32

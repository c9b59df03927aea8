"""The sizes of one attention call, checked once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Problem(NamedTuple):
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
        batch, q_heads, q_len, head_dim = q.shape
        kv_heads, kv_len, v_dim = k.shape[1], k.shape[2], v.shape[3]
        wrong = None  # the message is made only where one is needed: every decode step comes here
        if k.shape[:3] != v.shape[:3]:
            wrong = "k and v must have the same batch, heads and length"
        elif batch != k.shape[0] or head_dim != k.shape[3]:
            wrong = "q and k must have the same batch and head_dim"
        elif not (head_dim and v_dim):
            wrong = "head_dim and v_dim must be at least 1"
        elif kv_heads == 0 or q_heads % kv_heads:
            wrong = "kv_heads must divide q_heads"
        if wrong is not None:
            shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
            raise ValueError(f"{wrong}: got {shapes}.")
        of_keys = torch.int8 if quantized else q.dtype
        if not of_keys == k.dtype == v.dtype or q.dtype not in DTYPES:
            raise ValueError(
                "q, k and v must have one dtype of float64, float32, bfloat16, float16: "
                f"got {q.dtype}, {k.dtype}, {v.dtype}."
            )
        if not q.device == k.device == v.device:
            raise ValueError(f"q, k and v must be on one device: got {q.device}, {k.device}, {v.device}.")
        return cls(batch, q_heads, kv_heads, q_len, kv_len, head_dim, v_dim, q.dtype)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over inputs of `dtype` are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32

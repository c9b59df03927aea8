"""ATen's memory-efficient attention on CUDA, in float32: what it wants its inputs to look like.

It has no grouped heads, reads rows from multiples of 16 bytes on, and keeps an lse for a multiple of 32 rows.
Written from PyTorch's sources (torch 2.13, aten/src/ATen/native/transformers/cuda/attention.cu and
attention_backward.cu); its developers have never run it on a device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .fused import Masking, Outputs

WIDTH = 8  # dims, and columns of a bias, are padded to a multiple of so many elements
LSE_ROWS = 32


def forward(q: Tensor, k: Tensor, v: Tensor, masking: Masking) -> tuple[Tensor, Tensor]:
    """(out, lse) of one operator call."""
    q_len, v_dim = q.shape[2], v.shape[3]
    q, k, v = _aligned(q, _for_each_head(k, q), _for_each_head(v, q))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, _bias(masking.bias, q), True, 0.0, masking.causal, scale=masking.scale
    )
    return out[..., :v_dim], lse[:, :, :q_len]


def backward(q: Tensor, k: Tensor, v: Tensor, masking: Masking, outputs: Outputs) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v of one operator call. A row whose lse is +inf has no weights."""
    kv_shape, head_dim, v_dim = k.shape[:3], q.shape[3], v.shape[3]
    d_out, out, lse = outputs
    d_out, q_, k_, v_, out = _aligned(d_out, q, _for_each_head(k, q), _for_each_head(v, q), out)
    # It takes rows of out to lie as in its own: all heads of a row side by side.
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    lse = F.pad(lse, (0, -lse.shape[2] % LSE_ROWS), value=torch.inf)
    no_dropout = torch.zeros((), dtype=torch.int64)
    d_q, d_k, d_v, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        d_out,
        q_,
        k_,
        v_,
        _bias(masking.bias, q),
        out,
        lse,
        no_dropout,
        no_dropout,
        0.0,
        [True, True, True, False],
        masking.causal,
        scale=masking.scale,
    )
    # The heads of a group share their keys and values.
    d_k, d_v = (x.reshape(kv_shape[0], kv_shape[1], -1, *x.shape[2:]).sum(dim=2) for x in (d_k, d_v))
    return d_q[..., :head_dim], d_k[..., :head_dim], d_v[..., :v_dim]


def _for_each_head(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values once for each query head."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _aligned(*tensors: Tensor) -> list[Tensor]:
    """All padded to one width, of which every row begins where the operator may load it."""
    width = max(x.shape[3] for x in tensors)
    width += -width % WIDTH
    padded = (F.pad(x, (0, width - x.shape[3])) for x in tensors)
    return [
        x if x.stride(3) == 1 and not any(s % WIDTH for s in x.stride()[:3]) else x.contiguous() for x in padded
    ]


def _bias(bias: Tensor | None, q: Tensor) -> Tensor | None:
    if bias is None:
        return None
    padded = F.pad(bias, (0, -bias.shape[1] % WIDTH))[:, : bias.shape[1]]
    return padded.expand(q.shape[0], q.shape[1], *bias.shape)

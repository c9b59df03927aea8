"""PyTorch's fused attention operators, made exact for every row interval."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ..errors import Unsupported
from ..problem import state_dtype
from ..state import AttentionState, merge
from .base import Kernel
from .pieces import Piece, pieces
from .reference import ReferenceKernel

# Half-precision keys and values are converted this many elements at a time, so that the float32 copies stay in
# cache: 2^19 (2 MB each) is within 3 % of the best of 2^18 .. 2^20, and 2^21 and above are 1.6 to 2.4 times
# slower (2-core AVX2 machine, 2026-11-23, docs/log.md).
CONVERTED_ELEMENTS = 1 << 19
# With this many query rows arithmetic hides the conversion, and larger chunks save merges.
MANY_ROWS = 128


class AtenKernel(Kernel):
    """ATen's flash attention on the CPU, its memory-efficient attention on CUDA; any dtype.

    Numerics: half-precision inputs are converted to float32 on the way in, piece by piece, so that no partial
    sum is rounded to their precision. A piece of keys that a whole run of rows sees is computed with the GQA
    group folded into the query length: keys and values are read once, not once for each query head.
    """

    name = "aten"

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
        state = _forward(q, k, v, lo, hi, scale)
        if state.is_finite():
            return state
        # Inside the operators a masked key still meets a weight of zero, and 0 * NaN is NaN. So keys that are
        # not finite are taken out, which leaves the others' intervals intervals, and go to the definition.
        good = (k.isfinite().all(dim=3) & v.isfinite().all(dim=3)).flatten(0, 1).all(dim=0)
        if bool(good.all()):
            return state
        kept, removed = good.nonzero().flatten().cpu(), (~good).nonzero().flatten().cpu()
        return merge(
            _forward(q, k[:, :, kept], v[:, :, kept], *_renumber(lo, hi, kept), scale),
            ReferenceKernel().forward(
                q, k[:, :, removed], v[:, :, removed], *_renumber(lo, hi, removed), scale=scale
            ),
        )


def _renumber(lo: Tensor, hi: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    return torch.searchsorted(kept, lo.contiguous()), torch.searchsorted(kept, hi.contiguous())


def _forward(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, scale: float) -> AttentionState:
    """The state piece by piece; sequences of the batch whose masks differ are taken one at a time."""
    if lo.shape[0] > 1 and not bool((lo == lo[:1]).all() and (hi == hi[:1]).all()):
        states = [
            _forward(q[b : b + 1], k[b : b + 1], v[b : b + 1], lo[b : b + 1], hi[b : b + 1], scale)
            for b in range(lo.shape[0])
        ]
        return AttentionState(torch.cat([s.out for s in states]), torch.cat([s.lse for s in states]))
    dtype = state_dtype(q.dtype)
    total = AttentionState.empty(*q.shape[:3], v.shape[3], dtype=dtype, device=q.device)
    if total.out.numel() == 0 or q.shape[3] == 0:
        return total
    q, lo, hi = q.to(dtype), lo[0].cpu(), hi[0].cpu()
    for piece in pieces(lo, hi):
        for kind, row, row_end, key, key_end in _converted_at_once(piece, k):
            rows, keys = slice(row, row_end), slice(key, key_end)
            k_piece, v_piece = k[:, :, keys].to(dtype), v[:, :, keys].to(dtype)
            state = _attend(kind, q[:, :, rows], k_piece, v_piece, lo[rows] - key, hi[rows] - key, scale)
            if row_end - row == len(lo):
                total = merge(total, state)
            else:
                merged = merge(AttentionState(total.out[:, :, rows], total.lse[:, :, rows]), state)
                total.out[:, :, rows], total.lse[:, :, rows] = merged.out, merged.lse
    return total


def _converted_at_once(piece: Piece, k: Tensor) -> Iterator[Piece]:
    """The piece itself, or for half precision, cut over its keys so that the float32 copies stay small."""
    if piece.kind != "full" or k.dtype == state_dtype(k.dtype):
        yield piece
        return
    elements = CONVERTED_ELEMENTS * (16 if piece.row_end - piece.row >= MANY_ROWS else 1)
    step = max(64, elements // (k.shape[0] * k.shape[1] * k.shape[3]))
    for key in range(piece.key, piece.key_end, step):
        yield piece._replace(key=key, key_end=min(key + step, piece.key_end))


def _attend(kind: str, q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, scale: float) -> AttentionState:
    """One operator call: all rows see all keys ("full"), causal from the top left, or as lo and hi say."""
    if kind == "full":
        batch, q_heads, q_len, head_dim = q.shape
        folded = q.reshape(batch, k.shape[1], q_heads // k.shape[1] * q_len, head_dim)
        out, lse = _operator(folded, k, v, None, False, scale)
        shape = (batch, q_heads, q_len)
        return AttentionState(out.reshape(*shape, v.shape[3]), lse.reshape(shape))
    if kind == "causal":
        return AttentionState(*_operator(q, k, v, None, True, scale))
    keys = torch.arange(k.shape[2])
    visible = (lo.unsqueeze(1) <= keys) & (keys < hi.unsqueeze(1))
    bias = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, -torch.inf).to(q.device)
    out, lse = _operator(q, k, v, bias, False, scale)
    # For a row whose keys are all masked the operator says lse = 0: exp(0) would count as one key's weight.
    blind = (~visible.any(dim=1)).to(q.device)
    return AttentionState(out.masked_fill(blind.unsqueeze(1), 0.0), lse.masked_fill(blind, -torch.inf))


def _operator(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """ATen's (out, lse). No keys, other strides in the last dim, or v_dim != head_dim are not for it to see."""
    v_dim, head_dim = v.shape[3], q.shape[3]
    if v_dim < head_dim:
        v = F.pad(v, (0, head_dim - v_dim))
    elif v_dim > head_dim:
        q, k = F.pad(q, (0, v_dim - head_dim)), F.pad(k, (0, v_dim - head_dim))
    # The operator reads rows as if their elements lay side by side, and does not check it.
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
        return out[..., :v_dim], lse
    if q.dtype == torch.float64:
        raise Unsupported("the aten kernel has no float64 on CUDA. Use kernel='reference' or float32.")
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    if bias is not None:  # rows of the bias must begin at multiples of 16 bytes
        padded = F.pad(bias, (0, -bias.shape[1] % 8))[:, : bias.shape[1]]
        bias = padded.expand(q.shape[0], q.shape[1], *bias.shape)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, bias, True, 0.0, causal, scale=scale
    )
    return out[..., :v_dim], lse[:, :, : q.shape[2]]  # its lse is padded to a multiple of 32 rows

"""PyTorch's fused attention operators, made exact for every row interval."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..blocks import Block, Dense
from ..errors import Unsupported
from ..masks import Bounds
from ..problem import state_dtype
from ..scores import Scores
from ..state import AttentionState, all_finite, merge
from . import cuda
from .base import Gradients, Kernel, Leaf, OutputGradient, Queries
from .fused import Masking, Outputs
from .rectangles import Piece, pieces
from .reference import EagerKernel, ReferenceKernel
from .registry import use_another

# Half-precision keys and values are converted this many elements at a time, so that the float32 copies stay in
# cache: 2^19 (2 MB each) is within 3 % of the best of 2^18 .. 2^20, and 2^21 and above are 1.6 to 2.4 times
# slower (2-core AVX2 machine, 2026-11-23, docs/log.md).
CONVERTED_ELEMENTS = 1 << 19
# With this many query rows arithmetic hides the conversion, and larger chunks save merges.
MANY_ROWS = 128
# Far above what float32 can't represent, far below any scale in use.
SMALLEST_SCALE = 1e-30


class AtenKernel(Kernel):
    """ATen's flash attention on the CPU, its memory-efficient attention on CUDA; any dtype.

    Numerics: half-precision inputs are converted to float32 on the way in, piece by piece, so that no partial
    sum is rounded to their precision. A piece of keys that a whole run of rows sees is computed with the GQA
    group folded into the query length: keys and values are read once, not once for each query head.
    """

    name = "aten"

    def _forward(self, q: Queries, block: Block, bounds: Bounds, scores: Scores) -> AttentionState:
        assert isinstance(block, Dense)
        if not _for_operator(scores):
            return EagerKernel().forward(q, block, bounds, scores)
        self._check_dtype(q)
        state = _forward(q, block, bounds, scores.scale)
        if state.is_finite():
            return state
        # Inside the operators a masked key still meets a weight of zero, and 0 * NaN is NaN. So keys that are
        # not finite are taken out, which leaves the others' intervals intervals, and go to the definition.
        kept, removed = _finite_keys(block)
        if len(removed) == 0:
            return state
        return merge(
            _forward(q, block.keys(kept), _renumber(bounds, kept), scores.scale),
            ReferenceKernel().forward(q, block.keys(removed), _renumber(bounds, removed), scores),
        )

    def backward(
        self, q: Queries, block: Dense, bounds: Bounds, scores: Scores, gradient: OutputGradient
    ) -> Gradients:
        out = _as_operator_takes(gradient)
        if not _for_operator(scores) or out is None:
            return EagerKernel().backward(q, block, bounds, scores, gradient)
        self._check_dtype(q)
        # A row that sees no key has lse -inf; with +inf all its weights are 0.
        lse = gradient.lse.masked_fill(gradient.lse == -torch.inf, torch.inf)
        found = _backward(q, block, bounds, scores.scale, Outputs(gradient.out, out, lse))
        if all(map(all_finite, found)):
            return Gradients(*found)
        return EagerKernel().backward(q, block, bounds, scores, gradient)

    def _check_dtype(self, q: Tensor) -> None:
        if q.device.type != "cpu" and q.dtype == torch.float64:
            others = use_another(q.device, but=self.name)
            raise Unsupported(f"the {self.name} kernel has no float64 on {q.device}. {others}")

    def _forward_tree(self, q: Queries, block: Dense, bounds: Bounds, scores: Scores) -> AttentionState:
        return EagerKernel().forward_tree(q, block, bounds, scores)

    def backward_leaf(
        self, q: Queries, block: Dense, bounds: Bounds, scores: Scores, gradient: OutputGradient
    ) -> Gradients:
        return EagerKernel().backward_leaf(q, block, bounds, scores, gradient)

    def rounding(self, dtype: torch.dtype, *, bias: bool) -> Leaf:
        return EagerKernel().rounding(dtype, bias=bias)


def _for_operator(scores: Scores) -> bool:
    """Whether the operators compute these scores. They mask by -inf before they scale: 0 * -inf is NaN."""
    return scores.plain and scores.scale >= SMALLEST_SCALE


def _finite_keys(block: Dense) -> tuple[Tensor, Tensor]:
    """The keys that are finite in all heads and sequences, value included, and the others."""
    good = (block.k.isfinite().all(dim=3) & block.v.isfinite().all(dim=3)).flatten(0, 1).all(dim=0)
    return good.nonzero().flatten().cpu(), (~good).nonzero().flatten().cpu()


def _renumber(bounds: Bounds, kept: Tensor) -> Bounds:
    return Bounds(*(torch.searchsorted(kept, bound.contiguous()) for bound in bounds))


def _sequences(lo: Tensor, hi: Tensor) -> list[slice]:
    """The batch in parts of equal masks: all of it, or one sequence at a time."""
    if lo.shape[0] > 1 and not bool((lo == lo[:1]).all() and (hi == hi[:1]).all()):
        return [slice(b, b + 1) for b in range(lo.shape[0])]
    return [slice(None)]


def _forward(q: Tensor, block: Dense, bounds: Bounds, scale: float) -> AttentionState:
    """Compute the state piece by piece."""
    k, v, (lo, hi) = block.k, block.v, bounds
    dtype = state_dtype(q.dtype)
    whole = AttentionState.empty(*q.shape[:3], v.shape[3], dtype=dtype, device=q.device)
    if whole.out.numel() == 0 or q.shape[3] == 0:
        return whole
    for b in _sequences(lo, hi):
        total, empty = AttentionState(whole.out[b], whole.lse[b]), True
        for piece in _pieces(lo[b], hi[b], k[b]):
            rows, part, seen = _cut(piece, k[b], v[b], lo[b], hi[b], dtype)
            state = _attend(piece.kind, q[b, :, rows].to(dtype), *part, *seen, scale)
            if rows == slice(0, q.shape[2]):
                total = state if empty else merge(total, state)
            else:
                merged = merge(AttentionState(total.out[:, :, rows], total.lse[:, :, rows]), state)
                total.out[:, :, rows], total.lse[:, :, rows] = merged.out, merged.lse
            empty = False
        if b == slice(None):
            return total
        whole.out[b], whole.lse[b] = total.out, total.lse
    return whole


def _backward(
    q: Tensor, block: Dense, bounds: Bounds, scale: float, outputs: Outputs
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, piece by piece."""
    k, v, (lo, hi) = block.k, block.v, bounds
    dtype, total = state_dtype(q.dtype), None
    everything = slice(None), slice(0, q.shape[2]), slice(0, k.shape[2])
    sequences = _sequences(lo, hi) if q.numel() and k.numel() and v.numel() else []
    for b in sequences:
        for piece in _pieces(lo[b], hi[b], k[b]):
            rows, part, seen = _cut(piece, k[b], v[b], lo[b], hi[b], dtype)
            keys = slice(piece.key, piece.key_end)
            outputs_of_rows = Outputs(*(x[b, :, rows].to(dtype) for x in outputs))
            part_q = q[b, :, rows].to(dtype)
            found = _attend_backward(piece.kind, part_q, *part, Bounds(*seen), scale, outputs_of_rows)
            if total is None and (b, rows, keys) == everything:
                total = found
                continue
            total = _zeros(q, k, v) if total is None else total
            for gradient, part_of_it, where in zip(total, found, (rows, keys, keys), strict=True):
                gradient[b, :, where] += part_of_it
    return _zeros(q, k, v) if total is None else total


def _zeros(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (torch.zeros_like(x, dtype=state_dtype(q.dtype)) for x in (q, k, v))
    return d_q, d_k, d_v


def _pieces(lo: Tensor, hi: Tensor, k: Tensor) -> Iterator[Piece]:
    for piece in pieces(lo[0].cpu(), hi[0].cpu()):
        yield from _converted_at_once(piece, k)


def _cut(
    piece: Piece, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, dtype: torch.dtype
) -> tuple[slice, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A piece's rows, its keys and values converted, and its rows' bounds counted from its first key."""
    rows, keys = slice(piece.row, piece.row_end), slice(piece.key, piece.key_end)
    bounds = lo[0, rows].cpu() - piece.key, hi[0, rows].cpu() - piece.key
    return rows, (k[:, :, keys].to(dtype), v[:, :, keys].to(dtype)), bounds


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
    """One operator call: all rows see all keys ("full"), causal from the top left, or as lo and hi say.

    For a row whose scores are all -inf, masked or not, the operator says lse = 0, as if one key had weight 1.
    """
    visible, bias = _mask(q, k, lo, hi) if kind == "masked" else (None, None)
    folded = _folded(q, k) if kind == "full" else q
    out, lse = _operator(folded, k, v, Masking(bias, kind == "causal", scale))
    out, lse = out.reshape(*q.shape[:3], v.shape[3]), lse.reshape(q.shape[:3])
    if visible is not None:
        blind = (~visible.any(dim=1)).to(q.device)
        out, lse = out.masked_fill(blind.unsqueeze(1), 0.0), lse.masked_fill(blind, -torch.inf)
    doubtful = lse == 0
    if bool(doubtful.any()) and bool((doubtful & (out == 0).all(dim=-1)).any()):
        if kind != "masked":
            lo, hi = (
                torch.zeros_like(hi),
                torch.arange(1, len(hi) + 1) if kind == "causal" else hi * 0 + k.shape[2],
            )
        lo, hi = (bound.clamp(0, k.shape[2]).unsqueeze(0) for bound in (lo, hi))
        return EagerKernel().forward(q, Dense(k, v), Bounds(lo, hi), Scores(scale))
    return AttentionState(out, lse)


def _attend_backward(
    kind: str, q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, scale: float, outputs: Outputs
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v of one operator call."""
    bias = _mask(q, k, *bounds)[1] if kind == "masked" else None
    rows = q
    if kind == "full":
        lse = _folded(outputs.lse.unsqueeze(-1), k).squeeze(-1)
        rows, outputs = _folded(q, k), Outputs(_folded(outputs.d_out, k), _folded(outputs.out, k), lse)
    d_q, d_k, d_v = _operator_backward(rows, k, v, Masking(bias, kind == "causal", scale), outputs)
    return d_q.reshape(q.shape), d_k, d_v


def _as_operator_takes(gradient: OutputGradient) -> Tensor | None:
    """An `out` from which the operator, which computes sum(out_gradient * out), gets our delta; None if none can.

    The multiple of the gradient that has this product with it: where no gradient flows into lse, the final out
    would do as well, but need not travel for it.
    """
    # In float64 no square is lost, and no copy of the gradient is made for it.
    square = torch.linalg.vector_norm(gradient.out, dim=-1, dtype=torch.float64).square()
    if bool(((square == 0) & (gradient.delta != 0)).any()):
        return None
    factor = gradient.delta / square.masked_fill(square == 0, 1.0)
    multiple: Tensor = gradient.out * factor.to(gradient.out.dtype).unsqueeze(-1)
    return multiple


def _folded(x: Tensor, k: Tensor) -> Tensor:
    """The query heads of one KV head as more rows of it, so that its keys are read once."""
    return x.reshape(x.shape[0], k.shape[1], x.shape[1] // k.shape[1] * x.shape[2], x.shape[3])


def _mask(q: Tensor, k: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Which row sees which key, and the same as an additive mask."""
    keys = torch.arange(k.shape[2])
    visible = (lo.unsqueeze(1) <= keys) & (keys < hi.unsqueeze(1))
    bias = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, -torch.inf).to(q.device)
    return visible, bias


def _operator(q: Tensor, k: Tensor, v: Tensor, masking: Masking) -> tuple[Tensor, Tensor]:
    """ATen's (out, lse). No keys, other strides in the last dim, or v_dim != head_dim are not for it to see."""
    if q.device.type != "cpu":
        return cuda.forward(q, k, v, masking)
    v_dim, head_dim = v.shape[3], q.shape[3]
    if v_dim < head_dim:
        v = F.pad(v, (0, head_dim - v_dim))
    elif v_dim > head_dim:
        q, k = F.pad(q, (0, v_dim - head_dim)), F.pad(k, (0, v_dim - head_dim))
    # The operator reads rows as if their elements lay side by side, and does not check it.
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, masking.causal, attn_mask=masking.bias, scale=masking.scale
    )
    return out[..., :v_dim], lse


def _operator_backward(
    q: Tensor, k: Tensor, v: Tensor, masking: Masking, outputs: Outputs
) -> tuple[Tensor, Tensor, Tensor]:
    """ATen's gradients of q, k and v, under the same conditions."""
    if q.device.type != "cpu":
        return cuda.backward(q, k, v, masking, outputs)
    head_dim, v_dim = q.shape[3], v.shape[3]
    width, (d_out, out, lse) = max(head_dim, v_dim), outputs
    tensors = (F.pad(x, (0, width - x.shape[3])) if x.shape[3] < width else x for x in (d_out, q, k, v, out))
    d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(x if x.stride(3) == 1 else x.contiguous() for x in tensors),
        lse.contiguous(),
        0.0,
        masking.causal,
        attn_mask=masking.bias,
        scale=masking.scale,
    )
    return d_q[..., :head_dim], d_k[..., :head_dim], d_v[..., :v_dim]

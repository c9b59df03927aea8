"""Decode over keys and values that lie in pages of one pool, read where they are."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .blocks import Paged
from .compiler import outside_graphs
from .kernels import NativeKernel
from .masks import Bounds
from .problem import DTYPES
from .scores import Scores
from .state import AttentionState
from .tensors import check_tensors, no_gradient


@outside_graphs
def decode_paged(
    q: Float[Tensor, "batch q_heads q_len head_dim"],
    k_pages: Float[Tensor, "pages kv_heads page_len head_dim"],
    v_pages: Float[Tensor, "pages kv_heads page_len v_dim"],
    block_table: Int[Tensor, "batch max_pages"],
    lengths: Int[Tensor, " batch"],
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    instruction_set: str | None = None,
) -> AttentionState:
    """The state of each sequence's last queries over its own pages, which are not copied.

    Token j of sequence b is row j % page_len of page block_table[b, j // page_len]; sequences may share pages. The
    last query stands at the sequence's last token and sees that and all before it, or with `window` only so many
    before its own. With pages on several ranks: one query, no window, on each rank the `lengths` of its tokens,
    and the states merged (`shardsum.merge`).

    Shapes: q (batch, q_heads, q_len, head_dim), k_pages (pages, kv_heads, page_len, head_dim), v_pages (pages,
    kv_heads, page_len, v_dim), the last dim in one piece, other strides as they come; block_table (batch,
    max_pages) and lengths (batch,) in int32 or int64; out (batch, q_heads, q_len, v_dim).
    Numerics: as of a kernel. What lies beyond a sequence's length, and entries of the table that are for such
    tokens, do not matter. A sequence of length 0 gives (0, -inf).
    Raises: ValueError for what does not fit together; Unsupported where the native kernels can't be used.
    Source: Kwon et al. 2023 (PagedAttention, section 4.1).

    >>> k_pages = v_pages = torch.tensor([[[[9.0], [9.0]]], [[[1.0], [1.0]]]])  # 2 pages of 2 tokens
    >>> decode_paged(torch.ones(1, 1, 1, 1), k_pages, v_pages, torch.tensor([[1]]), torch.tensor([2])).out.item()
    1.0
    """
    _check(q, k_pages, v_pages, block_table, lengths)
    if window is not None and window < 0:
        raise ValueError(f"window must be 0 keys or more before a query's own: got {window}.")
    own = lengths.to("cpu", torch.int64).unsqueeze(1) - q.shape[2] + torch.arange(q.shape[2])
    lo = torch.zeros_like(own) if window is None else (own - window).clamp(min=0)
    scores = Scores(1 / math.sqrt(q.shape[3]) if scale is None else scale, softcap=softcap)
    block, bounds = Paged(k_pages, v_pages, block_table), Bounds(lo, (own + 1).clamp(min=0))
    return NativeKernel(instruction_set).forward(q, block, bounds, scores)


def _check(q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, lengths: Tensor) -> None:
    tensors = {"q": q, "k_pages": k_pages, "v_pages": v_pages}
    check_tensors(**tensors, block_table=block_table, lengths=lengths)
    for name, x in tensors.items():
        no_gradient(name, x, "Call under torch.no_grad(), or use attention.")
    got = ", ".join(f"{name} {tuple(x.shape)} in {x.dtype}" for name, x in tensors.items())
    if any(x.ndim != 4 for x in tensors.values()) or k_pages.shape[:3] != v_pages.shape[:3]:
        raise ValueError(f"k_pages and v_pages must be (pages, kv_heads, page_len, dim), q like them: got {got}.")
    if q.shape[3] != k_pages.shape[3] or not all((k_pages.shape[1], k_pages.shape[2], q.shape[3])):
        raise ValueError(
            f"q and k_pages must have one head_dim, and kv_heads and page_len be 1 or more: got {got}."
        )
    if q.shape[1] % k_pages.shape[1]:
        raise ValueError(f"kv_heads must divide q_heads: got {got}.")
    if not q.dtype == k_pages.dtype == v_pages.dtype or q.dtype not in DTYPES:
        raise ValueError(f"q and pages must have one dtype of float64, float32, bfloat16, float16: got {got}.")
    if k_pages.stride(3) != 1 or v_pages.stride(3) != 1:
        raise ValueError(
            "a row of a page must lie in one piece: got pages whose last dim has another stride than 1."
        )
    batch, whole = q.shape[0], (torch.int32, torch.int64)
    if block_table.ndim != 2 or block_table.shape[0] != batch or lengths.shape != (batch,):
        shapes = f"{tuple(block_table.shape)} and {tuple(lengths.shape)}"
        raise ValueError(f"block_table and lengths must be ({batch}, max_pages) and ({batch},): got {shapes}.")
    if block_table.dtype not in whole or lengths.dtype not in whole:
        kinds = f"{block_table.dtype} and {lengths.dtype}"
        raise ValueError(f"block_table and lengths must be int32 or int64: got {kinds}.")
    _check_entries(k_pages, block_table, lengths)


def _check_entries(k_pages: Tensor, block_table: Tensor, lengths: Tensor) -> None:
    room = block_table.shape[1] * k_pages.shape[2]
    if bool(((lengths < 0) | (lengths > room)).any()):
        raise ValueError(f"lengths must be from 0 to the {room} tokens of max_pages: got {lengths.tolist()}.")
    used = torch.arange(block_table.shape[1]) * k_pages.shape[2] < lengths.unsqueeze(1)
    wrong = used & ((block_table < 0) | (block_table >= k_pages.shape[0]))
    if bool(wrong.any()):
        b, p = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"block_table must name pages from 0 to {k_pages.shape[0] - 1}: got {int(block_table[b, p])} "
            f"for page {p} of sequence {b}."
        )

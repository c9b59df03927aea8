"""Attention over sharded queries, keys and values, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from .arguments import Arguments, Indices, Window, autocast
from .collectives import Collective
from .comm import Communicator, as_communicator, mistakes_reach_all
from .compiler import outside_graphs
from .dtensors import local_parts
from .kernels import Kernel
from .layouts import Layout
from .prepared import attend
from .rounding import error_bound
from .scalars import flag
from .strategies import Strategy


@outside_graphs
def attention(
    q: Float[Tensor, "batch q_heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads kv_len head_dim"],
    v: Float[Tensor, "batch kv_heads kv_len v_dim"],
    *,
    comm: Communicator | Any = None,
    layout: str | Layout = "contiguous",
    strategy: str | Strategy = "auto",
    kernel: str | Kernel = "auto",
    collective: str | Collective = "auto",
    causal: bool = False,
    window: Window | None = None,
    cu_seqlens: Indices | None = None,
    cu_seqlens_k: Indices | None = None,
    key_range: tuple[Indices, Indices] | None = None,
    prefix: int | Indices | None = None,
    sink_tokens: int = 0,
    key_intervals: tuple[Int[Tensor, "batch_or_1 q_len"], Int[Tensor, "batch_or_1 q_len"]] | None = None,
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | Sequence[float] | None = None,
    sinks: Float[Tensor, " q_heads"] | None = None,
    bias: Float[Tensor, "batch_or_1 heads_or_1 q_len all_keys"] | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    q_replicated: bool = False,
    q_start: int | Indices | None = None,
    q_len: int | None = None,
    kv_len: int | None = None,
    reproducible: bool = False,
    return_state: bool = False,
    return_bound: bool = False,
) -> Any:  # a Tensor, or an AttentionState if return_state; a union would burden every caller's type checker
    """Compute the attention of this rank's queries over the keys and values of all ranks.

    Each rank passes its own shards, in layout order. Query t of a sequence stands at position
    t + kv_len - q_len, so the last query meets the last key, or at q_start + t.

    - `q`, `k`, `v`: plain tensors, or DTensors that are sharded along dim 2 over the mesh that is `comm`, in
      layout "contiguous"; then the output is such a DTensor too.
    - `comm`: a Communicator, a torch ProcessGroup or one-dimensional DeviceMesh; default `connect()`.
    - `layout`: "contiguous", "zigzag", "striped" or a `Layout` (`Layout.weighted`, `Layout.packed`): which
      positions each rank's shards hold; contiguous takes whatever lengths the ranks hold.
    - `strategy`: "all_reduce", "all_gather", "ring", "pass_q", "ulysses", "hybrid" or "auto" (docs/choose.md).
    - `kernel`: "native", "aten", "eager", "reference" or "auto": native where it was built and tensors are on the
      CPU, else aten.
    - `collective`: how the states of replicated queries are merged over ranks, and their gradients summed:
      "all_gather", "recursive_doubling", "k_ary", "tree", "ring", "rabenseifner", "two_level" or "auto".
    - `causal`: row i sees keys up to its own position. `window` (left, right): only so many keys around its own
      position; None or -1 is no limit. `key_range` (start, end), each (batch,): only those keys (padding).
      `cu_seqlens`, `cu_seqlens_k`: cumulative global lengths of packed documents, which see only themselves.
      `q_start`: int or (batch,). `prefix` (int or (batch,)), `sink_tokens`: so many of a row's first keys are
      seen besides the window, the former whatever causal says. `key_intervals` (lo, hi), each (batch or 1, this
      rank's queries): global key indices, nothing outside is seen.
    - `scale`: multiplies q.k, default 1 / sqrt(head_dim): a number, or a tensor (), (q_heads,) or
      (batch or 1, q_heads or 1, this rank's queries). `softcap`: s becomes softcap * tanh(s / softcap).
      `alibi_slopes` (q_heads,): slope * distance is subtracted. `bias` (batch or 1, q_heads or 1, this rank's
      queries, all keys in global order) is added; its rows stay, so strategies that move queries refuse it.
    - `sinks` (q_heads,): a logit that joins each head's denominator and carries no value.
    - `dropout_p`: weights that are dropped, by a hash of `seed`, batch, head, query and key, so the same ones on
      any ranks; without a seed, rank 0 draws one from torch's generator.
    - `q_replicated`: every rank passes the same queries (decode) and gets the same result, bit for bit.
    - `q_len`, `kv_len`: the global lengths, checked against what the ranks hold.
    - `reproducible`: the same bits, of dq, dk, dv too, on any number of ranks, under any strategy, transport and
      layout, beside any batch: sums go along one tree over segments of 256 keys (or queries), which are not cut:
      shards must be those of `shard(..., reproducible=True)`. On one machine type, installation and kernel.
    - `return_state`: an `AttentionState` (out in float32 or wider, and lse) instead of `out` in q's dtype.
    - `return_bound`: a pair, the result and a bound on |out - exact| for each component, in out's shape, float32
      or wider; exact is attention in real numbers of the inputs as they are stored. It needs `reproducible`, and
      takes three more such calls (docs/theory.md).

    Shapes: q (batch, q_heads, q_len, head_dim), k (batch, kv_heads, kv_len, head_dim), v (batch, kv_heads,
    kv_len, v_dim), out (batch, q_heads, q_len, v_dim). kv_heads divides q_heads; any rank may hold no queries
    or no keys.
    Numerics: partial sums are float32 or wider. A row that sees no key gives 0 (lse -inf). A key that a row may
    not see contributes nothing to it, whatever it holds.
    Gradients: of q, k, v, sinks, bias and a scale that is a tensor, once; what else requires a gradient, second
    derivatives, forward mode and torch.func are refused. The loss is the sum of what the ranks
    backpropagate; a replicated q, and a bias beside it, receive their whole gradients, sinks and scale the part of
    this rank's rows, to be summed over ranks as a weight's under sharded queries. Every rank that calls forward
    calls backward.
    Traffic: one all-gather of 64 bytes in which the ranks agree on the call, then what the strategy declares.
    Raises: ValueError for arguments that make no sense, and tensors whose numbers do not lie in memory of their
    own (fake, meta, nested, sparse, quantized, other DTensors); Mismatch on every rank where the ranks' calls
    differ; Unsupported where a strategy or kernel can't do it; RankLost where a peer is gone.

    >>> import torch
    >>> q = k = v = torch.eye(2).view(1, 1, 2, 2)
    >>> attention(q, k, v, causal=True)[0, 0, 0]
    tensor([1., 0.])
    """
    sharded = layout == "contiguous" and q_replicated is return_state is return_bound is False
    parts = local_parts(comm, q, k, v) if sharded else None
    if parts is not None:
        q, k, v = parts[0]
    arguments = Arguments(
        layout=layout,
        strategy=strategy,
        kernel=kernel,
        collective=collective,
        causal=causal,
        window=window,
        cu_seqlens=cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        key_range=key_range,
        prefix=prefix,
        sink_tokens=sink_tokens,
        key_intervals=key_intervals,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        bias=bias,
        dropout_p=dropout_p,
        seed=seed,
        q_replicated=q_replicated,
        q_start=q_start,
        q_len=q_len,
        kv_len=kv_len,
        reproducible=reproducible,
        return_bound=return_bound,
    )
    q, k, v = (autocast(x) for x in (q, k, v))
    comm = as_communicator(comm)
    with mistakes_reach_all(comm):
        flag("return_state", return_state)
    state = attend(comm, q, k, v, arguments)
    out = state.out if return_state else state.out.to(q.dtype)
    if parts is not None:
        return parts[1](out)
    result = state if return_state else out
    return (result, error_bound(comm, q, k, v, arguments, state.out, out)) if return_bound else result

"""Attention over sharded queries, keys and values, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arguments import Arguments, Indices, Window
from .collectives import Collective, as_collective
from .comm import Communicator, agree, agree_on, as_communicator
from .errors import Unsupported
from .kernels import Kernel, OutputGradient, as_kernel
from .layouts import Layout, Placement, as_layout
from .problem import Problem, state_dtype
from .quantized import Quantized
from .scores import Scores
from .state import AttentionState, merge
from .strategies import Call, Strategy, as_strategy, choose


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
    return_state: bool = False,
) -> Any:  # a Tensor, or an AttentionState if return_state; a union would burden every caller's type checker
    """The attention of this rank's queries over the keys and values of all ranks.

    Each rank passes its own shards, in layout order. Query t of a sequence stands at position
    t + kv_len - q_len, so the last query meets the last key, or at q_start + t.

    - `comm`: a Communicator, a torch ProcessGroup or one-dimensional DeviceMesh; default `connect()`.
    - `layout`: "contiguous", "zigzag", "striped" or a `Layout` (`Layout.weighted`, `Layout.packed`): which
      positions each rank's shards hold; contiguous takes whatever lengths the ranks hold.
    - `strategy`: "all_reduce", "all_gather", "ring", "pass_q" or "auto".
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
    - `return_state`: an `AttentionState` (out in float32 or wider, and lse) instead of `out` in q's dtype.

    Shapes: q (batch, q_heads, q_len, head_dim), k (batch, kv_heads, kv_len, head_dim), v (batch, kv_heads,
    kv_len, v_dim), out (batch, q_heads, q_len, v_dim). kv_heads divides q_heads; any rank may hold no queries
    or no keys.
    Numerics: partial sums are float32 or wider. A row that sees no key gives 0 (lse -inf). A key that a row may
    not see contributes nothing to it, whatever it holds.
    Gradients: of q, k, v, sinks, bias and a scale that is a tensor, once. The loss is the sum of what the ranks
    backpropagate; a replicated q, and a bias beside it, receive their whole gradients, sinks and scale the part of
    this rank's rows, to be summed over ranks as a weight's under sharded queries. Every rank that calls forward
    calls backward.
    Traffic: one all-gather of 64 bytes in which the ranks agree on the call, then what the strategy declares.
    Raises: ValueError for arguments that make no sense; Mismatch on every rank where the ranks' calls differ;
    Unsupported where a strategy or kernel can't do it; RankLost where a peer is gone.

    >>> q = k = v = torch.eye(2).view(1, 1, 2, 2)
    >>> attention(q, k, v, causal=True)[0, 0, 0]
    tensor([1., 0.])
    """
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
    )
    if isinstance(q, Tensor) and torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(x.device.type)) for x in (q, k, v))
    state = attend(as_communicator(comm), q, k, v, arguments)
    return state if return_state else state.out.to(q.dtype)


def attend(
    comm: Communicator,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    arguments: Arguments,
    keys: Placement | None = None,
    name: str = "attention",
    scales: tuple[Tensor, Tensor] | None = None,
) -> AttentionState:
    """The state of this rank's query rows: what `attention` and `KVCache.attend` have in common.

    `keys` says where the keys lie; by default the layout does. `name` is that of the call, alike on every rank.
    `scales` (batch, kv_heads, kv_len): those of k and of v that are int8; keys that travel do so in q's dtype.
    """
    inputs = [x for x in (q, k, v, arguments.sinks, arguments.bias, arguments.scale) if isinstance(x, Tensor)]
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)

    def describe() -> dict[str, Any]:
        problem = Problem.of(q, k, v, quantized=scales is not None)
        if differentiable and scales is not None:
            raise Unsupported("int8 keys have no gradients. Call under torch.no_grad(), or with quantize=None.")
        sizes = {name: getattr(problem, name) for name in ("batch", "q_heads", "kv_heads", "head_dim", "v_dim")}
        described = arguments.describe(problem)
        device = q.device.type
        return {
            "call": name,
            **sizes,
            "dtype": str(q.dtype),
            "device": device,
            "kernel": as_kernel(arguments.kernel, q, v).name,
            "gradients": differentiable,
            "quantized": scales is not None,
            **described,
        }

    lengths = agree_on(comm, describe, q, k)
    strategy = as_strategy(arguments.strategy)
    stay = arguments.q_replicated and (strategy is None or strategy.keys_stay)
    if scales is not None and not stay:
        k, v = (Quantized(x, of_x).dequantized(q.dtype) for x, of_x in zip((k, v), scales, strict=True))
        scales = None
    call = _call(comm, q, k, v, arguments, keys, lengths, scales)
    strategy = strategy or choose(call)
    if differentiable:
        results = _Attend.apply(call.q, k, v, arguments.sinks, arguments.bias, call, strategy)  # type: ignore[no-untyped-call]
        return AttentionState(*results)
    return _with_sinks(strategy.forward(call), arguments.sinks)


def _call(
    comm: Communicator,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    arguments: Arguments,
    keys: Placement | None,
    lengths: list[tuple[int, int]],
    scales: tuple[Tensor, Tensor] | None,
) -> Call:
    """The call as this rank sees it, once all ranks have agreed. Raises: what every rank raises alike."""
    q_lens, kv_lens = [q_len for q_len, _ in lengths], [kv_len for _, kv_len in lengths]
    layout = as_layout(arguments.layout)
    keys = Placement.of(layout, kv_lens, "keys") if keys is None else keys
    assert [len(positions) for positions in keys.positions] == kv_lens
    if arguments.q_replicated:
        queries = Placement.replicated(q_lens)
    else:
        queries = Placement.of(layout, q_lens, "queries")
    q_len = q_lens[0] if arguments.q_replicated else queries.length
    mask = arguments.mask(q_len, keys.length, q.shape[0], _intervals_of_all(comm, arguments, queries))
    scale = 1.0 / math.sqrt(q.shape[3]) if arguments.scale is None and q.shape[3] else arguments.scale
    if isinstance(scale, Tensor):
        q, scale = _scaled(q, scale), 1.0
    slopes = arguments.alibi_slopes
    scores = Scores(
        scale=float(scale or 0.0),
        softcap=arguments.softcap,
        alibi_slopes=None if slopes is None else torch.as_tensor(slopes, device=q.device).detach(),
        bias=arguments.bias,
        dropout_p=arguments.dropout_p,
        seed=_seed(comm, arguments) if arguments.dropout_p else 0,
    )
    kernel = as_kernel(arguments.kernel, q, v)
    collective = as_collective(arguments.collective)
    return Call(comm, kernel, q, k, v, mask, queries, keys, scores, arguments.q_replicated, collective, scales)


def _scaled(q: Tensor, scale: Tensor) -> Tensor:
    """q times a scale that is a number, one per head, or one per query, not rounded; differentiable in both."""
    dtype = state_dtype(q.dtype)
    scale = scale.view(1, -1, 1) if scale.ndim == 1 else scale
    return q.to(dtype) * scale.to(dtype).unsqueeze(-1)


def _intervals_of_all(
    comm: Communicator, arguments: Arguments, queries: Placement
) -> tuple[Tensor, Tensor] | None:
    """Every rank's key_intervals, in the order of the global queries."""
    if arguments.key_intervals is None:
        return None
    own = torch.stack([torch.as_tensor(x, dtype=torch.int64, device="cpu") for x in arguments.key_intervals])
    if arguments.q_replicated or comm.size == 1:
        return own[0], own[1]
    parts = comm.all_gather(own, [(*own.shape[:2], len(positions)) for positions in queries.positions])
    whole = torch.cat(parts, dim=2)[:, :, torch.cat(queries.positions).argsort()]
    return whole[0], whole[1]


def _seed(comm: Communicator, arguments: Arguments) -> int:
    """The dropout seed: the one given, or what rank 0 draws from torch's generator."""
    if arguments.seed is not None:
        return arguments.seed
    drawn = torch.randint(1 << 62, (1,)) if comm.rank == 0 else torch.zeros(1, dtype=torch.int64)
    return int(comm.all_gather(drawn)[0])


def _with_sinks(state: AttentionState, sinks: Tensor | None) -> AttentionState:
    """A sink is one more key, whose score is given and whose value is zero."""
    if sinks is None:
        return state
    lse = sinks.to(state.lse).view(-1, 1).expand_as(state.lse)
    return merge(state, AttentionState(torch.zeros_like(state.out), lse))


class _Attend(torch.autograd.Function):
    """A strategy's forward and backward as one differentiable operation on q, k, v, sinks and bias.

    Nothing quadratic is kept: weights are computed again from the final lse.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        bias: Tensor | None,
        call: Call,
        strategy: Strategy,
    ) -> tuple[Tensor, Tensor]:
        state = _with_sinks(strategy.forward(call), sinks)
        ctx.save_for_backward(q, k, v, sinks, bias, state.out, state.lse)
        nothing = q.new_empty(0)  # autograd keeps the tensors, and frees them
        ctx.call = replace(call, q=nothing, k=nothing, v=nothing, scores=replace(call.scores, bias=None))
        ctx.strategy = strategy
        return state.out, state.lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, bias, out, lse = ctx.saved_tensors
        call = replace(ctx.call, q=q, k=k, v=v, scores=replace(ctx.call.scores, bias=bias))
        sizes = [[x.shape[0], x.shape[1], x.shape[3]] for x in (q, k, v)]
        agree(call.comm, {"call": "attention backward", "strategy": ctx.strategy.name, "sizes": sizes})
        delta = (d_out * out).sum(dim=-1) - d_lse
        found = ctx.strategy.backward(call, OutputGradient(d_out, lse, delta))
        d_sinks = None
        if sinks is not None:
            weights = (sinks.to(lse).view(-1, 1) - lse).exp()
            d_sinks = -(weights * delta).sum(dim=(0, 2)).to(sinks.dtype)
        d_bias = None if bias is None or found.bias is None else found.bias.to(bias.dtype)
        return found.q.to(q.dtype), found.k.to(k.dtype), found.v.to(v.dtype), d_sinks, d_bias, None, None

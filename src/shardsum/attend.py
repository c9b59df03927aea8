"""From a call's arguments to its state on this rank: agreement, strategy, and the way back of gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arguments import Arguments
from .collectives import as_collective
from .comm import Communicator, agree, agree_on
from .errors import Unsupported
from .kernels import OutputGradient, as_kernel
from .layouts import Placement, as_layout
from .problem import Problem, state_dtype
from .quantized import Quantized
from .scores import Scores
from .state import AttentionState, merge
from .strategies import Call, Strategy, as_strategy, choose
from .tree import unit


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
    stay = arguments.q_replicated and (strategy is None or strategy.keys_stay) and not arguments.reproducible
    if scales is not None and not stay:
        k, v = (Quantized(x, of_x).dequantized(q.dtype) for x, of_x in zip((k, v), scales, strict=True))
        scales = None
    call = _call(comm, q, k, v, arguments, keys, lengths, scales, f"rank {comm.rank}, call {comm.calls}, {name}")
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
    name: str,
) -> Call:
    """The call as this rank sees it, once all ranks have agreed. Raises: what every rank raises alike."""
    q_lens, kv_lens = [q_len for q_len, _ in lengths], [kv_len for _, kv_len in lengths]
    layout = as_layout(arguments.layout)
    together = unit(arguments.reproducible)
    keys = Placement.of(layout, kv_lens, "keys", together) if keys is None else keys
    assert [len(positions) for positions in keys.positions] == kv_lens
    if arguments.q_replicated:
        queries = Placement.replicated(q_lens)
    else:
        queries = Placement.of(layout, q_lens, "queries", together)
    q_len = q_lens[0] if arguments.q_replicated else queries.length
    mask = arguments.mask(q_len, keys.length, q.shape[0], _intervals_of_all(comm, arguments, queries))
    scale = 1.0 / math.sqrt(q.shape[3]) if arguments.scale is None and q.shape[3] else arguments.scale
    if isinstance(scale, Tensor):
        q, scale = scaled(q, scale), 1.0
    slopes = arguments.slopes(q.dtype)
    scores = Scores(
        scale=float(scale or 0.0),
        softcap=arguments.softcap,
        alibi_slopes=None if slopes is None else slopes.detach().to(q.device),
        bias=arguments.bias,
        dropout_p=arguments.dropout_p,
        seed=_seed(comm, arguments) if arguments.dropout_p else 0,
    )
    kernel, by = as_kernel(arguments.kernel, q, v), as_collective(arguments.collective)
    return Call(
        comm,
        kernel,
        q,
        k,
        v,
        mask,
        queries,
        keys,
        scores,
        arguments.q_replicated,
        by,
        scales,
        name,
        reproducible=arguments.reproducible,
    )


def scaled(q: Tensor, scale: Tensor) -> Tensor:
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
    bounds = torch.broadcast_tensors(*arguments.key_intervals)
    own = torch.stack([x.to("cpu", torch.int64) for x in bounds])
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
        ctx.strategy, ctx.number = strategy, call.comm.calls
        return state.out, state.lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, bias, out, lse = ctx.saved_tensors
        call = replace(ctx.call, q=q, k=k, v=v, scores=replace(ctx.call.scores, bias=bias))
        sizes = [[x.shape[0], x.shape[1], x.shape[3]] for x in (q, k, v)]
        described = {"call": "attention backward", "of call number": ctx.number, "strategy": ctx.strategy.name}
        agree(call.comm, described | {"sizes": sizes})
        delta = (d_out * out).contiguous().sum(dim=-1) - d_lse
        found = ctx.strategy.backward(call, OutputGradient(d_out, lse, delta))
        d_sinks = None
        if sinks is not None:
            # A row of no key beside a sink of -inf has lse -inf: (-inf) - (-inf) is NaN where the weight is 0.
            weights = (sinks.to(lse).view(-1, 1) - lse.masked_fill(lse == -torch.inf, torch.inf)).exp()
            d_sinks = -(weights * delta).sum(dim=(0, 2)).to(sinks.dtype)
        d_bias = None if bias is None or found.bias is None else found.bias.to(bias.dtype)
        return found.q.to(q.dtype), found.k.to(k.dtype), found.v.to(v.dtype), d_sinks, d_bias, None, None

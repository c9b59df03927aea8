"""From a call's arguments to its state on this rank: agreement, strategy, and the way back of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arguments import Arguments
from .collectives import as_collective
from .comm import Communicator, Description, agree
from .errors import Unsupported
from .kernels import OutputGradient, as_kernel
from .layouts import Placement, as_layout
from .problem import Problem, state_dtype
from .quantized import Quantized
from .scores import Scores
from .state import AttentionState, merge
from .strategies import Call, Found, Strategy, as_strategy, choose
from .tree import unit


def attend(
    comm: Communicator, q: Tensor, k: Tensor, v: Tensor, arguments: Arguments, name: str = "attention"
) -> AttentionState:
    """The state of this rank's query rows over keys that lie as the layout says.

    `name` is that of the call, alike on every rank.
    """
    try:
        prepared = Prepared(comm, q, k, v, arguments)
    except Exception as mistake:
        agree(comm, {}, error=mistake)
        raise
    return prepared.attend(q, k, v, name)


class Prepared:
    """A call of attention but for its tensors: what calls that differ in these alone need to find out once.

    `keys` says where the keys lie; by default the layout does. `quantized`: k and v are int8.
    Raises: what is wrong with the call, as far as one rank alone can say; the others wait to be told in `agree`.
    """

    def __init__(
        self,
        comm: Communicator,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        arguments: Arguments,
        keys: Placement | None = None,
        quantized: bool = False,
    ) -> None:
        self._comm, self._arguments, self._keys = comm, arguments, keys
        problem = Problem.of(q, k, v, quantized=quantized)
        self._batch, self._differentiable = problem.batch, differentiable(q, k, v, arguments)
        if self._differentiable and quantized:
            raise Unsupported("int8 keys have no gradients. Call under torch.no_grad(), or with quantize=None.")
        sizes = {name: getattr(problem, name) for name in ("batch", "q_heads", "kv_heads", "head_dim", "v_dim")}
        self._kernel = as_kernel(arguments.kernel, q.device, (problem.head_dim, problem.v_dim))
        described = {
            **sizes,
            "dtype": str(q.dtype),
            "device": q.device.type,
            "kernel": self._kernel.name,
            "gradients": self._differentiable,
            "quantized": quantized,
            **arguments.describe(problem),
        }
        self._description = Description.of(described)
        # The call over tensors, for the lengths that the ranks agreed on last.
        self._lengths: list[tuple[int, int]] = []
        self._call_over: Callable[..., Call] | None = None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, name: str, scales: tuple[Tensor, Tensor] | None = None
    ) -> AttentionState:
        """The state of this rank's query rows. The tensors are as those that this was made for.

        `name` is that of the call, alike on every rank. `scales` (batch, kv_heads, kv_len): those of k and of v
        that are int8; keys that travel do so in q's dtype.
        """
        comm, arguments = self._comm, self._arguments
        lengths = agree(comm, self._description.called(name), q.shape[2], k.shape[2])
        strategy = as_strategy(arguments.strategy)
        stay = arguments.q_replicated and (strategy is None or strategy.keys_stay) and not arguments.reproducible
        if scales is not None and not stay:
            k, v = (Quantized(x, of_x).dequantized(q.dtype) for x, of_x in zip((k, v), scales, strict=True))
            scales = None
        if self._call_over is None or self._lengths != lengths:
            self._lengths, self._call_over = lengths, self._agreed(lengths)
        if isinstance(arguments.scale, Tensor):
            q = scaled(q, arguments.scale)
        scores = self._scores(q)
        call = self._call_over(
            q=q, k=k, v=v, scores=scores, scales=scales, name=f"rank {comm.rank}, call {comm.calls}, {name}"
        )
        strategy = strategy or choose(call)
        if self._differentiable:
            results = _Attend.apply(q, k, v, arguments.sinks, arguments.bias, call, strategy)  # type: ignore[no-untyped-call]
            return AttentionState(*results)
        return _with_sinks(strategy.forward(call), arguments.sinks)

    def _agreed(self, lengths: list[tuple[int, int]]) -> Callable[..., Call]:
        """The call as this rank sees it, once all ranks have agreed. Raises: what every rank raises alike."""
        arguments, q_lens, kv_lens = self._arguments, *map(list, zip(*lengths, strict=True))
        layout, together = as_layout(arguments.layout), unit(arguments.reproducible)
        keys = Placement.of(layout, kv_lens, "keys", together) if self._keys is None else self._keys
        assert [len(positions) for positions in keys.positions] == kv_lens
        if arguments.q_replicated:
            queries, q_len = Placement.replicated(q_lens), q_lens[0]
        else:
            queries, q_len = Placement.of(layout, q_lens, "queries", together), sum(q_lens)
        intervals = _intervals_of_all(self._comm, arguments, queries)
        return partial(
            Call,
            comm=self._comm,
            kernel=self._kernel,
            mask=arguments.mask(q_len, keys.length, self._batch, intervals),
            queries=queries,
            keys=keys,
            q_replicated=arguments.q_replicated,
            collective=as_collective(arguments.collective),
            reproducible=arguments.reproducible,
            found=Found(),
        )

    def _scores(self, q: Tensor) -> Scores:
        arguments = self._arguments
        scale: float | Tensor | None = arguments.scale
        if isinstance(scale, Tensor):
            scale = 1.0  # it is in q already
        elif scale is None:
            scale = 1.0 / math.sqrt(q.shape[3])
        slopes = arguments.slopes(q.dtype)
        return Scores(
            scale=float(scale),
            softcap=arguments.softcap,
            alibi_slopes=None if slopes is None else slopes.detach().to(q.device),
            bias=arguments.bias,
            dropout_p=arguments.dropout_p,
            seed=_seed(self._comm, arguments) if arguments.dropout_p else 0,
        )


def differentiable(q: Tensor, k: Tensor, v: Tensor, arguments: Arguments) -> bool:
    """Whether a call has a backward."""
    inputs = (q, k, v, arguments.sinks, arguments.bias, arguments.scale)
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


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

"""From a call's arguments to its state on this rank: agreement, problem, choice, and the way back of gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .arguments import Arguments, settled
from .blocks import Dense
from .choice import Choice, choose
from .collectives import as_collective
from .comm import Communicator, Description, agree, mistakes_reach_all
from .errors import Unsupported
from .kernels import OutputGradient, as_kernel
from .layouts import as_layout
from .placement import Placement
from .prepared_calls import PreparedCalls
from .problem import Problem, Sizes, state_dtype
from .scores import Scores
from .state import AttentionState, merge
from .strategies import Call, PlacedBlock, Strategy
from .tensors import check_tensors, first_derivatives
from .tree import unit


def attend(
    comm: Communicator, q: Tensor, k: Tensor, v: Tensor, arguments: Arguments, name: str = "attention"
) -> AttentionState:
    """The state of this rank's query rows over keys that lie as the layout says.

    `name` is that of the call, alike on every rank.
    """
    with mistakes_reach_all(comm):
        check_tensors(q=q, k=k, v=v)
        sizes, inputs = Sizes.of(q, k, v), (q, k, v)

        options = settled(vars(arguments))

        def make() -> PreparedCall:
            return PreparedCall(comm, sizes, inputs, Arguments(**options))

        kept = comm.prepared.get("attention", 0, PreparedCalls[PreparedCall])
        key = (sizes, q.device, differentiable(inputs, arguments), torch.get_float32_matmul_precision())
        prepared = make() if kept is None else kept.get(key, options, make)
    return prepared.attend(q, [PlacedBlock(Dense(k, v))], name)


class PreparedCall:
    """A call of attention but for its tensors: what calls that differ in these alone need to find out once.

    `sizes`: those of the tensors. `inputs`: q, and what keys and values may need gradients. `keys` says where the
    keys lie; by default the layout does.
    Raises: what is wrong with the call, as far as one rank alone can say; the others wait to be told in `agree`.
    """

    def __init__(
        self,
        comm: Communicator,
        sizes: Sizes,
        inputs: tuple[Tensor, ...],
        arguments: Arguments,
        keys: Placement | None = None,
        kind: str = Dense.kind,
    ) -> None:
        self._comm, self._arguments, self._keys, self._sizes = comm, arguments, keys, sizes
        self._device = inputs[0].device
        self._kernel = as_kernel(arguments.kernel, self._device, (sizes.head_dim, sizes.v_dim))
        self._differentiable = differentiable(inputs, arguments)
        if self._differentiable and kind != Dense.kind:
            raise Unsupported(f"{kind} keys have no gradients. Call under torch.no_grad().")
        described = {
            "batch": sizes.batch,
            "q_heads": sizes.q_heads,
            "kv_heads": sizes.kv_heads,
            "head_dim": sizes.head_dim,
            "v_dim": sizes.v_dim,
            "dtype": str(sizes.dtype),
            "device": self._device.type,
            "kernel": self._kernel.name,
            "gradients": self._differentiable,
            "keys": kind,
            **arguments.describe(sizes),
        }
        self._description = Description.of(described)
        # The problem and the choice for the lengths that the ranks agreed on last.
        self._lengths: list[tuple[int, int]] = []
        self._agreed: tuple[Problem, Choice] | None = None

    def attend(self, q: Tensor, blocks: Sequence[PlacedBlock], name: str) -> AttentionState:
        """The state of this rank's query rows. The tensors are as those that this was made for.

        `name` is that of the call, alike on every rank.
        """
        with (
            torch._C.DisableTorchFunction()
        ):  # a caller's modes (a default device, context_parallel) are not for us
            return self._attend(q, blocks, name)

    def _attend(self, q: Tensor, blocks: Sequence[PlacedBlock], name: str) -> AttentionState:
        comm, arguments = self._comm, self._arguments
        keys = sum(placed.block.kv_len for placed in blocks)
        lengths = agree(comm, self._description.called(name), q.shape[2], keys)
        if self._agreed is None or self._lengths != lengths:
            self._lengths, self._agreed = lengths, self._agree_on(lengths)
        problem, choice = self._agreed
        if isinstance(arguments.scale, Tensor):
            q = scaled(q, arguments.scale)
        call = Call(
            comm,
            problem,
            choice.kernel,
            q,
            blocks,
            self._scores(q),
            choice.collective,
            name=f"rank {comm.rank}, call {comm.calls}, {name}",
        )
        if self._differentiable:
            k, v = call.dense.k, call.dense.v
            results = _Attend.apply(q, k, v, arguments.sinks, arguments.bias, call, choice.strategy)  # type: ignore[no-untyped-call]
            return AttentionState(*results)
        return _with_sinks(choice.strategy.forward(call), arguments.sinks)

    def _agree_on(self, lengths: list[tuple[int, int]]) -> tuple[Problem, Choice]:
        """The problem that all ranks share once they have agreed, and how it is computed.

        Raises: what every rank raises alike.
        """
        comm, arguments, sizes = self._comm, self._arguments, self._sizes
        q_lens, kv_lens = map(list, zip(*lengths, strict=True))
        layout, together = as_layout(arguments.layout), unit(arguments.reproducible)
        keys = layout.of_lengths(kv_lens, "keys", together) if self._keys is None else self._keys
        assert keys.lengths == kv_lens
        if arguments.q_replicated:
            queries, q_len = Placement.replicated(q_lens), q_lens[0]
        else:
            queries, q_len = layout.of_lengths(q_lens, "queries", together), sum(q_lens)
        key_intervals = _intervals_of_all(comm, arguments, queries)
        collective = as_collective(arguments.collective)
        problem = Problem(
            batch=sizes.batch,
            q_heads=sizes.q_heads,
            kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            v_dim=sizes.v_dim,
            dtype=sizes.dtype,
            mask=arguments.mask(q_len, keys.length, sizes.batch, key_intervals),
            queries=queries,
            keys=keys,
            q_replicated=arguments.q_replicated,
            reproducible=arguments.reproducible,
            bias_shape=None if arguments.bias is None else (arguments.bias.shape[0], arguments.bias.shape[1]),
            q_dtype=state_dtype(sizes.dtype) if isinstance(arguments.scale, Tensor) else None,
            device=self._device.type,
            hosts=comm.hosts() if collective.needs_hosts else None,
        )
        return problem, choose(problem, arguments.strategy, collective, self._kernel)

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


def differentiable(inputs: tuple[Tensor, ...], arguments: Arguments) -> bool:
    """Whether a call over these tensors has a backward."""
    every = (*inputs, arguments.sinks, arguments.bias, arguments.scale)
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in every)


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
    parts = comm.all_gather(own, [(*own.shape[:2], length) for length in queries.lengths])
    whole = torch.cat(parts, dim=2)[:, :, queries.order]
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
        # autograd keeps the tensors, and frees them
        ctx.call = replace(call, q=q.new_empty(0), blocks=(), scores=replace(call.scores, bias=None))
        ctx.strategy, ctx.number = strategy, call.comm.calls
        return state.out, state.lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        return *first_derivatives(_Attend._backward, ctx, d_out, d_lse), None, None

    @staticmethod
    def _backward(ctx: Any, saved: tuple[Tensor, ...], d_out: Tensor, d_lse: Tensor) -> list[Tensor | None]:
        q, k, v, sinks, bias, out, lse = saved
        scores = replace(ctx.call.scores, bias=bias)
        call: Call = replace(ctx.call, q=q, blocks=[PlacedBlock(Dense(k, v))], scores=scores)
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
        assert d_bias is not None or not ctx.needs_input_grad[4], "the kernel gave no gradient of the bias"
        return [found.q.to(q.dtype), found.k.to(k.dtype), found.v.to(v.dtype), d_sinks, d_bias]

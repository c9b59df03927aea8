"""Half precision does not drift with the number of ranks: partial sums and gradients travel in float32."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import shardsum
from shardsum import launch
from shardsum.comm import Communicator
from shardsum.strategies import STRATEGIES

from .. import dense
from ..tolerances import relative_norm
from . import test_traps

LENGTH, Q_HEADS, KV_HEADS = 640, 8, 2
CUT = {"q", "k", "v", "scale", "bias"}  # along dim 2; sinks are whole on every rank


def tensors(strategy: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).bfloat16()

    found = {
        "q": normal(1, Q_HEADS, LENGTH, 32),
        "k": normal(1, KV_HEADS, LENGTH, 32),
        "v": normal(1, KV_HEADS, LENGTH, 16),
        "sinks": normal(Q_HEADS),
        "scale": 0.1 * normal(1, Q_HEADS, LENGTH).abs(),
    }
    if STRATEGIES[strategy].rows_stay:
        found["bias"] = normal(1, 1, LENGTH, LENGTH)
    return found


def output_gradient() -> Tensor:
    return torch.randn(1, Q_HEADS, LENGTH, 16, generator=torch.Generator().manual_seed(6)).bfloat16()


@functools.cache
def expected(strategy: str) -> dict[str, Tensor]:
    inputs = {name: x.double().requires_grad_() for name, x in tensors(strategy).items()}
    scale, seen = inputs["scale"].unsqueeze(-1), dense.visible(LENGTH, LENGTH, causal=True)
    out, _ = dense.attention(
        inputs["q"], inputs["k"], inputs["v"], seen, scale, sinks=inputs["sinks"], bias=inputs.get("bias")
    )
    gradients = torch.autograd.grad(out, list(inputs.values()), output_gradient().double())
    return {"out": out.detach(), **dict(zip(inputs, gradients, strict=True))}


def errors(strategy: str, size: int) -> dict[str, float]:
    """The relative norm of the error of the output and of every gradient, put together from all ranks."""

    def run(comm: Communicator) -> dict[str, Tensor]:
        cut = functools.partial(shardsum.shard, comm=comm, layout="zigzag")
        inputs = {
            name: (cut(x) if name in CUT else x.clone()).requires_grad_() for name, x in tensors(strategy).items()
        }
        out = shardsum.attention(**inputs, comm=comm, layout="zigzag", strategy=strategy, causal=True)
        gradients = torch.autograd.grad(out, list(inputs.values()), cut(output_gradient()))
        return {"out": out.detach(), **dict(zip(inputs, gradients, strict=True))}

    parts = launch(run, ranks=size, transport="threads")
    order = torch.cat([shardsum.Layout("zigzag").positions(LENGTH, rank, size) for rank in range(size)]).argsort()
    found = {}
    for name, whole in expected(strategy).items():
        each = [part[name] for part in parts]
        together = (
            torch.cat(each, dim=2)[:, :, order] if name != "sinks" else torch.stack(each).double().sum(dim=0)
        )
        found[name] = relative_norm(together, whole)
    return found


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_eight_ranks_err_as_one_does(strategy: str) -> None:
    alone, eight = errors(strategy, 1), errors(strategy, 8)
    for name, error in alone.items():
        assert 1e-4 < error < 4e-3, name  # one rounding to bfloat16, and nothing else
        if name != "sinks":  # 8 numbers, each a sum of 8 rounded ones: how that falls out is chance
            assert eight[name] <= 1.1 * error, (name, eight[name], error)


def error_of_many_sinks(strategy: str, size: int) -> float:
    """The relative norm of the error of 2,048 sinks' gradients, from each rank its rows' part, rounded."""
    generator, heads, length = torch.Generator().manual_seed(7), 2048, 16
    q, k, v, d_out = (torch.randn(1, n, length, 4, generator=generator).bfloat16() for n in (heads, 1, 1, heads))
    sinks = torch.randn(heads, generator=generator).bfloat16()
    exact = sinks.double().requires_grad_()
    out, _ = dense.attention(q, k, v, dense.visible(length, length, causal=True), sinks=exact)
    (expected,) = torch.autograd.grad(out, exact, d_out.double())

    def run(comm: Communicator) -> Tensor:
        cut = functools.partial(shardsum.shard, comm=comm, layout="zigzag")
        own, (q_own, k_own, v_own) = sinks.clone().requires_grad_(), map(cut, (q, k, v))
        options: dict[str, Any] = {"comm": comm, "layout": "zigzag", "strategy": strategy, "causal": True}
        out = shardsum.attention(q_own, k_own, v_own, **options, sinks=own)
        return torch.autograd.grad(out, own, cut(d_out))[0]

    parts = launch(run, ranks=size, transport="threads")
    return relative_norm(torch.stack(parts).double().sum(dim=0), expected)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_eight_ranks_err_as_one_does_in_the_gradients_of_sinks(strategy: str) -> None:
    alone, eight = error_of_many_sinks(strategy, 1), error_of_many_sinks(strategy, 8)
    assert 1e-3 < alone < 3e-3
    assert eight <= 1.1 * alone, (eight, alone)


def test_rounded_partial_gradients_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = errors("pass_q", 1)
    test_traps.dk_and_dv_are_rounded_to_bfloat16(monkeypatch)
    eight = errors("pass_q", 8)
    assert eight["k"] > 1.2 * alone["k"]
    assert eight["v"] > 1.2 * alone["v"]

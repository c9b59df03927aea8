"""A layout computed from packed documents, under every strategy, in the cache and in the agreement."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import shardsum
from shardsum import KVCache, Layout, Mismatch, launch
from shardsum.comm import Communicator
from shardsum.strategies import STRATEGIES

from .. import dense
from ..tolerances import STATE, assert_close
from .cases import recorded

ENDS = [0, 5, 6, 6, 60, 75, 101]


def tensors() -> list[Tensor]:
    return [
        torch.randn(1, heads, ENDS[-1], dim, generator=torch.Generator().manual_seed(i))
        for i, (heads, dim) in enumerate([(4, 8), (2, 8), (2, 5), (4, 5)])
    ]


def expected() -> list[Tensor]:
    """out, dq, dk and dv in float64."""
    *inputs, d_out = (x.double() for x in tensors())
    inputs = [x.requires_grad_() for x in inputs]
    out, _ = dense.attention(*inputs, dense.visible(ENDS[-1], ENDS[-1], causal=True, cu_seqlens=ENDS))
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out)]


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_attention_and_gradients_on_every_rank(strategy: str) -> None:
    wanted, layout = expected(), Layout.packed(ENDS)

    def run(comm: Communicator) -> None:
        q, k, v, d_out = (shardsum.shard(x, comm=comm, layout=layout) for x in tensors())
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = shardsum.attention(
            *inputs,
            comm=comm,
            layout=layout,
            strategy=recorded(STRATEGIES[strategy]()),
            causal=True,
            cu_seqlens=ENDS,
        )
        found = [out, *torch.autograd.grad(out, inputs, d_out)]
        for name, mine, whole in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
            own = shardsum.shard(whole, comm=comm, layout=layout)
            assert_close(mine.detach(), own, STATE[torch.float32], f"{name} of {strategy} on rank {comm.rank}")

    launch(run, ranks=3, transport="threads")


def test_a_cache_takes_documents_as_they_are_laid_out() -> None:
    q, k, v, _ = tensors()
    wanted, _ = dense.attention(q, k, v, dense.visible(ENDS[-1], ENDS[-1], causal=True, cu_seqlens=ENDS))
    layout = Layout.packed(ENDS)

    def run(comm: Communicator) -> None:
        own = [shardsum.shard(x, comm=comm, layout=layout) for x in (q, k, v)]
        cache = KVCache(comm=comm, layers=1, kv_heads=2, head_dim=8, v_dim=5)
        cache.append(0, *own[1:], layout=layout)
        # A cache's keys are one document to its queries: each row's own is given as an interval.
        first = torch.tensor(ENDS[:-1])[
            torch.bucketize(torch.arange(ENDS[-1]), torch.tensor(ENDS[1:]), right=True)
        ]
        mine = layout.positions(ENDS[-1], comm.rank, comm.size)
        rows = first[mine].unsqueeze(0), torch.full((1, len(mine)), ENDS[-1])
        out = cache.attend(0, own[0], q_replicated=False, layout=layout, key_intervals=rows)
        assert_close(out, shardsum.shard(wanted, comm=comm, layout=layout), STATE[torch.float32], "out")

    launch(run, ranks=3, transport="threads")


def test_other_documents_on_one_rank_are_named_on_every_rank() -> None:
    def run(comm: Communicator) -> str:
        layout = Layout.packed([0, 3, 8] if comm.rank == 1 else [0, 4, 8])
        x = torch.randn(1, 1, 4, 2)
        with pytest.raises(Mismatch, match="layout must be the same on every rank") as caught:
            shardsum.attention(x, x, x, comm=comm, layout=layout)
        with pytest.raises(ValueError, match=r"Layout.packed is of 9 positions: got a sequence of 8"):
            shardsum.attention(x, x, x, comm=comm, layout=Layout.packed([0, 9]))
        return str(caught.value)

    assert len(set(launch(run, ranks=2, transport="threads"))) == 1

"""Calls of `attention` that are remembered give what calls made anew give, whatever changed between them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import shardsum
from shardsum.comm import Communicator
from shardsum.comm.memory import PreparedOperations
from shardsum.prepared_calls import CALLS


def made_in_many_ways(comm: Communicator, plain: bool) -> list[Tensor]:
    """More kinds of calls than are remembered, with indices that change in place; `plain`: none is kept."""
    if plain:
        comm.prepared = PreparedOperations(most=0)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 8 * comm.size, 4, generator=generator) for _ in range(3))
    mine = [shardsum.shard(x, comm=comm, layout="zigzag").requires_grad_() for x in (q, k, v)]
    start, end = torch.zeros(2, dtype=torch.int64), [8 * comm.size, 3]
    outs = []
    for turn in range(4):
        start[1] = turn % 2
        end[0] = 8 * comm.size - turn % 3
        for left in range(CALLS + 2):
            with torch.set_grad_enabled(left % 2 == 0), torch.inference_mode(left % 5 == 1):
                given = {"window": (left, 0), "key_range": (start, end), "sinks": torch.full((2,), float(turn))}
                out = shardsum.attention(*mine, comm=comm, layout="zigzag", **given)
                outs.append(out.detach().clone())
                if out.requires_grad:
                    outs += torch.autograd.grad(out.sum(), mine)
                del given["sinks"]
                outs.append(shardsum.attention(*mine, comm=comm, layout="zigzag", **given).detach().clone())
    return outs


@pytest.mark.parametrize("size", [1, 2, pytest.param(3, marks=pytest.mark.nightly)])
def test_calls_that_are_remembered_give_what_calls_made_anew_give(size: int) -> None:
    found, expected = (shardsum.launch(made_in_many_ways, size, "threads", (plain,)) for plain in (False, True))
    for ours, plain in zip(found, expected, strict=True):
        assert all(map(torch.equal, ours, plain))

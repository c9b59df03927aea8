"""Rows whose every score is so large that its lse, rounded, says nothing of how many keys it is of."""

from __future__ import annotations

import pytest
import torch

import shardsum
from shardsum import launch
from shardsum.comm import Communicator


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("strategy", ["all_gather", "auto"])
@pytest.mark.parametrize("value", [-1e9, 1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("causal", [False, True])
def test_weights_of_a_row_add_up_to_1_on_any_ranks(ranks: int, strategy: str, value: float, causal: bool) -> None:
    q, k = (torch.randn(1, 1, 13, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    ones, bias = torch.ones(1, 1, 13, 3), torch.full((1, 1, 13, 13), value)

    def run(comm: Communicator) -> torch.Tensor:
        q_part, k_part, v_part, bias_part = (shardsum.shard(x, comm=comm) for x in (q, k, ones, bias))
        out = shardsum.attention(
            q_part, k_part, v_part, bias=bias_part, causal=causal, strategy=strategy, comm=comm
        )
        return shardsum.unshard(out, comm=comm)

    for out in launch(run, ranks=ranks, transport="threads", deadline=20):
        torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-6)

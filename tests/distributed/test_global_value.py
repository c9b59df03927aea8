"""One number of what all ranks hold, against float64, on every rank."""

from __future__ import annotations

import math

import pytest
import torch

import shardsum
from shardsum import Mismatch, launch
from shardsum.comm import Communicator

from ..tolerances import assert_close

PARTS = [torch.tensor([[0.5, -3.0], [2.0, 1e-3]]), torch.empty(0), torch.tensor(7.25), torch.tensor([-1.0, 1e8])]


@pytest.mark.parametrize("collective", ["auto", "tree", "ring"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["sum", "mean", "max", "count"])
def test_value_on_every_rank(kind: str, size: int, collective: str) -> None:
    def run(comm: Communicator) -> torch.Tensor:
        return shardsum.global_value(PARTS[comm.rank], kind, comm=comm, collective=collective)

    whole = torch.cat([part.reshape(-1) for part in PARTS[:size]]).double()
    expected = {"sum": whole.sum(), "mean": whole.mean(), "max": whole.max(), "count": torch.tensor(whole.numel())}
    results = launch(run, ranks=size, transport="threads")
    for found in results:
        assert found.dtype == (torch.int64 if kind == "count" else torch.float32)
        assert_close(found, expected[kind], 1e-7, kind)
        assert torch.equal(found, results[0])


def test_gradients_count_once() -> None:
    def run(comm: Communicator) -> torch.Tensor:
        values = PARTS[comm.rank].clone().requires_grad_()
        loss = shardsum.global_value(values * values, "mean", comm=comm)
        return torch.autograd.grad(loss, values)[0]

    for rank, gradient in enumerate(launch(run, ranks=4, transport="threads")):
        assert_close(gradient, 2 * PARTS[rank].double() / 7, 1e-6, f"rank {rank}")


def test_nothing_at_all_and_nan() -> None:
    def run(comm: Communicator) -> list[float]:
        nothing = [
            float(shardsum.global_value(torch.empty(0), k, comm=comm)) for k in ("sum", "max", "count", "mean")
        ]
        bad = torch.tensor([1.0, math.nan if comm.rank else 2.0])
        return [*nothing, *(float(shardsum.global_value(bad, k, comm=comm)) for k in ("sum", "max"))]

    for found in launch(run, ranks=2, transport="threads"):
        assert found[:3] == [0.0, -math.inf, 0.0]
        assert all(map(math.isnan, found[3:]))


def test_what_does_not_fit_is_refused_on_every_rank() -> None:
    with pytest.raises(ValueError, match="kind must be sum, mean, max, count: got 'median'"):
        shardsum.global_value(torch.ones(2), "median")
    with pytest.raises(ValueError, match="values must be floats"):
        shardsum.global_value(torch.ones(2).int(), "sum")
    with pytest.raises(Mismatch, match="call must be the same"):
        launch(
            lambda comm: shardsum.global_value(torch.ones(2), ["sum", "max"][comm.rank], comm=comm), 2, "threads"
        )

"""The sum of gradients over ranks: in float32 or wider, the same bits on every rank, in any buckets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from shardsum.errors import Mismatch
from shardsum.hf.gradients import sum_gradients
from shardsum.hf.identity import weights_digest
from shardsum.launching import launch

from ..tolerances import assert_close

SHAPES = [(7, 5), (), (11,), (3, 2, 2), (0, 4), (101,)]


def _parameters(rank: int, dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(rank)
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    return parameters


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("bucket_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sums(ranks: int, bucket_bytes: int, dtype: torch.dtype) -> None:
    held = [_parameters(rank, dtype) for rank in range(ranks)]
    expected = [sum(p.grad.double() for p in same) for same in zip(*held, strict=True)]  # type: ignore[union-attr]
    launch(lambda comm: sum_gradients(comm, held[comm.rank], bucket_bytes), ranks=ranks, transport="threads")
    for parameters in held:
        for parameter, first, reference in zip(parameters, held[0], expected, strict=True):
            assert parameter.grad is not None
            assert parameter.grad.dtype == dtype
            assert torch.equal(parameter.grad, first.grad)  # type: ignore[arg-type]
            assert isinstance(reference, torch.Tensor)
            # One rounding to bfloat16, of the whole sum and not of each part.
            rounded = reference.to(torch.bfloat16) if dtype == torch.bfloat16 else reference
            assert_close(parameter.grad, rounded, 1e-6 if dtype != torch.bfloat16 else 1e-3)


def test_a_gradient_on_some_ranks_only() -> None:
    """No token went here: counts as zero. None went anywhere: stays without a gradient, as in one process."""
    held = [_parameters(rank, torch.float32) for rank in range(3)]
    only = held[1][0].grad
    assert only is not None
    expected = only.clone()
    held[0][0].grad = held[2][0].grad = None
    for parameters in held:
        parameters[2].grad = None
        parameters[3].requires_grad_(False)
    untouched = [parameters[3].grad.clone() for parameters in held]  # type: ignore[union-attr]
    launch(lambda comm: sum_gradients(comm, held[comm.rank]), ranks=3, transport="threads")
    for parameters, before in zip(held, untouched, strict=True):
        assert torch.equal(parameters[0].grad, expected)  # type: ignore[arg-type]
        assert parameters[2].grad is None
        assert torch.equal(parameters[3].grad, before)  # type: ignore[arg-type]


def test_traffic() -> None:
    """64 bytes, a byte for each parameter, and 2 (N - 1) / N of the gradients from each rank."""
    held = [_parameters(rank, torch.float32) for rank in range(3)]

    def run(comm: Any) -> int:
        sum_gradients(comm, held[comm.rank])
        sent: int = comm.traffic.sent_bytes
        return sent

    elements = sum(parameter.numel() for parameter in held[0])
    sent = launch(run, ranks=3, transport="threads")
    assert sum(sent) == 3 * 2 * (64 + len(SHAPES)) + 2 * 2 * 4 * elements


def test_other_parameters_are_refused() -> None:
    held = [_parameters(rank, torch.float32)[rank:] for rank in range(2)]
    with pytest.raises(Mismatch, match="parameters must be the same on every rank"):
        launch(lambda comm: sum_gradients(comm, held[comm.rank]), ranks=2, transport="threads")


def test_the_digest_sees_one_bit() -> None:
    models = [nn.Linear(7, 5).to(torch.bfloat16) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    assert weights_digest(models[0]) == weights_digest(models[1])
    models[1].weight.data.view(torch.int16)[3, 2] ^= 1
    assert weights_digest(models[0]) != weights_digest(models[1])

"""`attention` inside what people train with: gradcheck, autocast, checkpointing, process groups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import shardsum
from shardsum import launch
from shardsum.comm import Communicator

from .. import dense
from ..tolerances import assert_close


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("kernel", ["aten", "eager"])
@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 3.0}, {"window": (2, 1), "sink_tokens": 2}])
def test_gradcheck(kernel: str, options: dict[str, Any]) -> None:
    shapes = {"q": (1, 4, 5, 3), "k": (1, 2, 6, 3), "v": (1, 2, 6, 2), "sinks": (4,), "scale": (4,)}
    inputs = {name: normal(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    if kernel == "eager":
        inputs["bias"] = normal(1, 4, 5, 6, seed=9)

    def attend(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        state = shardsum.attention(
            **dict(zip(inputs, tensors, strict=True)), kernel=kernel, return_state=True, **options
        )
        return state.out, state.lse

    assert torch.autograd.gradcheck(attend, [x.requires_grad_() for x in inputs.values()])


def whole(x: Tensor, causal: bool = True) -> Tensor:
    return dense.attention(x, x, x, dense.visible(x.shape[2], x.shape[2], x.shape[0], causal=causal))[0]


def gradient_of(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    out = function(x)
    (out * torch.arange(out.numel(), dtype=out.dtype).view(out.shape).sin()).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


def sharded(comm: Communicator, attend: Callable[[Tensor, Communicator], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of a whole tensor whose inside is sharded; shard and unshard carry gradients too."""

    def function(x: Tensor) -> Tensor:
        return shardsum.unshard(
            attend(shardsum.shard(x, comm=comm, layout="zigzag"), comm), comm=comm, layout="zigzag"
        )

    return function


def one_tensor_thrice(x: Tensor, comm: Communicator) -> Tensor:
    out: Tensor = shardsum.attention(x, x, x, comm=comm, layout="zigzag", causal=True)
    return out


def checkpointed(x: Tensor, comm: Communicator) -> Tensor:
    out: Tensor = checkpoint(one_tensor_thrice, x, comm, use_reentrant=False)
    return out


def reentrant(x: Tensor, comm: Communicator) -> Tensor:
    out: Tensor = checkpoint(one_tensor_thrice, x, comm, use_reentrant=True)
    return out


@pytest.mark.parametrize("attend", [one_tensor_thrice, checkpointed, reentrant])
def test_one_tensor_as_q_k_and_v_and_recomputed(attend: Callable[[Tensor, Communicator], Tensor]) -> None:
    x = normal(1, 2, 23, 4)
    expected = gradient_of(whole, x)

    def run(comm: Communicator) -> None:
        for found, reference in zip(gradient_of(sharded(comm, attend), x), expected, strict=True):
            assert_close(found, reference, 1e-12, attend.__name__)

    launch(run, ranks=3, transport="threads")


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_inputs_only(wanted: tuple[int, ...]) -> None:
    inputs = [normal(1, 2, 12, 4, seed=seed) for seed in range(3)]

    def run(comm: Communicator) -> None:
        own = [shardsum.shard(x, comm=comm).requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        out = shardsum.attention(*own, comm=comm, causal=True)
        out.sum().backward()
        reference = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        dense.attention(*reference, dense.visible(12, 12, causal=True))[0].sum().backward()
        for i, (mine, x) in enumerate(zip(own, reference, strict=True)):
            if i in wanted:
                assert mine.grad is not None
                assert_close(mine.grad, shardsum.shard(x.grad, comm=comm), 1e-12, f"input {i}")
            else:
                assert mine.grad is None
        with torch.no_grad():
            assert not shardsum.attention(*own, comm=comm).requires_grad

    launch(run, ranks=2, transport="threads")


def test_ranks_that_differ_in_what_they_want_are_told() -> None:
    def run(comm: Communicator) -> str:
        x = torch.zeros(1, 1, 2, 2, requires_grad=comm.rank == 1)
        with pytest.raises(shardsum.Mismatch) as caught:
            shardsum.attention(x, x, x, comm=comm)
        return str(caught.value)

    assert "gradients must be the same on every rank" in launch(run, ranks=2, transport="threads")[0]


def test_under_autocast() -> None:
    q, k, v = (normal(1, 2, 12, 4, seed=seed, dtype=torch.float32).requires_grad_() for seed in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = shardsum.attention(q, k, v, causal=True)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    reference = [x.detach().bfloat16().double().requires_grad_() for x in (q, k, v)]
    expected = dense.attention(*reference, dense.visible(12, 12, causal=True))[0]
    expected.sum().backward()
    assert_close(out.detach().float(), expected.detach(), 2**-8, "out")
    for found, x in zip((q, k, v), reference, strict=True):
        assert found.grad is not None
        assert x.grad is not None
        assert found.grad.dtype == torch.float32
        assert_close(found.grad, x.grad, 2**-7, "gradient")


def test_a_sink_that_is_not_there_has_no_gradient() -> None:
    x, sinks = normal(1, 2, 3, 4), torch.tensor([-torch.inf, 0.5], dtype=torch.float64, requires_grad=True)
    shardsum.attention(x, x, x, sinks=sinks, causal=True, q_start=-1).sum().backward()  # row 0 sees no key
    assert sinks.grad is not None
    assert sinks.grad[0] == 0.0
    assert sinks.grad[1].abs() > 0.0


def test_autocast_leaves_float64_as_torch_does() -> None:
    x = normal(1, 2, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(shardsum.attention(x, x, x), whole(x, causal=False), 1e-12, "float64")
        with pytest.raises(ValueError, match="one dtype of float64"):
            shardsum.attention(x.int(), x.int(), x.int())


def test_the_weighted_sum_has_gradients() -> None:
    weights, values = normal(3, 10), normal(10, 2, seed=1)

    def run(comm: Communicator) -> None:
        own_weights = shardsum.shard(weights, comm=comm, dim=1).requires_grad_()
        own_values = shardsum.shard(values, comm=comm, dim=0).requires_grad_()
        out = shardsum.weighted_sum(own_weights, own_values, comm=comm)
        factor = normal(3, 2, seed=2)
        (out * factor).sum().backward()
        assert own_weights.grad is not None
        assert own_values.grad is not None
        assert_close(own_weights.grad, shardsum.shard(factor @ values.T, comm=comm, dim=1), 1e-12, "weights")
        assert_close(own_values.grad, shardsum.shard(weights.T @ factor, comm=comm, dim=0), 1e-12, "values")

    launch(run, ranks=3, transport="threads")


def over_groups(comm: Communicator, file: str) -> None:
    store = dist.FileStore(file, comm.size)
    dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)
    try:
        x = normal(1, 2, 14, 4)
        expected = whole(x)
        mesh = init_device_mesh("cpu", (1, comm.size), mesh_dim_names=("data", "sequence"))
        for group in (dist.group.WORLD, mesh["sequence"]):
            own = shardsum.shard(x, comm=group)
            out = shardsum.attention(own, own, own, comm=group, causal=True)
            assert_close(out, shardsum.shard(expected, comm=group), 1e-12, "over a group")
        with pytest.raises(ValueError, match="one dimension of a DeviceMesh"):
            shardsum.attention(x, x, x, comm=mesh)
    finally:
        dist.destroy_process_group()


def test_a_process_group_and_a_device_mesh_are_communicators(tmp_path: Path) -> None:
    launch(over_groups, ranks=2, transport="gloo", args=(str(tmp_path / "store"),))

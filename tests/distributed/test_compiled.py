"""A compiled caller on several ranks gets the numbers of an eager one: its graph breaks around each call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import shardsum
from shardsum import launch
from shardsum.comm import Communicator

from .. import dense
from ..tolerances import assert_close

X = torch.randn((1, 2, 13, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
W = torch.randn((8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LONGER = torch.cat([X, 2 * X], dim=2)


def attention(comm: Any, part: Tensor, w: Tensor) -> Tensor:
    h = part @ w
    return shardsum.attention(h, h, h, comm=comm, causal=True).sin()


def checkpointed(comm: Any, part: Tensor, w: Tensor) -> Tensor:
    out: Tensor = checkpoint(attention, comm, part, w, use_reentrant=False)
    return out


def sums_and_parts(comm: Any, part: Tensor, w: Tensor) -> Tensor:
    whole = shardsum.unshard(part @ w, comm=comm)
    again = shardsum.shard(whole.sin(), comm=comm)
    weights = torch.softmax(again.sum(dim=(0, 1, 3)), dim=0)[None]
    summed = shardsum.weighted_sum(weights, again[0, 0], comm=comm)
    return again * shardsum.global_value(again, "mean", comm=comm) + summed


def caught(comm: Any, part: Tensor, w: Tensor) -> Tensor:
    h = part @ w
    with shardsum.context_parallel(comm):
        return scaled_dot_product_attention(h, h, h, is_causal=True).sin()


INNER = torch.compile(lambda h: scaled_dot_product_attention(h, h, h, is_causal=True).sin(), backend="aot_eager")


def compiled_inside(comm: Any, part: Tensor, w: Tensor) -> Tensor:
    with shardsum.context_parallel(comm):
        out: Tensor = INNER(part @ w)
    return out


def decoded(comm: Any, part: Tensor, w: Tensor) -> Tensor:
    cache = shardsum.KVCache(comm=comm, layers=1, kv_heads=2, head_dim=8, dtype=torch.float64)
    with torch.no_grad():
        cache.append(0, part @ w, part @ w, layout="contiguous")
        cache.append(0, X[:, :, :1] @ w, X[:, :, :1] @ w)
        cache.crop(9)
    return cache.attend(0, (X[:, :, :1] @ w)).sin() + (part @ w).sum()


JOBS = [attention, checkpointed, sums_and_parts, caught, compiled_inside, decoded]


def forward_and_backward(call: Callable[..., Tensor], comm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    w = W.clone().requires_grad_()
    out = call(comm, shardsum.shard(x, comm=comm), w)
    out.sum().backward()
    assert w.grad is not None
    return out.detach(), w.grad


def compare(comm: Any, jobs: int = len(JOBS)) -> None:
    for job in JOBS[:jobs]:
        torch.compiler.reset()
        compiled = torch.compile(job, backend="aot_eager")
        for x in (X, LONGER, X):  # compiled, compiled again for another length, and from what was kept
            expected = forward_and_backward(job, comm, x)
            for found, reference in zip(forward_and_backward(compiled, comm, x), expected, strict=True):
                assert_close(found, reference, 1e-12, job.__name__)
            with torch.no_grad():
                found = compiled(comm, shardsum.shard(x, comm=comm), W)
            assert_close(found, expected[0], 1e-12, f"{job.__name__} without gradients")
    h = X @ W
    reference = dense.attention(h, h, h, dense.visible(13, 13, causal=True))[0].sin()
    found = torch.compile(attention, backend="aot_eager")(comm, shardsum.shard(X, comm=comm), W)
    assert_close(found, shardsum.shard(reference, comm=comm), 1e-12, "against float64")
    torch.compiler.reset()
    with pytest.raises(Exception, match="ranks meet in it"):
        torch.compile(attention, backend="aot_eager", fullgraph=True)(comm, shardsum.shard(X, comm=comm), W)
    attention(comm, shardsum.shard(X, comm=comm), W)  # the next call works


def over_a_group(comm: Communicator, file: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(file, comm.size), rank=comm.rank, world_size=comm.size)
    try:
        for group in (dist.group.WORLD, init_device_mesh("cpu", (comm.size,), mesh_dim_names=("sequence",))):
            compare(group, jobs=1)
    finally:
        dist.destroy_process_group()


NIGHTLY = [pytest.param(*case, len(JOBS), marks=pytest.mark.nightly) for case in ((1, "gloo"), (3, "mpi"))]


@pytest.mark.parametrize(("ranks", "transport", "jobs"), [(2, "gloo", len(JOBS)), (2, "mpi", 1), *NIGHTLY])
def test_a_compiled_caller_gets_the_numbers_of_an_eager_one(ranks: int, transport: str, jobs: int) -> None:
    """In processes of their own: the compiler can't read what checks shapes in tests."""
    launch(compare, ranks, transport, args=(jobs,))


def test_over_a_process_group_and_a_device_mesh(tmp_path: Path) -> None:
    launch(over_a_group, 2, "gloo", args=(str(tmp_path / "store"),))

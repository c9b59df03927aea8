"""Tensors without memory of their own, and gradients that nothing gives: refused by name, by every rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

import shardsum
from shardsum import KVCache, Mismatch, Unsupported, launch
from shardsum.comm import Communicator

from .. import dense
from ..tolerances import assert_close

# torch's own, about what is made here to be refused.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def fake(x: Tensor) -> Tensor:
    return FakeTensorMode().from_tensor(x)


def quantized(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


def jagged(x: Tensor) -> Tensor:
    nested = torch.nested.nested_tensor([x[0, :, :2].transpose(0, 1)] * 2, layout=torch.jagged)
    return nested.transpose(1, 2)


# What a tensor is made, and the words that name it.
KINDS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "meta": (lambda x: x.to("meta"), "a meta tensor"),
    "fake": (fake, "a FakeTensor"),
    "sparse": (lambda x: x.to_sparse(), "a sparse tensor"),
    "nested": (jagged, "a nested tensor"),
    "quantized": (quantized, "a quantized tensor"),
    "a subclass": (lambda x: TwoTensor(x, x), "a TwoTensor"),
    "negated": (lambda x: torch.complex(x, x).conj().imag, "negated when it is read"),
    "freed": (freed, "memory was given back"),
    "no tensor": (lambda x: x.tolist(), "must be a torch tensor: got list"),
}


def paged(x: Any, comm: Communicator) -> Any:
    pages, table = normal(2, 2, 3, 4), torch.tensor([[0, 1]])
    return shardsum.decode_paged(x, pages, pages, table, torch.tensor([5]))


def appended(x: Any, comm: Communicator) -> Any:
    KVCache(comm=comm, layers=1, kv_heads=2, head_dim=4).append(0, x, normal(1, 2, 3, 4))
    return comm.barrier()  # tokens that all ranks bring need no agreement


def appended_shards(x: Any, comm: Communicator) -> Any:
    KVCache(comm=comm, layers=1, kv_heads=2, head_dim=4).append(0, x, normal(1, 2, 3, 4), layout="contiguous")


def attended(x: Any, comm: Communicator) -> Any:
    cache = KVCache(comm=comm, layers=1, kv_heads=2, head_dim=4)
    cache.append(0, normal(1, 2, 3, 4), normal(1, 2, 3, 4))
    return cache.attend(0, x)


CALLS: dict[str, Callable[[Any, Communicator], Any]] = {
    "q": lambda x, comm: shardsum.attention(x, normal(1, 2, 3, 4), normal(1, 2, 3, 4), comm=comm),
    "k": lambda x, comm: shardsum.attention(normal(1, 2, 3, 4), x, normal(1, 2, 3, 4), comm=comm),
    "KVCache.attend": attended,
    "KVCache.append of shards": appended_shards,
    "unshard": lambda x, comm: shardsum.unshard(x, comm=comm),
    "values": lambda x, comm: shardsum.weighted_sum(normal(1, 2, 4, 3), x, comm=comm),
    "global_value": lambda x, comm: shardsum.global_value(x, "max", comm=comm),
}
ALONE: dict[str, Callable[[Any, Communicator], Any]] = {
    "decode_paged": paged,
    "KVCache.append": appended,
    "shard": lambda x, comm: shardsum.shard(x, comm=comm),
}


def refused_by_all(comm: Communicator, call: str, kind: str) -> str:
    """Every rank's error if rank 1 alone has such a tensor; the next call works."""
    make, _ = KINDS[kind]
    x = normal(1, 2, 3, 4)
    with pytest.raises((ValueError, Mismatch)) as caught:
        CALLS[call](make(x) if comm.rank == 1 else x, comm)
    assert int(shardsum.global_value(x, "count", comm=comm)) == 24 * comm.size
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", CALLS)
def test_what_one_rank_can_not_compute_with_is_named_by_all(call: str, kind: str) -> None:
    for message in launch(refused_by_all, 3, "threads", (call, kind), deadline=10.0):
        assert KINDS[kind][1] in message
        assert "rank 1" in message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", [*CALLS, *ALONE])
def test_what_can_not_be_computed_with_is_named(call: str, kind: str) -> None:
    make, words = KINDS[kind]
    with pytest.raises(ValueError, match=words):
        (CALLS | ALONE)[call](make(normal(1, 2, 3, 4)), shardsum.connect("single"))


ARGUMENTS: dict[str, Tensor] = {
    "sinks": normal(2),
    "bias": normal(1, 2, 3, 3),
    "scale": normal(2),
    "alibi_slopes": normal(2),
    "cu_seqlens": torch.tensor([0, 1, 3]),
    "q_start": torch.tensor([0]),
    "prefix": torch.tensor([1]),
}


@pytest.mark.parametrize("kind", ["meta", "fake", "sparse"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_so_it_is_for_the_other_arguments(name: str, kind: str) -> None:
    x, (make, words) = normal(1, 2, 3, 4), KINDS[kind]
    with pytest.raises(ValueError, match=f"{name} must be a plain tensor: got {words}"):
        shardsum.attention(x, x, x, **{name: make(ARGUMENTS[name])})


def test_modes_in_which_nothing_is_computed_are_named() -> None:
    x = normal(1, 2, 3, 4)
    with FakeTensorMode(), pytest.raises(ValueError, match="FakeTensorMode is on"):
        shardsum.attention(x, x, x)
    with pytest.raises(ValueError, match=r"make_fx\) is on"):
        torch.fx.experimental.proxy_tensor.make_fx(lambda x: shardsum.attention(x, x, x))(x)
    with pytest.raises(ValueError, match=r"jit\.trace would keep"):
        torch.jit.trace(lambda x: shardsum.attention(x, x, x), x)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "vmap": lambda f, x: torch.func.vmap(f)(x[None]),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functions_of_functions_are_refused(transform: str) -> None:
    with pytest.raises(ValueError, match=r"inside torch\.func"):
        TRANSFORMS[transform](lambda x: shardsum.attention(x, x, x), normal(1, 2, 3, 4))


SECOND: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "a penalty on the gradient of q": lambda out, of_q, w: of_q.pow(2).sum(),
    "beside the loss": lambda out, of_q, w: out.sum() + of_q.norm(),
    "of what multiplied the output": lambda out, of_q, w: (of_q * 2).sum(),
}


@pytest.mark.parametrize("kernel", shardsum.kernels.available())
@pytest.mark.parametrize("loss", SECOND)
def test_second_derivatives_are_refused_and_first_ones_are_not(loss: str, kernel: str) -> None:
    q, w = normal(1, 2, 3, 4).requires_grad_(), normal(1, 2, 3, 4, seed=1).requires_grad_()
    out = shardsum.attention(q, q, q, kernel=kernel)
    (first,) = torch.autograd.grad((out * w).sum(), q, create_graph=True)
    (plain,) = torch.autograd.grad((shardsum.attention(q, q, q, kernel=kernel) * w).sum(), q)
    torch.testing.assert_close(first.detach(), plain, rtol=0, atol=0)
    with pytest.raises(Unsupported, match="first derivatives only"):
        SECOND[loss](out, first, w).backward()


def test_tangents_are_refused() -> None:
    x = normal(1, 2, 3, 4)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        for call in ("q", "k", "values", "global_value"):
            with pytest.raises(Unsupported, match="has a tangent"):
                CALLS[call](dual, shardsum.connect("single"))


def called(comm: Communicator, **options: Any) -> Any:
    x = normal(1, 2, 3, 4)
    return shardsum.attention(x, x, x, comm=comm, **options)


def learned(*shape: int) -> Tensor:
    return normal(*shape).abs().requires_grad_()


WITHOUT: dict[str, tuple[str, Callable[[Communicator], Any]]] = {
    "slopes": ("alibi_slopes", lambda comm: called(comm, alibi_slopes=learned(2))),
    "softcap": ("softcap", lambda comm: called(comm, softcap=learned(1).sum())),
    "dropout": ("dropout_p", lambda comm: called(comm, dropout_p=learned(1).sum() * 0, seed=1)),
    "an append": ("k", lambda comm: appended(learned(1, 2, 3, 4), comm)),
    "an append of shards": ("k", lambda comm: appended_shards(learned(1, 2, 3, 4), comm)),
    "pages": ("q", lambda comm: paged(learned(1, 2, 1, 4), comm)),
    "max": ("values", lambda comm: shardsum.global_value(learned(3), "max", comm=comm)),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_what_gets_no_gradient_may_not_require_one(name: str) -> None:
    words, call = WITHOUT[name]
    with pytest.raises(Unsupported, match=f"{words} requires a gradient, and receives none here"):
        call(shardsum.connect("single"))
    with torch.no_grad():
        call(shardsum.connect("single"))


def taken(comm: Communicator, file: str) -> None:
    """DTensors of 13 positions, over a mesh and over its group."""
    dist.init_process_group("gloo", store=dist.FileStore(file, comm.size), rank=comm.rank, world_size=comm.size)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("sp",))
    whole = [normal(1, 2, 13, 4, seed=seed).double().requires_grad_() for seed in range(3)]
    expected = dense.attention(*whole, dense.visible(13, 13, 1, causal=True))[0]
    expected.sin().sum().backward()
    for over in (mesh, mesh.get_group()):
        parts = [distribute_tensor(x.detach(), mesh, [Shard(2)]).requires_grad_() for x in whole]
        out = shardsum.attention(*parts, comm=over, causal=True)
        assert isinstance(out, DTensor)
        assert out.placements == (Shard(2),)
        assert_close(out.full_tensor().detach(), expected.detach(), 1e-12, "a DTensor")
        out.to_local().sin().sum().backward()
        for part, x in zip(parts, whole, strict=True):
            assert part.grad is not None
            assert x.grad is not None
            assert_close(part.grad.full_tensor(), x.grad, 1e-12, "a gradient that is a DTensor")
    refused = {
        "replicated": [distribute_tensor(x.detach(), mesh, [Replicate()]) for x in whole],
        "over heads": [distribute_tensor(x.detach(), mesh, [Shard(1)]) for x in whole],
        "mixed": [parts[0], *(part.to_local() for part in parts[1:])],
    }
    for tensors in refused.values():
        with pytest.raises(ValueError, match=r"a DTensor. Pass x.to_local\(\)"):
            shardsum.attention(*tensors, comm=mesh)
    for options in ({"layout": "zigzag"}, {"q_replicated": True}, {"return_state": True}):
        with pytest.raises(ValueError, match=r"a DTensor. Pass x.to_local\(\)"):
            shardsum.attention(*parts, comm=mesh, **options)
    dist.destroy_process_group()


def test_dtensors_along_the_sequence_are_taken(tmp_path: Path) -> None:
    launch(taken, 2, "gloo", (str(tmp_path / "store"),))

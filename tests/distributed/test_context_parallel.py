"""F.scaled_dot_product_attention inside `context_parallel` equals itself outside, on whole tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

import shardsum
from shardsum import Mismatch, Unsupported, context_parallel, launch
from shardsum.comm import Communicator
from shardsum.kernels import available

from ..tolerances import assert_close


def inputs(kv_len: int, kv_heads: int) -> list[torch.Tensor]:
    shapes = [(2, 4, 17, 8), (2, kv_heads, kv_len, 8), (2, kv_heads, kv_len, 8)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize(
    ("kv_len", "kv_heads", "options"),
    [
        (17, 4, {"is_causal": True}),
        (29, 4, {"is_causal": True}),  # top-left: the last keys are seen by nobody
        (9, 2, {"is_causal": True, "enable_gqa": True, "scale": 0.3}),
        (29, 1, {"enable_gqa": True}),
    ],
)
def test_as_torch_alone(layout: str, kv_len: int, kv_heads: int, options: dict[str, Any]) -> None:
    whole = inputs(kv_len, kv_heads)
    expected = F.scaled_dot_product_attention(*whole, **options)
    expected.sin().sum().backward()

    def run(comm: Communicator) -> None:
        own = [shardsum.shard(x.detach(), comm=comm, layout=layout).requires_grad_() for x in whole]
        with context_parallel(comm, layout=layout):
            out = F.scaled_dot_product_attention(*own, **options)
        out.sin().sum().backward()
        assert_close(out.detach(), shardsum.shard(expected.detach(), comm=comm, layout=layout), 1e-12, "out")
        for found, x in zip(own, whole, strict=True):
            assert found.grad is not None
            assert x.grad is not None
            assert_close(found.grad, shardsum.shard(x.grad, comm=comm, layout=layout), 1e-12, "gradient")

    launch(run, ranks=3, transport="threads")


def test_what_is_not_supported_reaches_every_rank() -> None:
    def run(comm: Communicator) -> str:
        q = torch.ones(1, 1, 2, 2)
        with context_parallel(comm):
            with pytest.raises(Mismatch) as caught:
                F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(2, 2) if comm.rank else None)
            F.scaled_dot_product_attention(q, q, q)
        return str(caught.value)

    for said in launch(run, ranks=2, transport="threads"):
        assert said.startswith("rank 1 could not take part: Unsupported: attn_mask has 2 columns")


def test_only_inside_and_only_what_is_supported() -> None:
    q, k, v = (x.detach() for x in inputs(17, 2))
    plain = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    with context_parallel():
        with pytest.raises(Unsupported, match=r"\(batch, heads, length, dim\)"):
            F.scaled_dot_product_attention(q[0], q[0], q[0])
        with pytest.raises(ValueError, match="enable_gqa=True"):
            F.scaled_dot_product_attention(q, k, v)
        assert_close(F.scaled_dot_product_attention(q, k, v, enable_gqa=True), plain, 1e-12, "one rank")
    F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(17, 17, dtype=torch.bool))


def attend(q: torch.Tensor, w: torch.Tensor, **options: Any) -> torch.Tensor:
    h = q @ w
    return F.scaled_dot_product_attention(h, h, h, **options)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_checkpointed_layer_is_computed_again_as_it_was(layers: int, reentrant: bool, outside: bool) -> None:
    """Wherever its backward runs."""
    x, w = inputs(17, 4)[0].detach(), torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator())

    def loss(x: torch.Tensor, w: torch.Tensor, again: bool) -> torch.Tensor:
        out = x
        for _ in range(layers):
            out = checkpoint(attend, out, w, use_reentrant=reentrant) if again else attend(out, w)
        return (out * x.detach()).sum()

    whole = w.clone().requires_grad_()
    loss(x, whole, again=False).backward()

    def run(comm: Communicator) -> torch.Tensor:
        own, part = w.clone().requires_grad_(), shardsum.shard(x, comm=comm).requires_grad_()
        with context_parallel(comm):
            found = loss(part, own, again=True)
            if not outside:
                found.backward()
        if outside:
            found.backward()
        assert own.grad is not None
        return own.grad

    assert whole.grad is not None
    assert_close(sum(launch(run, 2, "threads")), whole.grad, 1e-12, "gradient of a weight")


def operator(q: torch.Tensor) -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)


OTHERWISE: dict[str, Any] = {
    "multi_head_attention_forward": lambda q: nn.MultiheadAttention(8, 2)(q[0], q[0], q[0], need_weights=False),
    "multi_head_attention": lambda q: nn.MultiheadAttention(8, 2)(q[0], q[0], q[0]),
    "multi_head_attention_forwar": lambda q: nn.TransformerEncoderLayer(8, 2, 8)(q[0]),
    "_scaled_dot_product_flash_attention_for_cpu": operator,
    "_scaled_dot_product_flash": lambda q: torch._scaled_dot_product_flash_attention_for_cpu(q, q, q),
    "this rank holds one token": lambda q: F.scaled_dot_product_attention(*(q[:, :, :1],) * 3),
    "attn_mask has 2 columns": lambda q: F.scaled_dot_product_attention(q, q, q, torch.ones(2, 2).bool()),
    "attn_mask has 1 column, for all keys of this rank": lambda q: F.scaled_dot_product_attention(
        q, q, q, torch.ones(2, 1).bool()
    ),
    "attn_mask and is_causal": lambda q: F.scaled_dot_product_attention(q, q, q, torch.ones(2, 4), is_causal=True),
}


@pytest.mark.parametrize("words", OTHERWISE)
def test_what_is_computed_of_a_ranks_own_tokens_is_refused_by_all(words: str) -> None:
    def run(comm: Communicator) -> None:
        q = torch.ones(1, 1, 2, 8)
        with context_parallel(comm):
            with pytest.raises(ValueError, match=words):
                OTHERWISE[words](q)
            F.scaled_dot_product_attention(q, q, q)

    launch(run, 2, "threads", deadline=20.0)


def test_a_block_that_saw_no_attention_says_so_at_its_end() -> None:
    def run(comm: Communicator) -> None:
        q = torch.ones(1, 1, 2, 2)
        with pytest.raises(Unsupported, match=r"saw no F\.scaled_dot_product_attention"), context_parallel(comm):
            torch.softmax(q @ q.mT, -1) @ q

    launch(run, 2, "threads")


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_of_all_keys_is_taken(kind: str) -> None:
    q, k, v = (x.detach() for x in inputs(17, 4))
    mask = torch.rand(17, 17, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[:, 0] = True
    given = mask if kind == "bool" else torch.zeros(17, 17, dtype=q.dtype).masked_fill(~mask, -3.0)
    expected = F.scaled_dot_product_attention(q, k, v, given)

    def run(comm: Communicator) -> None:
        own = [shardsum.shard(x, comm=comm) for x in (q, k, v)]
        with context_parallel(comm):
            out = F.scaled_dot_product_attention(*own, shardsum.shard(given, comm=comm, dim=0))
        assert_close(out, shardsum.shard(expected, comm=comm), 1e-12, "out")

    launch(run, 3, "threads")


@pytest.mark.parametrize("kernel", available())
def test_our_own_calls_are_not_caught(kernel: str) -> None:
    def run(comm: Communicator) -> None:
        q = torch.ones(1, 1, 2, 2)
        with context_parallel(comm):
            shardsum.attention(q, q, q, comm=comm, kernel=kernel)
            F.scaled_dot_product_attention(q, q, q)

    launch(run, 2, "threads")


def written_out(q: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ q.mT, dim=-1) @ q


def eager_beside_a_call(q: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, q, q) + written_out(q)


def eager_before_a_call(q: torch.Tensor) -> torch.Tensor:
    return written_out(q) + F.scaled_dot_product_attention(q, q, q)


def eager_by_batches(q: torch.Tensor) -> torch.Tensor:
    rows = q.flatten(0, 1)
    weights = F.softmax(torch.bmm(rows, rows.mT), dim=-1)
    return F.scaled_dot_product_attention(q, q, q) + torch.bmm(weights, rows).view_as(q)


def eager_by_a_method(q: torch.Tensor) -> torch.Tensor:
    return (q @ q.mT).softmax(-1) @ q + F.scaled_dot_product_attention(q, q, q)


@pytest.mark.parametrize(
    "compute", [eager_beside_a_call, eager_before_a_call, eager_by_batches, eager_by_a_method, written_out]
)
def test_attention_that_is_written_out_is_refused_by_all(compute: Any) -> None:
    def run(comm: Communicator) -> str:
        q = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(comm.rank))
        with pytest.raises(shardsum.Unsupported) as caught, context_parallel(comm):
            compute(q)
        with context_parallel(comm):  # the next block works
            F.scaled_dot_product_attention(q, q, q)
        return str(caught.value)

    said = launch(run, 2, "threads")
    assert all("is of this rank's tokens alone" in one for one in said), said


def test_a_routers_softmax_is_no_attention() -> None:
    """Scores of 5 experts for each of 5 tokens."""

    def run(comm: Communicator) -> None:
        q = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(comm.rank))
        with context_parallel(comm):
            F.scaled_dot_product_attention(q, q, q)
            for routed in (q[0, :, :, :5], q[0, 0, :, :5]):
                torch.softmax(routed[:1], dim=-1)

    launch(run, 2, "threads")


def flexible(comm: Communicator) -> str:
    q = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(comm.rank))
    with pytest.raises(shardsum.Unsupported) as caught, context_parallel(comm):
        flex_attention(q, q, q)
    with context_parallel(comm):  # the next block works
        F.scaled_dot_product_attention(q, q, q)
    return str(caught.value)


@pytest.mark.parametrize("transport", ["gloo"])
def test_flex_attention_is_refused_by_all(transport: str) -> None:
    """In processes of their own: it runs by the compiler, which can't read what checks shapes in tests."""
    assert all("flex_attention" in said for said in launch(flexible, 2, transport))

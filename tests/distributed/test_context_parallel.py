"""F.scaled_dot_product_attention inside `context_parallel` equals itself outside, on whole tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import shardsum
from shardsum import Mismatch, Unsupported, context_parallel, launch
from shardsum.comm import Communicator

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
        assert said.startswith("rank 1 could not take part: Unsupported: attn_mask is not supported")


def test_only_inside_and_only_what_is_supported() -> None:
    q, k, v = (x.detach() for x in inputs(17, 2))
    plain = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    with context_parallel():
        with pytest.raises(Unsupported, match="attn_mask is not supported"):
            F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(17, 17, dtype=torch.bool))
        with pytest.raises(Unsupported, match=r"\(batch, heads, length, dim\)"):
            F.scaled_dot_product_attention(q[0], q[0], q[0])
        with pytest.raises(ValueError, match="enable_gqa=True"):
            F.scaled_dot_product_attention(q, k, v)
        assert_close(F.scaled_dot_product_attention(q, k, v, enable_gqa=True), plain, 1e-12, "one rank")
    F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(17, 17, dtype=torch.bool))

"""Blocks: what each kind knows of itself, its cuts and its dense twin; and the kernel that only counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from shardsum.blocks import Block, Dense, Int8, Paged
from shardsum.kernels import CostingKernel, OutputGradient, available, chosen
from shardsum.masks import Bounds
from shardsum.quantized import Quantized
from shardsum.scores import Scores

from .native import normal


def dense() -> Block:
    return Dense(normal(1, 2, 3, 10, 7).float(), normal(2, 2, 3, 10, 5).float())


def int8() -> Block:
    return Int8(Quantized.of(normal(1, 2, 3, 10, 7)), Quantized.of(normal(2, 2, 3, 10, 5)))


def paged() -> Block:
    table = torch.tensor([[3, 0], [1, 3]])
    return Paged(normal(1, 4, 3, 5, 7).float(), normal(2, 4, 3, 5, 5).float(), table)


each_kind = pytest.mark.parametrize("make", [dense, int8, paged])


@each_kind
def test_sizes_and_cuts_are_those_of_the_dense_twin(make: Callable[[], Block]) -> None:
    block = make()
    twin = block.dense(block.dtype)
    assert (block.kv_heads, block.kv_len, block.head_dim, block.v_dim) == (3, 10, 7, 5)
    assert twin.shape == block.shape
    assert twin.dense(block.dtype) is twin
    assert block.device == twin.device
    for some in (slice(2, 7), torch.tensor([0, 4, 9])):
        cut = block.keys(some).dense(block.dtype)
        assert torch.equal(cut.k, twin.k[:, :, some])
        assert torch.equal(cut.v, twin.v[:, :, some])
    heads = block.heads(slice(1, 3)).dense(block.dtype)
    assert torch.equal(heads.k, twin.k[:, 1:3])
    assert torch.equal(heads.v, twin.v[:, 1:3])


def test_a_page_is_where_the_table_says() -> None:
    block = paged()
    assert isinstance(block, Paged)
    assert torch.equal(block.dense(torch.float32).k[1, :, 5:], block.k_pages[3])
    assert torch.equal(block.dense(torch.float32).v[0, :, :5], block.v_pages[3])


def test_bytes_are_those_that_a_call_reads() -> None:
    assert dense().nbytes == 2 * 3 * 10 * (7 + 5) * 4
    assert int8().nbytes == 2 * 3 * 10 * (7 + 5 + 2 * 4)
    assert paged().nbytes == dense().nbytes


@each_kind
def test_the_costing_kernel_counts_and_gives_shapes(make: Callable[[], Block]) -> None:
    kernel, block, q = CostingKernel(), make(), torch.empty(2, 6, 4, 7, dtype=torch.bfloat16, device="meta")
    hi = torch.tensor([[1, 2, 3, 10]])
    state = kernel.forward(q, block, Bounds(hi * 0, hi), Scores(1.0))
    assert state.out.is_meta
    assert (state.out.shape, state.out.dtype) == ((2, 6, 4, 5), torch.float32)
    assert state.is_finite()
    assert (kernel.calls, kernel.multiply_adds, kernel.read_bytes) == (1, 2 * 6 * 16 * 12, block.nbytes)


def test_the_costing_kernel_on_meta_alone() -> None:
    kernel = CostingKernel()
    q, k, v = (torch.empty(2, heads, 9, dim, device="meta") for heads, dim in ((6, 7), (3, 7), (3, 5)))
    block, bounds = Dense(k, v), Bounds(*torch.empty(2, 1, 9, dtype=torch.int64, device="meta"))
    state = kernel.forward_tree(q, block, bounds, Scores(1.0))
    gradient = OutputGradient(state.out, state.lse, state.lse)
    gradients = kernel.backward_leaf(q, block, bounds, Scores(1.0), gradient)
    total = gradients + kernel.backward(q, block, bounds, Scores(1.0), gradient)
    assert [tuple(x.shape) for x in (total.q, total.k, total.v)] == [tuple(x.shape) for x in (q, k, v)]
    assert kernel.calls == 3
    assert kernel.multiply_adds == 2 * 6 * 9 * 9 * (7 + 5 + 2 * (3 * 7 + 2 * 5))


def test_nobody_is_given_the_costing_kernel_unasked() -> None:
    for device in (None, torch.device("cpu"), torch.device("meta"), torch.device("cuda")):
        assert CostingKernel.name not in available(device)
        assert chosen(device, (2048, 2048)) == "aten"

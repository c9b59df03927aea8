"""The seams that later work builds on: strategies without a wire, blocks of several holders, blocks of files."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import config
from torch import Tensor

import shardsum
from shardsum import KVCache, Layout, launch
from shardsum.arguments import Arguments
from shardsum.blocks import Block, Dense
from shardsum.collectives import COLLECTIVES, as_collective
from shardsum.comm import Communicator, CountingTransport, Ranks
from shardsum.kernels import CostingKernel, Gradients, OutputGradient
from shardsum.kv.owners import Owners
from shardsum.masks import Mask
from shardsum.placement import Placement, Subset
from shardsum.prepared import PreparedCall
from shardsum.problem import Problem, Sizes
from shardsum.scores import Scores
from shardsum.strategies import STRATEGIES, Call, Hybrid, PlacedBlock, Strategy

from .. import dense
from ..tolerances import STATE, assert_close

MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (300, None)},
    "first tokens": {"causal": True, "window": (200, None), "sink_tokens": 3},
}


def problem_of(
    size: int, layout: str, mask: str, *, length: int = 1500, heads: tuple[int, int] = (8, 4), **options: Any
) -> Problem:
    placement = Layout(layout).placement(length, size, 256 if options.get("reproducible") else 1)
    queries = Placement.replicated([length] * size) if options.get("q_replicated") else placement
    sizes = {"batch": 2, "q_heads": heads[0], "kv_heads": heads[1], "head_dim": 16, "v_dim": 24}
    return Problem(
        **sizes,
        dtype=torch.bfloat16,
        mask=Mask(length, length, **MASKS[mask]),
        queries=queries,
        keys=placement,
        **options,
    )


def alone(problem: Problem, rank: int, collective: str = "auto") -> Call:
    """The call as one rank of the problem sees it: tensors that have sizes only, and nobody on the other side."""

    def meta(*shape: int, dtype: torch.dtype = problem.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    keys = problem.kv_len(rank)
    return Call(
        comm=Communicator(CountingTransport(rank, problem.size)),
        problem=problem,
        kernel=CostingKernel(),
        q=meta(*problem.q_shape(rank)),
        blocks=[PlacedBlock(Dense(meta(*problem.k_shape(keys)), meta(*problem.v_shape(keys))))],
        scores=Scores(0.25),
        collective=as_collective(collective),
    )


def gradient_of(call: Call) -> OutputGradient:
    rows = torch.empty(*call.q.shape[:3], call.problem.v_dim, device="meta")
    return OutputGradient(rows, rows[..., 0], rows[..., 0])


def runs_as_declared(strategy: Strategy, problem: Problem, rank: int) -> None:
    call = alone(problem, rank)
    state = strategy.forward(call)
    assert state.out.shape == (*call.q.shape[:3], problem.v_dim)
    counted = call.comm.traffic.snapshot()
    assert counted == strategy.traffic(problem, rank), (strategy.name, problem, rank, "forward")
    found: Gradients = strategy.backward(call, gradient_of(call))
    assert found.q.shape == call.q.shape
    assert found.k.shape == call.dense.k.shape
    declared = strategy.traffic_backward(problem, rank)
    assert call.comm.traffic - counted == declared, (strategy.name, problem, rank, "backward")


@pytest.fixture(autouse=True)
def without_shape_checks() -> Iterator[None]:
    """They take half of the time here, and are made wherever values are tested."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    "size", [1, 2, 5, *(pytest.param(n, marks=pytest.mark.nightly) for n in (3, 8, 16, 33)), 64]
)
@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_strategy_runs_without_a_wire_and_sends_what_it_declares(name: str, size: int) -> None:
    """The strategy's own code on tensors without numbers, and on communicators without ranks."""
    strategy = Hybrid(4) if name == "hybrid" and size % 4 == 0 else STRATEGIES[name]()
    cases = [
        problem_of(size, layout, mask, q_replicated=q_replicated)
        for (layout, mask), q_replicated in itertools.product(
            [("zigzag", "causal"), ("contiguous", "window"), ("striped", "full")], (False, True)
        )
    ]
    cases.append(problem_of(size, "zigzag", "first tokens", length=5000, heads=(8, 8), reproducible=True))
    done = 0
    for problem in cases:
        if strategy.why_not(problem) is None:
            for rank in sorted({0, size // 2, size - 1} if size < 64 else {size // 2}):
                runs_as_declared(strategy, problem, rank)
                done += 1
    assert done or (name in ("ulysses", "hybrid") and size > 8)


LARGE = [
    ("zigzag", "causal", 100_000_000),
    ("contiguous", "window", 100_000_000),
    ("striped", "causal", 200_000),
]


@pytest.mark.parametrize(("layout", "mask", "length"), LARGE)
@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_what_a_hundred_thousand_ranks_send_is_told_in_under_a_second(
    name: str, layout: str, mask: str, length: int
) -> None:
    size = 100_000
    strategy = Hybrid(8) if name == "hybrid" else STRATEGIES[name]()
    heads = (size, size) if name == "ulysses" else (64, 8)
    problem = problem_of(size, layout, mask, length=length, heads=heads)
    start = time.thread_time()  # the machine is shared
    assert strategy.why_not(problem) is None
    assert strategy.traffic(problem, 7).sent_bytes > 0
    seconds = time.thread_time() - start
    assert strategy.traffic_backward(problem, 7).sent_bytes > 0
    assert strategy.memory_bytes(problem, 7) > 0
    assert seconds < 1.0, (name, seconds)


@pytest.mark.parametrize("name", sorted(COLLECTIVES))
def test_what_a_collective_of_a_hundred_thousand_ranks_sends(name: str) -> None:
    size = 100_000
    ranks = Ranks(777, size, tuple(f"host {rank // 8}" for rank in range(size)))
    start = time.perf_counter()
    assert as_collective(name).traffic(ranks, 4096, 516).sent_bytes > 0
    assert time.perf_counter() - start < 1.0


# Blocks with several holders, of which one computes.

HOLDERS = {2: [[0], [0, 1], [1, 0]], 3: [[0, 1], [1, 2], [1, 0], [2, 1]]}  # the owner first; a rank owns two


def held_by_several(comm: Communicator, quantize: str | None, reproducible: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, heads, 1300, 16, generator=generator) for heads in (4, 2, 2))
    outs = []
    for holders in (None, HOLDERS[comm.size]):
        cache = KVCache(layers=1, kv_heads=2, head_dim=16, comm=comm, quantize=quantize, reproducible=reproducible)
        if holders is not None:
            cache._store.owners = Owners(comm.size, 256 if reproducible else 1, holders)
        cache.append(0, k[:, :, :1100], v[:, :, :1100])
        for step in range(1100, 1300, 40):
            cache.append(0, k[:, :, step : step + 40], v[:, :, step : step + 40])
        outs.append(cache.attend(0, q[:, :, -3:], window=(700, 0)))
        held = sum(map(int, comm.all_gather(torch.tensor([cache.bytes_held]))))
        assert held >= (1 if holders is None else 1.4) * k.nbytes * (2 if quantize is None else 0.5)
    if quantize is None:
        seen = dense.visible(1300, 1300, 2, causal=True, window=(700, 0))
        expected = dense.attention(q.double(), k.double(), v.double(), seen)[0][:, :, -3:]
        for out in outs:
            assert_close(out, expected, STATE[torch.float32])
    return outs


@pytest.mark.parametrize("size", HOLDERS)
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_block_that_two_ranks_hold_and_one_computes(size: int, quantize: str | None) -> None:
    for plain, several in launch(held_by_several, size, "threads", (quantize, False)):
        assert_close(several, plain.double(), 1e-5)


@pytest.mark.parametrize("size", HOLDERS)
def test_the_same_bits_whoever_else_holds_a_block(size: int) -> None:
    digests = {
        tuple(x.flatten().tolist())
        for outs in launch(held_by_several, size, "threads", (None, True))
        for x in outs
    }
    assert len(digests) == 1


# A block that is read from a file when it is asked for.


class OfFile(Block):
    """Keys and values in two .npy files."""

    kind = "file"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reads = 0

    def _mapped(self) -> Dense:
        return Dense(*(torch.from_numpy(np.load(self.folder / f"{name}.npy", mmap_mode="c")) for name in "kv"))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self._mapped().tensors

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self._mapped().shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def keys(self, some: Subset) -> Dense:
        return self._mapped().keys(some)

    def heads(self, some: slice) -> Dense:
        return self._mapped().heads(some)

    def dense(self, dtype: torch.dtype) -> Dense:
        self.reads += 1
        return Dense(*(torch.from_numpy(np.load(self.folder / f"{name}.npy")).to(dtype) for name in "kv"))


def from_files(comm: Communicator, folder: Path, strategy: str) -> None:
    generator = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(1, heads, 90, 8, generator=generator) for heads in (4, 2, 2))
    own = [shardsum.shard(x, comm=comm, layout="zigzag") for x in (q, k, v)]
    place = folder / str(comm.rank)
    place.mkdir(exist_ok=True)
    for name, x in zip("kv", own[1:], strict=True):
        np.save(place / f"{name}.npy", x.numpy())
    arguments = Arguments(layout="zigzag", strategy=strategy, causal=True)
    block = OfFile(place)
    call = PreparedCall(comm, Sizes.of(*own), (own[0],), arguments, kind=block.kind)
    out = call.attend(own[0], [PlacedBlock(block)], "attention over files").out
    expected = dense.attention(*(x.double() for x in (q, k, v)), dense.visible(90, 90, 1, causal=True))[0]
    assert_close(out, shardsum.shard(expected, comm=comm, layout="zigzag"), STATE[torch.float32])
    assert block.reads > 0


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_a_block_that_is_read_from_a_file(strategy: str, tmp_path: Path) -> None:
    launch(from_files, 3, "threads", (tmp_path, strategy))

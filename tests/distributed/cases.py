"""The problems that every strategy must get right, and the check that every rank runs on them."""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import shardsum
from shardsum import Layout
from shardsum.comm import Communicator, Traffic
from shardsum.kernels import available
from shardsum.strategies import STRATEGIES, Call, Observed, Strategy, Ulysses

from .. import dense
from ..tolerances import STATE, assert_close

MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (4, 2)},
    "causal window": {"causal": True, "window": (6, None)},
    "key range": {"causal": True, "key_range": ([3, 0], [19, 11])},
    "documents": {"causal": True, "cu_seqlens": "some"},
    "document windows": {"window": (2, 1), "cu_seqlens": "some"},
    "earlier queries": {"causal": True, "q_start": [2, -3]},
    "first tokens": {"causal": True, "window": (4, None), "sink_tokens": 3, "key_range": ([2, 0], [19, 15])},
    "prefix": {"causal": True, "window": (5, 1), "prefix": [4, 9]},
}


@dataclass(frozen=True)
class Case:
    """One problem: global sizes, mask, layout. Sizes are distinct primes where they can be."""

    mask: str
    layout: str
    q_len: int = 13
    kv_len: int = 19
    q_heads: int = 6
    kv_heads: int = 2
    head_dim: int = 5
    v_dim: int = 7
    dtype: torch.dtype = torch.float32
    scores: float = 1.0  # about the size of the largest
    nan_key: int | None = None

    def options(self) -> dict[str, Any]:
        options = dict(MASKS[self.mask])
        if "cu_seqlens" in options:
            options["cu_seqlens"] = [0, 2, 2, self.q_len // 2, self.q_len]
            options["cu_seqlens_k"] = [0, 1, 4, self.kv_len // 2, self.kv_len]
        return options

    @functools.cache  # noqa: B019 (every rank and strategy asks)
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))

        def normal(*shape: int) -> Tensor:
            return torch.randn(2, *shape, generator=generator, dtype=torch.float64)

        q = normal(self.q_heads, self.q_len, self.head_dim) * self.scores
        k, v = normal(self.kv_heads, self.kv_len, self.head_dim), normal(self.kv_heads, self.kv_len, self.v_dim)
        if self.nan_key is not None:
            k[:, :, self.nan_key], v[:, :, self.nan_key] = torch.nan, torch.inf
        return q.to(self.dtype), k.to(self.dtype), v.to(self.dtype)

    @functools.cache  # noqa: B019
    def expected(self) -> tuple[Tensor, Tensor]:
        q, k, v = self.tensors()
        return dense.attention(q, k, v, dense.visible(self.q_len, self.kv_len, 2, **self.options()))


def recorded(strategy: Strategy) -> Strategy:
    """The strategy, its declared traffic held against what the communicator counts, in both directions."""

    def note(call: Call, direction: str, declared: Traffic, counted: Traffic) -> None:
        assert counted == declared, (strategy.name, call.comm.rank, direction, declared)

    return Observed(strategy, note)


def layout_of(name: str, size: int) -> Layout:
    """ "weighted" gives shares of 3, 0, 2, 3, ...: one rank of three or more holds nothing."""
    return Layout.weighted([[3, 0, 2][rank % 3] for rank in range(size)]) if name == "weighted" else Layout(name)


def ragged(length: int, rank: int, size: int) -> tuple[int, int]:
    """Contiguous shards of lengths that no rule gives: the first and, of three, the middle one empty."""
    edges = [0, 0, *[(length * (r * r + 1)) // (size * size) for r in range(2, size)], length]
    return (0, length) if size == 1 else (edges[rank], edges[rank + 1])


def run_case(comm: Communicator, case: Case, strategy: str | Strategy, kernel: str, q_replicated: bool) -> None:
    """Run the case on this rank and compare out and lse with the float64 definition."""
    q, k, v = case.tensors()
    out, lse = case.expected()
    layout = "contiguous" if case.layout == "ragged" else layout_of(case.layout, comm.size)

    def own(x: Tensor) -> Tensor:
        if case.layout == "ragged":
            start, end = ragged(x.shape[2], comm.rank, comm.size)
            return x[:, :, start:end]
        return shardsum.shard(x, comm=comm, layout=layout)

    before = comm.traffic.snapshot()
    state = shardsum.attention(
        q if q_replicated else own(q),
        own(k),
        own(v),
        comm=comm,
        layout=layout,
        strategy=strategy,
        kernel=kernel,
        q_replicated=q_replicated,
        return_state=True,
        **case.options(),
    )
    assert (comm.traffic - before).sent_bytes >= 64 * (comm.size - 1)
    expected_out, expected_lse = (out, lse) if q_replicated else (own(out), own(lse.unsqueeze(-1)).squeeze(-1))
    # Scores of 80 are uncertain by 80 * 2^-24 = 5e-6, and so are weights, relatively.
    tolerance = STATE[case.dtype] * (1 if case.scores < 10 or case.dtype == torch.float64 else 10)
    what = f"{case} {strategy} {kernel} replicated={q_replicated} rank {comm.rank} of {comm.size}"
    assert_close(state.out, expected_out, tolerance, f"out of {what}")
    assert_close(state.lse, expected_lse, tolerance, f"lse of {what}")


LAYOUTS = ("contiguous", "zigzag", "striped", "weighted", "ragged")


# Replicated queries have nowhere to travel.
AS_ALL_REDUCE = ("pass_q", "ulysses", "hybrid")


def matrix() -> Iterator[tuple[Case, str, str, bool]]:
    """Every kernel x strategy x layout x mask, for sharded and for replicated queries."""
    for mask, layout, strategy, kernel in itertools.product(MASKS, LAYOUTS, STRATEGIES, available()):
        yield Case(mask, layout), strategy, kernel, False
        if strategy not in AS_ALL_REDUCE:
            yield Case(mask, layout), strategy, kernel, True


def sample() -> Iterator[tuple[Case, str, str, bool]]:
    """Of the matrix every strategy x layout x mask, and every kernel with each of these."""
    kernels = itertools.cycle([*available(), "native" if "native" in available() else "aten"])
    for mask, layout, strategy in itertools.product(MASKS, LAYOUTS, STRATEGIES):
        yield Case(mask, layout), strategy, next(kernels), False
        if strategy not in AS_ALL_REDUCE:
            yield Case(mask, layout), strategy, next(kernels), True


def corners() -> Iterator[tuple[Case, str, str, bool]]:
    """What breaks implementations: each corner under every strategy."""
    cases = [
        Case("causal", "zigzag", q_len=1, kv_len=23),
        Case("causal", "contiguous", q_len=3, kv_len=2),  # more ranks than keys, a row that sees nothing
        Case("full", "striped", q_len=2, kv_len=0),
        Case("causal", "striped", q_len=0, kv_len=5),
        Case("full", "zigzag", head_dim=1, v_dim=1, q_heads=3, kv_heads=1),
        Case("causal", "zigzag", head_dim=8, v_dim=3, q_heads=4, kv_heads=4),
        Case("causal", "zigzag", scores=30.0),
        Case("causal window", "striped", scores=30.0, dtype=torch.float64),
        Case("documents", "zigzag", dtype=torch.float64),
        Case("causal", "contiguous", dtype=torch.bfloat16, q_len=70, kv_len=301),
        Case("key range", "weighted", dtype=torch.float16),
        Case("causal", "zigzag", q_len=300, kv_len=300),
        Case("window", "zigzag", q_len=290, kv_len=701),
        Case("key range", "zigzag", nan_key=1, kv_len=19),  # sequence 0 may not see key 1; sequence 1 may
        Case("causal", "contiguous", nan_key=16),
        Case("documents", "striped", nan_key=2),
    ]
    for case, strategy in itertools.product(cases, STRATEGIES):
        yield case, strategy, "aten", case.q_len == 1


def supported(strategy: str, ranks: int, q_heads: int) -> bool:
    """Whether there is a query head for each rank that wants one."""
    made = STRATEGIES[strategy]()
    return not isinstance(made, Ulysses) or made.ranks_in_group(ranks) <= q_heads


def run_all(comm: Communicator, which: str) -> int:
    """Run all cases of one kind on this rank; the number of them."""
    cases = [
        (case, strategy, kernel, q_replicated)
        for case, strategy, kernel, q_replicated in {"matrix": matrix, "sample": sample, "corners": corners}[
            which
        ]()
        if supported(strategy, comm.size, case.q_heads)
    ]
    for case, strategy, kernel, q_replicated in cases:
        run_case(comm, case, strategy, kernel, q_replicated)
    return len(cases)

"""Ranks that call otherwise than the others: all of them hear the same, soon, and may go on."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import shardsum
from shardsum.comm import Communicator
from shardsum.launching import launch
from shardsum.strategies import STRATEGIES

from .. import dense
from ..tolerances import STATE, assert_close
from .mismatches import KINDS, KV_LEN, Q_LEN, SCALE, Shards, fitted
from .mismatches_elsewhere import OTHERS


def _problem(comm: Communicator) -> tuple[Shards, Tensor]:
    generator = torch.Generator().manual_seed(5)
    q, k, v = (
        torch.randn(2, *shape, generator=generator) for shape in ((6, Q_LEN, 5), (2, KV_LEN, 5), (2, KV_LEN, 7))
    )
    seen = dense.visible(Q_LEN, KV_LEN, 2, causal=True)
    out, _ = dense.attention(q, k, v, seen, SCALE)
    q, k, v = (shardsum.shard(x, comm=comm) for x in (q, k, v))
    return Shards(comm, q, k, v), shardsum.shard(out, comm=comm)


def run_mismatches(comm: Communicator, strategies: Sequence[str], every: bool) -> list[list[Any]]:
    """[kind, strategy, what it must name, message, seconds] of every mismatch; after each, a call must be right.

    The rank that differs is another one each time. Every kind is tried with every strategy, or with one in turn.
    """
    found: list[list[Any]] = []
    shards, expected = _problem(comm)
    tries: list[tuple[str, str, str, Callable[[Shards, bool], None]]] = []
    for number, (name, kind) in enumerate(KINDS.items()):
        tries += [
            (name, strategy, kind.named, fitted(kind, shards, strategy, comm.size).run)
            for strategy in (strategies if every else [strategies[number % len(strategies)]])
        ]
    tries += [(name, strategies[0], named, run) for name, (run, named) in OTHERS.items()]
    for number, (name, strategy, named, run) in enumerate(tries):
        options = {"causal": True, "scale": SCALE, "strategy": strategy, "kernel": "aten"}
        spoilt = Shards(comm, shards.q.clone(), shards.k, shards.v, dict(options))
        start = time.monotonic()
        with pytest.raises(shardsum.Mismatch, match=r".") as caught:
            run(spoilt, comm.rank == number % comm.size)
        found.append([name, strategy, named, str(caught.value), time.monotonic() - start])
        right = Shards(comm, shards.q, shards.k, shards.v, dict(options))
        assert_close(right.attend(), expected, STATE[torch.float32], f"the call after {name}, {strategy}")
    return found


@functools.cache
def _found(transport: str, ranks: int, every: bool) -> list[list[list[Any]]]:
    return launch(run_mismatches, ranks, transport, (sorted(STRATEGIES), every), deadline=20.0)


def _check(transport: str, ranks: int, every: bool, name: str) -> None:
    by_rank = [[entry for entry in found if entry[0] == name] for found in _found(transport, ranks, every)]
    assert len(by_rank[0]) == (len(STRATEGIES) if every and name in KINDS else 1)
    for tries in zip(*by_rank, strict=True):
        _, strategy, named, message, _ = tries[0]
        assert {entry[3] for entry in tries} == {message}, f"not the same on every rank, {strategy}"
        assert named in message
        assert "rank" in message


@pytest.mark.parametrize("name", [*KINDS, *OTHERS])
def test_every_strategy_in_threads(name: str) -> None:
    _check("threads", 3, True, name)


@pytest.mark.parametrize("name", [*KINDS, *OTHERS])
@pytest.mark.parametrize("transport", ["gloo", "mpi"])
def test_every_kind_in_processes(transport: str, name: str) -> None:
    _check(transport, 2, False, name)


@pytest.mark.nightly
@pytest.mark.parametrize("name", [*KINDS, *OTHERS])
@pytest.mark.parametrize("transport", ["gloo", "mpi"])
def test_every_kind_and_strategy_in_processes(transport: str, name: str) -> None:
    _check(transport, 3, True, name)


@pytest.mark.parametrize(
    ("transport", "ranks", "every"), [("threads", 3, True), ("gloo", 2, False), ("mpi", 2, False)]
)
def test_ranks_hear_within_two_seconds(transport: str, ranks: int, every: bool) -> None:
    """But for the one kind in ten that other work on the cores may hold up; all did before the deadline."""
    for found in _found(transport, ranks, transport == "threads"):
        seconds = sorted(entry[4] for entry in found)
        assert seconds[-1 - len(seconds) // 10] < 2.0

"""Every collective on 1 to 9 ranks: values against float64, the same bits, and its declared cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import shardsum
from shardsum import AttentionState, Mismatch, Unsupported, launch, packed
from shardsum.collectives import (
    COLLECTIVES,
    MAXIMUM,
    MERGE,
    SUM,
    Auto,
    Collective,
    KaryExchange,
    TwoLevel,
    all_reduce_states,
    as_collective,
    least_bytes,
    least_messages,
    least_rounds,
    reduce_over_ranks,
)
from shardsum.comm import Communicator, Ranks, Traffic, subgroup
from shardsum.comm.threads import Hub, ThreadTransport
from shardsum.packed import pack, unpack

from ..tolerances import assert_close

V_DIM = 5
SIZES = range(1, 10)


def three_nodes(size: int) -> list[str]:
    """Uneven, and not of neighbouring ranks."""
    return ["abcab"[rank * rank % 5] for rank in range(size)]


MADE: dict[str, Callable[[int], Collective]] = {
    **{name: lambda size, name=name: as_collective(name) for name in ("auto", *COLLECTIVES)},
    "k_ary, radix 3": lambda size: KaryExchange(3),
    "k_ary, radix 9": lambda size: KaryExchange(9),
    "two_level of three nodes": lambda size: TwoLevel(three_nodes(size)),
    "two_level, ring between": lambda size: TwoLevel(three_nodes(size), as_collective("ring")),
}


def part(rank: int, rows: int, dtype: torch.dtype = torch.float32) -> AttentionState:
    """Scores up to 80, and rows that see nothing: the first on every rank, others on some."""
    generator = torch.Generator().manual_seed(rank)
    out = torch.randn(rows, V_DIM, generator=generator)
    lse = 80 * (2 * torch.rand(rows, generator=generator) - 1)
    lse[torch.rand(rows, generator=generator) < 0.3] = -math.inf
    lse[:1] = -math.inf
    return AttentionState(out.masked_fill((lse == -math.inf).unsqueeze(1), 0.0).to(dtype), lse.to(dtype))


def union(states: list[AttentionState]) -> AttentionState:
    """By the definition, in float64."""
    lse = torch.stack([state.lse.double() for state in states])
    total = lse.logsumexp(dim=0)
    weights = (lse - total.masked_fill(total == -math.inf, 0.0)).exp().unsqueeze(-1)
    return AttentionState((weights * torch.stack([s.out.double() for s in states])).sum(dim=0), total)


def check_states(name: str, size: int, rows: int, dtype: torch.dtype) -> None:
    def run(comm: Communicator) -> AttentionState:
        return all_reduce_states(comm, part(comm.rank, rows, dtype), MADE[name](size))

    expected = union([part(rank, rows, dtype) for rank in range(size)])
    results = launch(run, ranks=size, transport="threads", deadline=20)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6 if rows else 0.0
    for found in results:
        assert found.out.dtype == dtype
        # Scores of 80 are uncertain by 80 * 2^-24 = 5e-6, and so are weights, relatively.
        assert_close(found.out, expected.out, 10 * tolerance, "out")
        assert_close(found.lse, expected.lse, tolerance, "lse")
        assert torch.equal(found.lse == -math.inf, expected.lse == -math.inf)
        assert torch.equal(found.out, results[0].out)
        assert torch.equal(found.lse, results[0].lse)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MADE)
def test_states_on_every_rank_are_the_union_bit_for_bit(name: str, size: int) -> None:
    for rows in (0, 1, 7, 24):
        check_states(name, size, rows, torch.float32)
    check_states(name, size, 11, torch.float64)


@pytest.mark.parametrize("name", MADE)
def test_states_without_the_native_merge(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "native_module", lambda: None)
    check_states(name, 5, 7, torch.float32)


@pytest.mark.parametrize("name", MADE)
def test_groups_of_ranks_reduce_among_themselves(name: str) -> None:
    """Rows, columns and all of four ranks, states of one shape after another."""

    def members(rank: int) -> list[list[int]]:
        row, column = divmod(rank, 2)
        return [[2 * row, 2 * row + 1], [column, column + 2], [0, 1, 2, 3]]

    def run(comm: Communicator) -> list[AttentionState]:
        groups = [subgroup(comm, some) for some in members(comm.rank)]
        states = [all_reduce_states(group, part(comm.rank, 7), MADE[name](group.size)) for group in groups * 2]
        return states[3:]

    for rank, states in enumerate(launch(run, ranks=4, transport="threads", deadline=20)):
        for some, found in zip(members(rank), states, strict=True):
            expected = union([part(other, 7) for other in some])
            assert_close(found.out, expected.out, 2e-5, "out")
            assert_close(found.lse, expected.lse, 2e-6, "lse")


@pytest.mark.parametrize("name", MADE)
def test_large_states_and_sums_of_every_rank(name: str) -> None:
    """Large enough that "auto" cuts the rows."""
    check_states(name, 4, 20_011, torch.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MADE)
def test_sums_and_maxima(name: str, size: int) -> None:
    def values(rank: int) -> Tensor:
        return torch.randn(3, 7, generator=torch.Generator().manual_seed(rank)).t()

    def run(comm: Communicator) -> list[Tensor]:
        own = values(comm.rank)
        collective = MADE[name](size)
        found = [reduce_over_ranks(comm, own, collective, operation) for operation in (SUM, MAXIMUM)]
        whole = reduce_over_ranks(comm, torch.arange(3) + 2**40 * comm.rank, collective)
        assert torch.equal(own, values(comm.rank)), "the part itself must stay"
        return [*found, whole]

    every = torch.stack([values(rank) for rank in range(size)]).double()
    results = launch(run, ranks=size, transport="threads", deadline=20)
    for total, largest, whole in results:
        assert_close(total, every.sum(dim=0), 1e-6, "sum")
        assert torch.equal(total, results[0][0])
        assert torch.equal(largest.double(), every.amax(dim=0))
        assert whole.tolist() == [size * i + 2**40 * (size * (size - 1) // 2) for i in range(3)]


class Clocked(ThreadTransport):
    """Counts the longest chain of rounds: each message carries the sender's time. Source: Lamport 1978."""

    def __init__(self, hub: Hub, clocks: Hub, rank: int) -> None:
        super().__init__(hub, rank, 20)
        self._clocks, self.clock = clocks, 0

    def exchange(self, send: Tensor, to: int, receive: Tensor, source: int) -> Callable[[], None]:
        before, wait = self.clock, super().exchange(send, to, receive, source)
        if send.nbytes:
            self._clocks.put(self.rank, to, torch.tensor(before))

        def finish() -> None:
            wait()
            arrived = int(self._clocks.get(source, self.rank, 20)) if receive.nbytes else 0
            if send.nbytes or receive.nbytes:
                self.clock = max(self.clock, before + 1, arrived + 1)

        return finish

    def all_gather(self, send: Tensor, receive: Tensor, sizes: list[int]) -> None:
        super().all_gather(send, receive, sizes)
        self.clock += send.dtype != torch.uint8  # not for the names of hosts


def costs(name: str, size: int, rows: int) -> tuple[list[Traffic], list[Traffic], int, int, int]:
    """Declared and counted traffic of every rank, longest chain, declared rounds, messages at once."""
    hub, clocks, row_bytes = Hub(size), Hub(size), 4 * (V_DIM + 1)

    def run(comm: Communicator) -> tuple[Traffic, Traffic, int, int, int]:
        clock = Clocked(hub, clocks, comm.rank)
        clocked = Communicator(clock)
        collective = MADE[name](size)
        collective.all_reduce(clocked, torch.ones(rows, V_DIM + 1), SUM)
        ranks = collective.ranks(clocked)
        at_once = collective.messages_at_once(ranks)
        declared = collective.traffic(ranks, rows, row_bytes)
        return declared, clocked.traffic, clock.clock, collective.rounds(ranks, rows, row_bytes), at_once

    found = launch(run, ranks=size, transport="threads", deadline=20)
    declared, counted, chain, rounds, at_once = zip(*found, strict=True)
    assert len(set(rounds)) == len(set(at_once)) == 1, "every rank must declare the same"
    return list(declared), list(counted), max(chain), rounds[0], at_once[0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MADE)
def test_declared_counted_and_least_cost(name: str, size: int) -> None:
    for rows in (0, 1, 4, 9, 24):
        declared, counted, chain, rounds, at_once = costs(name, size, rows)
        assert declared == counted
        total = sum(declared, Traffic())
        if rows == 0:
            assert total == Traffic()
            continue
        assert total.sent_bytes >= least_bytes(size, rows * 4 * (V_DIM + 1))
        assert total.messages >= least_messages(size)
        assert chain >= least_rounds(size, at_once)
        if rows >= size:
            assert chain == rounds
        else:
            assert chain <= rounds


def test_what_reaches_the_bounds() -> None:
    for size in SIZES[1:]:
        bound = least_bytes(size, 24 * 4 * (V_DIM + 1))
        totals = {name: sum(costs(name, size, 24)[0], Traffic()) for name in ("tree", "ring", "all_gather")}
        assert totals["tree"].sent_bytes == totals["ring"].sent_bytes == bound
        assert totals["tree"].messages == least_messages(size)
        assert totals["all_gather"].sent_bytes == bound * size // 2
        assert costs("all_gather", size, 24)[2] == least_rounds(size, size - 1) == 1
        if size in (2, 4, 8):
            assert costs("recursive_doubling", size, 24)[2] == least_rounds(size)
            assert sum(costs("rabenseifner", size, 24)[0], Traffic()).sent_bytes == bound


def test_nan_reaches_every_rank_and_no_other_row() -> None:
    def run(comm: Communicator, name: str) -> AttentionState:
        state = part(comm.rank, 7)
        if comm.rank == 2:
            state.out[3, 1] = math.nan
            state.lse[3] = 0.0
        return all_reduce_states(comm, state, MADE[name](3))

    for name in MADE:
        for found in launch(run, ranks=3, transport="threads", args=(name,), deadline=20):
            assert found.out.isnan().nonzero().tolist() == [[3, 1]]
            assert not found.lse.isnan().any()


def test_native_merge_is_that_of_the_definition() -> None:
    for dtype in (torch.float32, torch.float64):
        a, b = (pack(part(rank, 200, dtype)) for rank in (1, 2))
        into = torch.empty_like(a)
        MERGE.combine(a, b, into)
        swapped = torch.empty_like(a)
        MERGE.combine(b, a, swapped)
        expected = shardsum.merge(unpack(a), unpack(b))
        assert_close(into[:, :-1], expected.out, 1e-6 if dtype == torch.float32 else 1e-14, "out")
        assert_close(into[:, -1], expected.lse, 1e-6 if dtype == torch.float32 else 1e-14, "lse")
        assert torch.equal(into, swapped), "commutative to the bit"
        empty = pack(AttentionState.empty(200, V_DIM, dtype=dtype))
        MERGE.combine(a, empty, into)
        assert torch.equal(into, a)
        a[5, 0] = math.nan
        MERGE.combine(a, b, a)
        assert a.isnan().any(dim=1).nonzero().tolist() == [[5]]


def attended(comm: Communicator, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of attention, of its gradient with respect to replicated queries, and of a cache."""
    collective = MADE[name](comm.size)
    q, k, v = (torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    k_own, v_own = (shardsum.shard(x, comm=comm) for x in (k, v))
    q.requires_grad_()
    out = shardsum.attention(q, k_own, v_own, comm=comm, q_replicated=True, collective=collective)
    (d_q,) = torch.autograd.grad(out, q, torch.ones_like(out))
    cache = shardsum.KVCache(comm=comm, layers=1, kv_heads=4, head_dim=8)
    cache.append(0, k, v)
    cached = cache.attend(0, q.detach(), causal=False, collective=collective)
    return out.detach(), d_q, cached


@pytest.mark.parametrize("name", MADE)
def test_attention_and_cache_by_every_collective(name: str) -> None:
    q, k, v = (torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(i)).double() for i in range(3))
    q.requires_grad_()
    expected = (q @ k.transpose(2, 3) / math.sqrt(8)).softmax(dim=3) @ v
    (d_q,) = torch.autograd.grad(expected, q, torch.ones_like(expected))
    results = launch(attended, ranks=3, transport="threads", args=(name,), deadline=20)
    for out, found_d_q, cached in results:
        assert_close(out, expected.detach(), 2e-6, "out")
        assert_close(cached, expected.detach(), 2e-6, "cache")
        assert_close(found_d_q, d_q, 1e-5, "dq")
        assert torch.equal(out, results[0][0])
        assert torch.equal(found_d_q, results[0][1])


def states_over_processes(comm: Communicator) -> list[AttentionState]:
    return [all_reduce_states(comm, part(comm.rank, 24), made(comm.size)) for made in MADE.values()]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("transport", ["gloo", "mpi"])
def test_over_processes(transport: str, size: int) -> None:
    expected = union([part(rank, 24) for rank in range(size)])
    results = launch(states_over_processes, ranks=size, transport=transport, deadline=60)
    for found in results:
        for state, first in zip(found, results[0], strict=True):
            assert_close(state.out, expected.out, 2e-5, transport)
            assert torch.equal(state.out, first.out)
            assert torch.equal(state.lse, first.lse)


def test_ranks_that_name_different_collectives_are_told_so() -> None:
    def run(comm: Communicator) -> None:
        x = torch.ones(1, 1, 2, 2)
        shardsum.attention(x, x, x, comm=comm, q_replicated=True, collective=["tree", "ring"][comm.rank])

    with pytest.raises(Mismatch, match='collective must be the same on every rank: got "tree" on rank 0, "ring"'):
        launch(run, ranks=2, transport="threads")


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(Unsupported, match="collective must be auto, all_gather, recursive_doubling"):
        as_collective("butterfly")
    with pytest.raises(ValueError, match="radix must be 2 or more: got 1"):
        KaryExchange(1)
    with pytest.raises(ValueError, match="must not be two_level itself"):
        TwoLevel(between=TwoLevel())
    with pytest.raises(ValueError, match="the node of each of 2 ranks: got 3 nodes"):
        TwoLevel("aab").traffic(Ranks(0, 2), 1, 4)
    with pytest.raises(ValueError, match="needs the host of each rank"):
        TwoLevel().traffic(Ranks(0, 2), 1, 4)


@pytest.mark.parametrize("name", MADE)
def test_what_100_000_ranks_cost_is_known_at_once(name: str) -> None:
    size, rows, row_bytes = 100_000, 4096, 4 * (V_DIM + 1)
    hosts = tuple(f"host {rank // 8}" for rank in range(size))
    collective = MADE[name](size)
    start = time.perf_counter()
    for rank in (0, 1, 7, 34_463, size - 1):
        ranks = Ranks(rank, size, hosts)
        sent = collective.traffic(ranks, rows, row_bytes)
        assert sent.sent_bytes >= rows * row_bytes * (size - 1) // size
        assert collective.rounds(ranks, rows, row_bytes) >= least_rounds(size, collective.messages_at_once(ranks))
    assert time.perf_counter() - start < 1.0, "far more than it takes, on however busy a machine"


def test_hosts_are_asked_for_once_and_are_no_traffic() -> None:
    def run(comm: Communicator) -> tuple[str, ...]:
        assert comm.hosts() is comm.hosts()
        assert comm.traffic == Traffic()
        return comm.hosts()

    for names in launch(run, ranks=3, transport="threads"):
        assert len(set(names)) == 1
        assert names[0]


def test_auto_looks_at_bytes_and_ranks() -> None:
    assert Auto().of(2, 16512).name == Auto().of(2, 1 << 20).name == Auto().of(4, 1 << 18).name == "all_gather"
    assert Auto().of(8, 16512).name == "recursive_doubling"
    assert Auto().of(2, 1 << 26).name == Auto().of(4, 1 << 20).name == Auto().of(8, 1 << 26).name == "rabenseifner"


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", MADE)
def test_what_calls_in_inference_mode_leave_behind(
    name: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(packed, "native_module", lambda: None)
    q, k, v = (torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))

    def run(comm: Communicator) -> Tensor:
        cache = shardsum.KVCache(comm=comm, layers=1, kv_heads=4, head_dim=8)

        def step() -> Tensor:
            cache.append(0, k, v)
            found: Tensor = cache.attend(0, q, causal=False, collective=MADE[name](comm.size))
            return found

        with torch.inference_mode():
            step()
        attended(comm, name)  # with gradients
        return step()

    expected = (q.double() @ k.double().mT / math.sqrt(8)).softmax(dim=3) @ v.double()
    for found in launch(run, ranks=3, transport="threads", deadline=20):
        assert_close(found, expected, 2e-6, "out")

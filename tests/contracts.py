"""One suite per interface, run on every implementation: what a communicator must do, whatever carries it."""

from __future__ import annotations

import contextlib
import functools
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from shardsum import AttentionState, merge
from shardsum.collectives import COLLECTIVES, Collective, as_collective
from shardsum.comm import Communicator, agree, mistakes_reach_all
from shardsum.comm.group import GroupTransport
from shardsum.comm.memory import (
    BUFFERS,
    PREPARED,
    PREPARED_BYTES,
    PREPARED_BYTES_IN_ALL,
    FreshBuffers,
    KeptBuffers,
    PreparedOperations,
)
from shardsum.errors import Mismatch

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def _from(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What this rank sends: known to every other, and other values on every rank."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(17 + rank))
    return (4 * numbers).to(dtype)


def _same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.equal(found.contiguous().reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def check_all_gather_even(comm: Communicator) -> None:
    for rank, part in enumerate(comm.all_gather(_from(comm.rank, 3, 5))):
        _same(part, _from(rank, 3, 5))


def check_all_gather_uneven(comm: Communicator) -> None:
    shapes = [(2 * rank + 1, 3) for rank in range(comm.size)]
    for rank, part in enumerate(comm.all_gather(_from(comm.rank, *shapes[comm.rank]), shapes)):
        _same(part, _from(rank, *shapes[rank]))


def check_all_gather_where_some_are_empty(comm: Communicator) -> None:
    for empty in range(comm.size):
        shapes = [(0, 3) if rank == empty else (2, 3) for rank in range(comm.size)]
        for rank, part in enumerate(comm.all_gather(_from(comm.rank, *shapes[comm.rank]), shapes)):
            _same(part, _from(rank, *shapes[rank]))


def check_all_gather_where_all_are_empty(comm: Communicator) -> None:
    assert [part.shape for part in comm.all_gather(torch.empty(0, 7))] == [(0, 7)] * comm.size


def check_all_gather_of_numbers(comm: Communicator) -> None:
    for rank, part in enumerate(comm.all_gather(_from(comm.rank))):
        _same(part, _from(rank))


def check_all_gather_again_and_again(comm: Communicator) -> None:
    for length in (3, 0, 5):  # what is made later outlives what is dropped
        pieces = torch.empty(comm.size, length)
        gather = comm.prepare_all_gather(pieces)
        before = comm.traffic.snapshot()
        for number in range(3):
            pieces[comm.rank] = 10 * number + comm.rank
            gather()
            ranks = torch.arange(comm.size) + 10.0 * number
            _same(pieces, ranks.unsqueeze(1).repeat(1, length))
            comm.barrier()  # before others' parts change
        sent = comm.traffic - before
        others = comm.size - 1
        assert (sent.sent_bytes, sent.messages) == (3 * (4 * length + 1) * others, 6 * others)


def check_messages_that_go_one_way(comm: Communicator) -> None:
    if comm.size == 1:
        return
    first, last = 0, comm.size - 1
    before = comm.traffic.snapshot()
    into = torch.zeros(4, 3)
    if comm.rank == first:
        comm.send(_from(first, 4, 3), last)
    elif comm.rank == last:
        comm.receive(into, first)
        _same(into, _from(first, 4, 3))
    sent = comm.traffic - before
    assert (sent.sent_bytes, sent.messages, sent.rounds) == ((48, 1, 1) if comm.rank == first else (0, 0, 0))
    comm.barrier()


def check_hosts_are_alike_on_all_ranks(comm: Communicator) -> None:
    before = comm.traffic.snapshot()
    hosts = comm.hosts()
    assert comm.ranks.hosts is comm.hosts() is hosts
    assert comm.traffic == before
    for part in comm.all_gather(torch.tensor([len(name) for name in hosts])):
        assert part.tolist() == [len(name) for name in hosts]


# Fast paths, each beside the plain way: equal results on every rank, to the bit, and equal traffic.

_ROWS = [*range(1, BUFFERS + 4), 1, 2]  # more shapes than buffers are kept, and two of them again


def _state_of(rank: int, rows: int) -> AttentionState:
    return AttentionState(_from(rank, 1, 1, rows, 5), _from(rank, 1, 1, rows))


def _reduced(
    comm: Communicator, reduce: Callable[[Communicator, AttentionState], None], rows: int
) -> tuple[Tensor, Tensor, object]:
    """The merged state, and what this rank has sent for it."""
    state, before = _state_of(comm.rank, rows), comm.traffic.snapshot()
    if comm.size > 1:
        reduce(comm, state)
    return state.out, state.lse, comm.traffic - before


def _alike(fast: tuple[Tensor, Tensor, object], plain: tuple[Tensor, Tensor, object]) -> None:
    for found, expected in zip(fast[:2], plain[:2], strict=True):
        _same(found, expected)
    assert fast[2] == plain[2]


@contextlib.contextmanager
def _plainly(
    comm: Communicator, *, buffers: FreshBuffers | None = None, prepared: PreparedOperations | None = None
) -> Iterator[None]:
    """In the block the communicator keeps buffers, or prepares operations, in this way."""
    before = comm.buffers, comm.prepared
    comm.buffers, comm.prepared = buffers or comm.buffers, prepared or comm.prepared
    try:
        yield
    finally:
        comm.buffers, comm.prepared = before


def check_kept_buffers_are_as_fresh_ones(comm: Communicator) -> None:
    for name in COLLECTIVES:
        reduce, kept = as_collective(name).all_reduce_state, KeptBuffers()
        for rows in _ROWS:
            with _plainly(comm, buffers=kept, prepared=PreparedOperations(most=0)):
                fast = _reduced(comm, reduce, rows)
            with _plainly(comm, buffers=FreshBuffers(), prepared=PreparedOperations(most=0)):
                _alike(fast, _reduced(comm, reduce, rows))


def check_prepared_states_are_as_unprepared_ones(comm: Communicator) -> None:
    collective = as_collective("all_gather")
    plain = functools.partial(Collective.all_reduce_state, collective)
    with _plainly(comm, prepared=PreparedOperations(most=3)):  # the later shapes find no place
        for rows in _ROWS:
            fast = _reduced(comm, collective.all_reduce_state, rows)
            _alike(fast, _reduced(comm, plain, rows))
            expected = functools.reduce(merge, [_state_of(rank, rows) for rank in range(comm.size)])
            torch.testing.assert_close(fast[0], expected.out)
            torch.testing.assert_close(fast[1], expected.lse)


def check_prepared_operations_beyond_their_bound(comm: Communicator) -> None:
    made: list[int] = []
    operations = PreparedOperations()
    for key in range(PREPARED + 3):
        operations.get(key, 1, lambda key=key: made.append(key) or key + 1)
    assert made == list(range(PREPARED))
    assert operations.get(PREPARED, 1, lambda: 0) is None
    assert operations.get("large", PREPARED_BYTES + 1, lambda: 0) is None
    assert operations.get(0, 1, lambda: 0) == 1, "what was made stays"
    full, places = PreparedOperations(), PREPARED_BYTES_IN_ALL // PREPARED_BYTES
    assert all(full.get(key, PREPARED_BYTES, lambda: 1) for key in range(places))
    assert full.get(places, 1, lambda: 1) is None
    collective = as_collective("all_gather")
    with _plainly(comm, prepared=operations):  # there is no place left: agreement and states go the plain way
        assert agree(comm, {"causal": True}, comm.rank) == [(rank, 0) for rank in range(comm.size)]
        unprepared = _reduced(comm, collective.all_reduce_state, 3)
    _alike(_reduced(comm, collective.all_reduce_state, 3), unprepared)


def _agreements(comm: Communicator) -> list[object]:
    """What agreements give, say and send, each on this rank."""
    found: list[object] = []
    for number in range(4):
        before = comm.traffic.snapshot()
        found.append(agree(comm, {"causal": True}, number + comm.rank, 7))
        found.append(comm.traffic - before)
        before = comm.traffic.snapshot()
        if comm.size > 1:
            with pytest.raises(Mismatch) as raised:
                agree(comm, {"rows": [number, comm.rank == 0]}, 1, 1)
            found.append(str(raised.value))
        found.append(comm.traffic - before)
    return found


def check_prepared_frames_are_as_unprepared_ones(comm: Communicator) -> None:
    with _plainly(comm, prepared=PreparedOperations()):
        fast = _agreements(comm)
    with _plainly(comm, prepared=PreparedOperations(most=0)):
        assert _agreements(comm) == fast


def check_every_dtype(comm: Communicator) -> None:
    for dtype in DTYPES:
        for rank, part in enumerate(comm.all_gather(_from(comm.rank, 7, dtype=dtype))):
            _same(part, _from(rank, 7, dtype=dtype))


def check_strided_and_differentiable_parts(comm: Communicator) -> None:
    part = _from(comm.rank, 3, 5).requires_grad_().transpose(0, 1)
    for rank, found in enumerate(comm.all_gather(part)):
        _same(found, _from(rank, 3, 5).transpose(0, 1).contiguous())


def check_large_messages(comm: Communicator) -> None:
    for rank, part in enumerate(comm.all_gather(_from(comm.rank, 300_007))):
        _same(part, _from(rank, 300_007))


def check_all_to_all(comm: Communicator) -> None:
    def part(source: int, to: int) -> Tensor:  # sizes differ, some are 0
        return _from(10 * source + to, (source + 2 * to) % 4, 3)

    parts = [part(comm.rank, to) for to in range(comm.size)]
    shapes = [tuple(part(source, comm.rank).shape) for source in range(comm.size)]
    for source, found in enumerate(comm.all_to_all(parts, shapes)):
        _same(found, part(source, comm.rank))


def check_all_to_all_even(comm: Communicator) -> None:
    parts = [_from(10 * comm.rank + to, 2, 3).bfloat16() for to in range(comm.size)]
    for source, found in enumerate(comm.all_to_all(parts, [(2, 3)] * comm.size)):
        _same(found, _from(10 * source + comm.rank, 2, 3).bfloat16())


def check_exchange_around_a_ring(comm: Communicator) -> None:
    lengths = [3 * rank for rank in range(comm.size)]  # rank 0's part is empty
    held = _from(comm.rank, lengths[comm.rank], 2)
    for step in range(1, comm.size + 1):
        owner = (comm.rank - step) % comm.size
        wait = comm.exchange(held, (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size, (lengths[owner], 2))
        held = wait()
        _same(held, _from(owner, lengths[owner], 2))


def check_two_exchanges_under_way(comm: Communicator) -> None:
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    waits = [comm.exchange(_from(comm.rank + 100 * i, 5 + i), to, source, (5 + i,)) for i in range(2)]
    for i, wait in enumerate(waits):
        _same(wait(), _from(source + 100 * i, 5 + i))


def check_order_under_skew(comm: Communicator) -> None:
    """Ranks that come late, each in turn, change nothing: no message is taken for a later one."""
    for i in range(2 * comm.size):
        if i % comm.size == comm.rank:
            time.sleep(0.01)
        found = comm.all_gather(torch.tensor([comm.rank + 1000 * i]))
        assert [int(part) for part in found] == [rank + 1000 * i for rank in range(comm.size)]


def check_sent_buffers_can_be_reused(comm: Communicator) -> None:
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    part = _from(comm.rank, 1000)
    gathered = comm.all_gather(part)
    part.fill_(-1)
    comm.barrier()
    for rank, found in enumerate(gathered):
        _same(found, _from(rank, 1000))
    parts = [_from(comm.rank, 1000) for _ in range(comm.size)]
    received = comm.all_to_all(parts, [(1000,)] * comm.size)
    for sent in parts:
        sent.fill_(-1)
    comm.barrier()
    for rank, found in enumerate(received):
        _same(found, _from(rank, 1000))
    part = _from(comm.rank, 1000)
    found = comm.exchange(part, to, source, (1000,))()
    part.fill_(-1)
    comm.barrier()
    _same(found, _from(source, 1000))


def check_received_tensors_are_the_callers(comm: Communicator) -> None:
    part = _from(comm.rank, 4)
    for found in comm.all_gather(part):
        found.fill_(-1)
    _same(part, _from(comm.rank, 4))


def check_traffic(comm: Communicator) -> None:
    others = comm.size - 1
    before = comm.traffic.snapshot()
    shapes = [(rank + 1,) for rank in range(comm.size)]
    comm.all_gather(torch.zeros(shapes[comm.rank]), shapes)
    sent = comm.traffic - before
    assert (sent.sent_bytes, sent.messages, sent.rounds) == (4 * (comm.rank + 1) * others, others, others > 0)

    before = comm.traffic.snapshot()
    comm.all_to_all(
        [torch.zeros(to + 1, dtype=torch.bfloat16) for to in range(comm.size)], [(comm.rank + 1,)] * comm.size
    )
    sent = comm.traffic - before
    sent_bytes = sum(2 * (to + 1) for to in range(comm.size) if to != comm.rank)
    assert (sent.sent_bytes, sent.messages, sent.rounds) == (sent_bytes, others, others > 0)

    if others:
        before = comm.traffic.snapshot()
        comm.exchange(torch.zeros(7), (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size, (7,))()
        sent = comm.traffic - before
        assert (sent.sent_bytes, sent.messages, sent.rounds) == (28, 1, 1)


def check_agreement_gives_everyones_lengths(comm: Communicator) -> None:
    lengths = agree(comm, {"operation": "attention", "causal": True}, 3 + comm.rank, 2**39 + comm.rank)
    assert lengths == [(3 + rank, 2**39 + rank) for rank in range(comm.size)]


def check_agreement_names_what_differs_on_every_rank(comm: Communicator) -> None:
    if comm.size == 1:
        return
    odd = comm.size - 1
    with pytest.raises(Mismatch) as raised:
        agree(comm, {"causal": comm.rank == odd, "softcap": 2.0})
    others = ", ".join(str(rank) for rank in range(odd))
    expected = f"causal must be the same on every rank: got false on rank {others}, true on rank {odd}."
    assert str(raised.value) == expected
    assert [int(part) for part in comm.all_gather(torch.tensor(comm.rank))] == list(range(comm.size))


def _make_a_mistake(comm: Communicator, culprit: int) -> None:
    with mistakes_reach_all(comm):
        if comm.rank == culprit:
            raise ValueError("q has 3 heads")
    agree(comm, {"causal": True})


def check_agreement_tells_everyone_of_one_ranks_error(comm: Communicator) -> None:
    culprit = comm.size - 1
    alone, told = "^q has 3 heads$", f"^rank {culprit} could not take part: ValueError: q has 3 heads$"
    with pytest.raises(ValueError, match=alone if comm.size == 1 else told):
        _make_a_mistake(comm, culprit)
    assert agree(comm, {"causal": True}, comm.rank) == [(rank, 0) for rank in range(comm.size)]


def _make_a_mistake_too_late(comm: Communicator) -> None:
    with mistakes_reach_all(comm), mistakes_reach_all(comm):
        agree(comm, {"causal": True})
        raise ValueError("too late")


def check_a_mistake_after_the_agreement_is_the_ranks_own(comm: Communicator) -> None:
    with pytest.raises(ValueError, match="too late"):
        _make_a_mistake_too_late(comm)
    assert agree(comm, {"causal": True}) == [(0, 0)] * comm.size


COMMUNICATOR: dict[str, Callable[[Communicator], None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}


# What holds for one rank alone, without the values that others would send.
OF_ONE_RANK = (
    "all_gather_where_all_are_empty",
    "received_tensors_are_the_callers",
    "traffic",
    "a_mistake_after_the_agreement_is_the_ranks_own",
    "kept_buffers_are_as_fresh_ones",
)


def run_communicator_contracts(comm: Communicator, contracts: Sequence[str] = ()) -> dict[str, str]:
    """The traceback of every check that failed on this rank: a whole suite, by default, in one launch."""
    failed = {}
    for name in contracts or COMMUNICATOR:
        try:
            COMMUNICATOR[name](comm)
        except Exception:  # noqa: BLE001, PERF203 (each is reported by the test of its name)
            failed[name] = traceback.format_exc()
    return failed


def run_communicator_contracts_in_groups(comm: Communicator) -> dict[str, str]:
    """Run the contracts in two groups side by side, one of them a rank alone, and in one group of all ranks."""
    last, *others = reversed(range(comm.size))
    failed = {}
    for name, groups in {"apart": [others, [last]], "turned": [[last, *others]]}.items():
        (members,) = (group for group in groups if comm.rank in group)
        group = Communicator(GroupTransport(comm._transport, members), comm)
        for contract, text in run_communicator_contracts(group).items():
            failed[contract] = f"{name}, ranks {members}: {text}"
        comm.barrier()
    return failed

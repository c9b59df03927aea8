"""Every communicator keeps the one contract."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed import FileStore, HashStore

from shardsum.comm import LAUNCHED, TRANSPORTS, Communicator, SingleTransport
from shardsum.comm.counting import CountingTransport
from shardsum.comm.group import GroupTransport
from shardsum.comm.mpi import MpiTransport
from shardsum.comm.threads import ThreadTransport
from shardsum.comm.torch_distributed import GlooTransport, NcclTransport, transport_over
from shardsum.errors import RankLost
from shardsum.launching import launch

from ..contracts import (
    COMMUNICATOR,
    OF_ONE_RANK,
    run_communicator_contracts,
    run_communicator_contracts_in_groups,
)

ALONE = [name for name, kind in TRANSPORTS.items() if kind is SingleTransport]
# NCCL, which needs a device for each rank, has a stand-in below.
GROUPS = [(transport, ranks) for transport in LAUNCHED for ranks in (1, 2, 3)]


@functools.cache
def _failures(transport: str, ranks: int) -> list[dict[str, str]]:
    if transport in ALONE:
        return [run_communicator_contracts(Communicator(SingleTransport()))]
    return launch(run_communicator_contracts, ranks=ranks, transport=transport, deadline=60.0)


@pytest.mark.parametrize("contract", COMMUNICATOR)
@pytest.mark.parametrize(("transport", "ranks"), [*((name, 1) for name in ALONE), *GROUPS])
def test_contract(transport: str, ranks: int, contract: str) -> None:
    for rank, failures in enumerate(_failures(transport, ranks)):
        assert contract not in failures, f"on rank {rank}:\n{failures[contract]}"


def test_the_contract_is_run_over_every_transport() -> None:
    assert {*LAUNCHED, *ALONE, NcclTransport.name} == set(TRANSPORTS)


@pytest.mark.parametrize("transport", LAUNCHED)
def test_groups_keep_the_contract(transport: str) -> None:
    assert launch(run_communicator_contracts_in_groups, 3, transport, deadline=60.0) == [{}] * 3


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (2, 3)])
def test_one_rank_without_the_others_keeps_what_it_can_of_the_contract(rank: int, size: int) -> None:
    comm = Communicator(CountingTransport(rank, size))
    assert run_communicator_contracts(comm, OF_ONE_RANK) == {}


class OldMpi:
    """An MPI communicator, as mpi4py has it over a library that is older than MPI 4.0."""

    def __init__(self, mpi: Any) -> None:
        self._mpi = mpi

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mpi, name)

    def Allgather_init(self, *_: object) -> None:
        raise NotImplementedError


def keep_the_contract_over_an_old_mpi(comm: Communicator) -> dict[str, str]:
    transport = MpiTransport()
    transport._mpi = OldMpi(transport._mpi)
    return run_communicator_contracts(Communicator(transport))


def test_an_mpi_without_persistent_collectives_keeps_the_contract() -> None:
    assert launch(keep_the_contract_over_an_old_mpi, 2, "mpi", deadline=60.0) == [{}] * 2


def give_up_while_a_gather_is_under_way(comm: Communicator) -> str:
    transport = MpiTransport()
    gather = Communicator(transport).prepare_all_gather(torch.zeros(comm.size, 3))
    gather()
    with mock.patch.object(transport, "wait", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        gather()
    with pytest.raises(RankLost) as raised:
        gather()
    return str(raised.value)


def test_a_gather_that_was_given_up_is_not_started_again() -> None:
    for rank, message in enumerate(launch(give_up_while_a_gather_is_under_way, 2, "mpi", deadline=60.0)):
        assert f"rank {rank} gave up a gather" in message


@pytest.mark.parametrize("transport", ["threads", "gloo", "mpi"])
def test_a_closed_communicator_says_so(transport: str) -> None:
    launch(close_and_call, 2, transport, deadline=60.0)


def close_and_call(comm: Communicator) -> None:
    gather = comm.prepare_all_gather(torch.zeros(comm.size, 3))
    gather()
    group = Communicator(GroupTransport(comm._transport, [1, 0]), comm)
    comm.close()
    comm.close()
    again = torch.zeros(comm.size, 3)
    for call in (gather, comm.barrier, comm.hosts, group.barrier, lambda: comm.prepare_all_gather(again)):
        with pytest.raises(ValueError, match="closed"):
            call()


class LikeNccl:
    """What NCCL's process group does, as far as it differs from Gloo's, over the queues of threads.

    Messages of one group go together; a message by itself would wait for its peer's, which waits for this one's. A
    wait with a timeout would stop the thread.
    """

    def __init__(self, transport: ThreadTransport) -> None:
        self._transport = transport
        self._sending: list[tuple[int, torch.Tensor]] | None = None
        self._receiving: list[tuple[int, torch.Tensor]] = []

    def _start_coalescing(self) -> None:
        assert self._sending is None
        self._sending, self._receiving = [], []

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> None:
        assert self._sending is not None, "a send by itself"
        assert tensors[0].nbytes
        self._sending.append((peer, tensors[0]))

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> None:
        assert self._sending is not None, "a receive by itself"
        assert tensors[0].nbytes
        self._receiving.append((peer, tensors[0]))

    def _end_coalescing(self) -> LikeNccl:
        assert self._sending is not None
        assert self._sending or self._receiving, "a group of nothing has no work to wait for"
        for peer, tensor in self._sending:
            self._transport.hub.put(self._transport.rank, peer, tensor.clone())
        self._sending = None
        return self._work(self._receiving)

    def allgather(self, pieces: list[list[torch.Tensor]], parts: list[torch.Tensor]) -> LikeNccl:
        for peer in range(self._transport.size):
            self._transport.hub.put(self._transport.rank, peer, parts[0].clone())
        return self._work(list(enumerate(pieces[0])))

    def _work(self, receiving: list[tuple[int, torch.Tensor]]) -> LikeNccl:
        work = LikeNccl(self._transport)
        work._receiving = receiving
        return work

    def wait(self) -> None:
        for peer, tensor in self._receiving:
            tensor.copy_(self._transport.hub.get(peer, self._transport.rank, 60.0))


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_nccl_is_asked_for_keeps_the_contract(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No device here: NCCL's process group is a stand-in, and CPU memory stands for the device's."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def run(comm: Communicator) -> dict[str, str]:
        transport = comm._transport
        assert isinstance(transport, ThreadTransport)
        nccl = NcclTransport(LikeNccl(transport), comm.rank, comm.size)
        nccl.device = nccl._device = torch.device("cpu")
        over_nccl = Communicator(nccl)
        return run_communicator_contracts(over_nccl) | run_communicator_contracts_in_groups(over_nccl)

    assert launch(run, ranks=ranks, transport="threads", deadline=60.0) == [{}] * ranks


def _communicators(comm: Communicator, directory: str, number: int) -> list[Communicator]:
    """Fresh ones of the same ranks: after one operation was given up, the next might fail for that alone."""
    if comm.transport == "mpi":
        return [Communicator(MpiTransport(deadline_seconds=0.5)) for _ in range(number)]
    stores = [FileStore(f"{directory}/store.{i}", comm.size) for i in range(number)]
    made = [Communicator(GlooTransport.over(store, comm.rank, comm.size, 60.0, ["lo"])) for store in stores]
    for each in made:
        each.deadline_seconds = 0.5
    return made


def wait_for_a_rank_that_does_not_come(comm: Communicator, directory: str) -> None:
    gather, again, to_all, ring = _communicators(comm, directory, 4)
    if comm.rank == 0:
        time.sleep(60)
    for operation in (
        lambda: gather.all_gather(torch.zeros(3)),
        lambda: again.prepare_all_gather(torch.zeros(2, 3))(),
        lambda: to_all.all_to_all([torch.zeros(3)] * 2, [(3,)] * 2),
        lambda: ring.exchange(torch.zeros(3), to=0, source=0, shape=(3,))(),
    ):
        start = time.monotonic()
        with pytest.raises(RankLost) as raised:
            operation()
        assert 0.4 < time.monotonic() - start < 20
    raise raised.value


@pytest.mark.parametrize("transport", ["gloo", "mpi"])
def test_no_wait_outlasts_the_deadline(transport: str, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(RankLost, match="rank 1 waited") as raised:
        launch(wait_for_a_rank_that_does_not_come, 2, transport, (str(tmp_path),), deadline=0.05)
    assert raised.value.rank == 1  # type: ignore[attr-defined]
    assert time.monotonic() - start < 40


class SilentStore(HashStore):
    """On a host that is cut off: no timeout of its own ends the wait for it."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        time.sleep(5)
        return desired.encode()


def test_a_store_that_does_not_answer_holds_up_no_error() -> None:
    transport = GlooTransport(None, 0, 3, store=SilentStore())
    start = time.monotonic()
    error = transport._lost_by(2, RuntimeError("timed out"))
    assert str(error) == "rank 0 waited for rank 2, which is gone or stuck: timed out"
    assert time.monotonic() - start < 3


def test_threads_do_not_outlast_the_deadline() -> None:
    def wait(comm: Communicator) -> None:
        if comm.rank == 1:
            comm.all_gather(torch.zeros(3))
        else:
            time.sleep(0.5)

    with pytest.raises(RankLost, match=r"rank 0 sent nothing to rank 1 within 0\.1 s"):
        launch(wait, ranks=2, transport="threads", deadline=0.1)


def wrap_a_group_that_the_user_has(comm: Communicator, directory: str) -> list[int]:
    from torch import distributed

    distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=comm.rank, world_size=comm.size
    )
    try:
        group = distributed.group.WORLD
        theirs = Communicator(transport_over(group))
        assert run_communicator_contracts(theirs) == {}
        return [int(part) for part in theirs.all_gather(torch.tensor(comm.rank))]
    finally:
        distributed.destroy_process_group()


def test_a_process_group_of_the_users_own(tmp_path: Path) -> None:
    assert launch(wrap_a_group_that_the_user_has, 2, "gloo", (str(tmp_path),)) == [[0, 1]] * 2

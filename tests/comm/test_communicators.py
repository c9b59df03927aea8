"""Every communicator keeps the one contract."""

from __future__ import annotations

import functools
import time

import pytest
import torch

from shardsum.comm import Communicator, launch
from shardsum.comm.threads import SingleCommunicator
from shardsum.comm.torch_distributed import TorchCommunicator
from shardsum.errors import RankLost

from ..contracts import COMMUNICATOR, run_communicator_contracts

GROUPS = [(transport, ranks) for transport in ("threads", "gloo", "mpi") for ranks in (1, 2, 3)]


@functools.cache
def _failures(transport: str, ranks: int) -> list[dict[str, str]]:
    if transport == "single":
        return [run_communicator_contracts(SingleCommunicator())]
    return launch(run_communicator_contracts, ranks=ranks, transport=transport, deadline=60.0)


@pytest.mark.parametrize("contract", COMMUNICATOR)
@pytest.mark.parametrize(("transport", "ranks"), [("single", 1), *GROUPS])
def test_contract(transport: str, ranks: int, contract: str) -> None:
    for rank, failures in enumerate(_failures(transport, ranks)):
        assert contract not in failures, f"on rank {rank}:\n{failures[contract]}"


def wait_for_a_rank_that_does_not_come(comm: Communicator, operation: str) -> None:
    if comm.rank == 0:
        time.sleep(60)
    if operation == "exchange":
        comm.exchange(torch.zeros(3), to=0, source=0, shape=(3,))()
    elif operation == "all_to_all":
        comm.all_to_all([torch.zeros(3)] * 2, [(3,)] * 2)
    else:
        comm.all_gather(torch.zeros(3))


@pytest.mark.parametrize("operation", ["all_gather", "all_to_all", "exchange"])
@pytest.mark.parametrize("transport", ["gloo", "mpi"])
def test_no_wait_outlasts_the_deadline(transport: str, operation: str) -> None:
    start = time.monotonic()
    with pytest.raises(RankLost) as raised:
        launch(wait_for_a_rank_that_does_not_come, 2, transport, (operation,), deadline=1.0)
    assert raised.value.rank == 1  # type: ignore[attr-defined]
    assert time.monotonic() - start < 30


def test_threads_do_not_outlast_the_deadline() -> None:
    def wait(comm: Communicator) -> None:
        if comm.rank == 1:
            comm.all_gather(torch.zeros(3))
        else:
            time.sleep(0.5)

    with pytest.raises(RankLost, match="rank 0 sent nothing to rank 1 within 0.1 s"):
        launch(wait, ranks=2, transport="threads", deadline=0.1)


def wrap_a_group_that_the_user_has(comm: Communicator, directory: str) -> list[int]:
    from torch import distributed

    distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=comm.rank, world_size=comm.size
    )
    try:
        group = distributed.group.WORLD
        theirs = TorchCommunicator(group, comm.rank, comm.size)
        assert run_communicator_contracts(theirs) == {}
        return [int(part) for part in theirs.all_gather(torch.tensor(comm.rank))]
    finally:
        distributed.destroy_process_group()


def test_a_process_group_of_the_users_own(tmp_path: object) -> None:
    assert launch(wrap_a_group_that_the_user_has, 2, "gloo", (str(tmp_path),)) == [[0, 1]] * 2

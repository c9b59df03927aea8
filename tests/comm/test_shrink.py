"""After a rank is lost, those that are left go on in a communicator of their own."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

import shardsum
from shardsum import RankLost
from shardsum.comm import LAUNCHED, Communicator
from shardsum.comm.threads import ThreadTransport
from shardsum.comm.torch_distributed import GlooTransport
from shardsum.launching import launch

from ..contracts import run_communicator_contracts

RANKS, VICTIM = 3, 1


class GoneStore:
    """The store of a rank 0 that has ended."""

    def set(self, key: str, value: str) -> None:
        raise RuntimeError("Broken pipe")


def test_a_store_that_has_gone_with_rank_zero() -> None:
    comm = Communicator(GlooTransport(None, 1, 3, 1.0, GoneStore()))
    with pytest.raises(RankLost, match=r"rank 1 can't go on: the store .* is gone, .* \(Broken pipe\)"):
        comm.shrink()


def go_on(comm: Communicator, directory: str, in_the_midst: bool) -> None:
    """Lose a rank, shrink, and write down what those that are left do not keep of the contract."""
    comm.epoch = 3
    comm.barrier()
    if comm.rank == VICTIM:
        if in_the_midst:
            comm.start((torch.zeros(3), 0, torch.zeros(0), 0))
        if comm.transport == ThreadTransport.name:
            return
        os.kill(os.getpid(), signal.SIGKILL)
    lost = False
    try:
        comm.all_gather(torch.zeros(3))
        comm.all_gather(torch.zeros(3))
    except RankLost:
        lost = True
    assert lost
    left = comm.shrink()
    assert comm.closed
    assert (left.rank, left.size, left.epoch, left.transport) == ([0, 2].index(comm.rank), 2, 3, comm.transport)
    failures = run_communicator_contracts(left)
    q, k, v = (torch.randn(1, 2, 12, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    expected = (q.double() @ k.double().mT / 8**0.5).softmax(dim=3) @ v.double()
    parts = [shardsum.shard(x, comm=left) for x in (q, k, v)]
    out = shardsum.unshard(shardsum.attention(*parts, comm=left), comm=left)
    if not float((out - expected).abs().max()) < 2e-6:
        failures["attention"] = f"{out} is not {expected}"
    (Path(directory) / f"{comm.rank}").write_text(json.dumps(failures))


@pytest.mark.parametrize("in_the_midst", [False, True])
@pytest.mark.parametrize("transport", LAUNCHED)
def test_survivors_shrink_keep_the_contract_and_attend(
    transport: str, in_the_midst: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardsum.launching.processes.GRACE_SECONDS", 20.0)
    if transport == ThreadTransport.name:
        launch(go_on, RANKS, transport, (str(tmp_path), in_the_midst), deadline=20)
    else:
        with pytest.raises(RankLost):
            launch(go_on, RANKS, transport, (str(tmp_path), in_the_midst), deadline=20)
    assert {file.name: json.loads(file.read_text()) for file in tmp_path.iterdir()} == {"0": {}, "2": {}}

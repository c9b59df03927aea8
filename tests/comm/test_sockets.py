"""On one machine ranks listen on the loopback alone: nobody outside can reach them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from shardsum.comm import Communicator, connect
from shardsum.launching import launch

from .sockets import LAUNCHERS, listening

pytestmark = pytest.mark.usefixtures("nothing_stays_behind")

BESIDE = Path(sys.executable).parent
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
# What no option changes (docs/security.md): Open MPI's runtime, and the store of torchrun's agent.
ELSEWHERE = {("prterun", "0.0.0.0"), ("prterun", "::"), ("torchrun", "0.0.0.0"), ("torchrun", "::")}


def look(comm: Communicator, mark: str) -> list[list[str]]:
    """What the job listens on, seen by rank 0 while all ranks are there and have sent something."""
    comm.all_gather(torch.zeros(100_000))
    found = sorted(listening(mark)) if comm.rank == 0 else []
    comm.barrier()
    return [list(entry) for entry in found]


def _check(found: list[list[str]], ranks_listen: bool) -> None:
    sockets = {(who, address) for who, address in found}
    assert {(who, address) for who, address in sockets if address not in LOOPBACK} <= ELSEWHERE
    assert any(who == "rank" for who, _ in sockets) == ranks_listen


@pytest.mark.parametrize(("transport", "ranks_listen"), [("gloo", True), ("mpi", False)])
def test_ranks_of_launch(transport: str, ranks_listen: bool) -> None:
    """Over MPI they share memory, and listen nowhere."""
    found = launch(look, ranks=2, transport=transport, args=(os.environ["SHARDSUM_TEST_MARK"],))[0]
    _check(found, ranks_listen)
    assert transport == "mpi" or not any(who in LAUNCHERS for who, _ in found)


SCRIPT = """
    import json, os, sys
    import shardsum
    from tests.comm.test_sockets import look

    comm = shardsum.connect(deadline=60.0)
    found = look(comm, os.environ["SHARDSUM_TEST_MARK"])
    if comm.rank == 0:
        open(sys.argv[1], "w").write(json.dumps(found))
"""
BY_HAND = [{"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"} for rank in range(2)]


@pytest.mark.parametrize(
    ("command", "environments", "ranks_listen"),
    [
        ([str(BESIDE / "torchrun"), "--nproc-per-node", "2"], [{}], True),
        (
            [str(BESIDE / "mpiexec"), "-n", "2", "--allow-run-as-root", "--oversubscribe", sys.executable],
            [{}],
            False,
        ),
        ([sys.executable], BY_HAND, True),
    ],
    ids=["torchrun", "mpiexec", "by hand"],
)
def test_ranks_of_other_launchers(
    command: list[str], environments: list[dict[str, str]], ranks_listen: bool, tmp_path: Path
) -> None:
    """By hand, rank 0 holds the store of the rendezvous, which torch would open to all."""
    script, output = tmp_path / "script.py", tmp_path / "found.json"
    script.write_text(textwrap.dedent(SCRIPT))
    common = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "MASTER_PORT": str(_free_port())}
    started = [
        subprocess.Popen([*command, str(script), str(output)], env=common | environment, stderr=subprocess.PIPE)
        for environment in environments
    ]
    for process in started:
        _, err = process.communicate(timeout=100)
        assert process.returncode == 0, err.decode()
    found = json.loads(output.read_text())
    _check(found, ranks_listen)
    assert environments == [{}] or all(who == "rank" for who, _ in found)


def test_the_audit_sees_what_listens_everywhere() -> None:
    for kind, address in (("SOCK_STREAM", "0.0.0.0"), ("SOCK_DGRAM", "127.0.0.1")):
        code = f"import socket; s = socket.socket(type=socket.{kind}); s.bind(('{address}', 0)); "
        code += "s.listen() if s.type == socket.SOCK_STREAM else None; print(flush=True); input()"
        with subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            found = listening(os.environ["SHARDSUM_TEST_MARK"])
            process.communicate(b"\n")
        assert found == {("rank", address)}


@pytest.mark.parametrize(
    ("address", "port"), [("203.0.113.1", "29500"), ("no.such.host.invalid", "29500"), ("a" * 70, "29500")]
)
def test_a_master_that_is_no_address_of_this_host(
    address: str, port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**BY_HAND[0], "MASTER_ADDR": address, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=f"rank 0 can't listen on MASTER_ADDR={address}, MASTER_PORT={port}, which"
    ):
        connect("gloo")
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ValueError, match="WORLD_SIZE must be set beside"):
        connect("gloo")


def test_the_programs_own_store_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever comes first, the program's process group or ours, they meet at one port."""
    from torch import distributed

    for name, value in {**BY_HAND[0], "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    for first in ("ours", "theirs"):
        monkeypatch.setenv("MASTER_PORT", str(_free_port()))
        comm = connect("gloo") if first == "ours" else None
        distributed.init_process_group("gloo")
        try:
            comm = comm or connect("gloo")
            assert [part.tolist() for part in comm.all_gather(torch.tensor([3.0]))] == [[3.0]]
        finally:
            distributed.destroy_process_group()
        comm.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])

"""What launchers say to their processes: believed where it is whole, refused by name where it is not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardsum.comm import connect, mpi
from shardsum.comm import connect as connecting
from shardsum.comm.environment import check_before_mpi, check_mpi, launched_rank
from shardsum.comm.torch_distributed import NcclTransport
from shardsum.errors import Unsupported

BESIDE = Path(sys.executable).parent
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
CONNECT = """
    import sys, shardsum
    for _ in range(int(sys.argv[2])):
        try:
            comm = shardsum.connect(deadline=float(sys.argv[1]))
            print(f"rank {comm.rank} of {comm.size} ({comm.transport})")
        except (ValueError, shardsum.RankLost) as error:
            print(f"{type(error).__name__}: {error}")
"""


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys.modules[connecting.__module__], "_connected", {})
    return


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RANK": "abc"}, "RANK must be a whole number from 0 to 2147483647, as a launcher sets it: got 'abc'"),
        ({"RANK": "-1"}, "RANK must be a whole number from 0 to"),
        ({"RANK": ""}, "^RANK must be set beside WORLD_SIZE and MASTER_ADDR and MASTER_PORT, as torchrun does"),
        ({"RANK": "1.0"}, "RANK must be a whole number from 0 to"),
        ({"RANK": "\u0661"}, "RANK must be a whole number from 0 to"),
        ({"WORLD_SIZE": "99999999999"}, "WORLD_SIZE must be a whole number from 0 to"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE must be a whole number from 0 to"),
        ({"RANK": "1", "MASTER_PORT": "any"}, "MASTER_PORT must be a whole number from 1 to 65535"),
        ({"RANK": "1", "MASTER_PORT": "0"}, "MASTER_PORT must be a whole number from 1 to 65535"),
        ({"RANK": "0", "MASTER_PORT": "65536"}, "MASTER_PORT must be a whole number from 1 to 65535"),
        ({"RANK": "1", "MASTER_ADDR": ""}, "MASTER_ADDR must be set beside RANK"),
        ({"LOCAL_RANK": "2"}, "got LOCAL_RANK=2, LOCAL_WORLD_SIZE=2, WORLD_SIZE=2"),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "got LOCAL_RANK=1, LOCAL_WORLD_SIZE=1, WORLD_SIZE=2"),
        ({"LOCAL_WORLD_SIZE": "3"}, "got LOCAL_RANK=0, LOCAL_WORLD_SIZE=3, WORLD_SIZE=2"),
        ({**dict.fromkeys(TORCHRUN), "LOCAL_RANK": "1"}, "must be set beside LOCAL_RANK, as torchrun does"),
        ({**dict.fromkeys(TORCHRUN), "LOCAL_RANK": "x"}, "must be set beside LOCAL_RANK"),
        ({**dict.fromkeys(TORCHRUN), "LOCAL_WORLD_SIZE": "2"}, "must be set beside LOCAL_WORLD_SIZE"),
        ({"RANK": "5"}, "RANK must be less than WORLD_SIZE: got RANK=5, WORLD_SIZE=2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number"),
        ({"WORLD_SIZE": "0"}, "RANK must be less than WORLD_SIZE: got RANK=0, WORLD_SIZE=0"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK must be a whole number"),
        ({"RANK": None}, "^RANK must be set beside WORLD_SIZE"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE must be set beside"),
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "MASTER_ADDR and MASTER_PORT must be set beside"),
    ],
)
def test_what_is_no_rank_of_torchrun(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, str | None], message: str
) -> None:
    for name, value in {**TORCHRUN, **changed}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            connect(deadline=1.0)


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "PMIX_RANK"])
def test_what_is_no_rank_of_an_mpi(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "first")
    with pytest.raises(ValueError, match=f"{name} must be a whole number"):
        launched_rank()
    monkeypatch.setenv(name, "3")
    assert launched_rank() == 3


@pytest.mark.parametrize(
    "started",
    [{"SLURM_PROCID": "1"}, {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, {"SLURM_STEP_NUM_TASKS": "3"}],
    ids=str,
)
def test_tasks_of_slurm_that_do_not_know_of_each_other(
    monkeypatch: pytest.MonkeyPatch, started: dict[str, str]
) -> None:
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    for transport in (None, "mpi"):
        monkeypatch.setattr("shardsum.comm.mpi.MpiTransport.connect", lambda _: check_mpi(1, "an MPI"))
        with pytest.raises(ValueError, match=r"srun has started . tasks that do not know of each other"):
            connect(transport)
    assert connect("single").size == 1  # who says so is alone
    assert connect("single") is connect("single")


def test_mpi_that_does_not_see_what_torchrun_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="torchrun has started 2 processes, but MPI sees 1"):
        check_mpi(1, "an MPI")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    check_mpi(2, "an MPI")  # started by mpiexec, whatever else is set


@pytest.mark.parametrize("launcher", ["OMPI_COMM_WORLD", "PMI", "MV2_COMM_WORLD"])
def test_half_of_what_mpiexec_sets(monkeypatch: pytest.MonkeyPatch, launcher: str) -> None:
    for half, other in (("RANK", "SIZE"), ("SIZE", "RANK")):
        with monkeypatch.context() as patch:
            patch.setenv(f"{launcher}_{half}", "1")
            with pytest.raises(ValueError, match=rf"must be set together, .*: {launcher}_{other} is not\."):
                check_before_mpi()


def test_mpi4py_without_an_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: float) -> None:
        raise RuntimeError("cannot load MPI library")

    monkeypatch.setattr(mpi, "_start_mpi", start)
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    with pytest.raises(Unsupported, match="needs mpi4py and an MPI library"):
        connect("mpi")


def test_pmix_without_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMIX_RANK", "1")
    with pytest.raises(ValueError, match="PMIX_RANK=1 is set, but no PMIX_SERVER_URI"):
        check_before_mpi()
    monkeypatch.setenv("PMIX_SERVER_URI41", "prterun@0.0;tcp4://127.0.0.1:1")
    check_before_mpi()


def test_a_rank_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**TORCHRUN, "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ValueError, match="LOCAL_RANK=1, but this host has 1 CUDA devices"):
        NcclTransport.connect(1.0)


def test_a_batch_script_of_slurm_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert (connect().size, connect().transport) == (1, "single")


def ran(environment: dict[str, str], deadline: float, launcher: tuple[str, ...] = ()) -> str:
    code = textwrap.dedent(CONNECT)
    done = subprocess.run(
        [*launcher, sys.executable, "-c", code, str(deadline), "1"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=90,
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    "environment",
    [
        {"PMI_RANK": "1", "PMI_SIZE": "2"},
        {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"},
        {"MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_SIZE": "2"},
    ],
    ids=lambda environment: next(iter(environment)),
)
def test_the_mpiexec_of_another_mpi(environment: dict[str, str]) -> None:
    said = ran(environment, 30.0)
    started = list(environment.values())[1]
    assert said.startswith(f"ValueError: the launcher has started {started} processes"), said
    assert "MPI sees 1: it belongs to another MPI than mpi4py's" in said


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


def test_rank_zero_whose_port_is_taken(port: int) -> None:
    said = ran({**TORCHRUN, "MASTER_PORT": str(port)}, 3.0)
    assert said.startswith(f"ValueError: rank 0 can't listen at MASTER_ADDR=127.0.0.1, MASTER_PORT={port}"), said


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_do_not_come(rank: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start = time.monotonic()
    said = ran({**TORCHRUN, "RANK": str(rank), "MASTER_PORT": str(port)}, 3.0)
    assert time.monotonic() - start < 30
    wait = "waited up to 3 s for the other 1 ranks: one is gone or has not come"
    assert said.startswith(f"RankLost: rank {rank} {('found no rank 0 at', wait)[rank == 0]}"), said


def test_a_rank_that_dies_before_mpi_init(tmp_path: Path) -> None:
    """The others say so as often as they try again."""
    script = tmp_path / "rank.py"
    die = "import os\nif os.environ['OMPI_COMM_WORLD_RANK'] == '1':\n    os.kill(os.getpid(), 9)\n"
    script.write_text(die + textwrap.dedent(CONNECT))
    command = ["mpiexec", "--allow-run-as-root", "--oversubscribe", "--with-ft", "ulfm", "-n", "3"]
    done = subprocess.run(
        [str(BESIDE / command[0]), *command[1:], sys.executable, str(script), "2", "2"],
        capture_output=True,
        text=True,
        timeout=90,
    )
    for rank in (0, 2):
        assert done.stdout.count(f"RankLost: rank {rank} waited 2 s in MPI_Init: another rank is gone") == 2

"""connect: the communicator that the environment offers, under the real launchers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from shardsum.comm import connect
from shardsum.launching import launch

BESIDE = Path(sys.executable).parent

# Armed in the ranks alone: torchrun itself unpickles what it finds in its store.
SCRIPT = """
    import json, os, sys, threading
    from tests.unpickling.sitecustomize import arm
    arm()
    import torch
    import shardsum
    from tests.contracts import run_communicator_contracts

    assert "mpi4py.MPI" not in sys.modules
    comm = shardsum.connect(deadline=60.0)
    assert shardsum.connect() is comm
    assert shardsum.connect(comm.transport) is comm
    from torch import distributed
    assert not distributed.is_initialized()
    failed = run_communicator_contracts(comm)
    elsewhere = []
    thread = threading.Thread(target=lambda: elsewhere.append(shardsum.connect() is comm))
    thread.start(); thread.join()
    line = json.dumps([comm.transport, comm.rank, comm.size, torch.get_num_threads(), elsewhere, failed])
    open(os.path.join(sys.argv[1], f"result.{comm.rank}"), "w").write(line)
"""


@pytest.mark.parametrize(
    ("transport", "command"),
    [
        ("mpi", [str(BESIDE / "mpiexec"), "-n", "2", "--allow-run-as-root", "--oversubscribe", sys.executable]),
        ("gloo", [str(BESIDE / "torchrun"), "--nproc-per-node", "2"]),
    ],
)
def test_under_a_launcher(transport: str, command: list[str], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        found = json.loads((tmp_path / f"result.{rank}").read_text())
        threads = max(1, len(os.sched_getaffinity(0)) // 2)
        assert found == [transport, rank, 2, threads, [True], {}]


def test_alone() -> None:
    comm = connect()
    assert (comm.transport, comm.rank, comm.size) == ("single", 0, 1)
    assert connect("single") is comm


def test_unknown_names_and_threads_outside_launch() -> None:
    with pytest.raises(ValueError, match="mpi, nccl, gloo, threads, single: got 'smoke'"):
        connect("smoke")
    with pytest.raises(ValueError, match="launch"):
        connect("threads")
    with pytest.raises(ValueError, match="torchrun"):
        connect("gloo")


def test_each_thread_finds_its_own_rank() -> None:
    assert launch(lambda comm: connect().rank, ranks=5, transport="threads") == list(range(5))
    assert launch(lambda comm: connect("threads") is comm, ranks=3, transport="threads") == [True] * 3
    assert connect().transport == "single"


def test_importing_shardsum_starts_nothing() -> None:
    code = textwrap.dedent(
        """
        import os, sys
        before = dict(os.environ)
        import shardsum, shardsum.comm
        assert "mpi4py" not in sys.modules and "mpi4py.MPI" not in sys.modules
        from torch import distributed
        assert not distributed.is_initialized()
        assert dict(os.environ) == before
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

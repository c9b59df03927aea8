"""That the bomb of tests/unpickling goes off, here and in ranks that are processes, however somebody unpickles."""

from __future__ import annotations

import ast
import importlib
import io
import json
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shardsum.comm import Communicator
from shardsum.launching import launch

from ..unpickling import FOLDER

PICKLED = pickle.dumps({"of": "another process"})


def _numpy() -> Any:
    file = io.BytesIO()
    np.save(file, np.array([None]), allow_pickle=True)
    return np.load(io.BytesIO(file.getvalue()), allow_pickle=True)


def _torch(weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(torch.zeros(3), file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=weights_only)


def _pipe() -> Any:
    receive, send = Pipe(duplex=False)
    send.send({"of": "another process"})
    return receive.recv()


def _gathered_object() -> Any:
    from torch.distributed import distributed_c10d

    tensor, size = distributed_c10d._object_to_tensor({"of": "another process"}, torch.device("cpu"), None)
    return distributed_c10d._tensor_to_object(tensor, int(size), None)


def _mpi() -> Any:
    from mpi4py import MPI

    return MPI.COMM_SELF.bcast({"of": "another process"}) and MPI.pickle.loads(PICKLED)


class _OwnUnpickler(pickle.Unpickler):
    pass


WAYS: dict[str, Callable[[], Any]] = {
    "pickle.load": lambda: pickle.load(io.BytesIO(PICKLED)),
    "pickle.loads": lambda: pickle.loads(PICKLED),
    "pickle.Unpickler": lambda: pickle.Unpickler(io.BytesIO(PICKLED)).load(),
    "pickle._Unpickler": lambda: pickle._Unpickler(io.BytesIO(PICKLED)).load(),  # type: ignore[attr-defined]
    "_pickle.loads": lambda: importlib.import_module("_pickle").loads(PICKLED),
    "_pickle.Unpickler": lambda: importlib.import_module("_pickle").Unpickler(io.BytesIO(PICKLED)).load(),
    "numpy.load": _numpy,
    "torch.load": lambda: _torch(weights_only=False),
    "a pipe of multiprocessing": _pipe,
    "object collectives of torch": _gathered_object,
}
HERE_ONLY = {"torch.load, weights only": lambda: _torch(weights_only=True)}
IN_RANKS = {"an unpickler of one's own": lambda: _OwnUnpickler(io.BytesIO(PICKLED)).load(), "mpi4py": _mpi}


def survivors(ways: dict[str, Callable[[], Any]]) -> list[str]:
    """The ways to unpickle that no bomb went off in."""
    found = []
    for name, unpickle in ways.items():
        try:
            unpickle()
        except BaseException as error:  # noqa: BLE001, PERF203
            found += [] if str(error) == "something was unpickled" else [f"{name}: {error!r}"]
        else:
            found.append(name)
    return found


def survivors_on(comm: Communicator) -> list[str]:
    return survivors(WAYS | (IN_RANKS if comm.transport == "mpi" else {}))


def test_the_bomb_goes_off_here() -> None:
    assert survivors(WAYS | HERE_ONLY) == []


@pytest.mark.parametrize("transport", ["gloo", "mpi"])
def test_the_bomb_goes_off_in_ranks(transport: str) -> None:
    assert launch(survivors_on, ranks=2, transport=transport) == [[], []]


def test_the_bomb_goes_off_in_other_processes() -> None:
    code = "import json\nfrom tests.comm.test_unpickling import *\nprint(json.dumps(survivors(WAYS)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=Path(FOLDER).parents[1]
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


FORBIDDEN = """
    import pickle
    import torch
    from torch import distributed
    import torch.distributed as dist

    distributed.all_gather_object([], 1)
    dist.broadcast_object_list([])
    torch.load("file")
    def later():
        from torch.distributed import send_object_list
"""


def test_the_linter_forbids_object_collectives() -> None:
    ruff = [str(Path(sys.executable).parent / "ruff"), "check", "--select=TID251", "--output-format=concise"]
    done = subprocess.run(
        [*ruff, "--stdin-filename=src/shardsum/any.py", "-"],
        input=textwrap.dedent(FORBIDDEN),
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(FOLDER).parents[1],
    )
    lines = sorted(int(line.split(":")[1]) for line in done.stdout.splitlines() if "TID251" in line)
    assert lines == [2, 7, 8, 9, 11]


# mpi4py's methods for Python objects, which it pickles; those for buffers have a capital.
OBJECT_METHODS = {"send", "bsend", "ssend", "isend", "ibsend", "issend", "recv", "irecv", "mprobe", "improbe"}
OBJECT_METHODS |= {"sendrecv", "bcast", "gather", "scatter", "allgather", "alltoall", "reduce", "allreduce"}
OBJECT_METHODS |= {"scan", "exscan"}


def object_messages(source: str) -> list[str]:
    """Where a module that has to do with MPI calls a method of that name, but not of a process group of c10d."""
    if not any(word in source for word in ("mpi4py", "._mpi", "COMM_WORLD")):
        return []
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    methods = [(node.lineno, node.func) for node in calls if isinstance(node.func, ast.Attribute)]
    return [
        f"line {line}: {method.attr}"
        for line, method in methods
        if method.attr in OBJECT_METHODS and not ast.unparse(method.value).endswith(".group")
    ]


def test_no_object_goes_through_mpi4py() -> None:
    bad = "from mpi4py import MPI\nMPI.COMM_WORLD.Bcast(x)\nMPI.COMM_WORLD.bcast(x)\nself._mpi.irecv(0).wait()\n"
    assert object_messages(bad) == ["line 3: bcast", "line 4: irecv"]
    root = Path(FOLDER).parents[1]
    files = [file for folder in ("src", "benchmarks", "examples") for file in (root / folder).rglob("*.py")]
    found = {str(file): object_messages(file.read_text()) for file in files}
    assert len(found) > 50
    assert {file: lines for file, lines in found.items() if lines} == {}

"""One rank of `launch` in a process of its own: `python -m shardsum.comm.worker DIRECTORY [RANK]`."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from . import wire
from .base import GRACE_SECONDS, Communicator
from .connect import launched
from .mpi import MpiCommunicator
from .torch_distributed import connect_gloo


def main(directory: Path, rank: int | None) -> int:
    """Run the function of the job on this rank and write its result, or its error, into the directory."""
    job = json.loads((directory / "job.json").read_text())
    sys.path[:] = job["path"]
    if job["terminal"]:  # under mpiexec the standard streams are pipes; a progress bar wants the terminal
        terminal = os.open(job["terminal"], os.O_WRONLY | os.O_NOCTTY)
        os.dup2(terminal, 1)
        os.dup2(terminal, 2)
    comm = _connect(job, directory, rank)
    (directory / f"pid.{comm.rank}").write_text(str(os.getpid()))
    launched.set(comm)
    try:
        arguments = wire.load(directory / "arguments.safetensors")
        wire.save(directory / f"result.{comm.rank}", _function(job)(comm, *arguments))
    except BaseException as error:  # noqa: BLE001 (whatever ends a rank is reported, then it ends)
        _report(directory, comm.rank, error)
        if job["transport"] == "mpi":
            _wait_for_others(directory, comm.size)
            from mpi4py import MPI

            MPI.COMM_WORLD.Abort(1)
        return 1
    return 0


def _connect(job: dict[str, Any], directory: Path, rank: int | None) -> Communicator:
    if job["transport"] == "mpi":
        torch.set_num_threads(job["threads"])
        return MpiCommunicator(deadline_seconds=job["deadline"])
    assert rank is not None
    if job["cores"]:
        os.sched_setaffinity(0, job["cores"][rank])
    torch.set_num_threads(job["threads"])
    from torch.distributed import FileStore

    store = FileStore(str(directory / "store"), job["size"])
    return connect_gloo(store, rank, job["size"], job["deadline"], loopback=True)


def _function(job: dict[str, Any]) -> Any:
    if job["module"]:
        found: Any = importlib.import_module(job["module"])
    else:
        spec = importlib.util.spec_from_file_location("__shardsum_main__", job["file"])
        assert spec is not None
        assert spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        sys.modules["__shardsum_main__"] = found
        spec.loader.exec_module(found)
    for name in job["name"].split("."):
        found = getattr(found, name)
    return found


def _report(directory: Path, rank: int, error: BaseException) -> None:
    kind = type(error)
    report = {
        "module": kind.__module__,
        "name": kind.__qualname__,
        "message": error.args[0] if len(error.args) == 1 and isinstance(error.args[0], str) else str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }
    unfinished = directory / f"error.{rank}.unfinished"
    unfinished.write_text(json.dumps(report))
    unfinished.rename(directory / f"error.{rank}")


def _wait_for_others(directory: Path, size: int) -> None:
    end = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < end:
        ended = [
            r for r in range(size) if any((directory / f"{what}.{r}").exists() for what in ("result", "error"))
        ]
        if len(ended) == size:
            return
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None))

"""One rank of `launch` in a process of its own: `python -m shardsum.launching.worker DIRECTORY [RANK]`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..arrays import appears_whole
from ..comm import TRANSPORTS, Communicator, Transport
from ..comm.connect import MAIN, set_rank_of_process
from . import wire
from .processes import GRACE_SECONDS, SHARED_MEMORY


def main(directory: Path, rank: int | None) -> int:
    """Run the function of the job on this rank and write its result, or its error, into the directory."""
    job = json.loads((directory / "job.json").read_text())
    sys.path[:], sys.argv[:] = job["path"], job["argv"]
    threading.Thread(target=_end_with_the_launch, args=(directory,), daemon=True).start()
    transport = TRANSPORTS[job["transport"]]
    comm = _connect(transport, job, directory, rank)
    set_rank_of_process(comm)
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        there = os.open(directory / f"{name}.{comm.rank}", os.O_WRONLY | os.O_NOCTTY)
        os.dup2(there, stream.fileno())
        os.close(there)
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        arguments = wire.load(directory / "arguments.safetensors")
        wire.save(directory / f"result.{comm.rank}", _function(job)(comm, *arguments))
    except BaseException as error:  # noqa: BLE001 (whatever ends a rank is reported, then it ends)
        try:
            _report(directory, comm.rank, error)
        finally:
            if transport.abort is not None:
                _abort(transport.abort, directory, comm.size)
        return 1
    return 0


def _end_with_the_launch(directory: Path) -> None:
    """Wait until the launching process says so, or is gone without a word and leaves the directory to us."""
    alive = os.open(directory / "alive", os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(alive, True)
    if not os.read(alive, 1):
        with contextlib.suppress(FileNotFoundError):
            (directory / "alive").unlink()  # one rank alone succeeds
            shutil.rmtree(directory, ignore_errors=True)
            shutil.rmtree(SHARED_MEMORY / directory.name, ignore_errors=True)
            os.kill(os.getsid(0), signal.SIGTERM)  # mpiexec, which ends ranks that can't read this
    os._exit(1)


def _connect(kind: type[Transport], job: dict[str, Any], directory: Path, rank: int | None) -> Communicator:
    if rank is not None and job["cores"]:  # where nobody else has pinned it and told it its rank
        os.sched_setaffinity(0, job["cores"][rank])
    torch.set_num_threads(job["threads_per_rank"])
    return Communicator(kind.join(directory, rank, job["size"], job["deadline"]))


def _function(job: dict[str, Any]) -> Any:
    if job["module"]:
        function: Any = importlib.import_module(job["module"])
    else:
        spec = importlib.util.spec_from_file_location(MAIN, job["file"])
        assert spec is not None
        assert spec.loader is not None
        function = importlib.util.module_from_spec(spec)
        sys.modules[MAIN] = function
        spec.loader.exec_module(function)
    for name in job["name"].split("."):
        function = getattr(function, name)
    return function


def _report(directory: Path, rank: int, error: BaseException) -> None:
    kind = type(error)
    report = {
        "module": kind.__module__,
        "name": kind.__qualname__,
        "message": error.args[0] if len(error.args) == 1 and isinstance(error.args[0], str) else str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }
    with appears_whole(directory / f"error.{rank}", durable=False) as unfinished:
        unfinished.write_text(json.dumps(report))


def _abort(abort: Callable[[], None], directory: Path, size: int) -> None:
    """End all ranks, as soon as they have reported or the time to do so has passed."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # this process ends too, at once
    end = time.monotonic() + GRACE_SECONDS
    while (
        time.monotonic() < end
        and sum(1 for what in ("error", "result") for _ in directory.glob(f"{what}.*[0-9]")) < size
    ):
        time.sleep(0.01)
    # What it has to say is ours to say; where the launcher is ending already, it says so on the rank's own stderr.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    abort()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None))

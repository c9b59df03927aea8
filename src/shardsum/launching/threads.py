"""Ranks as threads of this process."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from ..comm import Communicator
from ..comm.connect import rank_of_thread
from ..comm.threads import Hub, ThreadTransport
from .failures import Failure, blame, died, note, raise_first
from .job import threads_per_rank

Result = TypeVar("Result")
# How long the ranks get to hear that the launch is over; each does at its next message.
GRACE_SECONDS = 1.0


def run_threads(
    fn: Callable[..., Result], ranks: int, transport: str, args: Sequence[Any], deadline: float
) -> list[Result]:
    """The results of all ranks. Raises: the error most to blame."""
    hub = Hub(ranks)
    results: dict[int, Result] = {}
    failures: list[Failure | None] = [None] * ranks

    def run(rank: int) -> None:
        torch.set_num_threads(threads_per_rank(ranks))  # of this thread: OpenMP counts for each caller
        comm = Communicator(ThreadTransport(hub, rank, deadline))
        rank_of_thread.set(comm)
        try:
            results[rank] = fn(comm, *args)
        except SystemExit as end:
            failures[rank] = died(rank, f"sys.exit({end})")
        except BaseException as error:  # noqa: BLE001 (raised again in the caller's thread)
            note(error, f"on rank {rank} of {ranks}")
            failures[rank] = blame(error), error
        hub.leave(rank, failed=failures[rank] is not None)

    before = torch.get_num_threads()
    contexts = [contextvars.copy_context() for _ in range(ranks)]
    threads = [
        threading.Thread(target=context.run, args=(run, rank), name=f"rank {rank}", daemon=True)
        for rank, context in enumerate(contexts)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        for rank in range(ranks):
            hub.leave(rank, failed=True)
        end = time.monotonic() + GRACE_SECONDS
        for thread in threads:  # one that is inside torch when Python ends would abort the process
            if thread.is_alive():
                thread.join(max(0.0, end - time.monotonic()))
        raise
    finally:
        torch.set_num_threads(before)
    raise_first(failures)
    return [results[rank] for rank in range(ranks)]

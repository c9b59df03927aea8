"""Starting ranks on this machine from plain Python, and bringing back every result or the first error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ..comm import LAUNCHED, TRANSPORTS
from ..comm.transport import DEFAULT_DEADLINE_SECONDS
from ..errors import Unsupported
from .mpiexec import Mpiexec
from .processes import Processes, run_processes
from .threads import run_threads

Result = TypeVar("Result")
# How the ranks of a transport are started: what `Transport.started_by` names.
WAYS: dict[str, Callable[..., list[Any]]] = {
    "thread": run_threads,
    "process": run_processes(Processes),
    "mpiexec": run_processes(Mpiexec),
}


def launch(
    fn: Callable[..., Result],
    ranks: int = 2,
    transport: str | None = None,
    args: Sequence[Any] = (),
    deadline: float = DEFAULT_DEADLINE_SECONDS,
) -> list[Result]:
    """The results of `fn(comm, *args)` on each of `ranks` local ranks, in rank order.

    `transport`: "mpi" (the default if mpi4py is installed), "gloo", or "threads". Threads take any function and
    any arguments. Processes are fresh interpreters: `fn` is a function of a module or of the main script, which
    must guard its main part; arguments and results are None, bool, numbers, strings, tensors, arrays,
    AttentionState, and lists, tuples and dicts of these. Each rank gets its share of the cores.
    `deadline`: the longest wait in a collective, in seconds.
    Raises: the exception of the lowest failed rank that did not merely lose a peer, with `.rank`: of the same
    class if it is built in or ours, else RuntimeError. RankLost where a process ended without a word,
    also if the others go on by `Communicator.shrink`: processes have twice `GRACE_SECONDS`, two seconds, for that
    and then end. No result is brought back; survivors must write down themselves what they found.

    >>> launch(lambda comm, x: comm.rank + x, ranks=3, transport="threads", args=(10,))
    [10, 11, 12]
    """
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1: got {ranks}.")
    transport = transport or next(name for name in LAUNCHED if TRANSPORTS[name].why_not() is None)
    if transport not in LAUNCHED:
        listed = f"{', '.join(LAUNCHED[:-1])} or {LAUNCHED[-1]}"
        raise ValueError(f"launch starts ranks over {listed}: got {transport!r}.")
    kind = TRANSPORTS[transport]
    if (why := kind.why_not()) is not None:
        raise Unsupported(why)
    assert kind.started_by is not None
    return WAYS[kind.started_by](fn, ranks, transport, args, deadline)

"""Finding this rank's communicator: from `launch`, torchrun, mpiexec, or none of them."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

from .communicator import Communicator
from .environment import check_alone
from .registry import TRANSPORTS
from .single import SingleTransport
from .torch_distributed import transport_over
from .transport import DEFAULT_DEADLINE_SECONDS

# Inside a rank started by `launch`: a context's own where ranks are threads of one process; where the rank is the
# process, one for all threads, because a new thread does not inherit the context.
rank_of_thread: ContextVar[Communicator | None] = ContextVar("rank_of_thread", default=None)
_rank_of_process: Communicator | None = None
MAIN = "__shardsum_main__"  # what the main script is called in such a process
_connected: dict[str, Communicator] = {}
_of_groups: WeakKeyDictionary[Any, Communicator] = WeakKeyDictionary()


def connect(transport: str | None = None, deadline: float = DEFAULT_DEADLINE_SECONDS) -> Communicator:
    """This rank's communicator: found from the environment, or over the transport named.

    Inside `launch` it is that rank's (where ranks are threads, in the rank's own thread only), which `launch`
    closes; once you have, there is no other. Under mpiexec it
    is "mpi"; under torchrun "nccl" if there is a CUDA device, else "gloo"; otherwise the single rank. `deadline`
    is the longest wait in seconds. Called again, it returns the same communicator. Under a launcher that leaves
    each process one thread, torch gets this rank's share of the machine's cores.
    Raises: ValueError for an unknown transport, one that the environment does not offer, or an environment that
    is no launcher's: what is no rank, part of the variables, an mpiexec of another MPI, tasks of srun that do not
    know of each other; RankLost where the others have not come within the deadline.

    >>> connect().size
    1
    """
    if transport not in (None, *TRANSPORTS):
        raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}: got {transport!r}.")
    inside = rank_of_thread.get() or _rank_of_process
    if inside is not None and transport in (None, inside.transport):
        return inside
    name = transport or next(name for name, kind in TRANSPORTS.items() if kind.is_offered())
    if name not in _connected or _connected[name].closed:
        if transport is None and name == SingleTransport.name:
            check_alone()
        _connected[name] = Communicator(TRANSPORTS[name].connect(deadline))
    return _connected[name]


def set_rank_of_process(comm: Communicator) -> None:
    """What `connect` returns from now on in every thread of this process that is no rank itself."""
    global _rank_of_process
    _rank_of_process = comm


def as_communicator(comm: object) -> Communicator:
    """The communicator itself; one over a torch ProcessGroup or one-dimensional DeviceMesh; `connect()` for None.

    Raises: ValueError for anything else.
    """
    if comm is None:
        return connect()
    if isinstance(comm, Communicator):
        return comm
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    group = comm
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"comm must be one dimension of a DeviceMesh, as mesh['name']: got {group.ndim}.")
        group = group.get_group()
    if not isinstance(group, ProcessGroup):
        raise ValueError(f"comm must be a Communicator, ProcessGroup or DeviceMesh: got {type(comm).__name__}.")
    if group not in _of_groups or _of_groups[group].closed:
        _of_groups[group] = Communicator(transport_over(group))
    return _of_groups[group]

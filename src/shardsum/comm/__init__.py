"""Between ranks: communicators over threads, torch.distributed and MPI, and how to get one."""

from .agreement import Description, agree, agree_on, mistakes_reach_all
from .base import NOTHING, Communicator, Message, Traffic
from .connect import as_communicator, connect
from .group import subgroup
from .launch import launch
from .threads import SingleCommunicator

__all__ = [
    "NOTHING",
    "Communicator",
    "Description",
    "Message",
    "SingleCommunicator",
    "Traffic",
    "agree",
    "agree_on",
    "as_communicator",
    "connect",
    "launch",
    "mistakes_reach_all",
    "subgroup",
]

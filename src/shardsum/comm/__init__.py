"""Between ranks: communicators over threads, torch.distributed and MPI, and how to get one."""

from .agreement import Description, agree, agree_on, mistakes_reach_all
from .communicator import Communicator, Message, subgroup
from .connect import as_communicator, connect
from .counting import CountingTransport
from .ranks import Ranks
from .registry import LAUNCHED, TRANSPORTS
from .single import SingleTransport
from .traffic import Traffic
from .transport import Transport

__all__ = [
    "LAUNCHED",
    "TRANSPORTS",
    "Communicator",
    "CountingTransport",
    "Description",
    "Message",
    "Ranks",
    "SingleTransport",
    "Traffic",
    "Transport",
    "agree",
    "agree_on",
    "as_communicator",
    "connect",
    "mistakes_reach_all",
    "subgroup",
]

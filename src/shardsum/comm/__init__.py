"""Between ranks: communicators over threads, torch.distributed and MPI, and how to get one."""

from .agreement import agree, agree_on
from .base import Communicator, Traffic
from .connect import as_communicator, connect
from .launch import launch

__all__ = ["Communicator", "Traffic", "agree", "agree_on", "as_communicator", "connect", "launch"]

"""Between ranks: communicators over threads, torch.distributed and MPI, and how to get one."""

from .agreement import agree
from .base import Communicator, Traffic
from .connect import connect
from .launch import launch

__all__ = ["Communicator", "Traffic", "agree", "connect", "launch"]

"""Between ranks: communicators over threads, torch.distributed and MPI, and how to get one."""

from .agreement import Description, agree, agree_on
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
    "subgroup",
]

import contextlib as _c
from dataclasses import dataclass as _d
@_d(frozen=True)
class Ranks:
    rank: int
    size: int
    hosts: tuple | None = None
class _Fake:
    def __init__(s, r): s.rank, s.size, s._h = r.rank, r.size, r.hosts
    def hosts(s): return s._h
@_c.contextmanager
def mistakes_reach_all(comm):
    try:
        yield
    except Exception as mistake:
        agree(comm, {}, error=mistake)
        raise

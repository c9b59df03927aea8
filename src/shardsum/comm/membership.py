"""Being one of a group's ranks: which one, on what host, with what deadline, and until when."""

from __future__ import annotations

import socket
from types import TracebackType
from typing import TypeVar

import torch

from ..copies import OnePerRank
from ..errors import RankLost
from .ranks import Ranks
from .transport import Transport

Member = TypeVar("Member", bound="Membership")
_HOST_BYTES = 64  # as long as a host's name can be on Linux


class Membership(OnePerRank):
    """One rank of those that a transport joins, until it is closed or has lost a rank."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.rank, self.size, self.transport = transport.rank, transport.size, transport.name
        self._hosts: tuple[str, ...] | None = None

    @property
    def deadline_seconds(self) -> float:
        """The longest wait in any operation."""
        return self._transport.deadline_seconds

    @deadline_seconds.setter
    def deadline_seconds(self, seconds: float) -> None:
        self._transport.deadline_seconds = seconds

    @property
    def device(self) -> torch.device:
        """Where tensors go that only the ranks themselves want to exchange."""
        return self._transport.device

    @property
    def ranks(self) -> Ranks:
        """This rank, the number of ranks, and the ranks' hosts once `hosts` has been called."""
        return Ranks(self.rank, self.size, self._hosts)

    def hosts(self) -> tuple[str, ...]:
        """The name of every rank's host, which all ranks ask for together.

        They are gathered once, before any payload that is counted: not part of the traffic.
        """
        if self._hosts is None:
            self.check()
            name = socket.gethostname().encode()[:_HOST_BYTES].ljust(_HOST_BYTES, b"\0")
            own = torch.frombuffer(bytearray(name), dtype=torch.uint8)
            everyones = torch.empty(self.size, _HOST_BYTES, dtype=torch.uint8)
            self._transport.all_gather(own, everyones, [_HOST_BYTES] * self.size)
            names = [name.tobytes().rstrip(b"\0") for name in everyones.numpy()]
            self._hosts = tuple(name.decode(errors="replace") for name in names)
        return self._hosts

    def check(self) -> None:
        """Raise where no operation may begin any more."""
        if self._transport.loss is not None:
            raise RankLost(f"this communicator has lost a rank already: {self._transport.loss}")
        if self._transport.closed:
            raise ValueError("this communicator is closed.")

    @property
    def closed(self) -> bool:
        """Whether nothing may be called any more."""
        return self._transport.closed

    def close(self) -> None:
        """Give back what this rank holds of the group; nothing may be called afterwards."""
        self._transport.close()

    def __enter__(self: Member) -> Member:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

"""The transport: what moves bytes between the ranks of a group, and all that a new way to do so has to say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import RankLost

DEFAULT_DEADLINE_SECONDS = 300.0
# Sent or received where a message goes one way only.
NOTHING = torch.empty(0, dtype=torch.uint8)


class Transport(ABC):
    """Moves the bytes of contiguous tensors between ranks: no transport knows a dtype (MPI has no bfloat16).

    `Communicator` counts, allocates and asks whether an operation may begin. Each operation is one of all ranks,
    who know all sizes; `receive` holds the pieces of all ranks one after another.
    To add one: a module with a subclass, and a line in `registry.TRANSPORTS`.
    Raises: RankLost where a peer is gone or the deadline passes; Unsupported for memory that it can't move.
    """

    name: str
    # How `launch` starts its ranks: a name in `launching.WAYS`; None where only others do.
    started_by: ClassVar[str | None] = None
    # What ends all ranks, where those that are left do not hear of one that has failed.
    abort: ClassVar[Callable[[], None] | None] = None
    device = torch.device("cpu")  # where tensors go that only the ranks themselves want to move

    def __init__(self, rank: int, size: int, deadline_seconds: float = DEFAULT_DEADLINE_SECONDS) -> None:
        self.rank, self.size, self.deadline_seconds = rank, size, deadline_seconds
        self.closed = False
        self.loss: str | None = None  # how a rank was lost, once one was

    @abstractmethod
    def all_gather(self, send: Tensor, receive: Tensor, sizes: list[int]) -> None:
        """Write all ranks' `send`, of so many bytes each, to `receive`."""

    @abstractmethod
    def all_to_all(self, send: list[Tensor], receive: Tensor, sizes: list[int]) -> None:
        """Send `send[r]` to each rank r and write what all ranks send here to `receive`; all is flat uint8."""

    @abstractmethod
    def exchange(self, send: Tensor, to: int, receive: Tensor, source: int) -> Callable[[], None]:
        """Start one message out and one in; the result waits for both. What is empty is not sent."""

    def send(self, part: Tensor, to: int) -> None:
        """Send to one rank, and return when `part` may be written to."""
        self.exchange(part, to, NOTHING, to)()

    def receive(self, into: Tensor, source: int) -> None:
        """Return when `into` holds what one rank has sent."""
        self.exchange(NOTHING, source, into, source)()

    def prepare_all_gather(self, pieces: Tensor) -> Callable[[], None]:
        """What writes every rank's `pieces[rank]` to all ranks' `pieces`, as often as it is called."""
        own = pieces[self.rank]
        sizes = [own.nbytes] * self.size
        return lambda: self.all_gather(own.clone(), pieces, sizes)

    def why_not_shrink(self) -> str | None:
        """What stands in the way of `revoke` and `shrink`, and what to start the ranks with instead."""
        return f"{self.name} can't go on without a rank that it has lost: start the ranks over another transport."

    def revoke(self) -> None:
        """End every operation that is under way on any rank, so that all of them come to `shrink`."""
        raise NotImplementedError

    def shrink(self) -> Transport:
        """A transport of the ranks that are left, in their order, once all of these have called this."""
        raise NotImplementedError

    def lost(self, message: str) -> RankLost:
        """The error to raise now; no operation may begin after it."""
        self.loss = self.loss or message
        return RankLost(message)

    def close(self) -> None:
        """Give back what it holds; nothing is called afterwards."""
        self.closed = True

    @classmethod
    def why_not(cls) -> str | None:
        """What this machine lacks for it, and how to get that."""
        return None

    @classmethod
    def is_offered(cls) -> bool:
        """Whether this process was started as a rank of this transport, by a launcher that is not ours."""
        return False

    @classmethod
    def connect(cls, deadline_seconds: float) -> Transport:
        """This rank, as the environment describes it. Raises: ValueError where it does not."""
        raise ValueError(f"ranks over {cls.name} exist only where shardsum.launch has started them.")

    @classmethod
    def join(cls, directory: Path, rank: int | None, size: int, deadline_seconds: float) -> Transport:
        """This rank of those that `launch` has started as processes, which meet in a directory."""
        raise NotImplementedError


def as_bytes(part: Tensor) -> Tensor:
    """Return a tensor as flat uint8: a view of its memory if that is contiguous, else a copy."""
    if part.dtype == torch.uint8 and part.ndim == 1 and part.is_contiguous():
        return part
    return part.contiguous().reshape(-1).view(torch.uint8)


def fenced(rank: int, members: list[int]) -> RankLost:
    """What a rank raises that the others have gone on without."""
    return RankLost(f"ranks {', '.join(map(str, members))} have gone on without rank {rank}, which came too late.")

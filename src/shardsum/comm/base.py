"""The communicator: what a strategy may ask of the wire, and the count of what it sent."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

DEFAULT_DEADLINE_SECONDS = 300.0
# When a rank has failed, the others get this long to say so too before they are ended.
GRACE_SECONDS = 1.0


@dataclass
class Traffic:
    """What one rank has sent to other ranks so far: payload bytes, messages, and rounds of communication.

    An all-gather counts as one message to each other rank, whatever algorithm the library below uses.
    """

    sent_bytes: int = 0
    messages: int = 0
    rounds: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.sent_bytes + other.sent_bytes, self.messages + other.messages, self.rounds + other.rounds
        )

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.sent_bytes - other.sent_bytes, self.messages - other.messages, self.rounds - other.rounds
        )

    def snapshot(self) -> Traffic:
        return Traffic(self.sent_bytes, self.messages, self.rounds)


class Communicator(ABC):
    """A fixed group of ranks that exchange tensors. One per thread of control; not shared between threads.

    Every operation is collective: all ranks call the same ones in the same order. Sizes must be known to both
    sides beforehand (`shapes`): agree on them first. Received tensors are new and belong to the caller; sent
    ones may be reused once the operation (or its `wait`) has returned.
    Raises: RankLost where a peer is gone or the deadline passes.
    """

    transport: str
    rank: int
    size: int
    deadline_seconds: float

    def __init__(self, rank: int, size: int, deadline_seconds: float) -> None:
        self.rank, self.size, self.deadline_seconds = rank, size, deadline_seconds
        self.traffic = Traffic()
        self.closed = False

    def all_gather(self, part: Tensor, shapes: Sequence[Sequence[int]] | None = None) -> list[Tensor]:
        """Every rank's `part`, in rank order; `shapes` gives each rank's shape where they differ."""
        shapes = [part.shape] * self.size if shapes is None else shapes
        assert tuple(shapes[self.rank]) == tuple(part.shape), "own shape is not as agreed"
        flat, pieces = _receive_buffer(part, shapes)
        self._count([part.nbytes] * (self.size - 1))
        self._all_gather(_as_bytes(part), flat, [piece.nbytes for piece in pieces])
        return pieces

    def all_to_all(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """What each rank holds for this one, in rank order: rank r receives every rank's `parts[r]`.

        `shapes[s]` is the shape that rank s sends here. All parts have one dtype and device.
        """
        flat, pieces = _receive_buffer(parts[0], shapes)
        self._count([part.nbytes for rank, part in enumerate(parts) if rank != self.rank])
        self._all_to_all([_as_bytes(part) for part in parts], flat, [piece.nbytes for piece in pieces])
        return pieces

    def exchange(self, part: Tensor, to: int, source: int, shape: Sequence[int]) -> Callable[[], Tensor]:
        """Start sending `part` to one rank and receiving `shape` from another; call the result to wait.

        The returned function gives the received tensor. `part` must not change before that. A message that is
        empty is not sent: both sides know its size.
        """
        flat, (piece,) = _receive_buffer(part, [shape])
        if to == source == self.rank:
            piece.copy_(part)
            return lambda: piece
        self._count([part.nbytes] if part.nbytes else [])
        wait = self._exchange(_as_bytes(part), to, flat, source)

        def finish() -> Tensor:
            wait()
            return piece

        return finish

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self.all_gather(torch.zeros(1, dtype=torch.uint8))

    def close(self) -> None:
        """Give back what this communicator holds; nothing may be called afterwards."""
        self.closed = True

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _count(self, message_bytes: Sequence[int]) -> None:
        self.traffic.sent_bytes += sum(message_bytes)
        self.traffic.messages += len(message_bytes)
        self.traffic.rounds += bool(message_bytes)

    # What a transport implements. Everything is flat uint8, so that no transport needs to know a dtype
    # (MPI has no bfloat16). `receive` is one buffer that holds the pieces of all ranks one after another. An
    # exchange neither sends nor waits for what is empty.

    @abstractmethod
    def _all_gather(self, send: Tensor, receive: Tensor, sizes: list[int]) -> None: ...

    @abstractmethod
    def _all_to_all(self, send: list[Tensor], receive: Tensor, sizes: list[int]) -> None: ...

    @abstractmethod
    def _exchange(self, send: Tensor, to: int, receive: Tensor, source: int) -> Callable[[], None]: ...


def _as_bytes(part: Tensor) -> Tensor:
    return part.contiguous().reshape(-1).view(torch.uint8)


def _receive_buffer(like: Tensor, shapes: Sequence[Sequence[int]]) -> tuple[Tensor, list[Tensor]]:
    """One uint8 buffer for all pieces, and the pieces as views of it with dtype and device of `like`."""
    counts = [math.prod(shape) for shape in shapes]
    buffer = torch.empty(sum(counts), dtype=like.dtype, device=like.device)
    pieces = [piece.view(tuple(shape)) for piece, shape in zip(buffer.split(counts), shapes, strict=True)]
    return buffer.view(torch.uint8), pieces

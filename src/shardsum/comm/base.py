"""The communicator: what a strategy may ask of the wire, and the count of what it sent."""

from __future__ import annotations

import math
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import RankLost
from ..memory import kept_memory
from .ranks import Ranks

DEFAULT_DEADLINE_SECONDS = 300.0
# When a rank has failed, the others get this long to say so too before they are ended.
GRACE_SECONDS = 1.0
# Working memory up to this size is kept from one call to the next, of so many different sizes: the system takes
# longer to give 4 MB than to copy them.
KEPT_BYTES, KEPT_SIZES = 1 << 24, 8

# Sent or received where a message goes one way only.
NOTHING = torch.empty(0, dtype=torch.uint8)
# What is sent, to whom, where to receive, from whom.
Message = tuple[Tensor, int, Tensor, int]
T = TypeVar("T")


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


_HOST_BYTES = 64  # as long as a host's name can be on Linux


class Communicator(ABC):
    """A fixed group of ranks that exchange tensors. One per thread of control; not shared between threads.

    Every operation is collective: all ranks call the same ones in the same order. Sizes must be known to both
    sides beforehand (`shapes`): agree on them first. Received tensors are new and belong to the caller; sent
    ones may be reused once the operation (or its `wait`) has returned.

    `epoch` is the caller's to set, to the step of a loop that it is in: ranks that are at different steps then
    raise Mismatch at their next call, where the calls alone could not tell. `calls` counts the calls agreed on.
    Raises: RankLost where a peer is gone or the deadline passes, and from then on: what is still under way could
    meet the messages of a later operation. ValueError once it is closed.
    """

    transport: str
    rank: int
    size: int
    deadline_seconds: float

    def __init__(self, rank: int, size: int, deadline_seconds: float) -> None:
        self.rank, self.size, self.deadline_seconds = rank, size, deadline_seconds
        self.traffic = Traffic()
        self.calls = self.epoch = 0
        self.closed = False
        self._lost: str | None = None
        self._scratch: dict[Hashable, tuple[Tensor, list[Tensor]]] = {}
        self._kept: dict[Hashable, Any] = {}  # of this group's ranks, and of no other's
        self._hosts: tuple[str, ...] | None = None

    @property
    def ranks(self) -> Ranks:
        """This rank, the number of ranks, and the ranks' hosts once `hosts` has been called."""
        return Ranks(self.rank, self.size, self._hosts)

    def all_gather(self, part: Tensor, shapes: Sequence[Sequence[int]] | None = None) -> list[Tensor]:
        """Every rank's `part`, in rank order; `shapes` gives each rank's shape where they differ."""
        shapes = [part.shape] * self.size if shapes is None else shapes
        assert tuple(shapes[self.rank]) == tuple(part.shape), "own shape is not as agreed"
        flat, pieces = _receive_buffer(part, shapes)
        self._count([part.nbytes] * (self.size - 1))
        self._all_gather(part.contiguous(), flat, [piece.nbytes for piece in pieces])
        return pieces

    def all_to_all(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """What each rank holds for this one, in rank order: rank r receives every rank's `parts[r]`.

        `shapes[s]` is the shape that rank s sends here. All parts have one dtype and device.
        """
        flat, pieces = _receive_buffer(parts[0], shapes)
        self._count([part.nbytes for rank, part in enumerate(parts) if rank != self.rank])
        self._all_to_all([as_bytes(part) for part in parts], flat, [piece.nbytes for piece in pieces])
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
        wait = self.start((part.contiguous(), to, flat, source))

        def finish() -> Tensor:
            wait()
            return piece

        return finish

    def start(self, *messages: Message) -> Callable[[], None]:
        """Start messages that make one round; call the result to wait for all of them.

        A message is (what is sent, to whom, where to receive, from whom), both tensors contiguous and used as they
        are: neither may be touched before the wait is over. What is empty is not sent.
        """
        self._count([send.nbytes for send, *_ in messages if send.nbytes])
        if len(messages) == 1:
            return self._exchange(*messages[0])
        waits = [self._exchange(*message) for message in messages]
        return lambda: _call_all(waits)

    def all_gather_into(self, part: Tensor, pieces: Tensor) -> None:
        """Write every rank's `part` into `pieces[rank]`; both are contiguous, and all parts are of one shape."""
        self._count([part.nbytes] * (self.size - 1))
        self._all_gather(part, pieces, [part.nbytes] * self.size)

    def all_gather_again(self, pieces: Tensor) -> Callable[[], None]:
        """What writes every rank's `pieces[rank]` to all ranks' `pieces`, contiguous, as often as it is called."""
        self._check()
        gather = self._all_gather_again(pieces)
        messages = self.size - 1
        sent_bytes = messages * pieces[self.rank].nbytes

        def again() -> None:
            self._count_round(sent_bytes, messages)
            gather()

        return again

    def scratch(
        self, like: Tensor, count: int = 1, use: str = "receive", shape: tuple[int, ...] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Working memory (count, *shape), and its parts: the same at every call for one use, whatever is in it."""
        shape = like.shape if shape is None else shape
        key = (use, count, shape, like.dtype, like.device)
        return _kept(self._scratch, key, _working_memory, like, count, shape)

    def kept(self, key: Hashable, make: Callable[..., tuple[T, int]], *args: object) -> T:
        """What `make(*args)` gave for this key, or gives now, with the bytes that it holds.

        All ranks ask for the same in the same order: making it may be an operation of theirs.
        """
        found: T = _kept(self._kept, key, make, *args)
        return found

    def hosts(self) -> tuple[str, ...]:
        """The name of every rank's host, which all ranks ask for together.

        They are gathered once, before any payload that is counted: not part of the traffic.
        """
        if self._hosts is None:
            self._check()
            name = socket.gethostname().encode()[:_HOST_BYTES].ljust(_HOST_BYTES, b"\0")
            everyones = torch.empty(self.size * _HOST_BYTES, dtype=torch.uint8)
            self._all_gather(
                torch.frombuffer(bytearray(name), dtype=torch.uint8), everyones, [_HOST_BYTES] * self.size
            )
            names = everyones.view(self.size, _HOST_BYTES).numpy()
            self._hosts = tuple(name.tobytes().rstrip(b"\0").decode(errors="replace") for name in names)
        return self._hosts

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self.all_gather(torch.zeros(1, dtype=torch.uint8))

    def close(self) -> None:
        """Give back what this communicator holds; nothing may be called afterwards."""
        self.closed = True
        self._kept.clear()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def lost(self, message: str) -> RankLost:
        """The error to raise now, and at every later operation."""
        self._lost = self._lost or message
        return RankLost(message)

    def _count(self, message_bytes: Sequence[int]) -> None:
        self._count_round(sum(message_bytes), len(message_bytes))

    def _check(self) -> None:
        """Raise where no operation may begin any more."""
        if self._lost is not None:
            raise RankLost(f"this communicator has lost a rank already: {self._lost}")
        if self.closed:
            raise ValueError("this communicator is closed.")

    def _count_round(self, sent_bytes: int, messages: int) -> None:
        self._check()
        if messages:
            self.traffic.sent_bytes += sent_bytes
            self.traffic.messages += messages
            self.traffic.rounds += 1

    # What a transport implements. Tensors are contiguous, and what moves is their bytes: no transport needs to
    # know a dtype (MPI has no bfloat16). `receive` holds the pieces of all ranks one after another. In an
    # all-to-all everything is flat uint8 already. An exchange neither sends nor waits for what is empty.

    @abstractmethod
    def _all_gather(self, send: Tensor, receive: Tensor, sizes: list[int]) -> None: ...

    def _all_gather_again(self, pieces: Tensor) -> Callable[[], None]:
        own = pieces[self.rank]
        sizes = [own.nbytes] * self.size
        return lambda: self._all_gather(own.clone(), pieces, sizes)

    @abstractmethod
    def _all_to_all(self, send: list[Tensor], receive: Tensor, sizes: list[int]) -> None: ...

    @abstractmethod
    def _exchange(self, send: Tensor, to: int, receive: Tensor, source: int) -> Callable[[], None]: ...


def as_bytes(part: Tensor) -> Tensor:
    """The same memory as flat uint8, if it is contiguous."""
    if part.dtype == torch.uint8 and part.ndim == 1 and part.is_contiguous():
        return part
    return part.contiguous().reshape(-1).view(torch.uint8)


def _kept(kept: dict[Hashable, T], key: Hashable, make: Callable[..., tuple[T, int]], *args: object) -> T:
    found = kept.get(key)
    if found is None:
        found, held_bytes = make(*args)
        if held_bytes <= KEPT_BYTES:
            if len(kept) == KEPT_SIZES:
                kept.clear()
            kept[key] = found
    return found


def _working_memory(like: Tensor, count: int, shape: Sequence[int]) -> tuple[tuple[Tensor, list[Tensor]], int]:
    whole = kept_memory(count, *shape, dtype=like.dtype, device=like.device)
    return (whole, list(whole.unbind())), whole.nbytes


def _call_all(waits: Sequence[Callable[[], None]]) -> None:
    for wait in waits:
        wait()


def _receive_buffer(like: Tensor, shapes: Sequence[Sequence[int]]) -> tuple[Tensor, list[Tensor]]:
    """One uint8 buffer for all pieces, and the pieces as views of it with dtype and device of `like`."""
    counts = [math.prod(shape) for shape in shapes]
    buffer = torch.empty(sum(counts), dtype=like.dtype, device=like.device)
    pieces = [piece.view(tuple(shape)) for piece, shape in zip(buffer.split(counts), shapes, strict=True)]
    return buffer.view(torch.uint8), pieces

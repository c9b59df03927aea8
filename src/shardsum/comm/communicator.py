"""The communicator: what a strategy may ask of the wire, and the count of what it sent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..compiler import outside_graphs
from ..errors import Unsupported
from .group import GroupTransport
from .membership import Membership
from .memory import FreshBuffers, KeptBuffers, PreparedOperations
from .single import SingleTransport
from .traffic import Traffic
from .transport import Transport, as_bytes

# What is sent, to whom, where to receive, from whom.
Message = tuple[Tensor, int, Tensor, int]


class Communicator(Membership):
    """A group of ranks that exchange tensors over a transport: one per thread of control, not shared.

    Every operation is collective: all ranks call the same ones in the same order. Sizes must be known to both
    sides beforehand (`shapes`): agree on them first. Received tensors are new and belong to the caller; sent
    ones may be reused once the operation (or its `wait`) has returned.

    `epoch` is the caller's to set, to the step of a loop that it is in: ranks that are at different steps then
    raise Mismatch at their next call, where the calls alone could not tell. `calls` counts the calls agreed on.
    `buffers`, `prepared`: what is kept from one call to the next.
    Raises: RankLost where a peer is gone or the deadline passes, and from then on: what is still under way could
    meet the messages of a later operation. `shrink` gives a communicator of the ranks that are left. ValueError
    once it is closed.
    """

    def __init__(self, transport: Transport, parent: Communicator | None = None) -> None:
        """`parent`: the communicator whose ranks these are a part of, and whose traffic they count in."""
        super().__init__(transport)
        self.traffic: Traffic = Traffic() if parent is None else parent.traffic
        self.buffers: FreshBuffers = KeptBuffers() if parent is None else parent.buffers
        self.prepared = PreparedOperations()
        self.calls = self.epoch = 0

    @outside_graphs
    def all_gather(
        self, part: Tensor, shapes: Sequence[Sequence[int]] | None = None, into: Tensor | None = None
    ) -> list[Tensor]:
        """Every rank's `part`, in rank order; `shapes` gives each rank's shape where they differ.

        `into`: where to write the parts, contiguous, if all are of one shape; by default into new memory.
        """
        if into is None:
            shapes = [part.shape] * self.size if shapes is None else shapes
            assert tuple(shapes[self.rank]) == tuple(part.shape), "own shape is not as agreed"
            into, pieces = _receive_buffer(part, shapes)
        else:
            pieces = list(into.unbind())
        self._count((self.size - 1) * part.nbytes, self.size - 1)
        self._transport.all_gather(part.contiguous(), into, [piece.nbytes for piece in pieces])
        return pieces

    @outside_graphs
    def all_to_all(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """What each rank holds for this one, in rank order: rank r receives every rank's `parts[r]`.

        `shapes[s]` is the shape that rank s sends here. All parts have one dtype and device.
        """
        flat, pieces = _receive_buffer(parts[0], shapes)
        self._count(sum(part.nbytes for rank, part in enumerate(parts) if rank != self.rank), self.size - 1)
        self._transport.all_to_all([as_bytes(part) for part in parts], flat, [piece.nbytes for piece in pieces])
        return pieces

    @outside_graphs
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

    @outside_graphs
    def start(self, *messages: Message) -> Callable[[], None]:
        """Start messages that make one round; call the result to wait for all of them.

        A message is (what is sent, to whom, where to receive, from whom), both tensors contiguous and used as they
        are: neither may be touched before the wait is over. What is empty is not sent.
        """
        sent = [send.nbytes for send, *_ in messages if send.nbytes]
        self._count(sum(sent), len(sent))
        if len(messages) == 1:
            return self._transport.exchange(*messages[0])
        waits = [self._transport.exchange(*message) for message in messages]
        return lambda: _call_all(waits)

    @outside_graphs
    def send(self, part: Tensor, to: int) -> None:
        """Send `part`, contiguous, to one rank, which receives it."""
        self._count(part.nbytes, int(part.nbytes > 0))
        self._transport.send(part, to)

    @outside_graphs
    def receive(self, into: Tensor, source: int) -> None:
        """Write to `into`, contiguous, what one rank sends."""
        self.check()
        self._transport.receive(into, source)

    def prepare_all_gather(self, pieces: Tensor) -> Callable[[], None]:
        """What writes every rank's `pieces[rank]` to all ranks' `pieces`, contiguous, as often as it is called."""
        self.check()
        gather = self._transport.prepare_all_gather(pieces)
        messages = self.size - 1
        sent_bytes = messages * pieces[self.rank].nbytes

        def again() -> None:
            self._count(sent_bytes, messages)
            gather()

        return again

    @outside_graphs
    def barrier(self) -> None:
        """Return when every rank has come here."""
        self.all_gather(torch.zeros(1, dtype=torch.uint8))

    def shrink(self) -> Communicator:
        """A communicator of the ranks that are left, in their order, once all of these have called this.

        Call it where RankLost was raised, after the `except` block: the error's traceback keeps sockets open.
        This communicator and its groups are closed; what came of an operation that not all ranks have finished is
        theirs to forget. `epoch` and the deadline stay; `calls` and `traffic` begin anew.
        Raises: Unsupported where the transport can't, naming what to start the ranks with; RankLost on a rank that
        the others have gone on without.
        """
        if (why := self._transport.why_not_shrink()) is not None:
            raise Unsupported(why)
        self.prepared.clear()
        self._transport.revoke()
        shrunk = Communicator(self._transport.shrink())
        shrunk.epoch = self.epoch
        return shrunk

    def close(self) -> None:
        """Give back what this communicator holds; nothing may be called afterwards."""
        self.prepared.clear()
        super().close()

    def _count(self, sent_bytes: int, messages: int) -> None:
        """Check and count what is one round of communication, if it has messages."""
        self.check()
        if messages:
            self.traffic.sent_bytes += sent_bytes
            self.traffic.messages += messages
            self.traffic.rounds += 1


def subgroup(comm: Communicator, members: Sequence[int]) -> Communicator:
    """The ranks `members` of `comm`, this one among them, in that order; `comm` itself for all of them.

    Every other rank makes the group that it is in itself. What the group sends counts in the traffic of `comm`.
    """
    if len(members) == comm.size:
        return comm
    if len(members) == 1:
        return Communicator(SingleTransport())
    return Communicator(GroupTransport(comm._transport, members), comm)


def _call_all(waits: Sequence[Callable[[], None]]) -> None:
    for wait in waits:
        wait()


def _receive_buffer(like: Tensor, shapes: Sequence[Sequence[int]]) -> tuple[Tensor, list[Tensor]]:
    """One uint8 buffer for all pieces, and the pieces as views of it with dtype and device of `like`."""
    counts = [math.prod(shape) for shape in shapes]
    buffer = torch.empty(sum(counts), dtype=like.dtype, device=like.device)
    pieces = [piece.view(tuple(shape)) for piece, shape in zip(buffer.split(counts), shapes, strict=True)]
    return buffer.view(torch.uint8), pieces

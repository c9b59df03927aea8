"""Ranks as threads of one process: for tests, notebooks and closures."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from threading import Condition, Lock

from torch import Tensor

from ..errors import RankLost
from .transport import DEFAULT_DEADLINE_SECONDS, Transport, as_bytes, fenced


class Hub:
    """Where the threads of one group leave messages for each other: a queue from each rank to each other."""

    def __init__(self, size: int) -> None:
        self.size = size
        pairs = [(source, to) for source in range(size) for to in range(size)]
        self._queues: dict[tuple[int, int], deque[Tensor]] = {pair: deque() for pair in pairs}
        # One each, of one lock: a message that wakes all others makes an all-gather of N ranks N^3 awakenings.
        self._lock = Lock()
        self._arrived = {pair: Condition(self._lock) for pair in pairs}
        self._gone: set[int] = set()
        self._failed: int | None = None
        self._revoked_by: int | None = None
        self._survivors: set[int] = set()
        self._all_survivors_came = Condition(self._lock)
        self._successor: tuple[list[int], Hub] | None = None

    def put(self, source: int, to: int, message: Tensor) -> None:
        with self._lock:
            self._queues[source, to].append(message)
            self._arrived[source, to].notify()

    def get(self, source: int, to: int, deadline_seconds: float) -> Tensor:
        queue, arrived = self._queues[source, to], self._arrived[source, to]
        end = time.monotonic() + deadline_seconds
        with self._lock:
            while not queue:
                if self._failed is not None:
                    raise RankLost(f"rank {self._failed} failed; rank {to} was waiting for rank {source}.")
                if source in self._gone:
                    raise RankLost(f"rank {source} has returned; rank {to} was waiting for it.")
                if self._revoked_by is not None:
                    raise RankLost(f"rank {self._revoked_by} goes on without a rank that it has lost.")
                if not arrived.wait(end - time.monotonic()):
                    raise RankLost(f"rank {source} sent nothing to rank {to} within {deadline_seconds:g} s.")
            return queue.popleft()

    def leave(self, rank: int, failed: bool) -> None:
        """This rank sends nothing more: who waits for it waits in vain; if it failed, so does everyone."""
        with self._lock:
            self._gone.add(rank)
            if failed and self._failed is None:
                self._failed = rank
            self._wake()
            successor = self._successor
        if successor is not None and rank in successor[0]:
            successor[1].leave(successor[0].index(rank), failed)

    def revoke(self, rank: int) -> None:
        """Nobody waits here any more."""
        with self._lock:
            self._revoked_by = rank if self._revoked_by is None else self._revoked_by
            self._wake()

    def shrink(self, rank: int, deadline_seconds: float) -> tuple[list[int], Hub]:
        """The ranks that are left, and their hub: those that have come here when no other can, or in time."""
        end = time.monotonic() + deadline_seconds
        with self._lock:
            self._survivors.add(rank)
            self._all_survivors_came.notify_all()
            while self._successor is None:
                missing = set(range(self.size)) - self._survivors - self._gone
                if not missing or not self._all_survivors_came.wait(end - time.monotonic()):
                    members = sorted(self._survivors - self._gone)
                    self._successor = members, Hub(len(members))
            return self._successor

    def _wake(self) -> None:
        for arrived in self._arrived.values():
            arrived.notify()
        self._all_survivors_came.notify_all()


class ThreadTransport(Transport):
    """A rank that is a thread; what it sends is copied once, so the sender may reuse its buffers."""

    name = "threads"
    started_by = "thread"

    def __init__(self, hub: Hub, rank: int, deadline_seconds: float = DEFAULT_DEADLINE_SECONDS) -> None:
        super().__init__(rank, hub.size, deadline_seconds)
        self.hub = hub

    def all_gather(self, send: Tensor, receive: Tensor, sizes: list[int]) -> None:
        self._deliver([as_bytes(send).clone()] * self.size, as_bytes(receive), sizes)

    def all_to_all(self, send: list[Tensor], receive: Tensor, sizes: list[int]) -> None:
        self._deliver([message.clone() for message in send], receive, sizes)

    def exchange(self, send: Tensor, to: int, receive: Tensor, source: int) -> Callable[[], None]:
        if send.nbytes:
            self.hub.put(self.rank, to, as_bytes(send).clone())
        return lambda: self._receive(as_bytes(receive), source)

    def why_not_shrink(self) -> str | None:
        return None

    def revoke(self) -> None:
        self.hub.revoke(self.rank)

    def shrink(self) -> Transport:
        members, hub = self.hub.shrink(self.rank, self.deadline_seconds)
        self.close()
        if self.rank not in members:
            raise fenced(self.rank, members)
        return ThreadTransport(hub, members.index(self.rank), self.deadline_seconds)

    @classmethod
    def connect(cls, deadline_seconds: float) -> Transport:
        raise ValueError("ranks that are threads exist inside shardsum.launch(..., transport='threads') only.")

    def _deliver(self, messages: list[Tensor], receive: Tensor, sizes: list[int]) -> None:
        for to, message in enumerate(messages):
            self.hub.put(self.rank, to, message)
        for source, piece in enumerate(receive.split(sizes)):
            piece.copy_(self._get(source))

    def _receive(self, receive: Tensor, source: int) -> None:
        if receive.nbytes:
            receive.copy_(self._get(source))

    def _get(self, source: int) -> Tensor:
        try:
            return self.hub.get(source, self.rank, self.deadline_seconds)
        except RankLost as loss:
            raise self.lost(str(loss)) from loss

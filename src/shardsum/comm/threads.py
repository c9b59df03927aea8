"""Ranks as threads of one process: for tests, notebooks and closures; and the one rank that is alone."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from threading import Condition, Lock

from torch import Tensor

from ..errors import RankLost
from .base import DEFAULT_DEADLINE_SECONDS, Communicator, as_bytes


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
                if not arrived.wait(end - time.monotonic()):
                    raise RankLost(f"rank {source} sent nothing to rank {to} within {deadline_seconds:g} s.")
            return queue.popleft()

    def leave(self, rank: int, failed: bool) -> None:
        """This rank sends nothing more: who waits for it waits in vain; if it failed, so does everyone."""
        with self._lock:
            self._gone.add(rank)
            if failed and self._failed is None:
                self._failed = rank
            for arrived in self._arrived.values():
                arrived.notify()


class ThreadCommunicator(Communicator):
    """A rank that is a thread; what it sends is copied once, so the sender may reuse its buffers."""

    transport = "threads"

    def __init__(self, hub: Hub, rank: int, deadline_seconds: float = DEFAULT_DEADLINE_SECONDS) -> None:
        super().__init__(rank, hub.size, deadline_seconds)
        self._hub = hub

    def _all_gather(self, send: Tensor, receive: Tensor, sizes: list[int]) -> None:
        self._deliver([as_bytes(send).clone()] * self.size, as_bytes(receive), sizes)

    def _all_to_all(self, send: list[Tensor], receive: Tensor, sizes: list[int]) -> None:
        self._deliver([message.clone() for message in send], receive, sizes)

    def _deliver(self, messages: list[Tensor], receive: Tensor, sizes: list[int]) -> None:
        for to, message in enumerate(messages):
            self._hub.put(self.rank, to, message)
        for source, piece in enumerate(receive.split(sizes)):
            piece.copy_(self._get(source))

    def _exchange(self, send: Tensor, to: int, receive: Tensor, source: int) -> Callable[[], None]:
        if send.nbytes:
            self._hub.put(self.rank, to, as_bytes(send).clone())
        return lambda: self._receive(as_bytes(receive), source)

    def _receive(self, receive: Tensor, source: int) -> None:
        if receive.nbytes:
            receive.copy_(self._get(source))

    def _get(self, source: int) -> Tensor:
        try:
            return self._hub.get(source, self.rank, self.deadline_seconds)
        except RankLost as loss:
            raise self.lost(str(loss)) from loss


class SingleCommunicator(Communicator):
    """The only rank there is: every collective is a copy."""

    transport = "single"

    def __init__(self, deadline_seconds: float = DEFAULT_DEADLINE_SECONDS) -> None:
        super().__init__(0, 1, deadline_seconds)

    def _all_gather(self, send: Tensor, receive: Tensor, sizes: list[int]) -> None:
        as_bytes(receive).copy_(as_bytes(send))

    def _all_to_all(self, send: list[Tensor], receive: Tensor, sizes: list[int]) -> None:
        receive.copy_(send[0])

    def _exchange(self, send: Tensor, to: int, receive: Tensor, source: int) -> Callable[[], None]:
        as_bytes(receive).copy_(as_bytes(send))
        return lambda: None

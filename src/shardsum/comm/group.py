"""Some of the ranks with a numbering of their own: a row or a column of a two-dimensional arrangement."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..errors import RankLost
from .transport import Transport, as_bytes


class GroupTransport(Transport):
    """The ranks `members` of another transport, in that order, which carries their messages pair by pair."""

    def __init__(self, carrier: Transport, members: Sequence[int]) -> None:
        self._carrier, self._members = carrier, list(members)
        super().__init__(self._members.index(carrier.rank), len(members), carrier.deadline_seconds)
        self.name, self.device = carrier.name, carrier.device

    def all_gather(self, send: Tensor, receive: Tensor, sizes: list[int]) -> None:
        self.all_to_all([as_bytes(send)] * self.size, as_bytes(receive), sizes)

    def all_to_all(self, send: list[Tensor], receive: Tensor, sizes: list[int]) -> None:
        pieces = receive.split(sizes)
        pieces[self.rank].copy_(send[self.rank])
        waiting = []
        for step in range(1, self.size):
            to, source = (self.rank + step) % self.size, (self.rank - step) % self.size
            waiting.append(self.exchange(send[to], to, pieces[source], source))
        for wait in waiting:
            wait()

    def exchange(self, send: Tensor, to: int, receive: Tensor, source: int) -> Callable[[], None]:
        return self._carrier.exchange(send, self._members[to], receive, self._members[source])

    def why_not_shrink(self) -> str | None:
        return "a group can't go on without a rank by itself: shrink the communicator that it is a part of."

    # Whether operations may begin, and how long they may take, is known to the carrier.

    @property
    def deadline_seconds(self) -> float:
        return self._carrier.deadline_seconds

    @deadline_seconds.setter
    def deadline_seconds(self, seconds: float) -> None:
        self._carrier.deadline_seconds = seconds

    @property
    def closed(self) -> bool:
        return self._closed or self._carrier.closed

    @closed.setter
    def closed(self, closed: bool) -> None:
        self._closed = closed

    @property
    def loss(self) -> str | None:
        return self._carrier.loss

    @loss.setter
    def loss(self, loss: str | None) -> None:
        assert loss is None, "only the carrier loses a rank"

    def lost(self, message: str) -> RankLost:
        return self._carrier.lost(message)

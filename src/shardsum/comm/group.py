"""Some of the ranks as a communicator of their own: a row or a column of a two-dimensional arrangement."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .base import Communicator, as_bytes
from .threads import SingleCommunicator


def subgroup(comm: Communicator, members: Sequence[int]) -> Communicator:
    """The ranks `members` of `comm`, this one among them, in that order; `comm` itself for all of them."""
    if len(members) == comm.size:
        return comm
    return SingleCommunicator() if len(members) == 1 else GroupCommunicator(comm, members)


class GroupCommunicator(Communicator):
    """The ranks `members` of `parent`, in that order; every other rank makes the group that it is in itself.

    It sends pairwise through its parent, whose traffic it counts in.
    """

    def __init__(self, parent: Communicator, members: Sequence[int]) -> None:
        super().__init__(list(members).index(parent.rank), len(members), parent.deadline_seconds)
        self.transport, self.traffic = parent.transport, parent.traffic
        self._scratch = parent._scratch
        self._parent, self._members = parent, list(members)

    def _check(self) -> None:
        super()._check()
        self._parent._check()

    def _all_gather(self, send: Tensor, receive: Tensor, sizes: list[int]) -> None:
        self._all_to_all([as_bytes(send)] * self.size, as_bytes(receive), sizes)

    def _all_to_all(self, send: list[Tensor], receive: Tensor, sizes: list[int]) -> None:
        pieces = receive.split(sizes)
        pieces[self.rank].copy_(send[self.rank])
        waiting = []
        for step in range(1, self.size):
            to, source = (self.rank + step) % self.size, (self.rank - step) % self.size
            waiting.append(self._exchange(send[to], to, pieces[source], source))
        for wait in waiting:
            wait()

    def _exchange(self, send: Tensor, to: int, receive: Tensor, source: int) -> Callable[[], None]:
        return self._parent._exchange(send, self._members[to], receive, self._members[source])

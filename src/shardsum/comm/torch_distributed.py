"""Ranks of torch.distributed: Gloo between CPUs, NCCL between CUDA devices, on a process group of our own."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from ..errors import RankLost
from .base import DEFAULT_DEADLINE_SECONDS, Communicator, as_bytes

_STORE_SECONDS = 0.5  # for an answer, beside the deadline that has passed
_groups = itertools.count()  # every rank makes the same ones, in the same order


class TorchCommunicator(Communicator):
    """The ranks of one c10d process group (or of its backend), which need not be the global default group."""

    def __init__(
        self,
        group: Any,
        rank: int,
        size: int,
        transport: str = "gloo",
        deadline_seconds: float = DEFAULT_DEADLINE_SECONDS,
        store: Any = None,
    ) -> None:
        super().__init__(rank, size, deadline_seconds)
        self.transport = transport
        self._store = store
        self.group = group
        atexit.register(self.close)
        self._device: torch.device | None = None
        self._together: list[torch.device] = []
        if transport == "nccl":
            from torch.distributed import ProcessGroup

            # NCCL moves CUDA memory only: what lies elsewhere is taken there and back.
            self._device = torch.device("cuda", torch.cuda.current_device())
            # A process group wants to know of which of its backends' devices a group of messages is.
            self._together = [self._device] if isinstance(group, ProcessGroup) else []

    def close(self) -> None:
        super().close()
        self.group = None  # with the last reference its threads end; once Python stops they abort the process

    def _all_gather(self, send: Tensor, receive: Tensor, sizes: list[int]) -> None:
        send, receive = as_bytes(send), as_bytes(receive)
        # Gloo's own collective does not say for whom it waited; NCCL's takes equal sizes only.
        if self._device is None or len(set(sizes)) > 1:
            self._pairwise([send] * self.size, receive, sizes)
            return
        if sizes[0] == 0:
            return
        there, back = self._at_hand(send), self._at_hand(receive)
        self._wait(self.group.allgather([list(back.split(sizes))], [there]))
        _return(back, receive)

    def _all_to_all(self, send: list[Tensor], receive: Tensor, sizes: list[int]) -> None:
        self._pairwise(send, receive, sizes)

    def _exchange(self, send: Tensor, to: int, receive: Tensor, source: int) -> Callable[[], None]:
        send, receive = as_bytes(send), as_bytes(receive)
        there, back = self._at_hand(send), self._at_hand(receive)
        works = self._start([(to, there)] if send.nbytes else [], [(source, back)] if receive.nbytes else [])

        def wait() -> None:
            assert there is not None  # the message must live until it has left
            for peer, work in works:
                self._wait(work, peer)
            _return(back, receive)

        return wait

    def _pairwise(self, send: list[Tensor], receive: Tensor, sizes: list[int]) -> None:
        """Every rank's message to every other, of whatever sizes; its own is copied."""
        back = self._at_hand(receive)
        pieces = list(back.split(sizes))
        pieces[self.rank].copy_(send[self.rank])
        others = [(self.rank + step) % self.size for step in range(1, self.size)]
        sending = [(peer, self._at_hand(send[peer])) for peer in others if send[peer].nbytes]
        receiving = [(peer, pieces[peer]) for peer in reversed(others) if sizes[peer]]
        for peer, work in self._start(sending, receiving):
            self._wait(work, peer)
        _return(back, receive)

    def _start(
        self, sending: list[tuple[int, Tensor]], receiving: list[tuple[int, Tensor]]
    ) -> list[tuple[int, Any]]:
        if not sending and not receiving:
            return []
        works: list[tuple[int, Any]] = []
        peer = None
        try:
            if self._device is not None:  # one thing after the other: ranks would all receive, and none send
                self.group._start_coalescing(*self._together)
            for peer, piece in receiving:
                works.append((peer, self.group.recv([piece], peer, 0)))
            for peer, piece in sending:
                works.append((peer, self.group.send([piece], peer, 0)))
            if self._device is not None:
                return [(works[0][0], self.group._end_coalescing(*self._together))]
        except RuntimeError as failure:  # a peer that is known to be gone is no longer waited for
            raise self._lost_by(peer, failure) from failure
        return works

    def _wait(self, work: Any, peer: int | None = None) -> None:
        """Wait until it is done; with NCCL, only let what this rank computes from here on wait for it.

        A timeout would make NCCL hold up this thread; its group has its own, which ends the process.
        """
        try:
            if self._device is None:
                work.wait(timedelta(seconds=self.deadline_seconds))
            else:
                work.wait()
        except RuntimeError as failure:
            raise self._lost_by(peer, failure) from failure

    def _lost_by(self, peer: int | None, failure: RuntimeError) -> RankLost:
        """The error of a failed wait. The rank that was missed first is the one that all name, where there is a
        store to write it to: a rank that ends because it missed another is missed itself."""
        first = peer if self._store is None or peer is None else self._first_missed(peer)
        who = "a peer" if first is None else f"rank {first}"
        return self.lost(f"rank {self.rank} waited for {who}, which is gone or stuck: {failure}")

    def _first_missed(self, peer: int) -> int:
        """The rank that the store knows as missed first: this one if it knows none, or does not answer."""
        found = [peer]

        def ask() -> None:
            with contextlib.suppress(RuntimeError, ValueError):  # the store is gone, or holds no number
                found.append(int(self._store.compare_set("lost", "", str(peer))))

        # The store's own timeout does not end a wait for a host that is cut off (torch 2.13).
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(_STORE_SECONDS)
        return found[-1]

    def _at_hand(self, x: Tensor) -> Tensor:
        return x if self._device is None else x.to(self._device)


def _return(back: Tensor, receive: Tensor) -> None:
    if back is not receive:
        receive.copy_(back)


def connect_gloo(
    store: Any, rank: int, size: int, deadline_seconds: float, interfaces: Sequence[str] = ()
) -> TorchCommunicator:
    """A Gloo communicator over a c10d store, on these interfaces; by default on that of the host's own name."""
    from torch.distributed import PrefixStore, ProcessGroupGloo

    timeout = timedelta(seconds=deadline_seconds)
    options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    create = ProcessGroupGloo.create_device
    devices = [create(interface=name) for name in interfaces]
    options._devices = devices or [ProcessGroupGloo.create_default_device()]
    own = PrefixStore(f"shardsum {next(_groups)}", store)
    return TorchCommunicator(ProcessGroupGloo(own, rank, size, options), rank, size, "gloo", deadline_seconds, own)


def connect_nccl(store: Any, rank: int, size: int, deadline_seconds: float) -> TorchCommunicator:
    """An NCCL communicator over a c10d store, on this process's current CUDA device."""
    from torch.distributed import PrefixStore, ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=deadline_seconds)
    group = ProcessGroupNCCL(PrefixStore(f"shardsum {next(_groups)}", store), rank, size, options)
    return TorchCommunicator(group, rank, size, "nccl", deadline_seconds)

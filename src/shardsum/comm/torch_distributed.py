"""Ranks of torch.distributed: Gloo between CPUs, NCCL between CUDA devices, on a process group of our own."""

from __future__ import annotations

import atexit
import contextlib
import gc
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RankLost
from .environment import interfaces, not_come, rendezvous, share_cores, started_by_torchrun, whole_number
from .transport import DEFAULT_DEADLINE_SECONDS, Transport, as_bytes, fenced

_STORE_SECONDS = 0.5  # for an answer, beside the deadline that has passed
_START_SECONDS = 60.0  # ranks import torch at different speeds; that is no collective's deadline
# How long survivors wait for each other, where it is not known who is left, and how often they look.
_ANNOUNCE_SECONDS, _LOOK_SECONDS = 5.0, 0.005
_groups = itertools.count()  # every rank makes the same ones, in the same order


class TorchTransport(Transport):
    """The ranks of one c10d process group (or of its backend), which need not be the global default group."""

    def __init__(
        self,
        group: Any,
        rank: int,
        size: int,
        deadline_seconds: float = DEFAULT_DEADLINE_SECONDS,
        store: Any = None,
    ) -> None:
        """`store`: where ranks tell each other who was lost."""
        super().__init__(rank, size, deadline_seconds)
        self.group, self._store = group, store
        atexit.register(self.close)
        self._device: torch.device | None = None
        self._together: list[torch.device] = []

    def close(self) -> None:
        super().close()
        self.group = None  # with the last reference its threads end; once Python stops they abort the process

    def all_gather(self, send: Tensor, receive: Tensor, sizes: list[int]) -> None:
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

    def all_to_all(self, send: list[Tensor], receive: Tensor, sizes: list[int]) -> None:
        self._pairwise(send, receive, sizes)

    def exchange(self, send: Tensor, to: int, receive: Tensor, source: int) -> Callable[[], None]:
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


class GlooTransport(TorchTransport):
    """Gloo: CPUs of one host or many, through sockets."""

    name = "gloo"
    started_by = "process"

    def __init__(
        self,
        group: Any,
        rank: int,
        size: int,
        deadline_seconds: float = DEFAULT_DEADLINE_SECONDS,
        store: Any = None,
        interfaces: Sequence[str] = (),
    ) -> None:
        super().__init__(group, rank, size, deadline_seconds, store)
        self._interfaces = interfaces

    @classmethod
    def over(
        cls, store: Any, rank: int, size: int, deadline_seconds: float, interfaces: Sequence[str] = ()
    ) -> GlooTransport:
        """The ranks that meet in a c10d store, on these interfaces; by default on that of the host's own name."""
        from torch.distributed import PrefixStore

        own = PrefixStore(f"shardsum {next(_groups)}", store)
        return cls(
            _gloo_group(own, rank, size, deadline_seconds, interfaces),
            rank,
            size,
            deadline_seconds,
            own,
            interfaces,
        )

    def why_not_shrink(self) -> str | None:
        if self._store is not None:
            return None
        return (
            "a process group of the program's own has no store that ranks could meet in again: "
            "get the communicator from shardsum.connect or shardsum.launch."
        )

    def revoke(self) -> None:
        """The sockets close with the group's last reference: that is what the other ranks hear."""
        self.close()
        gc.collect()  # messages that were under way hold the group, and may be part of a traceback's circle

    def shrink(self) -> Transport:
        from torch.distributed import PrefixStore

        try:
            members = self._decide()
        except RuntimeError as failure:
            raise self.lost(
                f"rank {self.rank} can't go on: the store in which the ranks met is gone, as with rank 0 where "
                f"no torchrun holds it ({failure})."
            ) from failure
        if self.rank not in members:
            raise fenced(self.rank, members)
        rank, size = members.index(self.rank), len(members)
        own = PrefixStore("shrunk", self._store)
        group = _gloo_group(own, rank, size, max(self.deadline_seconds, _START_SECONDS), self._interfaces)
        return GlooTransport(group, rank, size, self.deadline_seconds, own, self._interfaces)

    def _decide(self) -> list[int]:
        """The ranks that are left: one rank's view of who has come, which the store makes that of all."""
        self._store.set(f"left {self.rank}", "1")
        end = time.monotonic() + _ANNOUNCE_SECONDS
        while True:
            here = [rank for rank in range(self.size) if self._store.check([f"left {rank}"])]
            lost = {int(self._store.get("lost"))} if self._store.check(["lost"]) else set()
            complete = len({*here} | lost) == self.size
            if complete or self._store.check(["members"]) or time.monotonic() > end:
                view = self._store.compare_set("members", "", ",".join(map(str, here)))
                return [int(rank) for rank in view.decode().split(",")]
            time.sleep(_LOOK_SECONDS)

    @classmethod
    def is_offered(cls) -> bool:
        return started_by_torchrun()

    @classmethod
    def connect(cls, deadline_seconds: float) -> Transport:
        share_cores()
        store, rank, size = rendezvous(cls.name, timedelta(seconds=deadline_seconds))
        return cls.over(store, rank, size, deadline_seconds, interfaces())

    @classmethod
    def join(cls, directory: Path, rank: int | None, size: int, deadline_seconds: float) -> Transport:
        from torch.distributed import FileStore

        assert rank is not None
        store = FileStore(str(directory / "store"), size)
        made = cls.over(store, rank, size, max(deadline_seconds, _START_SECONDS), ["lo"])
        made.deadline_seconds = deadline_seconds
        return made


def _gloo_group(store: Any, rank: int, size: int, timeout_seconds: float, interfaces: Sequence[str]) -> Any:
    from torch.distributed import ProcessGroupGloo

    options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(seconds=timeout_seconds)
    create = ProcessGroupGloo.create_device
    options._devices = [create(interface=name) for name in interfaces] or [
        ProcessGroupGloo.create_default_device()
    ]
    try:
        return ProcessGroupGloo(store, rank, size, options)
    except RuntimeError as error:
        raise not_come(rank, size, timeout_seconds, error) from error


class NcclTransport(TorchTransport):
    """NCCL: CUDA devices. What lies elsewhere is taken there and back."""

    name = "nccl"

    def __init__(
        self, group: Any, rank: int, size: int, deadline_seconds: float = DEFAULT_DEADLINE_SECONDS
    ) -> None:
        from torch.distributed import ProcessGroup

        super().__init__(group, rank, size, deadline_seconds)
        self.device = self._device = torch.device("cuda", torch.cuda.current_device())
        # A process group wants to know of which of its backends' devices a group of messages is.
        self._together = [self._device] if isinstance(group, ProcessGroup) else []

    @classmethod
    def is_offered(cls) -> bool:
        return started_by_torchrun() and torch.cuda.is_available()

    @classmethod
    def connect(cls, deadline_seconds: float) -> Transport:
        """This rank, on the process's current CUDA device."""
        device, devices = whole_number("LOCAL_RANK", 0), torch.cuda.device_count()
        if device >= devices:
            raise ValueError(
                f"LOCAL_RANK={device}, but this host has {devices} CUDA devices: start one rank for each."
            )
        from torch.distributed import PrefixStore, ProcessGroupNCCL

        share_cores()
        store, rank, size = rendezvous(cls.name, timedelta(seconds=deadline_seconds))
        torch.cuda.set_device(device)
        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=deadline_seconds)
        group = ProcessGroupNCCL(PrefixStore(f"shardsum {next(_groups)}", store), rank, size, options)
        return cls(group, rank, size, deadline_seconds)


def transport_over(group: Any) -> TorchTransport:
    """The transport of a process group of the program's own."""
    from torch.distributed import get_backend

    backend = str(get_backend(group))
    kind = NcclTransport if backend == NcclTransport.name else GlooTransport
    transport = kind(group, group.rank(), group.size())
    transport.name = backend
    return transport

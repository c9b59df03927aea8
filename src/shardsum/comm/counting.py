"""One rank of many without the others: what it sends is counted, and nothing moves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .transport import Transport, as_bytes


class CountingTransport(Transport):
    """No wire: one rank's code runs alone, as if there were `size` ranks that all do as it does.

    Where all ranks send as many bytes, each is taken to send what this one sends, so that an agreement succeeds;
    else what is received is zeros. Meta tensors stay meta.
    """

    name = "counting"

    def __init__(self, rank: int, size: int, device: torch.device | str = "cpu") -> None:
        super().__init__(rank, size)
        self.device = torch.device(device)

    def all_gather(self, send: Tensor, receive: Tensor, sizes: list[int]) -> None:
        self._arrive(as_bytes(send), as_bytes(receive), sizes)

    def all_to_all(self, send: list[Tensor], receive: Tensor, sizes: list[int]) -> None:
        self._arrive(send[self.rank], receive, sizes)

    def exchange(self, send: Tensor, to: int, receive: Tensor, source: int) -> Callable[[], None]:
        self._arrive(as_bytes(send), as_bytes(receive), [receive.nbytes])
        return lambda: None

    @staticmethod
    def _arrive(like: Tensor, receive: Tensor, sizes: list[int]) -> None:
        for piece in receive.split(sizes):
            if piece.nbytes == like.nbytes:
                piece.copy_(like)
            else:
                piece.zero_()

"""What a communicator keeps from one call to the next: working memory, and operations that are made once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import Tensor

from ..memory import kept_memory

T = TypeVar("T")
# Working memory up to this size is kept, of at most this many different sizes: the system takes longer to give
# 4 MB than to copy them.
BUFFER_BYTES, BUFFERS = 1 << 24, 8
# At most this many operations are prepared, on at most this much memory each, and in all.
PREPARED, PREPARED_BYTES, PREPARED_BYTES_IN_ALL = 64, 1 << 24, 1 << 26

Buffer = tuple[Tensor, list[Tensor]]


class FreshBuffers:
    """Working memory that is new at every call: the plain way."""

    def get(
        self, like: Tensor, count: int = 1, use: str = "receive", shape: tuple[int, ...] | None = None
    ) -> Buffer:
        """Working memory (count, *shape) with dtype and device of `like`, and its parts; whatever is in it."""
        shape = like.shape if shape is None else shape
        whole = kept_memory(count, *shape, dtype=like.dtype, device=like.device)
        return whole, list(whole.unbind())


class KeptBuffers(FreshBuffers):
    """Working memory that is the same at every call for one use, size, dtype and device."""

    def __init__(self) -> None:
        self._buffers: dict[Hashable, Buffer] = {}

    def get(
        self, like: Tensor, count: int = 1, use: str = "receive", shape: tuple[int, ...] | None = None
    ) -> Buffer:
        shape = like.shape if shape is None else shape
        key = (use, count, shape, like.dtype, like.device)
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = super().get(like, count, use, shape)
            if buffer[0].nbytes <= BUFFER_BYTES:
                if len(self._buffers) == BUFFERS:
                    self._buffers.clear()
                self._buffers[key] = buffer
        return buffer


class PreparedOperations:
    """What is made once by all ranks together and used at every call; bounded, and nothing is ever dropped.

    Making it may be an operation of all ranks (MPI's persistent requests). All ranks ask for the same things in
    the same order, so that they find the same things made, and the same ones refused once the place is taken.
    """

    def __init__(self, most: int = PREPARED) -> None:
        """`most`: how many are made; with 0 everything is done the plain way."""
        self._most, self._bytes_left = most, PREPARED_BYTES_IN_ALL
        self._operations: dict[Hashable, Any] = {}

    def get(self, key: Hashable, held_bytes: int, make: Callable[[], T]) -> T | None:
        """What `make` gave for this key, or gives now; None where it is to be done the plain way."""
        operation: T | None = self._operations.get(key)
        fits = held_bytes <= min(PREPARED_BYTES, self._bytes_left) and len(self._operations) < self._most
        if operation is None and fits:
            self._bytes_left -= held_bytes
            operation = self._operations[key] = make()
        return operation

    def clear(self) -> None:
        self._operations.clear()
        self._bytes_left = PREPARED_BYTES_IN_ALL

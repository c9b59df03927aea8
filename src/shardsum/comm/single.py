"""The one rank that is alone."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .transport import DEFAULT_DEADLINE_SECONDS, Transport, as_bytes


class SingleTransport(Transport):
    """The only rank there is: every operation is a copy."""

    name = "single"

    def __init__(self, deadline_seconds: float = DEFAULT_DEADLINE_SECONDS) -> None:
        super().__init__(0, 1, deadline_seconds)

    def all_gather(self, send: Tensor, receive: Tensor, sizes: list[int]) -> None:
        as_bytes(receive).copy_(as_bytes(send))

    def all_to_all(self, send: list[Tensor], receive: Tensor, sizes: list[int]) -> None:
        receive.copy_(send[0])

    def exchange(self, send: Tensor, to: int, receive: Tensor, source: int) -> Callable[[], None]:
        as_bytes(receive).copy_(as_bytes(send))
        return lambda: None

    @classmethod
    def is_offered(cls) -> bool:
        return True

    @classmethod
    def connect(cls, deadline_seconds: float) -> Transport:
        return cls(deadline_seconds)

"""Calls that are prepared once and made again, for the next layer or step: the fast path of every call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Generic, TypeVar

import torch

from .layouts import Layout

Call = TypeVar("Call")
# How many kinds of calls are remembered: more than models have kinds of layers.
CALLS = 8


class PreparedCalls(Generic[Call]):
    """The prepared calls of the last few kinds of call: `get` makes what it has not, the plain way.

    A call is known by everything that it is made of. Where that is something that may change (a tensor, an
    instance of a strategy), it is made anew at every call. Making one is no operation of several ranks, so that
    ranks may forget at different times.
    """

    def __init__(self) -> None:
        self._calls: dict[Hashable, Call] = {}

    def __deepcopy__(self, memo: Any) -> PreparedCalls[Call]:
        return PreparedCalls()

    def get(self, key: tuple[Hashable, ...], options: Mapping[str, Any], make: Callable[[], Call]) -> Call:
        """The call for a key and options: the one that `make` gave before, or gives now."""
        try:
            values = tuple([_exactly(value) for value in options.values()])
        except _MayChange:
            return make()
        # What inference mode makes can't be used outside it.
        known_by = (*key, torch.is_inference_mode_enabled(), *options, *values)
        call = self._calls.get(known_by)
        if call is None:
            if len(self._calls) == CALLS:
                del self._calls[next(iter(self._calls))]  # the oldest
            call = self._calls[known_by] = make()
        return call


class _MayChange(Exception):
    """Raised for a value, such as a tensor, that may change and stay the same object."""


def _exactly(value: object) -> Hashable:
    """What is equal for values that are equal and alike: 1, 1.0 and True are not."""
    if value is None or value is False or value is True or type(value) is str:
        return value, type(value)
    if type(value) is tuple:
        return tuple(map(_exactly, value))
    if type(value) in (int, float, Layout):
        return value, type(value)
    raise _MayChange

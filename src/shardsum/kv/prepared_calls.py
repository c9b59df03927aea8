"""Calls that are prepared once and made again for the next layer: a cache's fast path."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from ..layouts import Layout
from ..prepared import PreparedCall

# How many kinds of calls are remembered: more than models have kinds of layers.
CALLS = 8


class PreparedCalls:
    """The prepared calls of the last few kinds of call: `get` makes what it has not, the plain way.

    A call is known by everything that it is made of. Where that is something that may change (a tensor, an
    instance of a strategy), it is made anew at every call. Making one is no operation of several ranks, so that
    ranks may forget at different times.
    """

    def __init__(self) -> None:
        self._calls: dict[Hashable, PreparedCall] = {}

    def get(
        self, key: tuple[Hashable, ...], options: dict[str, Any], make: Callable[[], PreparedCall]
    ) -> PreparedCall:
        """The call for a key and options: the one that `make` gave before, or gives now."""
        try:
            key = (*key, *((name, _exactly(options[name])) for name in sorted(options)))
        except _MayChange:
            return make()
        call = self._calls.get(key)
        if call is None:
            if len(self._calls) == CALLS:
                del self._calls[next(iter(self._calls))]  # the oldest
            call = self._calls[key] = make()
        return call


class _MayChange(Exception):
    """Raised for a value, such as a tensor, that may change and stay the same object."""


def _exactly(value: object) -> Hashable:
    """What is equal for values that are equal and alike: 1, 1.0 and True are not."""
    if type(value) is tuple:
        return tuple(map(_exactly, value))
    if value is None or type(value) in (bool, int, float, str, Layout):
        return type(value), value
    raise _MayChange

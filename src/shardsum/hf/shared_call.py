"""A call that all ranks make: where it fails on one rank, it fails on all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..comm import Communicator, agree, mistakes_reach_all
from .cache import ShardedCache


class SharedCall:
    """What a session's ranks are doing together, if anything."""

    def __init__(self) -> None:
        self._mistakes: mistakes_reach_all | None = None

    @contextlib.contextmanager
    def over(self, cache: ShardedCache, comm: Communicator) -> Iterator[None]:
        """Surround a call that all ranks make over the cache, or a part of such a call.

        Wherever the exception comes, the others hear of it in this call, which ends with an agreement. The cache
        is left as it was.
        """
        if self._mistakes is not None:
            yield
            return
        length = cache.get_seq_length()
        try:
            with mistakes_reach_all(comm) as self._mistakes:
                yield
                agree(comm, {"call": "the end of a call of hf"})
        except BaseException:
            cache.cut(length)
            raise
        finally:
            self._mistakes = None

    def renew(self) -> None:
        """Hear that what all ranks do together is over: until the next, exceptions are this rank's own."""
        if self._mistakes is not None:
            self._mistakes.renew()

"""Copies of what is one rank's part of something: with memory of its own in this process, or not at all."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

from .errors import Unsupported


class OneRanksPart:
    """What `copy.deepcopy` copies, its memory too, on each rank by itself; it can't be saved or sent."""

    def __copy__(self) -> NoReturn:
        raise Unsupported(f"two {type(self).__name__}s can't share their memory: use copy.deepcopy.")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self)] = object.__new__(type(self))
        vars(copied).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return copied

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise Unsupported(
            f"a {type(self).__name__} can't be saved or sent to another process: it is one rank's part. "
            "Put its tokens into a new one there; in this process, copy.deepcopy copies it."
        )


class OnePerRank:
    """What a rank has one of: copies of what refers to it refer to the same; it can't be saved or sent."""

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise Unsupported(
            f"a {type(self).__name__} can't be saved or sent to another process: each rank makes its own there."
        )

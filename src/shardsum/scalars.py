"""Arguments that are one number, flag or name, checked without touching what is none of these."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

from torch import Tensor

from .errors import Unsupported
from .tensors import check_tensors

LARGEST_BITS = 40  # of positions: sums of a few stay within int64


def shown(value: object) -> str:
    """A wrong value in words: of a tensor its shape and dtype, since some can't be printed."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} of {value.dtype}"
    if isinstance(value, (list, tuple)):
        begin, end = "[]" if isinstance(value, list) else "()"
        return f"{begin}{', '.join(map(shown, value))}{',' if end == ')' and len(value) == 1 else ''}{end}"
    return repr(value) if value is None or isinstance(value, (bool, int, float, complex, str)) else _kind(value)


def flag(name: str, value: Any) -> bool:
    """The value, which is True or False. Raises: ValueError for anything else."""
    if value is not True and value is not False:
        raise ValueError(f"{name} must be True or False: got {shown(value)}.")
    return value


def whole(name: str, value: Any, bits: int = LARGEST_BITS) -> int:
    """The value as an int. Raises: ValueError for what is no whole number, or one of more bits."""
    _check(name, value)
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number: got {shown(value)}.") from None
    if not -(1 << bits) <= number < 1 << bits:
        raise ValueError(f"{name} must be between -2^{bits} and 2^{bits}: got {number}.")
    return number


def at_least(name: str, value: Any, least: int) -> int:
    """The value as an int that is not below `least`. Raises: ValueError for anything else."""
    number = whole(name, value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}: got {number}.")
    return number


def real(name: str, value: Any) -> float:
    """The value as a float. Raises: ValueError for what is no number."""
    _check(name, value)
    try:
        return float(operator.mul(value, 1.0))  # no string: that can't be multiplied
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{name} must be a number: got {shown(value)}.") from None


def one_of(name: str, value: Any, names: Collection[str]) -> str:
    """The value, which is one of these names. Raises: Unsupported for anything else."""
    if not isinstance(value, str) or value not in names:
        raise Unsupported(f"{name} must be {', '.join(names)}: got {shown(value)}.")
    return value


def _check(name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        check_tensors(**{name: value})


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"

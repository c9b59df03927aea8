"""Over how many tokens a model is asked whether its tokens meet: what it does by 16 at a time shows in 33."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

# What names a number of tokens in configurations and modules. A sliding window is a mask, asked by itself.
_OF_TOKENS = re.compile(
    r"stride|block|window|chunk|rate|ratio|segment|pool|compress|kernel|group|local|landmark|bucket|hop"
    r"|dilat|conv|shift|every|interval|period|span|patch|memory|merge|downsample|token"
)
_NOT_OF_TOKENS = re.compile(r"sliding_window|token_id|dropout|heads|vocab|num_key_value_groups")
LARGEST = 512  # tokens at a time: more would make the questions dearer than the work that they are asked for


def longest_stretch(model: PreTrainedModel, positions: int) -> int:
    """Return so many tokens that each number of them that the model names is crossed twice and ends before."""
    named = [number for number in _numbers(model) if 1 < number <= LARGEST]
    return min(2 * max(named, default=0) + 3, positions)


def half_of(length: int) -> list[int]:
    """Choose about half of the positions without a pattern, the same ones everywhere."""
    return [t for t in range(length) if _mixed(t) & 1]


def _mixed(number: int) -> int:
    """Mix the bits of a number. Source: the finalizer of MurmurHash3 (Appleby), in 32 bits."""
    number = number * 0x9E3779B1 & 0xFFFFFFFF
    number = (number ^ number >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    number = (number ^ number >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return number ^ number >> 16


def _numbers(model: PreTrainedModel) -> Iterator[int]:
    """All whole numbers that configurations and modules have under a name that may count tokens."""
    yield from _counts(model.config.to_dict())
    for module in model.modules():
        yield from _counts({name: value for name, value in vars(module).items() if _may_count(value)})


def _may_count(value: object) -> bool:
    return isinstance(value, (int, list, tuple, dict)) and not isinstance(value, nn.Module)


def _counts(values: Any, named: bool = False) -> Iterator[int]:
    if isinstance(values, dict):
        for name, value in values.items():
            says = _OF_TOKENS.search(str(name)) and not _NOT_OF_TOKENS.search(str(name))
            yield from _counts(value, bool(says) or (named and isinstance(value, int)))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _counts(value, named)
    elif named and isinstance(values, int) and not isinstance(values, bool):
        yield values

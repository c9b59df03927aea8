"""What the fuzz tests of frames and files share: how many, how they are spoiled, and what memory was asked for."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

SOME = 1_500
LATER = pytest.param(100_000, 2, marks=[pytest.mark.nightly, pytest.mark.timeout(3000)])
# Two descriptions of 64 KB, decoded, parsed and quoted in one message.
CAP_BYTES = 8 << 20

EXTREMES = (0, 1, 2, 255, 256, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, (1 << 63) - 1)


def mutated(draw: random.Random, whole: bytes, header_bytes: int) -> bytes:
    """A file with a wrong header, a wrong length or neither end."""
    data, kind = bytearray(whole), draw.randrange(4)
    if kind == 0:
        return bytes(data[: draw.randrange(len(data))])
    if kind == 1:
        data[:8] = struct.pack("<Q", draw.choice(EXTREMES) if draw.random() < 0.5 else draw.randrange(1 << 64))
    for _ in range(draw.randint(1, 6)):
        data[draw.randrange(header_bytes)] = draw.choice(b'0123456789-,:{}[]"xF\x00\xff')
    return bytes(data)


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """The largest tensor that was made so far, or what Python held at most, in bytes."""
    largest = 0
    empty = torch.empty

    def counted(*shape: Any, **options: Any) -> Tensor:
        nonlocal largest
        largest = max(largest, empty(*shape, **{**options, "device": "meta"}).nbytes)
        assert largest < CAP_BYTES
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", counted)
    tracemalloc.start()
    yield lambda: max(largest, tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()

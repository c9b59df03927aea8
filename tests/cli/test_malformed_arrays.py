"""Malformed .npy and .safetensors files: an error of one line, and no memory that they ask for."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from shardsum.arrays import open_array

from ..malformed import CAP_BYTES, EXTREMES, LATER, SOME, allocated, mutated

__all__ = ["allocated"]

DTYPES = ("<f4", "<f8", "|O", "|V2147483647", "<U9", "<f16", ">f4", "|S0", "<f1")


def _header(draw: random.Random) -> bytes:
    """Of a .npy file, announcing whatever it likes."""
    shape = tuple(draw.choice((*EXTREMES, -1, True)) for _ in range(draw.choice((0, 1, 2, 3, 70))))
    words = f"{{'descr': {draw.choice(DTYPES)!r}, 'fortran_order': {draw.choice((True, 0))}, 'shape': {shape}}}"
    words = draw.choice(
        (words, words, words, "(" * 300, "-" * 9000 + "1", "9" * 5000, "[" * 20_000, "\0", words[:9])
    )
    version = draw.choice((1, 1, 2, 3, 4))
    size = draw.choice(EXTREMES) if draw.random() < 0.2 else len(words)
    size_field = struct.pack("<H", size % (1 << 16)) if version == 1 else struct.pack("<I", size % (1 << 32))
    return b"\x93NUMPY" + bytes((version, 0)) + size_field + words.encode()


def _fuzz(count: int, seed: int, path: Path, spoiled: Callable[[random.Random], bytes]) -> int:
    """How many of so many files were refused, each in one line; no tensor of another is larger than its file."""
    draw = random.Random(seed)
    refused = taken = 0
    for _ in range(count):
        path.write_bytes(spoiled(draw))
        try:
            array = open_array(str(path))
        except ValueError as error:
            refused += str(path) in str(error) and "\n" not in str(error)
        else:
            taken += array.untyped_storage().nbytes() <= path.stat().st_size
    assert refused + taken == count
    return refused


@pytest.mark.parametrize(("count", "seed"), [(SOME, 1), LATER])
@pytest.mark.parametrize("kind", ["npy", "npy headers", "safetensors"])
def test_malformed_arrays(kind: str, count: int, seed: int, tmp_path: Path, allocated: Callable[[], int]) -> None:
    path = tmp_path / f"a.{kind.split()[0]}"
    if kind == "safetensors":
        safetensors.torch.save_file({"a": torch.zeros(2, 3)}, path)
        header_bytes = 8 + struct.unpack_from("<Q", path.read_bytes())[0]
    else:
        np.save(path, np.zeros((2, 3), dtype=np.float32))
        header_bytes = 128
    whole = path.read_bytes()
    spoil: dict[str, Callable[[random.Random], bytes]] = {
        "npy headers": lambda draw: _header(draw) + bytes(draw.choice((0, 64, 4096))),
    }
    spoiled = spoil.get(kind, lambda draw: mutated(draw, whole, header_bytes))
    assert _fuzz(count, seed, path, spoiled) > count // 3
    assert allocated() < CAP_BYTES


@pytest.mark.parametrize("descr", ["|S0", "|U0", "|V0", "<f4"])
def test_a_negative_size_is_no_division_by_nothing(descr: str, tmp_path: Path) -> None:
    """Of elements without bytes, which ended the process."""
    words = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': (-1,)}}"
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(words)) + words.encode() + bytes(64))
    with pytest.raises(ValueError, match="can't read"):
        open_array(str(path))

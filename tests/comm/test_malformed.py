"""Malformed frames of another rank, and malformed files of a launch: an error, and no memory that they ask for."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shardsum import AttentionState
from shardsum.comm import Communicator, SingleTransport, agree
from shardsum.errors import Mismatch
from shardsum.launching import wire
from shardsum.launching.failures import read_failure

from ..malformed import CAP_BYTES, EXTREMES, LATER, SOME, allocated, mutated

__all__ = ["allocated"]

# Written down a second time: what travels, with a CRC-32 behind the digest and behind the lengths.
FIELDS, LENGTHS = struct.Struct("<4sBBHqq16s"), struct.Struct("<qq")
FAILED, TEXT_BYTES, DIGEST = 2, 3, 6  # places among the fields
CALL = {"call": "attention", "causal": True, "shapes": [1, 2, 3]}


class Wire(SingleTransport):
    """Rank 0 of two; what the other one sends is made by functions, in order, of what this one sends."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 2
        self.others: list[Callable[[bytes, int], bytes]] = []
        self.heard: list[bytes] = []

    def all_gather(self, send: Tensor, receive: Tensor, sizes: list[int]) -> None:
        own = send.numpy().tobytes()
        other = self.others.pop(0)(own, sizes[1])
        assert len(other) == sizes[1]
        self.heard.append(other)
        receive.view(-1).copy_(torch.frombuffer(bytearray(own + other), dtype=torch.uint8))


def _fields(frame: bytes) -> list[Any]:
    return [*FIELDS.unpack_from(frame), *_lengths(frame)]


def _lengths(frame: bytes) -> tuple[Any, ...]:
    return LENGTHS.unpack_from(frame, FIELDS.size + 4)


def _sealed(fields: list[Any]) -> bytes:
    parts = FIELDS.pack(*fields[:-2]), LENGTHS.pack(*fields[-2:])
    return b"".join(part + zlib.crc32(part).to_bytes(4, "little") for part in parts)


def _frame(draw: random.Random, own: bytes) -> bytes:
    """A header that is not what a rank which makes the same call would send."""
    kind = draw.randrange(5)
    if kind == 0:
        return draw.randbytes(64)
    if kind == 1:  # bits turned over
        frame = bytearray(own)
        for _ in range(draw.randint(1, 8)):
            frame[draw.randrange(64)] ^= 1 << draw.randrange(8)
        return bytes(frame)
    if kind == 2:  # shifted, as where something was sent before
        at = draw.randrange(1, 64)
        return own[at:] + own[:at]
    fields = _fields(own)
    for place in draw.sample(range(2, 9), draw.randint(1, 3)):  # whole and with its check, but not true
        fields[place] = _field(draw, place)
    return _sealed(fields)


def _field(draw: random.Random, place: int) -> Any:
    if place == DIGEST:
        return draw.randbytes(16)
    bits = {FAILED: 8, TEXT_BYTES: 16}.get(place, 63)
    value = draw.choice([*(extreme for extreme in EXTREMES if extreme < 1 << bits), draw.getrandbits(bits)])
    return value if bits < 63 or draw.random() < 0.5 else ~value


def _description(draw: random.Random, own: bytes, size: int) -> bytes:
    words = draw.choice(
        [
            b"[" * size,
            b'{"a":' * size,
            b"9" * size,
            b"[1, 2]",
            b"null",
            b'{"causal": NaN, "\\ud800": 1e999}',
            b'{"call": {"call": [[1], {"x": null}]}}',
            b"\xff\xfe\x00" * size,
            draw.randbytes(size),
            own,
            own.replace(b"true", b"null"),
        ]
    )
    return words[:size].ljust(size)


def _fuzz_agreement(count: int, seed: int) -> dict[str, int]:
    """Call after call against a malformed frame, each followed by one in which all is well."""
    draw = random.Random(seed)
    other_rank = Wire()
    comm = Communicator(other_rank)
    outcomes = {"agreed": 0, "refused": 0, "mismatch": 0}
    for _ in range(count):
        other_rank.heard = []
        other_rank.others = [lambda own, size: _frame(draw, own), lambda own, size: _description(draw, own, size)]
        try:
            lengths = agree(comm, CALL, 5, 7)
        except Mismatch as error:
            said = str(error)
            outcomes["refused" if "malformed" in said or "protocol" in said else "mismatch" if said else ""] += 1
        else:
            assert lengths == [(5, 7), _lengths(other_rank.heard[0])]
            assert min(lengths[1]) >= 0
            assert max(lengths[1]) <= 1 << 40
            outcomes["agreed"] += 1
        other_rank.others = [lambda own, size: own]
        assert agree(comm, CALL, 5, 7) == [(5, 7)] * 2
    return outcomes


@pytest.mark.parametrize(("count", "seed"), [(SOME, 1), LATER])
def test_malformed_headers_and_descriptions(count: int, seed: int, allocated: Callable[[], int]) -> None:
    outcomes = _fuzz_agreement(count, seed)
    assert min(outcomes.values()) > count // 100, outcomes
    assert allocated() < CAP_BYTES


def test_no_turned_bit_of_a_header_is_believed() -> None:
    for bit in range(512):
        other_rank = Wire()
        comm = Communicator(other_rank)
        other_rank.others = [
            lambda own, size, bit=bit: (int.from_bytes(own, "little") ^ 1 << bit).to_bytes(64, "little")
        ]
        with pytest.raises(Mismatch, match=r"^rank 1 (sent a malformed header|does not speak)"):
            agree(comm, CALL, 5, 7)


def test_descriptions_that_differ_where_they_are_cut_are_told_apart() -> None:
    """Beyond 64 KB only the digest knows."""
    other_rank = Wire()
    comm = Communicator(other_rank)

    def other(own: bytes, size: int) -> bytes:
        return _sealed([*_fields(own)[:DIGEST], b"another digest..", 0, 0])

    other_rank.others = [other, lambda own, size: own]
    with pytest.raises(Mismatch, match="too long to compare"):
        agree(comm, {"sizes": [7] * 70_000})


@pytest.mark.parametrize("epoch", [1 << 63, 1.5, "second"])
def test_an_epoch_that_is_no_number_of_64_bits_is_refused_on_every_rank(epoch: Any) -> None:
    other_rank = Wire()
    comm = Communicator(other_rank)
    comm.epoch = epoch
    failed: list[int] = []

    def other(own: bytes, size: int) -> bytes:
        failed.append(_fields(own)[FAILED])
        return own

    other_rank.others = [other, lambda own, size: own]
    with pytest.raises((ValueError, TypeError)):
        agree(comm, CALL)
    assert failed == [1]


def _fuzz_values(count: int, seed: int, path: Path) -> int:
    draw = random.Random(seed)
    value = {
        "state": AttentionState(torch.zeros(1, 2, 3), torch.zeros(1, 2)),
        "more": ({"tuple": [1]}, [True, "x"]),
    }
    wire.save(path, value)
    whole = path.read_bytes()
    header_bytes = 8 + struct.unpack_from("<Q", whole)[0]
    refused = taken = 0
    for _ in range(count):
        path.write_bytes(mutated(draw, whole, header_bytes))
        try:
            wire.load(path)
        except ValueError as error:
            refused += str(path) in str(error)
        else:
            taken += 1
    assert refused + taken == count
    return refused


@pytest.mark.parametrize(("count", "seed"), [(SOME, 1), LATER])
def test_malformed_values(count: int, seed: int, tmp_path: Path, allocated: Callable[[], int]) -> None:
    """What `launch` reads back is a value, or a ValueError that names the file."""
    assert _fuzz_values(count, seed, tmp_path / "result.0") > count // 2
    assert allocated() < CAP_BYTES


@pytest.mark.parametrize("name", ["exec", "eval", "print", "__import__", "exit", "str", "no such thing"])
def test_a_report_names_an_error_and_calls_nothing_else(name: str, tmp_path: Path) -> None:
    message = f"open({str(tmp_path / 'called')!r}, 'w')"
    report = {"module": "builtins", "name": name, "message": message, "traceback": ""}
    (tmp_path / "error.0").write_text(json.dumps(report))
    failure = read_failure(tmp_path, 0, None)
    assert failure is not None
    assert (type(failure[1]), str(failure[1])) == (RuntimeError, f"{name}: {message}")
    assert not (tmp_path / "called").exists()

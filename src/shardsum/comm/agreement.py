"""Agreement: before any payload moves, the ranks find out whether they make the same call.

One all-gather of a 64-byte header, the same collective whatever the call. Ranks that entered different calls,
or the same one with other arguments, all see so in the headers, and all raise the same error.
"""

from __future__ import annotations

import hashlib
import json
import operator
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import Mismatch
from .base import Communicator

# Magic, version, failed, call number, epoch, description bytes, digest: alike on all ranks where all is well. Then
# q_len and kv_len, and the CRC-32 of all that.
_HEADER = struct.Struct("<4sHHqqI16sqq")
_ALIKE_BYTES = 44
_CHECK, _LENGTHS_AND_CHECK = struct.Struct("<I"), struct.Struct("<qqI")
_FRAME_BYTES = _HEADER.size + _CHECK.size
_DIGEST_BYTES = 16
_encode, _decode = json.JSONEncoder(sort_keys=True).encode, json.JSONDecoder().raw_decode
_MAGIC, _VERSION = b"ssum", 4
# What a header may announce. Positions of a longer sequence would be 8 TB by themselves.
_MAX_DESCRIPTION_BYTES, _MAX_LENGTH, _MAX_CALLS = 1 << 16, 1 << 40, 1 << 62


class Description:
    """What must be equal on all ranks: values as JSON text, and the call's name behind them, with their digest.

    Many calls have the same values and other names: `called` encodes nothing anew.
    """

    def __init__(self, text: bytes, hashed: Any) -> None:
        """`hashed`: the hash object of the whole text, of which no more than a part is sent."""
        self.text = text[:_MAX_DESCRIPTION_BYTES]
        self.text_bytes, self.digest = len(self.text), hashed.digest()
        self._hashed = hashed

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Description:
        """Raises: TypeError, ValueError where these are no JSON values."""
        return cls._of_text(_encode(values))

    @classmethod
    def of_error(cls, error: Exception) -> Description:
        """What takes the place of a call that its own rank refuses."""
        return cls._of_text(f"{type(error).__name__}: {error}")

    @classmethod
    def _of_text(cls, text: str) -> Description:
        return cls(text.encode(), hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES))

    def called(self, name: str) -> Description:
        """The same values of a call of that name, where none has been given yet."""
        hashed, called = self._hashed.copy(), name.encode()
        hashed.update(called)
        return Description(self.text + called, hashed)


class _Header(NamedTuple):
    """The fields of a frame, but for its check."""

    magic: bytes
    version: int
    failed: int
    number: int
    epoch: int
    text_bytes: int
    digest: bytes
    q_len: int
    kv_len: int


def agree(
    comm: Communicator,
    call: Mapping[str, Any] | Description,
    q_len: int = 0,
    kv_len: int = 0,
    error: Exception | None = None,
) -> list[tuple[int, int]]:
    """Every rank's (q_len, kv_len), once all ranks were found to make the same `call`.

    `call` names every argument that must be equal, as JSON values. A rank whose own arguments are wrong passes
    its `error` instead of leaving the others to wait. Calls are counted, so that a rank which gave one up, and is
    at another than the others, is found too; so is one whose `comm.epoch` is another.
    Traffic: 64 bytes to each other rank; a second all-gather, of the descriptions, only on a mismatch.
    Raises: Mismatch, the same on every rank, naming the argument, its values and the ranks; `error` where every
    rank gave its own.
    """
    comm.calls += 1
    described, epoch = _NOTHING, 0
    if error is None:
        try:
            described = call if isinstance(call, Description) else Description.of(call)
            epoch = _epoch(comm)
        except (TypeError, ValueError) as mistake:
            error = mistake
    if comm.size == 1:
        if error is not None:
            raise error
        return [(q_len, kv_len)]
    if error is not None:
        described = Description.of_error(error)
    own, everyones, gather = comm.frames(_FRAME_BYTES)
    alike = _MAGIC, _VERSION, error is not None, comm.calls, epoch, described.text_bytes, described.digest
    header = _HEADER.pack(*alike, q_len, kv_len)
    own[:] = header + _CHECK.pack(zlib.crc32(header))
    gather()
    together = everyones.tobytes()
    frames = [together[start : start + _FRAME_BYTES] for start in range(0, len(together), _FRAME_BYTES)]
    if error is None and [frame[:_ALIKE_BYTES] for frame in frames].count(header[:_ALIKE_BYTES]) == comm.size:
        return [_lengths(frame, rank) for rank, frame in enumerate(frames)]
    headers = [_read(frame, rank) for rank, frame in enumerate(frames)]
    texts = _gather_descriptions(comm, described.text, [header.text_bytes for header in headers])
    numbers, epochs = [header.number for header in headers], [header.epoch for header in headers]
    failed = [rank for rank, header in enumerate(headers) if header.failed]
    comm.calls = max(numbers)
    if error is not None and len(failed) == comm.size:
        raise error
    if failed:
        raise Mismatch("; ".join(f"rank {rank} could not take part: {texts[rank]}" for rank in failed)) from error
    found = [*_unequal("call number", numbers), *_unequal("epoch", epochs), *_differences(texts)]
    raise Mismatch(" ".join(found) or _TOO_LONG)


_NOTHING = Description.of({})
_TOO_LONG = "the ranks made different calls, too long to compare argument by argument."


def _epoch(comm: Communicator) -> int:
    epoch = operator.index(comm.epoch)
    if not -(1 << 63) <= epoch < 1 << 63:
        raise ValueError(f"comm.epoch must fit into 64 bits: got {epoch}.")
    return epoch


def _read(frame: bytes, rank: int) -> _Header:
    """A rank's header, before anything is made of the sizes in it. Raises: Mismatch."""
    header = _Header._make(_HEADER.unpack_from(frame))
    if header.magic != _MAGIC or header.version != _VERSION:
        raise Mismatch(f"rank {rank} does not speak shardsum's protocol version {_VERSION}.")
    _lengths(frame, rank)
    if header.failed > 1 or not 0 < header.number < _MAX_CALLS or header.text_bytes > _MAX_DESCRIPTION_BYTES:
        raise _malformed(rank)
    return header


def _lengths(frame: bytes, rank: int) -> tuple[int, int]:
    """A header's q_len and kv_len, once its check was found to be right. Raises: Mismatch."""
    q_len, kv_len, check = _LENGTHS_AND_CHECK.unpack_from(frame, _ALIKE_BYTES)
    right = 0 <= q_len <= _MAX_LENGTH and 0 <= kv_len <= _MAX_LENGTH
    if not right or check != zlib.crc32(frame[: _HEADER.size]):
        raise _malformed(rank)
    return q_len, kv_len


def _malformed(rank: int) -> Mismatch:
    return Mismatch(f"rank {rank} sent a malformed header.")


def _gather_descriptions(comm: Communicator, description: bytes, sizes: Sequence[int]) -> list[str]:
    part = torch.frombuffer(bytearray(description), dtype=torch.uint8)
    parts = comm.all_gather(part, [(size,) for size in sizes])
    return [part.numpy().tobytes().decode(errors="replace") for part in parts]


def _differences(texts: Sequence[str]) -> list[str]:
    """One sentence per argument that is not the same on all ranks."""
    if len(set(texts)) == 1:
        return []
    try:
        calls = [_parsed(text) for text in texts]
        names = sorted({name for call in calls for name in call})
        return [sentence for name in names for sentence in _unequal(name, [call.get(name) for call in calls])]
    except (ValueError, TypeError, AttributeError, RecursionError):  # cut at the cap, or no description at all
        return [_TOO_LONG]


def _parsed(text: str) -> dict[str, Any]:
    """The values of a description, and its call's name, which stands behind them, as one more."""
    values, end = _decode(text)
    return {"call": text[end:], **values} if text[end:] else values


def _unequal(name: str, values: Sequence[Any]) -> list[str]:
    """The sentence about values that are not the same on all ranks, if they are not."""
    by_value: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        by_value.setdefault(json.dumps(value), []).append(rank)
    if len(by_value) == 1:
        return []
    listed = ", ".join(f"{value} on rank {_listed(ranks)}" for value, ranks in by_value.items())
    return [f"{name} must be the same on every rank: got {listed}."]


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def agree_on(
    comm: Communicator, describe: Callable[[], dict[str, Any]], q: Tensor, k: Tensor, dim: int | None = 2
) -> list[tuple[int, int]]:
    """Every rank's lengths of q and k along `dim` (None: their elements), once all gave the same description.

    An exception of `describe`, the caller's mistake on this rank, reaches every rank instead of a hang.
    """
    description: dict[str, Any] = {}
    error: Exception | None = None
    lengths = (0, 0)
    try:
        description = describe()
        lengths = (q.numel(), k.numel()) if dim is None else (q.shape[dim], k.shape[dim])
    except Exception as mistake:  # noqa: BLE001 (raised again here, once the others know)
        error = mistake
    return agree(comm, description, *lengths, error)

"""Agreement: before any payload moves, the ranks find out whether they make the same call.

One all-gather of a 64-byte header, the same collective whatever the call. Ranks that entered different calls,
or the same one with other arguments, all see so in the headers, and all raise the same error.
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import Mismatch
from ..memory import kept_memory
from .communicator import Communicator

# The fields of a _Header, alike on all ranks where all is well; q_len and kv_len; and behind each its CRC-32.
_HEADER, _LENGTHS, _CHECK_BYTES = struct.Struct("<4sBBHqq16s"), struct.Struct("<qq"), 4
_HEADER_BYTES = _HEADER.size + _CHECK_BYTES
_FRAME_BYTES = _HEADER_BYTES + _LENGTHS.size + _CHECK_BYTES
_DIGEST_BYTES = 16
_encode, _decode = json.JSONEncoder(sort_keys=True).encode, json.JSONDecoder().raw_decode
_MAGIC, _VERSION = b"ssum", 5
# What a header may announce. Positions of a longer sequence would be 8 TB by themselves.
_MAX_DESCRIPTION_BYTES, _MAX_LENGTH, _MAX_CALLS = (1 << 16) - 1, 1 << 40, 1 << 62


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
        """Return the description of a call of that name with these values, which have no name yet."""
        hashed, called = self._hashed.copy(), name.encode()
        hashed.update(called)
        return Description(self.text + called, hashed)


class _Header(NamedTuple):
    """What a rank says of its call."""

    magic: bytes
    version: int
    failed: int
    text_bytes: int
    number: int
    epoch: int
    digest: bytes


class mistakes_reach_all:  # named as it reads in a `with`, as contextlib.suppress is
    """Around what a rank does before the ranks have agreed: an exception inside reaches all of them.

    The other ranks raise Mismatch, which names it, at their next agreement, in place of waiting for this one. Here
    the exception itself is raised where every rank has one, else that Mismatch, from the exception.
    An exception that comes when the ranks have agreed inside the block is left as it is: no rank waits for this
    one in that agreement any more. So blocks may be nested, and a block around several agreed calls says `renew()`
    when one of them is over.
    Traffic: none without an exception; then that of an agreement that fails.
    """

    __slots__ = ("_calls", "_comm")

    def __init__(self, comm: Communicator) -> None:
        self._comm, self._calls = comm, comm.calls

    def __enter__(self) -> mistakes_reach_all:
        return self

    def renew(self) -> None:
        """Go on after an agreed call inside the block: every rank has what it needed of this one."""
        self._calls = self._comm.calls

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and self._comm.calls == self._calls:
            _announce(self._comm, error)


def agree(
    comm: Communicator, call: Mapping[str, Any] | Description, q_len: int = 0, kv_len: int = 0
) -> list[tuple[int, int]]:
    """Every rank's (q_len, kv_len), once all ranks were found to make the same `call`.

    `call` names every argument that must be equal, as JSON values. What a rank finds wrong before it comes here it
    finds inside `mistakes_reach_all`. Calls are counted, so that a rank which gave one up, and is at another than
    the others, is found too; so is one whose `comm.epoch` is another.
    Traffic: 64 bytes to each other rank; a second all-gather, of the descriptions, only on a mismatch.
    Raises: Mismatch, the same on every rank, naming the argument, its values and the ranks.
    """
    try:  # as `mistakes_reach_all` does it, without an object for each call
        description = call if isinstance(call, Description) else Description.of(call)
        header = _header(description, False, comm.calls + 1, comm.epoch)
    except Exception as error:
        _announce(comm, error)
        raise
    comm.calls += 1
    if comm.size == 1:
        return [(q_len, kv_len)]
    together = _gather_frames(comm, header, _packed_lengths(q_len, kv_len))
    if lengths := _lengths_behind(header, together):
        return lengths.copy()
    mismatch = _mismatch(comm, description, together)
    assert mismatch is not None, "this rank has no mistake"
    raise mismatch


def _announce(comm: Communicator, error: Exception) -> None:
    """Take part in the agreement that the other ranks are in with this rank's mistake.

    Raises: Mismatch, as on all ranks, unless each has a mistake of its own.
    """
    comm.calls += 1
    if comm.size == 1:
        return
    description = Description.of_error(error)
    together = _gather_frames(comm, _header(description, True, comm.calls), _packed_lengths(0, 0))
    mismatch = _mismatch(comm, description, together)
    if mismatch is not None:
        raise mismatch from error


def _gather_frames(comm: Communicator, header: bytes, lengths: bytes) -> bytes:
    """All ranks' frames, one after another."""
    prepared = comm.prepared.get("agreement", comm.size * _FRAME_BYTES, lambda: PreparedFrames(comm))
    frame = header + lengths
    return gather_frames(comm, frame) if prepared is None else prepared.gather(frame)


def gather_frames(comm: Communicator, frame: bytes) -> bytes:
    """All ranks' frames in memory that is new: the plain way."""
    part = torch.frombuffer(bytearray(frame), dtype=torch.uint8)
    return torch.cat(comm.all_gather(part)).numpy().tobytes()


class PreparedFrames:
    """All ranks' frames, gathered again and again in the same memory by an operation that was made once."""

    def __init__(self, comm: Communicator) -> None:
        frames = kept_memory(comm.size, _FRAME_BYTES, dtype=torch.uint8)
        self._own, self._everyones = frames[comm.rank].numpy().data, frames.numpy().data
        self._gather = comm.prepare_all_gather(frames)

    def gather(self, frame: bytes) -> bytes:
        self._own[:] = frame
        self._gather()
        return self._everyones.tobytes()


def _mismatch(comm: Communicator, description: Description, frames: bytes) -> Mismatch | None:
    """What is raised, alike on all ranks, where the frames are not alike; None where each tells of a mistake.

    Raises: Mismatch where a frame can't be read.
    """
    starts = range(0, len(frames), _FRAME_BYTES)
    headers = [_read(frames[at : at + _FRAME_BYTES], rank) for rank, at in enumerate(starts)]
    texts = _gather_descriptions(comm, description.text, [header.text_bytes for header in headers])
    numbers, epochs = [header.number for header in headers], [header.epoch for header in headers]
    failed = [rank for rank, header in enumerate(headers) if header.failed]
    comm.calls = max(numbers)
    if len(failed) == comm.size:
        return None
    if failed:
        return Mismatch("; ".join(f"rank {rank} could not take part: {texts[rank]}" for rank in failed))
    sentences = [*_unequal("call number", numbers), *_unequal("epoch", epochs), *_differences(texts)]
    return Mismatch(" ".join(sentences) or _TOO_LONG)


_TOO_LONG = "the ranks made different calls, too long to compare argument by argument."


def _header(described: Description, failed: bool, number: int, epoch: int = 0) -> bytes:
    """A header with its check. Raises: ValueError for an epoch that can't be sent."""
    try:
        fields = _MAGIC, _VERSION, failed, described.text_bytes, number, epoch, described.digest
        return _with_check(_HEADER.pack(*fields))
    except struct.error:
        raise ValueError(f"comm.epoch must be a whole number of 64 bits: got {epoch!r}.") from None


def _with_check(fields: bytes) -> bytes:
    """The fields and their CRC-32."""
    return fields + zlib.crc32(fields).to_bytes(_CHECK_BYTES, "little")


# Most calls have the lengths of the one before: they are written and read once.
@functools.lru_cache
def _packed_lengths(q_len: int, kv_len: int) -> bytes:
    return _with_check(_LENGTHS.pack(q_len, kv_len))


@functools.lru_cache
def _lengths(*packed: bytes) -> list[tuple[int, int]] | None:
    """Every rank's q_len and kv_len; None where one has none."""
    lengths = []
    for part in packed:
        if _with_check(part[: _LENGTHS.size]) != part:
            return None
        q_len, kv_len = _LENGTHS.unpack_from(part)
        if not (0 <= q_len <= _MAX_LENGTH and 0 <= kv_len <= _MAX_LENGTH):
            return None
        lengths.append((q_len, kv_len))
    return lengths


def _lengths_behind(header: bytes, frames: bytes) -> list[tuple[int, int]] | None:
    """Every rank's lengths if each frame is this header and then lengths that are right, else None."""
    lengths = []
    for start in range(0, len(frames), _FRAME_BYTES):
        end_of_header = start + _HEADER_BYTES
        if frames[start:end_of_header] != header:
            return None
        lengths.append(frames[end_of_header : start + _FRAME_BYTES])
    return _lengths(*lengths)


def _read(frame: bytes, rank: int) -> _Header:
    """A rank's header, before anything is made of the sizes in it. Raises: Mismatch."""
    header = _Header._make(_HEADER.unpack_from(frame))
    if header.magic != _MAGIC or header.version != _VERSION:
        raise Mismatch(f"rank {rank} does not speak shardsum's protocol version {_VERSION}.")
    whole = _with_check(frame[: _HEADER.size]) == frame[:_HEADER_BYTES]
    right = header.failed <= 1 and 0 < header.number < _MAX_CALLS
    if not whole or not right or _lengths(frame[_HEADER_BYTES:]) is None:
        raise Mismatch(f"rank {rank} sent a malformed header.")
    return header


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
    with mistakes_reach_all(comm):
        description = describe()
        lengths = (q.numel(), k.numel()) if dim is None else (q.shape[dim], k.shape[dim])
    return agree(comm, description, *lengths)

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
from typing import Any

import torch
from torch import Tensor

from ..errors import Mismatch
from .base import Communicator

# Magic, version, failed, call number, epoch, q_len, kv_len, description bytes, digest; then the CRC-32 of these.
_HEADER = struct.Struct("<4sHHqqqqI16s")
_CHECK = struct.Struct("<I")
_FRAME_BYTES = _HEADER.size + _CHECK.size
_encode = json.JSONEncoder(sort_keys=True).encode
_MAGIC, _VERSION = b"ssum", 3
# What a header may announce. Positions of a longer sequence would be 8 TB by themselves.
_MAX_DESCRIPTION_BYTES, _MAX_LENGTH, _MAX_CALLS = 1 << 16, 1 << 40, 1 << 62


def agree(
    comm: Communicator,
    call: Mapping[str, Any],
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
    text, epoch = "", 0
    if error is None:
        try:
            text, epoch = _encode(call), _epoch(comm)
        except (TypeError, ValueError) as mistake:
            error = mistake
    if error is not None:
        text = f"{type(error).__name__}: {error}"
    description = text.encode()
    digest = hashlib.blake2b(description, digest_size=16).digest()
    description = description[:_MAX_DESCRIPTION_BYTES]
    if comm.size == 1:
        if error is not None:
            raise error
        return [(q_len, kv_len)]
    own, own_memory, everyones, memory = comm.frames(_FRAME_BYTES)
    fields = _MAGIC, _VERSION, error is not None, comm.calls, epoch, q_len, kv_len, len(description), digest
    _HEADER.pack_into(own_memory, 0, *fields)
    _CHECK.pack_into(own_memory, _HEADER.size, zlib.crc32(own_memory[: _HEADER.size]))
    comm.all_gather_into(own, everyones)
    frames = memory.tobytes()
    headers = [_read(frames[rank * _FRAME_BYTES : (rank + 1) * _FRAME_BYTES], rank) for rank in range(comm.size)]
    numbers, epochs = [h[3] for h in headers], [h[4] for h in headers]
    failed = [rank for rank, h in enumerate(headers) if h[2]]
    if not failed and all(h[8] == digest for h in headers) and len(set(numbers)) == len(set(epochs)) == 1:
        return [(h[5], h[6]) for h in headers]
    texts = _gather_descriptions(comm, description, [h[7] for h in headers])
    comm.calls = max(numbers)
    if error is not None and len(failed) == comm.size:
        raise error
    if failed:
        raise Mismatch("; ".join(f"rank {rank} could not take part: {texts[rank]}" for rank in failed)) from error
    found = [*_unequal("call number", numbers), *_unequal("epoch", epochs), *_differences(texts)]
    raise Mismatch(" ".join(found) or _TOO_LONG)


_TOO_LONG = "the ranks made different calls, too long to compare argument by argument."


def _epoch(comm: Communicator) -> int:
    epoch = operator.index(comm.epoch)
    if not -(1 << 63) <= epoch < 1 << 63:
        raise ValueError(f"comm.epoch must fit into 64 bits: got {epoch}.")
    return epoch


def _read(frame: bytes, rank: int) -> tuple[Any, ...]:
    """The fields of a rank's header, before anything is made of the sizes in it. Raises: Mismatch."""
    fields = magic, version, failed, number, _, q_len, kv_len, size, _ = _HEADER.unpack_from(frame)
    if (magic, version) != (_MAGIC, _VERSION):
        raise Mismatch(f"rank {rank} does not speak shardsum's protocol version {_VERSION}.")
    if not (
        _CHECK.unpack_from(frame, _HEADER.size)[0] == zlib.crc32(frame[: _HEADER.size])
        and failed <= 1
        and 0 < number < _MAX_CALLS
        and 0 <= q_len <= _MAX_LENGTH
        and 0 <= kv_len <= _MAX_LENGTH
        and size <= _MAX_DESCRIPTION_BYTES
    ):
        raise Mismatch(f"rank {rank} sent a malformed header.")
    return fields


def _gather_descriptions(comm: Communicator, description: bytes, sizes: Sequence[int]) -> list[str]:
    part = torch.frombuffer(bytearray(description), dtype=torch.uint8)
    parts = comm.all_gather(part, [(size,) for size in sizes])
    return [part.numpy().tobytes().decode(errors="replace") for part in parts]


def _differences(texts: Sequence[str]) -> list[str]:
    """One sentence per argument that is not the same on all ranks."""
    if len(set(texts)) == 1:
        return []
    try:
        calls = [json.loads(text) for text in texts]
        names = sorted({name for call in calls for name in call})
        return [sentence for name in names for sentence in _unequal(name, [call.get(name) for call in calls])]
    except (ValueError, TypeError, AttributeError, RecursionError):  # cut at the cap, or no description at all
        return [_TOO_LONG]


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

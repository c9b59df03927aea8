"""Arrays in files: memory-mapped, so that a rank reads only what it needs; written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenError
from typing import Literal

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SUFFIXES = (".npy", ".safetensors")
# NumPy parses a header by `ast`, which in Python 3.11 fails in two threads at once (python/cpython issue 106905).
_PARSING = threading.Lock()
# What is being written under a name of its own.
_unfinished: set[Path] = set()
# NumPy's own limit of a header, which it looks at when it has made room for what the file announces, up to 4 GB.
_MAX_HEADER_BYTES = 10_000
_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
# What its parser and the one of safetensors raise for files that are not what they should be.
_BROKEN_FILE = (
    OSError,
    ValueError,
    TypeError,
    ArithmeticError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TokenError,
    SafetensorError,
)


def open_array(name: str) -> Tensor:
    """Map the array in a .npy file, or the tensor in FILE.safetensors or FILE.safetensors:TENSOR.

    Raises: ValueError of one line for a file that is missing, malformed or holds no floating-point numbers.
    """
    file, _, key = name.partition(":") if ".safetensors:" in name else (name, "", "")
    path = Path(file)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} must be a {' or '.join(SUFFIXES)} file.")
    if not path.is_file():
        raise ValueError(f"{path} is a folder, not a file." if path.is_dir() else f"no such file: {path}")
    try:
        array = _open_npy(path) if path.suffix == ".npy" else _open_safetensors(path, key)
    except _BROKEN_FILE as error:
        raise ValueError(f"can't read {name}: {' '.join(str(error).split())}") from error
    if not array.is_floating_point():
        raise ValueError(f"{name} must hold floating-point numbers: got {array.dtype}.")
    return array


def _open_npy(path: Path) -> Tensor:
    with path.open("rb") as file:
        start = file.read(12)
    header_bytes = int.from_bytes(start[8 : 10 if start[6:7] == b"\1" else 12], "little")
    if header_bytes > _MAX_HEADER_BYTES:
        raise ValueError(f"its header would have {header_bytes} bytes, more than {_MAX_HEADER_BYTES}.")
    with _PARSING, np.errstate(over="raise"):
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            if version not in _READ_HEADER:
                raise ValueError(f"arrays of numbers have version 1.0 or 2.0 of the format: got {version}.")
            shape, fortran_order, dtype = _READ_HEADER[version](file)
            start_of_data = file.tell()
        # NumPy divides by the bytes of an element where it looks for a size that is negative.
        if dtype.hasobject or dtype.itemsize == 0 or min(shape, default=0) < 0:
            raise ValueError(f"it would hold {shape} of {dtype}, which can't be mapped.")
        order: Literal["F", "C"] = "F" if fortran_order else "C"
        # "c" (copy on write): torch wants memory that may be written, and the file must not be.
        return torch.from_numpy(np.memmap(path, dtype, "c", start_of_data, shape, order))


def _open_safetensors(path: Path, key: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        keys = list(file.keys())
        if not key and len(keys) != 1:
            raise ValueError(f"it holds {len(keys)} tensors, name one as {path}:NAME ({', '.join(keys[:8])})")
        if key and key not in keys:
            raise ValueError(f"it has no tensor {key!r}, only {', '.join(keys[:8])}")
        tensor: Tensor = file.get_tensor(key or keys[0])
        return tensor


def take(array: Tensor, dim: int, positions: Tensor) -> Tensor:
    """Take increasing positions of a dimension: a view of the file where they are consecutive."""
    count = len(positions)
    if count == 0 or int(positions[-1] - positions[0]) == count - 1:
        return array.narrow(dim, int(positions[0]) if count else 0, count)
    return array.index_select(dim, positions)


def save_array(path: Path, array: Tensor) -> None:
    """Write a .npy file, or a .safetensors file whose one tensor is `out`; it appears whole.

    Raises: OSError, naming the file, where it can't be written.
    """
    try:
        with appears_whole(path) as unfinished:
            if path.suffix == ".npy":
                _save_npy(unfinished, array.numpy())
            else:
                safetensors.torch.save_file({"out": array.contiguous()}, unfinished)
    except (OSError, SafetensorError) as error:
        raise OSError(f"can't write {path}: {getattr(error, 'strerror', None) or error}") from error


def why_not_save(path: Path, size_bytes: int) -> str | None:
    """Say what is known to keep an array of so many bytes from being written; None if nothing is."""
    folder = path.parent
    if path.suffix not in SUFFIXES:
        return f"the output must be a {' or '.join(SUFFIXES)} file: got {path}."
    if not folder.is_dir():
        return f"no such folder: {folder}"
    if len(os.fsencode(path.name)) > (longest := os.pathconf(folder, "PC_NAME_MAX")):
        return f"the output's name has {len(os.fsencode(path.name))} bytes, more than the folder's {longest}."
    if path.is_dir():
        return f"the output {path} is a folder."
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"the folder {folder} can't be written to."
    if (free := shutil.disk_usage(folder).free) < size_bytes:
        return f"no space for {path}: it takes {size_bytes:,} bytes, and {free:,} are free in {folder}."
    return None


def _save_npy(path: Path, array: np.ndarray) -> None:
    """As numpy.save, whose error says neither the file nor what is wrong."""
    array = np.asarray(array, order="C")
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.reshape(-1).view(np.uint8).data)


@contextlib.contextmanager
def appears_whole(path: Path, durable: bool = True) -> Iterator[Path]:
    """Give a name beside `path` to write a file or a folder to, which becomes `path` when the block has ended.

    A block that raises leaves what was at `path` before. A file replaces a file; a folder replaces none that has
    content. With `durable` the content is on the disk before it has its name, so that a machine that loses power
    keeps the old or the new, whole; what another process on this machine reads at once needs no such wait.
    Raises: OSError where it can't be written or renamed.
    """
    unfinished = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")  # no longer than the longest name
    _unfinished.add(unfinished)
    try:
        yield unfinished
        if durable:
            _flush(unfinished)
        unfinished.replace(path)
    finally:
        _discard(unfinished)


def discard_unfinished() -> None:
    """Remove what threads of this process have begun to write, before the process ends without them."""
    for path in [*_unfinished]:
        _discard(path)


def _discard(unfinished: Path) -> None:
    if unfinished.is_dir():
        shutil.rmtree(unfinished, ignore_errors=True)
    else:
        unfinished.unlink(missing_ok=True)
    _unfinished.discard(unfinished)


def _flush(path: Path) -> None:
    """Wait until a file, or a folder and all in it, is on the disk."""
    for entry in (path, *path.rglob("*")):
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

"""Plain values as one safetensors file: what `launch` sends to its ranks and gets back. Nothing is pickled."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from safetensors.torch import save_file
from torch import Tensor

from ..arrays import appears_whole
from ..state import AttentionState


def save(path: Path, value: Any) -> None:
    """Write `value` to a file; it is complete as soon as it exists under this name.

    Raises: TypeError naming what is not None, bool, number, string, tensor, array, AttentionState, or a list,
    tuple or dict of these; OSError where it can't be written.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode(value, tensors, "value"))
    try:
        with appears_whole(path, durable=False) as unfinished:
            save_file(tensors, unfinished, metadata={"value": text})
    except SafetensorError as error:  # which is no OSError
        raise OSError(f"can't write {path}: {error}") from error


def load(path: Path) -> Any:
    """The value that `save` wrote. Raises: ValueError for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return _decode(json.loads(file.metadata()["value"]), tensors)
    except (SafetensorError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a file of values: {error}") from error


def _encode(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (np.bool_, np.integer, np.floating)):
        return value.item()
    if isinstance(value, list):
        return [_encode(entry, tensors, f"{where}[{i}]") for i, entry in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": [_encode(entry, tensors, f"{where}[{i}]") for i, entry in enumerate(value)]}
    if isinstance(value, dict):
        pairs = [
            [_encode(key, tensors, f"a key of {where}"), _encode(entry, tensors, f"{where}[{key!r}]")]
            for key, entry in value.items()
        ]
        return {"dict": pairs}
    if isinstance(value, AttentionState):
        return {"state": [_encode(part, tensors, where) for part in (value.out, value.lse)]}
    if isinstance(value, np.ndarray):
        try:
            tensor = torch.from_numpy(np.array(value, order="C"))  # np.ascontiguousarray gives a number a dim
        except (TypeError, ValueError) as wrong:
            raise TypeError(f"{where} is an array of {value.dtype}, which can't go to another process.") from wrong
        return {"array": _encode(tensor, tensors, where)["tensor"]}
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta or not _can_be_saved(value.dtype):
            raise TypeError(
                f"{where} is a {value.layout} tensor of {value.dtype} on {value.device}, "
                "which can't go to another process."
            )
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    raise TypeError(
        f"{where} is a {type(value).__name__}: only None, bool, numbers, strings, tensors, arrays, AttentionState "
        "and lists, tuples and dicts of these go to another process. Use transport='threads' for other objects."
    )


@functools.cache
def _can_be_saved(dtype: torch.dtype) -> bool:
    try:
        serialize({"": torch.empty(0, dtype=dtype)})
    except (KeyError, RuntimeError):  # safetensors has no name for it; torch has no plain tensor of it
        return False
    return True


def _decode(encoded: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(encoded, list):
        return [_decode(entry, tensors) for entry in encoded]
    if not isinstance(encoded, dict):
        return encoded
    ((kind, content),) = encoded.items()
    if kind == "tuple":
        return tuple(_decode(content, tensors))
    if kind == "dict":
        return {_decode(key, tensors): _decode(entry, tensors) for key, entry in content}
    if kind == "state":
        return AttentionState(*_decode(content, tensors))
    return tensors[content].numpy() if kind == "array" else tensors[content]

"""What makes two ranks' models the same one: class, configuration, weights, and the versions that run them."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import __version__

# A tensor is hashed so many 64-bit words at a time, which stay in a core's cache.
_WORDS = 1 << 15
# What a configuration says of where it was saved, and of how its model's outputs are called.
_NOT_OF_THE_MODEL = {"architectures", "id2label", "label2id", "transformers_version"}


def describe_model(model: PreTrainedModel, ranks: int) -> dict[str, Any]:
    """Describe what has to be the same on every rank; each entry of the configuration is one by itself.

    Weights are read once, where there are several ranks.
    """
    config = {f"config.{name}": value for name, value in _settings(model.config.to_dict()).items()}
    versions = {"shardsum": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
    return {
        "model": type(model).__name__,
        "weights": weights_digest(model) if ranks > 1 else None,
        **{f"version of {name}": version.split("+")[0] for name, version in versions.items()},
        **json.loads(json.dumps(config, default=lambda value: type(value).__name__)),
    }


def weights_digest(model: nn.Module) -> str:
    """Hash the name, shape, dtype and bits of each parameter and buffer."""
    content = hashlib.blake2b(digest_size=8)
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        content.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {_hash_bits(tensor.detach())}".encode())
    return content.hexdigest()


def _hash_bits(tensor: Tensor) -> list[int]:
    """Return a number for each chunk of a tensor: the sum of its words, each times an odd number of its own."""
    octets = tensor.contiguous().flatten().view(torch.uint8)
    whole = octets[: octets.numel() // 8 * 8]
    parts = [*whole.clone().view(torch.int64).split(_WORDS)] if whole.storage_offset() % 8 else []
    parts = parts or [*whole.view(torch.int64).split(_WORDS)]
    factors = _factors().to(tensor.device)
    # The sum does not see two signs change at the top of words: these are spread over the lower half first.
    sums = [int(((part ^ (part >> 32)) * factors[: len(part)]).sum()) for part in parts]
    return [*sums, *octets[len(whole) :].tolist()]


@functools.lru_cache(maxsize=1)
def _factors() -> Tensor:
    """Odd numbers without a pattern, the same on every machine."""
    mixed = torch.arange(1, _WORDS + 1) * -7046029254386353131
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
    return (mixed ^ (mixed >> 32)) | 1


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Keep what a configuration says of its model, its parts' configurations too."""
    return {
        str(name): _settings(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if not str(name).startswith("_") and name not in _NOT_OF_THE_MODEL
    }

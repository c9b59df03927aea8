"""Hugging Face models over sharded keys and values: load one, run its attention on all ranks, generate.

    model, tokenizer = load("path/to/model")
    tokens = generate(model, input_ids, comm=comm)            # the same tokens on every rank
    with training(model, comm=comm) as sharded:               # loss and gradients of sequences cut over the ranks
        sharded.loss(input_ids, labels).backward()
        sharded.sum_gradients()

Every rank holds the whole model and a part of the KV cache. The prompt is cut: a rank runs the model on its own
tokens only, and attention is the one place where tokens meet, so it is the one place where ranks do.
"""

from __future__ import annotations

try:
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as missing:
    raise ImportError(
        "shardsum.hf needs the package transformers: pip install shardsum[hf]", name=missing.name
    ) from missing

from .binding import sharded
from .cache import ShardedCache
from .generation import generate
from .loading import load
from .session import Session
from .training import Training, training

__all__ = ["Session", "ShardedCache", "Training", "generate", "load", "sharded", "training"]

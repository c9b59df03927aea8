"""Whether a model's own loss is what `training` computes: the mean cross-entropy of its logits, no more."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..errors import Unsupported
from .bound_model import has_argument
from .recording import TOLERANCE
from .sequences import IGNORE_INDEX

TOKENS = 6


def check_losses(model: PreTrainedModel) -> None:
    """Ask the model for its loss and its logits over six tokens, as it is: in training mode if it is.

    Raises: Unsupported for a loss that isn't the cross-entropy of these logits, and a router's auxiliary loss.
    """
    kind = type(model).__name__
    if getattr(model.config.get_text_config(decoder=True), "output_router_logits", False):
        raise Unsupported(
            f"{kind} has output_router_logits=True: a router's auxiliary loss is a product of averages over all "
            "tokens, not a sum over tokens. Set config.output_router_logits = False."
        )
    if not has_argument(model, "labels"):
        return
    own, plain = _losses(model)
    if (
        own is None
        or not math.isfinite(plain)
        or abs(own - plain) <= TOLERANCE.get(model.dtype, 1e-4) * abs(plain)
    ):
        return
    name = getattr(model.loss_function, "__name__", type(model.loss_function).__name__)
    raise Unsupported(
        f"{kind} has a loss of its own ({name}): {own:.6g} for tokens whose mean cross-entropy is {plain:.6g}. "
        "Only that is computed over sharded tokens; take the loss back, or compute yours in one process."
    )


def _losses(model: PreTrainedModel) -> tuple[float | None, float]:
    """Return the model's own loss, if it has one, and the mean cross-entropy of its logits in the same pass."""
    words = model.config.get_text_config(decoder=True).vocab_size
    ids = (torch.arange(1, 2 * TOKENS + 1, device=model.device).view(2, TOKENS) * 7919) % max(words, 1)
    labels = ids.clone()
    labels[0, 2], labels[1, 4] = IGNORE_INDEX, IGNORE_INDEX
    # A pass in training mode may change buffers.
    kept = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[]):
        try:
            out = model(input_ids=ids, labels=labels)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise Unsupported(f"{type(model).__name__}'s own loss fails: {error}") from error
        finally:
            with torch.no_grad():
                for buffer, before in kept:
                    buffer.copy_(before)
    logits: Tensor = out.logits[:, :-1].flatten(0, 1)
    plain = F.cross_entropy(logits.float(), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
    return None if out.loss is None else out.loss.item(), plain.item()

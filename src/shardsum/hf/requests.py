"""What a caller asks `generate` for: checked before the ranks agree on it, and described for the agreement."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteriaList, StopStringCriteria
from transformers.generation.configuration_utils import GenerationConfig

from ..digests import digest_indices
from ..errors import Unsupported
from .masks import Padding
from .wrappers import check_whole

# Arguments and settings of `model.generate` that are refused, with what they mean and what to do instead.
_REFUSED = {
    "assistant_model": "assisted decoding is not supported over sharded keys. Use sampling or beams.",
    "cache_implementation": "the sharded cache takes the place of Transformers' own. Leave it out.",
    "custom_generate": "a decoding loop of your own is not supported over sharded keys. Use sampling or beams.",
    "guidance_scale": "classifier-free guidance is not supported over sharded keys. Use sampling or beams.",
    "inputs": "pass the prompt's tokens as input_ids.",
    "inputs_embeds": "prompts given as embeddings are not supported over sharded keys. Pass input_ids.",
    "negative_prompt_ids": "classifier-free guidance is not supported over sharded keys. Use sampling or beams.",
    "prompt_lookup_num_tokens": "prompt lookup is not supported over sharded keys. Use sampling or beams.",
    "synced_gpus": "it serves weights that are sharded by others. Every rank holds the whole model: leave it out.",
    "token_healing": "it changes the prompt's tokens. Heal them before: model.heal_tokens(input_ids, tokenizer).",
}
_OTHER_THAN_TEXT = ("audio_", "image_", "input_features", "input_values", "pixel_", "video_")
# What a model is handed besides inputs of its tokens: the sharded prefill passes these on by itself.
_HANDLED = {
    "attention_mask",
    "cache_position",
    "input_ids",
    "is_first_iteration",
    "logits_to_keep",
    "next_sequence_length",
    "past_key_values",
    "use_cache",
}
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


def check_request(
    model: PreTrainedModel, input_ids: object, attention_mask: object, arguments: Mapping[str, Any]
) -> Tensor:
    """Return input_ids, once nothing in the call says otherwise.

    Raises: ValueError, naming the argument, for what can't be meant; Unsupported for what can't be done.
    """
    check_whole(model)
    for name, why_not in _REFUSED.items():
        value = _setting(model, arguments, name)
        if value is not None and value is not False and not (name == "guidance_scale" and value == 1):
            plain = isinstance(value, (bool, int, float, str))
            error = ValueError if name == "inputs" else Unsupported
            raise error(f"{name}={value if plain else type(value).__name__}: {why_not}")
    for name, value in arguments.items():
        if value is not None and name.startswith(_OTHER_THAN_TEXT):
            raise Unsupported(
                f"{name}: images, video and sound are not supported over sharded keys. Leave it out."
            )
    tokens = check_tokens(model, input_ids, least=1)
    if attention_mask is None:
        return tokens
    if not isinstance(attention_mask, Tensor) or attention_mask.shape[:1] != tokens.shape[:1]:
        got = (
            tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else _describe_wrong(attention_mask)
        )
        raise ValueError(f"attention_mask must be a torch tensor {tuple(tokens.shape)}: got {got}.")
    if (why_not_left := Padding.of(attention_mask, tokens.shape[1]).why_not_left(tokens.shape[1])) is not None:
        raise Unsupported(why_not_left)
    return tokens


def check_tokens(model: PreTrainedModel, input_ids: object, least: int = 0) -> Tensor:
    """Return input_ids. Raises: ValueError where they are no tokens of the model's."""
    if not isinstance(input_ids, Tensor):
        raise ValueError(f"input_ids must be a torch tensor (batch, tokens): got {_describe_wrong(input_ids)}.")
    if input_ids.ndim != 2 or input_ids.numel() < least:
        some = ", one token at least" if least else ""
        raise ValueError(f"input_ids must be (batch, tokens){some}: got {tuple(input_ids.shape)}.")
    words = model.config.get_text_config(decoder=True).vocab_size
    if input_ids.dtype not in (torch.int64, torch.int32) or bool(((input_ids < 0) | (input_ids >= words)).any()):
        raise ValueError(f"input_ids must be whole numbers from 0 to {words - 1}: got {input_ids}.")
    return input_ids


def _describe_wrong(value: object) -> str:
    """Name what came in place of a tensor, and how to make one of it."""
    kind = type(value).__name__
    if isinstance(value, Mapping):
        return f"a {kind}; pass its entries by name: generate(model, **inputs)"
    if isinstance(value, str) or (isinstance(value, (list, tuple)) and any(isinstance(x, str) for x in value)):
        return "text; make tokens of it: tokenizer(text, return_tensors='pt').input_ids"
    return "nothing" if value is None else f"a {kind}; make one of it: torch.as_tensor(...)"


def requested_length(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, arguments: Mapping[str, Any]
) -> int | None:
    """Count prompt and new tokens together, where the call says how many; padding does not count."""
    new, length = _setting(model, arguments, "max_new_tokens"), arguments.get("max_length")
    padded = input_ids.shape[-1]
    prompt = padded if attention_mask is None else int(attention_mask.sum(dim=-1).max())
    if new is None:
        return None if length is None else prompt + max(int(length) - padded, 0)
    return prompt + int(new)


def take_stopping_criteria(arguments: dict[str, Any]) -> tuple[StoppingCriteriaList, dict[str, Any]]:
    """Take whatever stops generation out of the arguments; return it, and what of it must be alike on all ranks.

    Raises: ValueError for strings without a tokenizer.
    """
    tokenizer, stop_strings = arguments.pop("tokenizer", None), arguments.pop("stop_strings", None)
    config = arguments.get("generation_config")
    if stop_strings is None and config is not None and config.stop_strings is not None:
        config = arguments["generation_config"] = copy.deepcopy(config)
        stop_strings, config.stop_strings = config.stop_strings, None
    criteria = StoppingCriteriaList(arguments.pop("stopping_criteria", None) or [])
    if stop_strings is None:
        return criteria, {}
    if tokenizer is None:
        raise ValueError("stop_strings needs the tokenizer: pass tokenizer=... too.")
    criteria.append(StopStringCriteria(tokenizer, stop_strings))
    words = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    digest = hashlib.blake2b(words, digest_size=8).hexdigest()
    return criteria, {"stop_strings": stop_strings, "the tokenizer's words": digest}


def inputs_of_tokens(
    model: PreTrainedModel, input_ids: Tensor, start: int, model_kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """Return what the model is handed for each token from `start` on besides its number, by name.

    It is asked for as `model.generate` asks: `prepare_inputs_for_generation` makes it. Token types of 0
    that could only say that all is plain text are taken out of `model_kwargs`.
    Shapes: input_ids (batch, tokens); each input (..., batch or 1, tokens - start).
    Raises: Unsupported, naming the input, for one that is not of single tokens; ValueError for a wrong shape.
    """
    for name in _TOKEN_TYPES:
        if _types_change_masks(model) and (types := model_kwargs.get(name)) is not None and not types.any():
            model_kwargs[name] = None
    new, kind = input_ids.shape[1] - start, type(model).__name__
    make: Any = model.prepare_inputs_for_generation
    prepared = make(input_ids, next_sequence_length=new, is_first_iteration=True, **model_kwargs)
    if not torch.equal(prepared["input_ids"], input_ids[:, start:]):
        raise Unsupported(f"{kind} prepares other tokens for itself than input_ids has, which is not supported.")
    inputs = {}
    for name, value in prepared.items():
        if name in _HANDLED or value is None or value is False or (isinstance(value, dict) and not value):
            continue
        of_tokens = name == "position_ids" or (name == "token_type_ids" and not _types_change_masks(model))
        if not of_tokens:
            raise Unsupported(f"{name}: this input of {kind} can't be spread over ranks. Leave it out.")
        inputs[name] = value
    check_columns(inputs, new)
    return inputs


def check_columns(inputs: Mapping[str, object], new: int) -> None:
    """Raises: ValueError where an input has not one column for each new token."""
    for name, x in inputs.items():
        if not isinstance(x, Tensor) or x.ndim < 2 or x.shape[-1] != new:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must have a column for each of {new} new tokens: got {got}.")


def describe_request(
    input_ids: Tensor,
    config: GenerationConfig,
    model_kwargs: Mapping[str, Any],
    inputs: Mapping[str, Tensor],
    processors: list[Any],
) -> dict[str, Any]:
    """Describe what has to be the same on every rank, tensors by their digest."""
    # What a rank wants to be returned is its own affair.
    settings = {
        name: json.loads(json.dumps(value, default=_describe_object))
        for name, value in config.to_dict().items()
        if value is not None and not name.startswith(("_", "output_", "return_"))
    }
    return {
        "input_ids": digest_indices(input_ids),
        "attention_mask": digest_indices(model_kwargs.get("attention_mask")),
        "cached": model_kwargs["past_key_values"].get_seq_length(),
        "logits_processor": [type(processor).__name__ for processor in processors],
        **{name: digest_indices(value) for name, value in inputs.items()},
        **settings,
    }


def _setting(model: PreTrainedModel, arguments: Mapping[str, Any], name: str) -> Any:
    """Return what the call says under this name, or else its configuration, or else the model's."""
    places = (arguments.get("generation_config"), getattr(model, "generation_config", None))
    return next(
        (value for value in (arguments.get(name), *(getattr(x, name, None) for x in places)) if value is not None),
        None,
    )


def _types_change_masks(model: PreTrainedModel) -> bool:
    """Whether a token's type may say what it sees: in models of images too, or with masks of their own making."""
    several_kinds = model.config.get_text_config(decoder=True) is not model.config
    return several_kinds or hasattr(model, "create_masks_for_generate")


def _describe_object(value: Any) -> Any:
    """Describe a setting that is no JSON value, without its address."""
    return value.to_dict() if hasattr(value, "to_dict") else type(value).__name__

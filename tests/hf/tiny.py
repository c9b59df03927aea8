"""Tiny random models of many families, and generation over thread ranks to compare with Transformers alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor

from shardsum.hf import generate
from shardsum.launching import launch

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GPT2_SIZES = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128, "rotary_dim": 4}


def tiny(family: str, **sizes: Any) -> Any:
    """A random model with weights large enough that attention and its masks matter."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **sizes})
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.mul_(5)
    return model


def prompt(tokens: int, batch: int = 1) -> Tensor:
    """Fixed token ids, no two rows alike."""
    return (torch.arange(batch * tokens).view(batch, tokens) * 7 + 3) % 97


def words() -> Any:
    """A tokenizer whose token 3 is the word w3, and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    # Transformers' stop strings need a tokenizer that knows this word.
    vocabulary = {**{f"w{token}": token for token in range(96)}, "abcdef": 96}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0")


def plain(model: Any, ids: Tensor, **arguments: Any) -> Any:
    """What Transformers alone generates."""
    return model.generate(ids, **_arguments(arguments))


def on_ranks(model: Any, ids: Tensor, ranks: int, **arguments: Any) -> list[Any]:
    """What each rank generates; every rank has a model of its own."""
    models = [copy.deepcopy(model) for _ in range(ranks)]

    def run(comm: Any) -> Any:
        out = generate(models[comm.rank], ids, comm=comm, **_arguments(arguments))
        return {"sequences": out.sequences, "logits": torch.stack(out.logits)}

    return launch(run, ranks=ranks, transport="threads")


def assert_same(expected: Any, results: list[Any], tolerance: float = 1e-4) -> None:
    """Every rank has the expected tokens, and logits within `tolerance`, by element and by norm."""
    logits = torch.stack(expected.logits)
    for rank, result in enumerate(results):
        assert torch.equal(result["sequences"], expected.sequences), f"rank {rank}: {result['sequences']}"
        assert (result["logits"] - logits).abs().max() <= tolerance, f"rank {rank}"
        assert (result["logits"] - logits).norm() <= tolerance * logits.norm(), f"rank {rank}"


def _arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    defaults = {"max_new_tokens": 5, "do_sample": False}
    return {**defaults, "return_dict_in_generate": True, "output_logits": True, **arguments}

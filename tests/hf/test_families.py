"""Which models run over sharded keys with Transformers' own results, and which are refused, by name."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from shardsum.comm import connect
from shardsum.errors import Unsupported
from shardsum.hf import sharded

from .tiny import GPT2_SIZES, assert_same, on_ranks, plain, prompt, tiny

# It caches what keys and values are made from.
DEEPSEEK = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
ACCEPTED: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "Mistral": {"sliding_window": 5},
    "Mixtral": {"num_local_experts": 4},
    "Gemma": {"head_dim": 8},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 4, "num_hidden_layers": 6},
    "Cohere2": {"sliding_window": 4},
    "GPT2": GPT2_SIZES,
    "GPTBigCode": {**GPT2_SIZES, "multi_query": True},
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "Phi3": {},
}
MAMBA = {"num_heads": 8, "head_dim": 8}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Mamba": ({}, r"backbone\.layers\.0\.mixer \(MambaMixer\) mixes tokens"),
    "Mamba2": (MAMBA, r"backbone\.layers\.0\.mixer \(Mamba2Mixer\) mixes tokens"),
    "Jamba": ({"num_experts": 2}, r"model\.layers\.0\.mamba \(JambaMambaMixer\) mixes tokens"),
    "FalconH1": (
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
        r"model\.layers\.0\.mamba \(FalconH1Mixer\) mixes tokens",
    ),
    "Lfm2": ({"layer_types": ["full_attention", "conv"]}, r"layers\.1\.conv \(Lfm2ShortConv\) mixes"),
    "RecurrentGemma": ({}, r"temporal_block \(RecurrentGemmaRecurrentBlock\) mixes tokens"),
    "Qwen3Next": ({"head_dim": 8}, r"linear_attn \(Qwen3NextGatedDeltaNet\) mixes tokens"),
    "Rwkv": ({}, r"rwkv\.blocks\.0\.attention.* mixes tokens"),
    "Bloom": ({"n_head": 4, "n_layer": 2}, r"self_attention \(BloomAttention\) mixes tokens outside"),
    "Falcon": ({"alibi": True}, r"self_attention \(FalconAttention\) mixes tokens outside"),
    "GPTJ": (GPT2_SIZES, r"transformer\.h\.0\.attn \(GPTJAttention\) mixes tokens outside"),
    "Gemma2": ({"head_dim": 8}, r"\(Gemma2Attention\) passes 'softcap'"),
    "GptOss": ({"head_dim": 8, "num_local_experts": 4}, r"\(GptOssAttention\) passes 's_aux'"),
    "Llama4Text": (
        {"head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 2, "attention_chunk_size": 8},
        r"\(Llama4TextAttention\): the attention mask is not",
    ),
    "DeepseekV3": (DEEPSEEK, r"\(DeepseekV3Attention\) attends to other keys and values than it puts into"),
    "Bert": ({}, r"\(BertSelfAttention\): the attention mask is not a causal mask"),
}


@pytest.mark.parametrize("family", ACCEPTED)
def test_the_same_tokens_and_logits_as_transformers(family: str) -> None:
    model = tiny(family, **ACCEPTED[family])
    expected = plain(model, prompt(23))
    for ranks in (1, 2, 3):
        assert_same(expected, on_ranks(model, prompt(23), ranks))


@pytest.mark.parametrize("family", REFUSED)
def test_refused_by_name(family: str) -> None:
    sizes, message = REFUSED[family]
    with pytest.raises(Unsupported, match=message):
        on_ranks(tiny(family, **sizes), prompt(9), 2)


def test_refused_encoder_decoder() -> None:
    import transformers

    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=97)
    model = transformers.T5ForConditionalGeneration(config).eval()
    with pytest.raises(Unsupported, match="T5ForConditionalGeneration is an encoder-decoder"):
        _enter(model)


def test_refused_training_mode() -> None:
    with pytest.raises(ValueError, match=r"training mode: call model\.eval\(\)"):
        _enter(tiny("Llama").train())


def test_rotary_embedding_that_depends_on_the_longest_position() -> None:
    """Keys on a rank with early tokens only would be rotated by other angles than those of late tokens."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", **factors, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    model = tiny("Phi3", rope_parameters=rope, original_max_position_embeddings=32)
    with pytest.raises(Unsupported, match=r"model\.rotary_emb .*depend on the whole sequence, here of up to 128"):
        _enter(model)
    # As long as the sequence stays short there is only one set of angles.
    assert_same(plain(model, prompt(23)), on_ranks(model, prompt(23), 2))


# What no option announces: planted in a Llama, found by running it.


class _Blur(torch.nn.Module):
    """A convolution over the last two tokens."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        return y + 0.1 * torch.nn.functional.pad(y, (0, 0, 1, 0))[:, :-1]


def test_a_hidden_convolution_is_named() -> None:
    model = tiny("Llama")
    model.model.layers[1].mlp = _Blur(model.model.layers[1].mlp)
    with pytest.raises(Unsupported, match=r"model\.layers\.1\.mlp \(_Blur\) mixes tokens"):
        _enter(model)


def test_a_weight_on_earlier_tokens_is_found_also_when_small() -> None:
    model = tiny("Llama")
    model.model.layers[0].mlp = _Blur(model.model.layers[0].mlp)
    model.model.layers[0].mlp.inner.down_proj.weight.data.mul_(1e-3)
    with pytest.raises(Unsupported, match=r"model\.layers\.0\.mlp \(_Blur\) mixes tokens"):
        _enter(model)


@pytest.mark.parametrize("slope", [0.5, 0.01])
def test_a_hidden_bias_on_the_scores_is_found(slope: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """An eager attention that penalises distance, and tells nobody."""
    from transformers.models.llama import modeling_llama

    eager = modeling_llama.eager_attention_forward

    def penalising(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
        distance = torch.arange(k.shape[2]) - torch.arange(k.shape[2])[-q.shape[2] :, None]
        return eager(module, q, k, v, mask + slope * distance, **options)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", penalising)
    model = tiny("Llama")
    model.set_attn_implementation("eager")
    with pytest.raises(Unsupported, match=r"\(LlamaAttention\) computes something else than softmax"):
        _enter(model)


def test_keys_changed_after_caching_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    choose = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface

    def doubling(*names: Any) -> Any:
        attend = choose(*names)
        return lambda module, q, k, v, *rest, **options: attend(module, q, 2 * k, v, *rest, **options)

    monkeypatch.setattr(modeling_llama.ALL_ATTENTION_FUNCTIONS, "get_interface", doubling)
    with pytest.raises(Unsupported, match="attends to other keys and values than it puts into the cache"):
        _enter(tiny("Llama"))


def _enter(model: Any) -> None:
    with sharded(model, connect("single")):
        pass


def test_messages_are_one_line() -> None:
    with pytest.raises(Unsupported) as caught:
        _enter(tiny("Mamba"))
    assert not re.search(r"\n", str(caught.value))

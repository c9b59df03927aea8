"""Ranks that carry different things into generation are told what, and ranks that carry the same are not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from shardsum.errors import Mismatch
from shardsum.hf import generate, identity, sharded
from shardsum.hf.identity import describe_model, weights_digest
from shardsum.launching import launch

from .tiny import plain, prompt, tiny, words


def _swap_rows(model: Any) -> None:
    weight = model.model.embed_tokens.weight.data
    weight[[3, 4]] = weight[[4, 3]]


def _other_tokenizer() -> Any:
    tokenizer = words()
    tokenizer.add_tokens(["one more"])
    return tokenizer


# How rank 1's model differs, and what is named.
MODELS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a negated weight": (lambda model: model.model.layers[0].self_attn.v_proj.weight.data.neg_(), "weights"),
    "one element": (lambda model: model.lm_head.weight.data[5, 7].mul_(-1), "weights"),
    "two signs": (lambda model: model.lm_head.weight.data[5, 7:9].mul_(-1), "weights"),
    "a norm": (lambda model: model.model.norm.weight.data.add_(1e-3), "weights"),
    "two tokens' rows": (_swap_rows, "weights"),
    "a buffer": (lambda model: model.model.rotary_emb.inv_freq.mul_(2), "weights"),
    "a dtype": (lambda model: model.bfloat16(), "weights"),
    "an epsilon": (lambda model: setattr(model.config, "rms_norm_eps", 1e-3), "config.rms_norm_eps"),
    "a limit": (
        lambda model: setattr(model.config, "max_position_embeddings", 64),
        "config.max_position_embeddings",
    ),
}


def _each_rank_raises(models: list[Any], **by_rank: Any) -> list[str]:
    def run(comm: Any) -> str:
        own = {name: value(comm.rank) for name, value in by_rank.items()}
        with pytest.raises(Mismatch) as caught:
            generate(models[comm.rank], prompt(9), comm=comm, **{"max_new_tokens": 3, "do_sample": False, **own})
        return str(caught.value)

    return launch(run, len(models), "threads", deadline=30.0)


@pytest.mark.parametrize("name", MODELS)
def test_another_model_on_one_rank(name: str) -> None:
    change, named = MODELS[name]
    models = [tiny("Llama") for _ in range(2)]
    with torch.no_grad():
        change(models[1])
    for said in _each_rank_raises(models):
        assert f"{named} must be the same on every rank" in said


def test_another_class_on_one_rank() -> None:
    for said in _each_rank_raises([tiny("Llama"), tiny("Mistral", sliding_window=None)]):
        assert 'model must be the same on every rank: got "LlamaForCausalLM" on rank 0' in said


def test_weights_are_compared_when_a_session_opens() -> None:
    models = [tiny("Llama") for _ in range(3)]
    models[2].lm_head.weight.data.neg_()

    def run(comm: Any) -> None:
        with pytest.raises(Mismatch, match="weights must be the same"), sharded(models[comm.rank], comm):
            pass

    launch(run, 3, "threads", deadline=30.0)


@pytest.mark.parametrize(
    ("named", "by_rank"),
    [
        ("the tokenizer's words", {"tokenizer": lambda rank: _other_tokenizer() if rank else words()}),
        ("stop_strings", {"tokenizer": lambda rank: words(), "stop_strings": lambda rank: [f"w{rank}"]}),
        ("logits_processor", {"logits_processor": lambda rank: [lambda ids, scores: scores] * rank}),
        ("repetition_penalty", {"repetition_penalty": lambda rank: 1.1 + rank}),
        ("position_ids", {"position_ids": lambda rank: torch.arange(9)[None] + rank}),
        ("attention_mask", {"attention_mask": lambda rank: (torch.arange(9) >= 1 + rank).long()[None]}),
        ("input_ids", {"input_ids": lambda rank: prompt(9) + rank}),
        ("prefill_chunk_size", {"prefill_chunk_size": lambda rank: 3 + rank}),
    ],
)
def test_another_request_on_one_rank(named: str, by_rank: dict[str, Any]) -> None:
    models = [tiny("Llama") for _ in range(2)]
    ids = by_rank.pop("input_ids", lambda rank: prompt(9))
    if "tokenizer" in by_rank:
        by_rank = {"stop_strings": lambda rank: ["w3"], **by_rank}

    def run(comm: Any) -> str:
        own = {name: value(comm.rank) for name, value in by_rank.items()}
        with pytest.raises(Mismatch) as caught:
            generate(models[comm.rank], ids(comm.rank), comm=comm, max_new_tokens=3, do_sample=False, **own)
        return str(caught.value)

    for said in launch(run, 2, "threads", deadline=30.0):
        assert f"{named} must be the same on every rank" in said


@pytest.mark.parametrize("named", ["input_ids", "attention_mask", "position_ids"])
def test_prefills_are_compared(named: str) -> None:
    models = [tiny("Llama") for _ in range(2)]

    def run(comm: Any) -> None:
        inputs = {
            "input_ids": prompt(9),
            "attention_mask": torch.ones(1, 9, dtype=torch.int64),
            "position_ids": torch.arange(1, 10)[None],
        }
        inputs[named] = inputs[named] * (torch.arange(9) >= comm.rank)
        with sharded(models[comm.rank], comm) as session:  # noqa: SIM117 - what it raises is inside
            with pytest.raises(Mismatch, match=f"{named} must be the same on every rank"):
                session.prefill(session.new_cache(), **inputs)

    launch(run, 2, "threads", deadline=30.0)


def test_versions_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    before = describe_model(tiny("Llama"), 2)
    monkeypatch.setattr(identity.transformers, "__version__", "4.0.0")
    after = describe_model(tiny("Llama"), 2)
    assert {name for name in after if after[name] != before[name]} == {"version of transformers"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_digests_see_places_and_signs(dtype: torch.dtype) -> None:
    x = (torch.arange(1, 33 * 7 + 1).view(33, 7) % 113).to(dtype)
    others = [
        -x,
        x.roll(1, 0),
        x.roll(1, 1),
        x.flip(0),
        x.view(7, 33),
        x.float() if x.dtype != torch.float32 else x.half(),
    ]
    pair = x.clone()
    pair[3:5, 2] = -pair[3:5, 2]
    digests = {_digest(y) for y in (x, *others, pair)}
    assert len(digests) == len(others) + 2
    assert _digest(x) == _digest(x.clone()) == _digest(x.t().contiguous().t())


def _digest(x: torch.Tensor) -> str:
    module = torch.nn.Module()
    module.register_buffer("x", x)
    return weights_digest(module)


def test_where_a_model_came_from_does_not_count() -> None:
    """Nor do settings that are objects, whose addresses differ."""
    model = tiny("Llama")
    expected = plain(model, prompt(9)).sequences
    models = [copy.deepcopy(model) for _ in range(2)]
    models[1].config._name_or_path = models[1].config.transformers_version = "elsewhere"

    def run(comm: Any) -> torch.Tensor:
        config = transformers.GenerationConfig(max_new_tokens=5, compile_config=transformers.CompileConfig())
        config.something_of_the_users = object()
        return generate(models[comm.rank], prompt(9), comm=comm, generation_config=config)

    assert all(torch.equal(result, expected) for result in launch(run, 2, "threads", deadline=30.0))

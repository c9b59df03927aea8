"""Every input that `model.generate` would pass on reaches the sharded prefill, or is refused by its name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from shardsum.comm import connect
from shardsum.errors import Mismatch, Unsupported
from shardsum.hf import generate, sharded
from shardsum.launching import launch

from .tiny import GPT2_SIZES, SIZES, assert_same, on_ranks, plain, prompt, tiny

TYPES = (torch.arange(20) >= 8).long()[None]
ALL = torch.ones(1, 20, dtype=torch.int64)
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
TEXT = {**SIZES, "vocab_size": 288, "rope_parameters": MROPE}
SEVERAL_AXES = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Glm4v")


def text_with_types(family: str) -> Any:
    """A model that adds something to a token for its type."""
    sizes = GPT2_SIZES if family == "GPT2" else {"is_decoder": True, "type_vocab_size": 2}
    return tiny(family, **sizes)


def several_axes(family: str) -> Any:
    """A model of text and images whose positions are (axes, batch, tokens)."""
    torch.manual_seed(0)
    vision = {**VISION, "deepstack_visual_indexes": []} if family == "Qwen3VL" else VISION
    config = getattr(transformers, f"{family}Config")(text_config=TEXT, vision_config=vision)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.mul_(3)
    return model


@pytest.mark.parametrize("family", ["GPT2", "Bert", "Electra", "Ernie"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_token_types(family: str, ranks: int) -> None:
    model = text_with_types(family)
    asked = {"token_type_ids": TYPES, "attention_mask": ALL}
    expected = plain(model, prompt(20), **asked)
    without = plain(model, prompt(20), attention_mask=ALL)
    assert not torch.allclose(expected.logits[0], without.logits[0], atol=1e-3), "the types matter"
    assert_same(expected, on_ranks(model, prompt(20), ranks, **asked), 1e-3)


@pytest.mark.parametrize(
    "asked",
    [
        {"num_beams": 3},
        {"num_return_sequences": 2, "num_beams": 2},
        {"prefill_chunk_size": 6},
        {"reproducible": True},
    ],
)
def test_token_types_otherwise(asked: dict[str, Any]) -> None:
    model, ids = text_with_types("GPT2"), prompt(20, 2)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :5] = 0
    inputs = {"token_type_ids": TYPES.expand(2, -1).contiguous(), "attention_mask": mask}
    alone = {name: value for name, value in asked.items() if name.startswith("num")}
    assert_same(plain(model, ids, **inputs, **alone), on_ranks(model, ids, 2, **inputs, **asked), 1e-3)


@pytest.mark.parametrize("family", SEVERAL_AXES)
@pytest.mark.parametrize("asked", [{}, {"num_beams": 2}, {"prefill_chunk_size": 7}, {"reproducible": True}])
def test_positions_of_several_axes(family: str, asked: dict[str, Any]) -> None:
    model, ids = several_axes(family), prompt(20, 2)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :4] = 0
    alone = {name: value for name, value in asked.items() if name.startswith("num")}
    expected = plain(model, ids, attention_mask=mask, **alone)
    assert_same(expected, on_ranks(model, ids, 2, attention_mask=mask, **asked), 1e-3)


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Qwen2"])
def test_positions_of_the_callers_own(family: str) -> None:
    model = tiny(family, **(GPT2_SIZES if family == "GPT2" else {}))
    positions = torch.tensor([[*range(9), *range(30, 41)]])
    expected = plain(model, prompt(20), position_ids=positions)
    assert not torch.allclose(expected.logits[0], plain(model, prompt(20)).logits[0], atol=1e-3)
    assert_same(expected, on_ranks(model, prompt(20), 3, position_ids=positions), 1e-3)


def test_types_that_say_that_all_is_text() -> None:
    model = several_axes("Qwen2_5_VL")
    asked = {"mm_token_type_ids": torch.zeros(1, 20, dtype=torch.int64), "attention_mask": ALL}
    assert_same(plain(model, prompt(20), **asked), on_ranks(model, prompt(20), 2, **asked), 1e-3)


def refused(model: Any, **asked: Any) -> list[Exception]:
    """What each of two ranks raises where the second one asks for it, too."""
    models = [copy.deepcopy(model) for _ in range(2)]

    def run(comm: Any) -> Exception:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are compared by the caller
            generate(models[comm.rank], prompt(20), comm=comm, max_new_tokens=3, do_sample=False, **asked)
        return caught.value

    return launch(run, 2, "threads", deadline=30.0)


@pytest.mark.parametrize(
    ("family", "named", "value"),
    [
        ("Qwen2_5_VL", "mm_token_type_ids", TYPES),
        ("Qwen2_5_VL", "pixel_values", torch.zeros(4, 1176)),
        ("Qwen2VL", "video_grid_thw", torch.tensor([[1, 2, 2]])),
        ("Bert", "encoder_hidden_states", torch.zeros(1, 3, 32)),
        ("GPT2", "token_type_ids", TYPES[:, 1:]),
        ("Llama", "position_ids", torch.arange(20)),
        ("Llama", "position_ids", torch.arange(7)[None]),
        ("Llama", "output_router_logits", True),
    ],
)
def test_inputs_that_are_refused(family: str, named: str, value: Any) -> None:
    model = (
        several_axes(family) if "VL" in family else text_with_types(family) if family != "Llama" else tiny(family)
    )
    for error in refused(model, **{named: value}):
        assert named in str(error)


def test_a_model_that_adds_tokens_of_its_own_is_refused() -> None:
    model = tiny("Llama")
    original = type(model).prepare_inputs_for_generation

    def prepare(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return original(
            model, torch.cat([input_ids, input_ids[:, :1]], 1), **kwargs | {"next_sequence_length": None}
        )

    model.prepare_inputs_for_generation = prepare
    with pytest.raises(Unsupported, match="prepares other tokens for itself"):
        generate(model, prompt(20), comm=connect("single"), max_new_tokens=2)


@pytest.mark.parametrize(
    "where", ["sharded", "generate", "a session's prefill", "a session's generate", "its model"]
)
@pytest.mark.parametrize("reproducible", [False, True])
def test_autocast_is_refused_by_name(where: str, reproducible: bool) -> None:
    """On the second of two ranks only: the first one hears of it."""
    models = [tiny("Llama") for _ in range(2)]

    def run(comm: Any) -> str:
        model, autocast = models[comm.rank], torch.autocast("cpu", torch.bfloat16, enabled=comm.rank == 1)
        opened = where in ("sharded", "generate")
        with pytest.raises((Unsupported, Mismatch)) as caught:  # noqa: PT012 - each way to open is one
            if opened:
                with autocast:
                    if where == "generate":
                        generate(model, prompt(9), comm=comm, max_new_tokens=2, reproducible=reproducible)
                    else:
                        sharded(model, comm, reproducible=reproducible).__enter__()
            with sharded(model, comm, reproducible=reproducible) as session, autocast, torch.no_grad():
                cache = session.new_cache()
                if where == "a session's prefill":
                    session.prefill(cache, prompt(9))
                elif where == "a session's generate":
                    generate(session, prompt(9), max_new_tokens=2)
                else:
                    with session.shared_call.over(cache, comm):
                        model(prompt(9), past_key_values=cache)
        return str(caught.value)

    assert all("torch.autocast" in said for said in launch(run, 2, "threads", deadline=30.0))

"""Entering and leaving `sharded`: what is registered, and that nothing stays."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from tiny import prompt, tiny
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from shardsum.comm import connect, launch
from shardsum.errors import Unsupported
from shardsum.hf import sharded


def _state(model: Any) -> tuple[Any, ...]:
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    registered = sorted(ALL_ATTENTION_FUNCTIONS), sorted(ALL_MASK_ATTENTION_FUNCTIONS)
    return model.config._attn_implementation, hooks, registered


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_everything_is_undone(implementation: str) -> None:
    model = tiny("Llama")
    model.set_attn_implementation(implementation)
    before, expected = _state(model), model(prompt(9)).logits
    with sharded(model, connect("single")):
        assert model.config._attn_implementation != implementation
        assert _state(model) != before
    assert _state(model) == before
    assert torch.equal(model(prompt(9)).logits, expected)


def test_everything_is_undone_after_an_exception() -> None:
    model = tiny("Llama")
    before = _state(model)
    with pytest.raises(KeyError), sharded(model, connect("single")):
        raise KeyError("the caller's own")
    assert _state(model) == before


def test_everything_is_undone_after_a_refusal() -> None:
    for model in (tiny("Gemma2", head_dim=8), tiny("Mamba")):
        before = _state(model)
        with pytest.raises(Unsupported), sharded(model, connect("single")):
            pass
        assert _state(model) == before


def test_the_random_generator_is_left_alone() -> None:
    model = tiny("Llama")
    before = torch.get_rng_state()
    with sharded(model, connect("single")):
        pass
    assert torch.equal(torch.get_rng_state(), before)


def test_attention_without_a_sharded_cache_is_refused() -> None:
    model = tiny("Llama")
    with sharded(model, connect("single")), pytest.raises(Unsupported, match="attends without a sharded cache"):
        model(prompt(9), use_cache=False)


def test_a_forward_pass_of_ones_own() -> None:
    """The cache is Transformers' `past_key_values`: the model may be called directly."""
    models, ids = [tiny("Llama") for _ in range(2)], prompt(20)
    with torch.no_grad():
        expected = models[0](ids).logits

    def run(comm: Any) -> Any:
        with sharded(models[comm.rank], comm) as session, torch.no_grad():
            cache = session.new_cache()
            session.prefill(cache, ids[:, :13])
            assert cache.get_seq_length() == 13
            logits = models[comm.rank](ids[:, 13:], past_key_values=cache).logits
            cache.crop(-7)
            again = models[comm.rank](ids[:, 13:], past_key_values=cache).logits
            return logits, again

    for logits, again in launch(run, ranks=2, transport="threads"):
        assert (logits - expected[:, 13:]).abs().max() <= 1e-4
        assert (again - expected[:, 13:]).abs().max() <= 1e-4


def test_sequences_longer_than_checked_are_refused() -> None:
    model = tiny("Llama")
    with sharded(model, connect("single"), positions=16) as session:
        cache = session.new_cache()
        session.prefill(cache, prompt(12))
        with pytest.raises(ValueError, match="checked for sequences of up to 16 tokens: got 24"):
            session.prefill(cache, prompt(12))
    with pytest.raises(ValueError, match="has 128 positions"), sharded(model, connect("single"), positions=129):
        pass


def test_without_transformers_one_sentence_says_what_to_install() -> None:
    code = "import sys; sys.modules['transformers'] = None\nimport shardsum\nimport shardsum.hf"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].endswith("pip install shardsum[hf]")


def test_shardsum_itself_does_not_import_transformers() -> None:
    code = "import sys, shardsum; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

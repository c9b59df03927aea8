"""Entering and leaving `sharded`: what is registered, and that nothing stays."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from shardsum.comm import connect
from shardsum.errors import Unsupported
from shardsum.hf import generate, sharded
from shardsum.launching import launch

from .tiny import plain, prompt, tiny


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


def test_two_models_at_once_and_one_after_the_other() -> None:
    one, other = tiny("Llama"), tiny("Mistral", sliding_window=5)
    expected = [plain(model, prompt(20)).sequences for model in (one, other)]
    comm = connect("single")
    with sharded(one, comm) as first:
        with sharded(other, comm) as second:
            for session, tokens in ((first, expected[0]), (second, expected[1]), (first, expected[0])):
                assert torch.equal(generate(session, prompt(20), max_new_tokens=5), tokens)
        assert torch.equal(generate(first, prompt(20), max_new_tokens=5), expected[0])
        assert torch.equal(plain(other, prompt(20)).sequences, expected[1])
    for _ in range(2):
        assert torch.equal(generate(one, prompt(20), comm=comm, max_new_tokens=5), expected[0])


def test_a_model_is_in_one_session_at_a_time() -> None:
    model = tiny("Llama")
    before = _state(model)
    with sharded(model, connect("single")) as session:
        for same in (model, type(model)(model.config).eval()):
            with pytest.raises(ValueError, match="is in a session already"), sharded(same, connect("single")):
                pass
        assert generate(session, prompt(9), max_new_tokens=2).shape == (1, 11)
    assert _state(model) == before


def test_ranks_that_are_threads_need_a_model_each() -> None:
    model = tiny("Llama")
    before = _state(model)
    with pytest.raises(ValueError, match="is in a session already"):
        launch(lambda comm: generate(model, prompt(9), comm=comm), ranks=2, transport="threads")
    assert _state(model) == before


def test_a_cache_belongs_to_its_session() -> None:
    """Outside of it, one more token would attend to itself alone, and nobody would notice."""
    model = tiny("Llama")
    with sharded(model, connect("single")) as session:
        cache = session.new_cache()
        session.prefill(cache, prompt(9))
    with pytest.raises(ValueError, match="belongs to a session that is closed"):
        model(prompt(1), past_key_values=cache)
    with sharded(model, connect("single")) as other, pytest.raises(Unsupported, match="this session's new_cache"):
        generate(other, prompt(10), past_key_values=cache)


def test_a_forward_pass_that_failed_leaves_nothing_behind() -> None:
    model = tiny("Llama")
    right = torch.ones(1, 9, dtype=torch.int64)
    right[0, -1] = 0
    with torch.no_grad(), sharded(model, connect("single")) as session:
        with pytest.raises(Unsupported, match="padding on the right"):
            session.prefill(session.new_cache(), prompt(9), right)
        with pytest.raises(Unsupported, match=r"layers\.0\..* attends without a sharded cache"):
            model(prompt(9), use_cache=False)


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

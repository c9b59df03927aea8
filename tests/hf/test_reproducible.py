"""Reproducible generation: the logits have the same bits on any number of ranks, and other bits without tiles."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor

from shardsum.errors import Mismatch, Unsupported
from shardsum.hf import binding, generate, sharded
from shardsum.launching import launch
from shardsum.layouts import Layout

from .tiny import assert_same, on_ranks, plain, prompt, tiny

# All but the last are prefilled: two segments and one token, which has a rank of its own or many beside it.
TOKENS = 514
LONG = {"max_position_embeddings": 1024, "n_positions": 1024}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 300},
    "GPT2": {"n_embd": 32, "n_head": 4, "n_layer": 2},  # its products are Conv1D, its positions a table
    "Gemma2": {"head_dim": 8, "attn_logit_softcapping": None, "query_pre_attn_scalar": 8},  # tanh of the logits
    "Mixtral": {"num_local_experts": 4},  # how many rows an expert gets depends on the others
}


def long(family: str) -> Any:
    model = tiny(family, **FAMILIES[family], **LONG)
    model.generation_config.bos_token_id = model.generation_config.eos_token_id = None
    return model


def digests(results: list[Any]) -> set[str]:
    return {hashlib.sha256(result["logits"].numpy().tobytes()).hexdigest()[:12] for result in results}


@pytest.mark.parametrize("family", FAMILIES)
def test_any_number_of_ranks(family: str) -> None:
    model, found = long(family), set()
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, :301] = 0
    given = {"attention_mask": mask, "pad_token_id": 0, "max_new_tokens": 4}
    expected = plain(model, prompt(TOKENS, 2), **given)
    for ranks, layout in ((1, "zigzag"), (2, "contiguous"), (3, "striped"), (4, "zigzag")):
        results = on_ranks(model, prompt(TOKENS, 2), ranks, layout=layout, reproducible=True, **given)
        assert_same(expected, results)
        found |= digests(results)
    assert len(found) == 1


@pytest.mark.parametrize("arguments", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_beams_and_samples(arguments: dict[str, Any]) -> None:
    model, found = long("Llama"), set()
    for ranks in (1, 3):
        torch.manual_seed(5)
        found |= digests(on_ranks(model, prompt(300), ranks, reproducible=True, **arguments))
    assert len(found) == 1


def test_any_number_of_threads_and_any_batch() -> None:
    """On one rank with 1, 2 or 3 threads, and the second row by itself."""
    model, before = long("Llama"), torch.get_num_threads()

    def logits(ids: Tensor, threads: int) -> Tensor:
        torch.set_num_threads(threads)
        try:
            out = generate(copy.deepcopy(model), ids, reproducible=True, max_new_tokens=3, **returned)
            return torch.stack(out.logits)
        finally:
            torch.set_num_threads(before)

    returned: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    one, two, three = (logits(prompt(TOKENS, 2), threads) for threads in (1, 2, 3))
    assert torch.equal(one, two)
    assert torch.equal(one, three)
    assert torch.equal(one[:, 1:], logits(prompt(TOKENS, 2)[1:], 2))
    assert torch.get_num_threads() == before


def test_bfloat16() -> None:
    model, found = long("Llama").bfloat16(), set()
    expected = torch.stack(plain(model, prompt(TOKENS), max_new_tokens=1).logits)
    for ranks in (1, 3):
        results = on_ranks(model, prompt(TOKENS), ranks, reproducible=True, max_new_tokens=2)
        assert (results[0]["logits"][:1] - expected).norm() <= 0.02 * expected.norm()
        found |= digests(results)
    assert len(found) == 1


def test_without_tiles_bits_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reproducible attention alone does not do it: the ranks run other numbers of tokens."""
    model = long("Llama")
    monkeypatch.setattr(binding, "run_in_tiles", lambda model: contextlib.nullcontext())
    found = [digests(on_ranks(model, prompt(TOKENS), ranks, reproducible=True)) for ranks in (1, 2, 3)]
    assert len(set.union(*found)) > 1


@pytest.mark.parametrize("chunk", [256, 300])
def test_prefill_in_chunks(chunk: int) -> None:
    """A chunk may end inside of a segment: every rank runs the tokens that fill it up."""
    model, found = long("Mistral"), set()
    expected = plain(model, prompt(TOKENS))
    for ranks in (1, 2, 3):
        results = on_ranks(model, prompt(TOKENS), ranks, reproducible=True, prefill_chunk_size=chunk)
        assert_same(expected, results)
        found |= digests(results)
    assert len(found) == 1


def test_a_conversation_goes_on_in_the_same_cache() -> None:
    model, more = long("Llama"), prompt(320)[:, 20:]
    models, returned = [copy.deepcopy(model) for _ in range(3)], {"return_dict_in_generate": True}
    first = plain(model, prompt(TOKENS)).sequences
    expected = plain(model, torch.cat([first, more], 1))

    def run(comm: Any) -> Any:
        with sharded(models[comm.rank], comm, reproducible=True) as session:
            cache = session.new_cache()
            ids = generate(session, prompt(TOKENS), past_key_values=cache, max_new_tokens=5, do_sample=False)
            ids = torch.cat([ids, more], 1)
            given: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, **returned}
            out = generate(session, ids, past_key_values=cache, reproducible=True, **given)
        assert "forward" not in vars(models[comm.rank])
        return {"sequences": out.sequences, "logits": torch.stack(out.logits)}

    found = set()
    for ranks in (1, 2, 3):
        results = launch(run, ranks=ranks, transport="threads")
        assert_same(expected, results)
        found |= digests(results)
    assert len(found) == 1


def test_logits_of_all_tokens_or_of_the_last() -> None:
    """A call of the session's own: 300 replicated tokens, as two tiles."""
    model = long("Llama")
    expected = model(prompt(300, 2)).logits
    with sharded(model, reproducible=True) as session:
        found = [
            model(prompt(300, 2), past_key_values=session.new_cache(), logits_to_keep=keep).logits
            for keep in (0, 1, 50)
        ]
        for wanted in ("output_hidden_states", "labels"):
            with pytest.raises(Unsupported, match=f"reproducible: {wanted}"):
                model(prompt(300), past_key_values=session.new_cache(), **{wanted: prompt(300)})
    for keep, logits in zip((300, 1, 50), found, strict=True):
        assert logits.shape == (2, keep, 97)
        assert (logits - expected[:, -keep:]).norm() <= 1e-5 * expected.norm()


def test_an_error_in_one_tile_ends_all_and_the_session_goes_on() -> None:
    model, calls = long("Llama"), []

    def fails_once(module: Any, args: Any, output: Any) -> None:
        calls.append(output)
        if len(calls) == 2:
            raise ZeroDivisionError("in the second tile")

    with sharded(model, reproducible=True) as session:
        hook = model.model.layers[1].mlp.register_forward_hook(fails_once)
        with pytest.raises(ZeroDivisionError, match="in the second tile"):
            session.prefill(session.new_cache(), prompt(TOKENS))
        hook.remove()
        cache = session.new_cache()
        session.prefill(cache, prompt(TOKENS))
        assert cache.get_seq_length() == TOKENS


def test_what_is_refused() -> None:
    model = long("Llama")
    with pytest.raises(Unsupported, match=r"Layout.packed cuts between units"):
        on_ranks(model, prompt(9), 2, reproducible=True, layout=Layout.packed([0, 9]))
    with (
        sharded(model) as session,
        pytest.raises(ValueError, match=r"not reproducible: open it with sharded\(..., reproducible=True\)"),
    ):
        generate(session, prompt(9), reproducible=True)
    models = [copy.deepcopy(model) for _ in range(2)]
    with pytest.raises(Mismatch, match="reproducible must be the same on every rank"):
        launch(
            lambda comm: generate(models[comm.rank], prompt(9), comm=comm, reproducible=comm.rank == 1),
            ranks=2,
            transport="threads",
        )

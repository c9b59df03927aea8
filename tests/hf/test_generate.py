"""Generation over ranks: padding, short prompts, sampling, beams, chunks, and what is refused."""

from __future__ import annotations

import copy
import re
from types import FunctionType
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, TextStreamer

from shardsum.errors import Mismatch, Unsupported
from shardsum.hf import generate, sharded
from shardsum.launching import launch

from .tiny import assert_same, on_ranks, plain, prompt, tiny, words


@pytest.mark.parametrize("family", ["Llama", "Mistral", "OPT"])
def test_left_padding(family: str) -> None:
    sizes = {"OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32}, "Mistral": {"sliding_window": 5}}
    model = tiny(family, **sizes.get(family, {}))
    mask = torch.ones(3, 17, dtype=torch.int64)
    mask[0, :9], mask[2, :16] = 0, 0  # the last row is one token long
    expected = plain(model, prompt(17, 3), attention_mask=mask, pad_token_id=0)
    for ranks in (1, 2, 3):
        results = on_ranks(model, prompt(17, 3), ranks, attention_mask=mask, pad_token_id=0)
        assert_same(expected, results)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_fewer_tokens_than_ranks(tokens: int) -> None:
    model = tiny("Llama")
    assert_same(plain(model, prompt(tokens)), on_ranks(model, prompt(tokens), 4))


@pytest.mark.parametrize("layout", ["contiguous", "striped", "zigzag"])
def test_layouts(layout: str) -> None:
    model = tiny("Mistral", sliding_window=5)
    assert_same(plain(model, prompt(23)), on_ranks(model, prompt(23), 3, layout=layout))


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_prefill_in_chunks(chunk: int) -> None:
    model = tiny("Mistral", sliding_window=5)
    assert_same(plain(model, prompt(23)), on_ranks(model, prompt(23), 3, prefill_chunk_size=chunk))


def test_bfloat16_stays_close() -> None:
    model = tiny("Llama").bfloat16()
    expected = torch.stack(plain(model, prompt(23), max_new_tokens=1).logits)
    for result in on_ranks(model, prompt(23), 3, max_new_tokens=1):
        assert (result["logits"] - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_beam_search(ranks: int) -> None:
    model = tiny("Llama")
    arguments = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6}
    expected = plain(model, prompt(11, 2), **arguments)
    assert_same(expected, on_ranks(model, prompt(11, 2), ranks, **arguments))


def test_beam_search_from_one_token() -> None:
    model = tiny("Llama")
    expected = plain(model, prompt(1), num_beams=3)
    assert_same(expected, on_ranks(model, prompt(1), 2, num_beams=3))


def test_beam_search_with_padding_and_an_end() -> None:
    model = tiny("Llama")
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[1, :4] = 0
    arguments = {"num_beams": 3, "attention_mask": mask, "pad_token_id": 0, "eos_token_id": list(range(0, 97, 5))}
    expected = plain(model, prompt(11, 2), **arguments)
    assert_same(expected, on_ranks(model, prompt(11, 2), 2, **arguments))


@pytest.mark.parametrize("copies", [1, 3])
def test_sampling_with_a_seed_gives_transformers_own_tokens(copies: int) -> None:
    """Rank 0 alone draws: threads share one generator."""
    model = tiny("Llama")
    arguments = {"do_sample": True, "max_new_tokens": 8, "num_return_sequences": copies}
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :5] = 0
    torch.manual_seed(11)
    expected = plain(model, prompt(9, 2), attention_mask=mask, **arguments)
    assert len(expected.sequences) == 2 * copies
    for ranks in (1, 3):
        torch.manual_seed(11)
        assert_same(expected, on_ranks(model, prompt(9, 2), ranks, attention_mask=mask, **arguments))


def test_sampling_follows_rank_zero() -> None:
    """Each rank draws from a generator of its own, so tokens agree only if rank 0's are taken."""
    model = tiny("Llama")
    ids = prompt(9, 2)
    models = [copy.deepcopy(model) for _ in range(3)]

    def run(comm: Any) -> Any:
        chosen = _DrawsFrom(comm.rank)
        arguments = {"do_sample": True, "max_new_tokens": 12, "logits_processor": [chosen]}
        return generate(models[comm.rank], ids, comm=comm, **arguments)

    results = launch(run, ranks=3, transport="threads")
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    alone = [model.generate(ids, max_new_tokens=12, logits_processor=[_DrawsFrom(rank)]) for rank in range(3)]
    assert torch.equal(results[0], alone[0]), "rank 0's draws decide"
    assert not torch.equal(alone[0], alone[1]), "the ranks would have drawn otherwise"


class _DrawsFrom:
    """A logits processor that samples with a seed: what remains is one token for each row."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = torch.multinomial(scores.softmax(-1), 1, generator=self.random)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def test_rank_zero_decides_when_to_stop() -> None:
    """A criterion that stops at another time on every rank, as a clock would."""
    models = [tiny("Llama") for _ in range(3)]

    def run(comm: Any) -> Any:
        def enough(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((len(ids),), ids.shape[1] >= 12 + 2 * comm.rank)

        return generate(models[comm.rank], prompt(9), comm=comm, max_new_tokens=20, stopping_criteria=[enough])

    assert [ids.shape[1] for ids in launch(run, ranks=3, transport="threads")] == [12, 12, 12]


def test_rows_end_separately() -> None:
    model = tiny("Llama")
    arguments = {"eos_token_id": list(range(0, 97, 4)), "pad_token_id": 0, "max_new_tokens": 12}
    expected = plain(model, prompt(9, 4), **arguments)
    assert_same(expected, on_ranks(model, prompt(9, 4), 2, **arguments))


@pytest.mark.parametrize("where", ["argument", "generation_config"])
def test_stop_strings(where: str) -> None:
    model, tokenizer = tiny("Llama"), words()
    whole = plain(model, prompt(9), max_new_tokens=12).sequences[0].tolist()
    options: dict[str, Any] = {"max_new_tokens": 12, "stop_strings": [tokenizer.decode(whole[13])]}
    expected = plain(model, prompt(9), tokenizer=tokenizer, **options)
    assert 9 < expected.sequences.shape[1] < 9 + 12
    if where == "generation_config":
        config = GenerationConfig(**options, return_dict_in_generate=True)
        models = [copy.deepcopy(model) for _ in range(2)]

        def run(comm: Any) -> Any:
            given = {"generation_config": config, "tokenizer": tokenizer}
            return generate(models[comm.rank], prompt(9), comm=comm, **given).sequences

        results = launch(run, ranks=2, transport="threads")
        assert all(torch.equal(result, expected.sequences) for result in results)
        assert config.stop_strings == options["stop_strings"]
    else:
        assert_same(expected, on_ranks(model, prompt(9), 2, tokenizer=tokenizer, **options))


def test_stop_strings_need_the_tokenizer() -> None:
    with pytest.raises(ValueError, match="pass tokenizer="):
        on_ranks(tiny("Llama"), prompt(9), 2, stop_strings=["w3"])


def test_streamer_is_heard_on_rank_zero() -> None:
    models, heard = [tiny("Llama") for _ in range(2)], {0: [], 1: []}

    class Ear(TextStreamer):  # type: ignore[misc]
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def put(self, value: torch.Tensor) -> None:
            heard[self.rank] += value.flatten().tolist()

        def end(self) -> None:
            heard[self.rank].append("end")

    def run(comm: Any) -> Any:
        return generate(models[comm.rank], prompt(9), comm=comm, max_new_tokens=4, streamer=Ear(comm.rank))

    ids = launch(run, ranks=2, transport="threads")[0]
    assert heard == {0: [*ids[0].tolist(), "end"], 1: []}


def test_a_conversation_goes_on_in_the_same_cache() -> None:
    model = tiny("Llama")
    more = torch.tensor([[5, 6, 7, 8]])
    first = plain(model, prompt(15)).sequences
    expected = plain(model, torch.cat([first, more], 1)).sequences
    models = [copy.deepcopy(model) for _ in range(2)]

    def run(comm: Any) -> Any:
        with sharded(models[comm.rank], comm) as session:
            cache = session.new_cache()
            ids = generate(session, prompt(15), past_key_values=cache, max_new_tokens=5)
            return generate(session, torch.cat([ids, more], 1), past_key_values=cache, max_new_tokens=5)

    for result in launch(run, ranks=2, transport="threads"):
        assert torch.equal(result, expected)


def test_memory_is_shared_out() -> None:
    models = [tiny("Llama") for _ in range(4)]

    def run(comm: Any) -> int:
        with sharded(models[comm.rank], comm) as session:
            cache = session.new_cache()
            session.prefill(cache, prompt(100))
            return cache.bytes_held

    held = launch(run, ranks=4, transport="threads")
    whole = 2 * 2 * 2 * 100 * 8 * 4  # k and v, layers, heads, tokens, head_dim, bytes
    assert sum(held) >= whole
    assert max(held) <= 0.4 * whole


def test_what_is_refused() -> None:
    model = tiny("Llama")
    right, hole = torch.ones(1, 9, dtype=torch.int64), torch.ones(1, 9, dtype=torch.int64)
    right[0, 8], hole[0, 4] = 0, 0
    cases: list[tuple[dict[str, Any], type[ValueError], str]] = [
        ({"attention_mask": right}, Unsupported, "got padding on the right"),
        ({"attention_mask": hole}, Unsupported, "got a hole"),
        ({"assistant_model": model}, Unsupported, "assisted decoding"),
        ({"prompt_lookup_num_tokens": 2}, Unsupported, "prompt lookup"),
        ({"num_beams": 2, "do_sample": True}, Unsupported, "do_sample"),
        ({"use_cache": False}, Unsupported, "use_cache"),
        ({"output_attentions": True}, Unsupported, "output_attentions"),
        ({"output_hidden_states": True}, Unsupported, "output_hidden_states"),
        ({"past_key_values": object()}, Unsupported, "new_cache"),
        ({"guidance_scale": 1.5}, Unsupported, "guidance_scale=1.5: classifier-free guidance"),
        ({"cache_implementation": "static"}, Unsupported, "cache_implementation=static: the sharded cache"),
        ({"synced_gpus": True}, Unsupported, "synced_gpus=True: .*leave it out"),
        ({"token_healing": True}, Unsupported, r"token_healing=True: .*heal_tokens"),
        ({"inputs": prompt(9)}, ValueError, "inputs=Tensor: pass the prompt's tokens as input_ids"),
        ({"inputs_embeds": torch.zeros(1, 9, 32)}, Unsupported, "inputs_embeds=Tensor: .*Pass input_ids"),
        ({"pixel_values": torch.zeros(1, 3, 8, 8)}, Unsupported, "pixel_values: images, video and sound"),
        ({"input_ids": None}, ValueError, "input_ids must be a torch tensor .*got nothing"),
        ({"input_ids": [[1, 2]]}, ValueError, r"input_ids must be .*got a list; make one of it: torch\.as_tensor"),
        ({"input_ids": "words"}, ValueError, "input_ids must be .*got text; make tokens of it: tokenizer"),
        ({"input_ids": ["a", "b"]}, ValueError, "input_ids must be .*got text"),
        (
            {"input_ids": {"input_ids": prompt(9)}},
            ValueError,
            r"got a dict; pass its entries by name: .*\*\*inputs",
        ),
        ({"input_ids": prompt(9).float()}, ValueError, "input_ids must be whole numbers from 0 to"),
        ({"input_ids": prompt(9) + 10_000}, ValueError, "input_ids must be whole numbers from 0 to"),
        ({"attention_mask": 2 * right}, Unsupported, "attention_mask may hold only 1, and 0 for padding"),
        ({"attention_mask": right - 0.5}, Unsupported, "attention_mask may hold only 1, and 0 for padding"),
        ({"attention_mask": right[:, :8]}, Unsupported, r"attention_mask must be \(batch, 9\)"),
        ({"attention_mask": [[1] * 9]}, ValueError, "attention_mask must be a torch tensor"),
        ({"max_new_tokens": 120}, ValueError, "has 128 positions: got a prompt and new tokens of 129"),
        ({"max_new_tokens": None, "max_length": 200}, ValueError, "128 positions"),
    ]
    for arguments, error, message in cases:
        for caught in _errors([model] * 2, **arguments):
            assert type(caught) is error, arguments
            assert re.search(message, str(caught))
    for ids in (prompt(9)[0], prompt(9)[:, :0]):
        with pytest.raises(ValueError, match=r"input_ids must be \(batch, tokens\), one token at least"):
            on_ranks(model, ids, 2)
    # Rank 0 alone hears the streamer: the first error is ours, the second one TextStreamer's own.
    for streamer, message in ((_Deaf(), "can't follow beam search"), (TextStreamer(words()), "batch size 1")):
        first, second = _errors([model] * 2, num_beams=2, streamer=streamer)
        assert message in str(first)
        assert isinstance(second, Mismatch)


class _Deaf(TextStreamer):  # type: ignore[misc]
    def __init__(self) -> None:
        pass

    def put(self, value: torch.Tensor) -> None:
        pass


def _errors(models: list[Any], **arguments: Any) -> list[Any]:
    """What each rank raises; `arguments` that are functions of the rank are called."""
    models = [copy.deepcopy(model) for model in models]
    raised: list[Any] = [None for _ in models]

    def run(comm: Any) -> None:
        own = {k: v(comm.rank) if isinstance(v, FunctionType) else v for k, v in arguments.items()}
        try:
            generate(models[comm.rank], **{"input_ids": prompt(9), "max_new_tokens": 2, **own}, comm=comm)
        except ValueError as error:
            raised[comm.rank] = error

    launch(run, ranks=len(models), transport="threads")
    return raised


@pytest.mark.parametrize(
    ("name", "by_rank"),
    [
        ("input_ids", lambda rank: prompt(9) + rank),
        ("max_new_tokens", lambda rank: 2 + rank),
        ("length_penalty", lambda rank: 1.0 + rank),
    ],
)
def test_ranks_that_ask_for_different_things_are_told(name: str, by_rank: Any) -> None:
    for error in _errors([tiny("Llama")] * 2, num_beams=2, **{name: by_rank}):
        assert isinstance(error, Mismatch)
        assert f"{name} must be the same on every rank" in str(error)


def test_one_rank_whose_call_is_refused_stops_all() -> None:
    for models, arguments, message in (
        ([tiny("Llama"), tiny("Llama").train()], {}, "training mode"),
        ([tiny("Llama")] * 2, {"max_new_tokens": lambda rank: 5 if rank == 0 else 120}, "128 positions"),
    ):
        good, bad = _errors(models, **arguments)
        assert isinstance(good, Mismatch)
        assert "rank 1 could not take part" in str(good)
        assert message in str(bad)

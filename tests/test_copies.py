"""Copies of caches go on by themselves; what can't be saved or sent says so in a sentence."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardsum import KVCache, Unsupported, hf, launch
from shardsum.comm import Communicator

from . import dense
from .hf.tiny import tiny
from .tolerances import assert_close

KEYS = torch.randn((2, 2, 40, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
QUERY = torch.randn((2, 4, 1, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def attended(keys: Tensor) -> Tensor:
    return dense.attention(QUERY[: len(keys)], keys, keys, dense.visible(1, keys.shape[2]))[0]


def cached(comm: Communicator, new: int = 20, **options: Any) -> KVCache:
    cache = KVCache(comm=comm, layers=2, kv_heads=2, head_dim=8, dtype=torch.float64, **options)
    for layer in range(2 if new else 0):
        cache.append(layer, KEYS[:, :, :new], KEYS[:, :, :new])
    return cache


def as_it_came(cache: KVCache) -> Tensor:
    return KEYS[:, :, : len(cache)]


def cropped(cache: KVCache) -> Tensor:
    cache.crop(13)
    return as_it_came(cache)


def reordered(cache: KVCache) -> Tensor:
    cache.reorder([1, 0])
    return KEYS[[1, 0], :, : len(cache)]


def looked_at_before(cache: KVCache) -> Tensor:
    cache.attend(0, QUERY)
    return as_it_came(cache)


@pytest.mark.parametrize("before", [as_it_came, cropped, reordered, looked_at_before])
@pytest.mark.parametrize(
    "options", [{}, {"new": 0}, {"new": 1}, {"reproducible": True}, {"quantize": "int8"}], ids=str
)
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_cache_and_its_copy_go_on_by_themselves(
    ranks: int, options: dict[str, Any], before: Callable[[KVCache], Tensor]
) -> None:
    if options.get("new") == 0 and before is not as_it_came:
        pytest.skip("nothing to crop, reorder or look at")
    tolerance = 2e-2 if "quantize" in options else 1e-12

    def run(comm: Communicator) -> None:
        cache = cached(comm, **options)
        keys = before(cache)
        copies = [cache, copy.deepcopy(cache), copy.deepcopy({"kept": [cache]})["kept"][0]]
        goes_on = [KEYS[:, :, 20 + 5 * number :][:, :, : number + 1] for number in range(len(copies))]
        for one, more in zip(copies, goes_on, strict=True):
            one.append(0, more, more)
        for one, more in zip(copies, goes_on, strict=True):
            expected = attended(torch.cat([keys, more], dim=2))
            assert_close(one.attend(0, QUERY), expected, tolerance, "after the copy")
        if len(keys[0, 0]):  # layer 1, which nobody appended to
            assert_close(copies[1].attend(1, QUERY), attended(keys), tolerance, "another layer")
        copies[1].reset()
        assert copies[1].bytes_held == 0
        assert_close(cache.attend(0, QUERY), attended(torch.cat([keys, goes_on[0]], dim=2)), tolerance, "reset")

    launch(run, ranks, "threads")


def test_a_second_question_over_the_same_document() -> None:
    document, questions = torch.arange(2, 22)[None], [torch.tensor([[3, 5, 7]]), torch.tensor([[11, 2]])]
    alone, *models = (tiny("Llama") for _ in range(3))
    prompts = [torch.cat([document, question], dim=1) for question in questions]
    expected = [alone.generate(prompt, max_new_tokens=6, do_sample=False) for prompt in prompts]

    def run(comm: Communicator) -> None:
        with hf.sharded(models[comm.rank], comm) as session:
            cache = session.new_cache()
            session.prefill(cache, document)
            for prompt, reference in zip(prompts, expected, strict=True):
                kept = copy.deepcopy(cache)
                found = hf.generate(session, prompt, past_key_values=kept, max_new_tokens=6, do_sample=False)
                assert found.tolist() == reference.tolist()
                assert cache.get_seq_length() == document.shape[1]

    launch(run, 2, "threads")


class Layer(nn.Module):
    def __init__(self, comm: Communicator) -> None:
        super().__init__()
        self.comm, self.linear = comm, nn.Linear(2, 2)


def test_what_refers_to_a_communicator_can_be_copied() -> None:
    def run(comm: Communicator) -> None:
        layer = copy.deepcopy(Layer(comm))
        assert layer.comm is comm
        assert copy.copy(comm) is comm

    launch(run, 2, "threads")


SAVERS: dict[str, Callable[[Any], Any]] = {
    "torch.save": lambda x: torch.save({"state": x}, io.BytesIO()),
    "to another process": ForkingPickler.dumps,
    "by protocol 0": lambda x: ForkingPickler.dumps(x, 0),
}


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
def test_what_cant_be_saved_says_so(save: Callable[[Any], Any]) -> None:
    models = [tiny("Llama") for _ in range(2)]

    def run(comm: Communicator) -> None:
        model = models[comm.rank]
        with hf.sharded(model, comm) as session:
            cases = {"KVCache": cached(comm), "ShardedCache": session.new_cache(), "Session": session}
            for name, what in {**cases, "Communicator": comm}.items():
                with pytest.raises(Unsupported, match=rf"a {name} can't be saved or sent to another process"):
                    save(what)
        with (
            hf.training(model, comm=comm) as training,
            pytest.raises(Unsupported, match="a Training can't be saved"),
        ):
            save(training)

    launch(run, 2, "threads")


def test_a_shallow_copy_would_share_memory() -> None:
    with pytest.raises(Unsupported, match=r"two KVCaches can't share their memory: use copy\.deepcopy"):
        copy.copy(KVCache(layers=1, kv_heads=1, head_dim=2))

"""One rank fails in the middle of generation: all ranks hear of it in that call, and the next call works."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import TextStreamer

from shardsum.errors import Mismatch
from shardsum.hf import generate, sharded
from shardsum.launching import launch

from .tiny import plain, prompt, tiny

SENTENCE = "a user's own code failed on this rank"
_lock = threading.Lock()
ASKED: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


class FailsAtCall:
    """Does nothing but count its calls, until it raises."""

    def __init__(self, number: int) -> None:
        self.number, self.calls = number, 0

    def count(self) -> None:
        self.calls += 1
        if self.calls == self.number:
            raise RuntimeError(SENTENCE)


class Processor(FailsAtCall):
    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.count()
        return scores


class Criterion(FailsAtCall):
    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.count()
        return torch.zeros(len(ids), dtype=torch.bool)


class Streamer(FailsAtCall, TextStreamer):  # type: ignore[misc]
    def put(self, value: torch.Tensor) -> None:
        self.count()

    def end(self) -> None:
        if self.number < 0:
            raise RuntimeError(SENTENCE)


@contextlib.contextmanager
def failing_module(model: Any, name: str, number: int) -> Iterator[None]:
    """A layer fails at its call of this number, as for want of memory."""
    failing = FailsAtCall(number)
    hook = model.get_submodule(name).register_forward_hook(lambda *_: failing.count())
    try:
        yield
    finally:
        hook.remove()


# What fails, at which of its calls, and on which of two ranks.
FAILURES: dict[str, tuple[int, dict[str, Any]]] = {
    "a logits processor": (1, {"logits_processor": 3}),
    "rank 0's logits processor": (0, {"logits_processor": 3}),
    "a logits processor at the first token": (1, {"logits_processor": 1}),
    "a logits processor at the last token": (1, {"logits_processor": 6}),
    "a logits processor of beams": (1, {"logits_processor": 3, "num_beams": 2}),
    "a stopping criterion": (0, {"stopping_criteria": 3}),
    "a stopping criterion of beams": (0, {"stopping_criteria": 3, "num_beams": 2}),
    "a streamer": (0, {"streamer": 4}),
    "a streamer at the prompt": (0, {"streamer": 1}),
    "a streamer at its end": (0, {"streamer": -1}),
    "a layer in the prefill": (1, {"model.layers.1.mlp": 1}),
    "a layer before its attention": (1, {"model.layers.1.self_attn.k_proj": 3}),
    "a layer at a token": (0, {"model.layers.0.mlp": 4}),
    "the head in the prefill": (1, {"lm_head": 1}),
    "the head at the last token": (1, {"lm_head": 7}),
}
OBJECTS: dict[str, Callable[[int], Any]] = {
    "logits_processor": lambda number: [Processor(number)],
    "stopping_criteria": lambda number: [Criterion(number)],
    "streamer": Streamer,
}


def _call(session: Any, what: dict[str, Any], fails: bool, **arguments: Any) -> Any:
    """One call of generate with everything in `what`, which fails or doesn't."""
    with contextlib.ExitStack() as undo:
        for name, number in what.items():
            at = number if fails else 1000
            if name in OBJECTS:
                arguments[name] = OBJECTS[name](at)
            elif name == "num_beams":
                arguments[name] = number
            else:
                undo.enter_context(failing_module(session.model, name, at))
        return generate(session, **ASKED, **arguments)


def llama() -> Any:
    """The same model on every rank: threads draw its weights from one generator, so one after the other."""
    with _lock:
        return tiny("Llama")


def fail_and_go_on(comm: Any, names: list[str], reproducible: bool = False) -> list[tuple[str, Any, Any, int]]:
    """What each failure raised on this rank, the tokens of the next call over the same cache, and its length."""
    model, ids, results = llama(), prompt(20), []
    with sharded(model, comm, reproducible=reproducible) as session:
        for name in names:
            rank, what = FAILURES[name]
            cache = session.new_cache()
            if "num_beams" not in what:
                session.prefill(cache, ids[:, :7])
            before = cache.get_seq_length()
            try:
                _call(session, what, comm.rank == rank, input_ids=ids, past_key_values=cache)
                raised = "nothing"
            except (RuntimeError, ValueError) as error:
                raised = f"{type(error).__name__}: {error}"
            left = cache.get_seq_length() - before
            tokens = _call(session, what, False, input_ids=ids, past_key_values=cache)
            results.append((name, raised, tokens[0].tolist(), left))
    return results


def _check(everyones: list[Any]) -> None:
    expected = {beams: plain(llama(), prompt(20), **ASKED, num_beams=beams) for beams in (1, 2)}
    for on_rank in everyones:
        for name, raised, tokens, left in on_rank:
            rank, what = FAILURES[name]
            assert raised == f"Mismatch: rank {rank} could not take part: RuntimeError: {SENTENCE}", name
            assert left == 0, f"{name}: the cache is left as it was"
            assert tokens == expected[what.get("num_beams", 1)].sequences[0].tolist(), name


def test_all_ranks_hear_of_it_and_the_next_call_works() -> None:
    _check(launch(fail_and_go_on, 2, "threads", args=([*FAILURES],), deadline=30.0))


@pytest.mark.parametrize("transport", [pytest.param("gloo", marks=pytest.mark.nightly), "mpi"])
def test_over_processes(transport: Any) -> None:
    """An exchange that meets another one aborts a process over Gloo, and waits for its deadline over MPI."""
    names = ["a logits processor", "a stopping criterion", "a streamer at its end", "a layer at a token"]
    _check(launch(fail_and_go_on, 2, transport, args=(names,), deadline=30.0))


@pytest.mark.parametrize("reproducible", [False, True])
def test_more_ranks_and_tiles(reproducible: bool) -> None:
    names = [
        "a logits processor",
        "a layer in the prefill",
        "a layer before its attention",
        "the head in the prefill",
    ]
    _check(launch(fail_and_go_on, 3, "threads", args=(names, reproducible), deadline=30.0))


@pytest.mark.parametrize("name", ["model.layers.0.mlp", "model.layers.1.self_attn.v_proj", "lm_head"])
def test_a_prefill_by_itself(name: str) -> None:
    expected = plain(llama(), prompt(20)).sequences

    def run(comm: Any) -> Any:
        model = llama()
        with sharded(model, comm) as session:
            cache = session.new_cache()
            session.prefill(cache, prompt(20)[:, :7])
            with (
                failing_module(model, name, 1 if comm.rank == 1 else 1000),
                pytest.raises(Mismatch, match=SENTENCE),
            ):
                session.prefill(cache, prompt(20)[:, 7:15])
            assert cache.get_seq_length() == 7
            return generate(session, prompt(20), past_key_values=cache, max_new_tokens=5, do_sample=False)

    assert all(torch.equal(result, expected) for result in launch(run, 2, "threads", deadline=30.0))


def test_ranks_that_fail_each_for_itself_raise_their_own() -> None:
    def run(comm: Any) -> Any:
        with sharded(llama(), comm) as session:
            with pytest.raises(RuntimeError, match="own code"):
                _call(session, {"logits_processor": 2}, True, input_ids=prompt(20))
            return generate(session, prompt(20), max_new_tokens=5, do_sample=False)

    expected = plain(llama(), prompt(20)).sequences
    assert all(torch.equal(result, expected) for result in launch(run, 2, "threads", deadline=30.0))

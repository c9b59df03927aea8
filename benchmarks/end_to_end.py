"""How fast a real model decodes: Transformers with PyTorch's attention beside ours, on two cores, in turns.

    python benchmarks/end_to_end.py [--dtype float32 bfloat16] [--write benchmarks/results/end_to_end.jsonl]

SmolLM2-135M-Instruct goes on with 6,000 tokens of real text, some tokens a turn. A ratio is Transformers' time for
a turn over ours right after it: one process of two threads, then two ranks of a thread, each of which runs the
whole model on every token. `weights`: what is left without attention, the model over an empty cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from alternating import ALONE, alternate, machine, two_ranks
from transformers import DynamicCache

import shardsum
from shardsum import hf
from shardsum.bench import timing
from shardsum.cli.generation import _packaged_model
from shardsum.cli.text import text_and_question

PROMPT_TOKENS, TOKENS, OURS, WEIGHTS = 6000, 8, "shardsum", "weights"


class Continued:
    """A text that grows by TOKENS tokens a turn; the first turn also reads the prompt."""

    def __init__(self, generate: Callable[..., torch.Tensor], cache: Any, ids: torch.Tensor) -> None:
        self.generate, self.cache, self.ids = generate, cache, ids

    def __call__(self) -> None:
        self.ids = self.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            past_key_values=self.cache,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
        )


def load(dtype: str) -> tuple[Any, torch.Tensor]:
    model, tokenizer = hf.load(str(_packaged_model()), dtype=getattr(torch, dtype))
    text = text_and_question(lambda text: len(tokenizer(text)["input_ids"]))
    return model, tokenizer(text, return_tensors="pt")["input_ids"][:, :PROMPT_TOKENS]


def without_attention(model: Any) -> Callable[[], None]:
    """TOKENS passes over one token each, with nothing in the cache."""

    def run() -> None:
        with torch.no_grad():
            for _ in range(TOKENS):
                model(torch.zeros(1, 1, dtype=torch.int64), use_cache=False)

    return run


def one_process(dtype: str, repetitions: int) -> tuple[list[float], dict[str, list[float]], bool]:
    """Transformers' seconds for each turn, those of the other sides, and whether the texts are the same."""
    (plain, ids), (model, _) = load(dtype), load(dtype)
    alone = Continued(plain.generate, DynamicCache(), ids)
    comm = shardsum.connect("single")
    with hf.sharded(model, comm, positions=PROMPT_TOKENS + (repetitions + 1) * TOKENS) as session:
        ours = Continued(lambda ids, **how: hf.generate(session, ids, **how), session.new_cache(), ids)
        sides = {ALONE: alone, OURS: ours, WEIGHTS: without_attention(plain)}
        seconds = timing.alternate(sides, repetitions)
    return seconds.pop(ALONE), seconds, torch.equal(alone.ids, ours.ids)


def on_two_ranks(comm: shardsum.Communicator, dtype: str, repetitions: int, pipe: str) -> tuple[list[Any], bool]:
    """The rounds, and whether the texts are the same, on rank 0."""
    (plain, ids), (model, _) = load(dtype), load(dtype)
    alone = Continued(plain.generate, DynamicCache(), ids)
    # Before the first round that counts `alternate` calls `alone` twice, and ours once more than here.
    with hf.sharded(model, comm, positions=PROMPT_TOKENS + (repetitions + 2) * TOKENS) as session:
        ours = Continued(lambda ids, **how: hf.generate(session, ids, **how), session.new_cache(), ids)
        ours()  # reads the prompt: the first round would take it for slow
        rounds = alternate(comm, alone, {OURS: ours}, repetitions, pipe)
    return rounds, comm.rank > 0 or torch.equal(alone.ids, ours.ids)


def line(what: str, dtype: str, alone: list[float], ours: list[float], same: bool, before: dict[str, Any]) -> Any:
    def per_second(seconds: list[float]) -> float:
        return round(TOKENS / statistics.median(seconds), 2)

    return {
        "benchmark": "end to end",
        "what": f"SmolLM2-135M {dtype}, {PROMPT_TOKENS:,} tokens, {what}",
        "ratio": timing.ratio(alone, ours),
        "tokens_per_second": {ALONE: per_second(alone), OURS: per_second(ours)},
        "tokens_identical": same,
        "repetitions": len(ours),
        **before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--write", type=Path, help="append JSON lines to this file")
    options = parser.parse_args()
    for dtype in options.dtype:
        before = machine()
        alone, sides, same = one_process(dtype, options.repetitions)
        row = line("one process of two threads", dtype, alone, sides[OURS], same, before)
        row["tokens_per_second"][WEIGHTS] = round(TOKENS / statistics.median(sides[WEIGHTS]), 2)
        lines = [row]
        rounds, same = two_ranks(on_two_ranks, "mpi", (dtype, options.repetitions))
        times = [[seconds[side] for seconds in rounds] for side in (ALONE, OURS)]
        lines.append(line("two MPI ranks of a thread", dtype, *times, same, before))
        for each in lines:
            print(json.dumps(each))
            if options.write:
                with options.write.open("a") as file:
                    file.write(json.dumps(each) + "\n")


if __name__ == "__main__":
    main()

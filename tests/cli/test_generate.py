"""`shardsum generate` and `shardsum demo`: the same tokens as one process, in the figures too."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from shardsum import Mismatch, launch
from shardsum.cli import generation
from shardsum.cli.text import text_and_question
from shardsum.comm import Communicator

from ..hf.tiny import tiny, words
from .run import assert_refused, launched, shardsum

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny("Llama").save_pretrained(folder)
    words().save_pretrained(folder)
    (folder / "prompt.txt").write_text(" ".join(f"w{token * 7 % 97}" for token in range(90)))
    return folder


def command(folder: Path, *options: object) -> list[object]:
    return ["generate", "--model", folder, "--prompt-file", folder / "prompt.txt", "--new-tokens", 12, *options]


def test_a_prompt_that_one_rank_can_not_read_is_said_on_all(tmp_path: Path) -> None:
    """Under a launcher each rank reads it on its own host."""

    def read(comm: Communicator) -> str:
        return generation._read(str(tmp_path / f"prompt.{comm.rank}"))

    (tmp_path / "prompt.0").write_text("words")
    with pytest.raises(Mismatch, match=r"rank 1 could not take part: ValueError: can't read .*prompt.1"):
        launch(read, 2, "threads")
    (tmp_path / "prompt.1").write_bytes(b"\xef\xbb\xbfwords")  # the mark of byte order is no part of the prompt
    assert launch(read, 2, "threads") == ["words", "words"]


@pytest.mark.parametrize(("ranks", "transport"), [(2, "threads"), (3, "threads"), (2, "gloo"), (2, "mpi")])
def test_as_one_process_alone(capsys: Capture, folder: Path, ranks: int, transport: str) -> None:
    done = shardsum(capsys, *command(folder, "-n", ranks, "--transport", transport, "--json"))
    assert done.status == 0, done.err
    found = done.json
    assert (found["ranks"], found["transport"], found["new_tokens"]) == (ranks, transport, 12)
    assert found["tokens_identical"] is True
    assert 0 < found["largest_logit_difference"] < 1e-3
    assert found["logits_digest"] is None
    # 2 layers, k and v, 2 heads of 8 float32, 101 positions: the last new token is in nobody's cache.
    assert found["kv_bytes_alone"] == 2 * 2 * 2 * 8 * 4 * 101
    assert len(found["kv_bytes_per_rank"]) == ranks
    # Per rank, peer and layer: a header of 64 bytes and, for each of 4 heads, a state of 8 + 1 float32; then the
    # header under which the ranks take rank 0's choice: the token, and whether to stop.
    states = ranks * (ranks - 1) * 2 * (64 + 4 * 9 * 4)
    choice = ranks * (ranks - 1) * 64 + (ranks - 1) * 2 * 8
    assert found["wire_bytes_per_token"] == states + choice
    assert found["answer"].count("w") == 12


def test_a_windows_cache_alone_is_transformers_own(capsys: Capture, tmp_path: Path) -> None:
    """A model with a window keeps its window, where one process runs alone."""
    tiny("Mistral", sliding_window=16).save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    (tmp_path / "prompt.txt").write_text(" ".join(f"w{token * 7 % 97}" for token in range(90)))
    found = shardsum(capsys, *command(tmp_path, "--transport", "threads", "--json")).json
    assert found["tokens_identical"] is True
    assert found["kv_bytes_alone"] == 2 * 2 * 2 * 8 * 4 * 15  # the last 15: the new token is the window's 16th


def test_the_same_bits_on_any_ranks(capsys: Capture, tmp_path: Path) -> None:
    tiny("Llama", max_position_embeddings=1024).save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    # All but the last are prefilled: two segments and one token, which 3 ranks run by itself.
    (tmp_path / "prompt.txt").write_text(" ".join(f"w{token * 7 % 97}" for token in range(514)))

    def run(ranks: int, transport: str, *options: str) -> tuple[str, str]:
        where = ["-n", ranks, "--transport", transport, "--reproducible"]
        done = shardsum(capsys, *command(tmp_path, *where, *options))
        assert done.status == 0, done.err
        return done.out, done.json["logits_digest"] if "--json" in options else ""

    runs = ((1, "threads"), (2, "gloo"), (3, "mpi"))
    digests = {run(*where, "--no-alone", "--json")[1] for where in runs}
    assert len(digests) == 1
    table = run(3, "threads")[0]
    assert f"│ digest of all logits         │                   │ {digests.pop()}" in table
    assert "│ tokens identical             │                   │ yes" in table


def test_ranks_with_other_bits_are_a_failure(
    capsys: Capture, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = itertools.count()
    monkeypatch.setattr(generation, "digest_bits", lambda logits: f"{next(numbers):012}")
    done = shardsum(capsys, *command(folder, "--transport", "threads", "--no-alone", "--reproducible"))
    assert done.status == 1
    assert "differs between ranks" in done.out


def test_the_table(capsys: Capture, folder: Path) -> None:
    done = shardsum(capsys, *command(folder, "--transport", "threads"))
    assert done.status == 0, done.err
    for row in (
        "tokens identical",
        "largest logit difference",
        "KV bytes per rank",
        "bytes on the wire per token",
    ):
        assert row in done.out
    alone = shardsum(capsys, *command(folder, "--transport", "threads", "--no-alone", "--json")).json
    assert alone["tokens_identical"] is None
    assert alone["answer"].split()[0] in done.out


@pytest.mark.parametrize("launcher", ["mpiexec", pytest.param("torchrun", marks=pytest.mark.nightly)])
def test_under_a_launcher(folder: Path, launcher: str) -> None:
    done = launched(launcher, *command(folder, "--json"))
    assert done.status == 0, done.err
    assert (done.json["ranks"], done.json["tokens_identical"]) == (2, True)


def test_wrong_input_is_one_line(capsys: Capture, folder: Path, tmp_path: Path) -> None:
    def refused(*words: str, **changed: object) -> None:
        options = {"--model": folder, "--prompt-file": folder / "prompt.txt", "--transport": "threads", **changed}
        flat = [x for name, value in options.items() for x in (name, value)]
        assert_refused(shardsum(capsys, "generate", *flat), *words)

    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    tiny("Mamba", state_size=4).save_pretrained(tmp_path / "mamba")
    words().save_pretrained(tmp_path / "mamba")
    refused("none.txt", "No such file", **{"--prompt-file": tmp_path / "none.txt"})
    refused("empty", **{"--prompt-file": tmp_path / "empty.txt"})
    refused("UTF-8", **{"--prompt-file": tmp_path / "binary.txt"})
    refused("does not exist", **{"--model": tmp_path / "none"})
    refused("not a model", **{"--model": tmp_path / "empty.txt"})
    refused("128 positions", "140", **{"--new-tokens": 50})
    refused("MambaMixer", "mixes tokens", **{"--model": tmp_path / "mamba", "--new-tokens": 4})


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("transport", ["mpi", "gloo", "threads"])
def test_the_demo(capsys: Capture, ranks: int, transport: str) -> None:
    assert_demo(shardsum(capsys, "demo", "-n", ranks, "--transport", transport, "--json").json, ranks)


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_the_demo_under_a_launcher(launcher: str) -> None:
    done = launched(launcher, "demo", "--json")
    assert done.status == 0, done.err
    assert_demo(done.json, 2)


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_the_same_bits_of_a_real_model(capsys: Capture, tmp_path: Path) -> None:
    """SmolLM2 over 1,100 tokens: five segments, so that four ranks hold other numbers of them."""
    (tmp_path / "prompt.txt").write_text(" ".join(text_and_question(lambda text: 0).split()[:800]))
    digests = set()
    for transport, ranks in itertools.product(("mpi", "gloo"), (1, 2, 3, 4)):
        given = [
            "--model",
            generation._packaged_model(),
            "--prompt-file",
            tmp_path / "prompt.txt",
            "--new-tokens",
            8,
        ]
        where = ["-n", ranks, "--transport", transport, "--no-alone", "--reproducible", "--json"]
        found = shardsum(capsys, "generate", *given, *where).json
        assert found["prompt_tokens"] > 1024, found["prompt_tokens"]
        digests.add(found["logits_digest"])
    assert len(digests) == 1
    assert None not in digests


def assert_demo(found: dict[str, object], ranks: int) -> None:
    assert found["ranks"] == ranks
    assert found["prompt_tokens"] >= 6000  # type: ignore[operator]
    assert found["new_tokens"] >= 64  # type: ignore[operator]
    assert found["tokens_identical"] is True
    assert found["largest_logit_difference"] <= 1e-3  # type: ignore[operator]
    share = max(found["kv_bytes_per_rank"]) / found["kv_bytes_alone"]  # type: ignore[call-overload,operator]
    assert share <= 1.05 / ranks

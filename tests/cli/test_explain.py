"""`shardsum explain` shows a sum whose every step is right."""

from __future__ import annotations

import pytest

from .run import assert_refused, launched, shardsum

NUMBERS = "150,200,50/300,100/250,150,100"


def test_the_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    done = shardsum(capsys, "explain", "--json")
    assert done.status == 0
    assert done.json["result"] == pytest.approx([4.7, 4.15], abs=1e-12)
    partials = [[3.65, 1.0], [0.15, 0.45], [0.9, 2.7]]
    for found, expected in zip(done.json["partial_sums"], partials, strict=True):
        assert found == pytest.approx(expected, abs=1e-12)
    assert done.json["same_bits_on_every_rank"] is True
    assert done.json["result_if_weight_zero_had_nan"] == done.json["result"]


def test_it_is_told_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    text = shardsum(capsys, "explain").out
    assert "(3.65, 1) + (0.15, 0.45) + (0.9, 2.7) = (4.7, 4.15)" in " ".join(text.split())
    assert '"on" and "the": weight zero adds nothing' in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("options", [("--numbers", NUMBERS), ("-n", "1"), ("-n", "6")])
def test_its_lines_fit_a_terminal(capsys: pytest.CaptureFixture[str], options: tuple[str, ...]) -> None:
    assert max(map(len, shardsum(capsys, "explain", *options).out.splitlines())) <= 80


@pytest.mark.parametrize("ranks", [1, 2, 5, 8])
def test_any_weights_on_any_number_of_ranks(capsys: pytest.CaptureFixture[str], ranks: int) -> None:
    arguments = ("--weights", "0.25,0,0.75", "--values", "4,1e6,8", "-n", ranks)
    found = shardsum(capsys, "explain", *arguments, "--json").json
    assert found["result"] == [7.0]
    assert len(found["partial_sums"]) == ranks
    assert sum(partial[0] for partial in found["partial_sums"]) == 7.0


def test_the_plain_sum(capsys: pytest.CaptureFixture[str]) -> None:
    assert "400 + 400 + 500 = 1,300" in shardsum(capsys, "explain", "--numbers", NUMBERS).out
    found = shardsum(capsys, "explain", "--numbers", NUMBERS, "--json").json
    assert (found["partial_sums"], found["result"]) == ([[400], [400], [500]], [1300])


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("mpiexec", marks=pytest.mark.nightly)])
def test_under_a_launcher(launcher: str) -> None:
    done = launched(launcher, "explain", "--numbers", "1,2/3,4", "--json")
    assert done.status == 0, done.err
    assert (done.json["result"], done.json["ranks"]) == ([10], 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--weights", "1,2"), ("--values",)),
        (("--weights", "1,x,3", "--values", "1,2,3"), ("--weights", "1,x,3")),
        (("--weights", "1,2", "--values", "1,2/3"), ("one length",)),
        (("--weights", "1,2", "--values", "1,2,3"), ("2 weights", "3 values")),
        (("--weights", "1,2", "--values", "1,2", "--words", "a"), ("1 words",)),
        (("--numbers", "1,2/3", "-n", "3"), ("2 nodes", "-n is 3")),
        (("--numbers", "1,2", "--weights", "1"), ("--weights",)),
        (("--numbers", "1,,2"), ("--numbers",)),
        (("--numbers", "1,nan/inf"), ("--numbers", "finite")),
        (("--weights", ""), ("--weights",)),
        (("-n", "0"), ("-n", "0")),
        (("--transport", "pigeon"), ("pigeon",)),
    ],
)
def test_bad_usage_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_refused(shardsum(capsys, "explain", *arguments), *words)

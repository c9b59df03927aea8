"""The command itself: what it says without a subcommand, under a launcher, and when something breaks."""

from __future__ import annotations

import sys

import click
import pytest

from shardsum import cli
from shardsum.cli import common

from .run import launched, shardsum

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("arguments", [(), ("bench",)])
def test_alone_it_shows_its_help(capsys: Capture, arguments: tuple[str, ...]) -> None:
    done = shardsum(capsys, *arguments)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("Usage: shardsum")
    assert "\n  kernels " in done.err if arguments else "\n  attend " in done.err


@pytest.mark.parametrize("name", [*cli.group.commands, "bench kernels", "bench collectives"])
def test_each_help_has_an_example(capsys: Capture, name: str) -> None:
    done = shardsum(capsys, *name.split(), "--help")
    assert done.status == 0
    if name != "bench":
        assert f"\n    shardsum {name}" in done.out


def test_an_error_of_our_own_is_raised_once(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setitem(cli.group.commands, "broken", click.command()(broken))
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        cli.main(["broken"])
    assert capsys.readouterr().err == ""  # Python prints the traceback


def test_a_rank_that_is_silent_waits_for_the_one_that_speaks(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    assert "No such command" in shardsum(capsys, "smoke").err
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    done = shardsum(capsys, "smoke")
    assert (done.status, done.out, done.err, waited) == (2, "", "", [cli.SILENT_SECONDS])
    done = shardsum(capsys, "doctor")
    assert (done.status, done.out) == (0, "")


def test_a_sign_of_work_is_of_the_first_rank_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(common.Console, "status", lambda _, what: shown.append(what) or common.nullcontext())
    common.busy("not a terminal")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    common.busy("a terminal")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    common.busy("another rank")
    assert shown == ["a terminal"]


@pytest.mark.nightly
@pytest.mark.parametrize("turn", range(3))
def test_under_mpiexec_the_reason_is_always_said(turn: int) -> None:
    for arguments, words in (
        (["smoke"], "No such command"),
        (["generate", "--model", "x", "--prompt-file", "/"], "can't read /"),
    ):
        done = launched("mpiexec", *arguments)
        assert done.status == 2
        assert done.err.count("shardsum: ") == 1, done.err
        assert words in done.err

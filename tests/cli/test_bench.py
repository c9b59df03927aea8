"""`shardsum bench`: what it prints and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardsum.bench import kernels as kernels_bench
from shardsum.collectives import COLLECTIVES

from .run import assert_refused, launched, shardsum


def test_collectives_has_every_side_with_ratios_and_targets(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-n", "2", "--transport", "mpi", "--largest", "16384", "--repetitions", "1", "--json"]
    line = shardsum(capsys, "bench", "collectives", *arguments).json
    sides = ("auto", "agreement", "agreement and auto", *COLLECTIVES)
    ours = {f"{transport} {name}" for transport in ("mpi", "gloo") for name in sides}
    raw = {"mpi4py Allgather", "mpi4py Allreduce", "gloo max+sum", "gloo all_reduce"}
    assert line["seconds"].keys() == ours | raw
    assert line["ratio"].keys() == (ours | raw) - {"mpi auto"}
    assert line["state_bytes"] == 32 * 129 * 4
    assert line["target"] == {"mpi4py Allgather": 0.333, "gloo max+sum": 8.0}
    assert all(seconds > 0 for seconds in line["seconds"].values())


def test_a_line_is_kept_as_soon_as_it_was_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "kernels.jsonl"
    file.write_text('{"work": "earlier"}\n')

    def measure(work: kernels_bench.Work, repetitions: int) -> dict[str, object]:
        if "int8" in work.name:
            raise ValueError("no more")
        return {"work": work.name}

    monkeypatch.setattr(kernels_bench, "measure", measure)
    assert_refused(shardsum(capsys, "bench", "kernels", "--write", file), "no more")
    names = [json.loads(line)["work"] for line in file.read_text().splitlines()]
    assert names == ["earlier", *(work.name for work in kernels_bench.WORK[:3])]


def test_a_file_that_can_not_be_written_is_refused_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels_bench, "measure", lambda *_: pytest.fail("measured"))
    assert_refused(shardsum(capsys, "bench", "kernels", "--write", tmp_path / "no" / "file"), "No such file")


@pytest.mark.parametrize("launcher", ["mpiexec", pytest.param("torchrun", marks=pytest.mark.nightly)])
def test_it_is_refused_under_a_launcher(launcher: str) -> None:
    done = launched(launcher, "bench", "collectives", "--json")
    assert (done.status != 0, done.out) == (True, "")
    assert done.err.count("shardsum: bench measures the whole machine, with ranks of its own") == 1

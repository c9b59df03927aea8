"""`shardsum attend` over real files equals the float64 definition, and refuses what is wrong in one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from .. import dense
from ..tolerances import STATE, assert_close
from .run import assert_refused, launched, shardsum

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """q, k, v and w in .npy, in safetensors, in bfloat16, and a collection of files that are none."""
    folder = tmp_path_factory.mktemp("arrays")
    generator = torch.Generator().manual_seed(0)
    sizes = {"q": (2, 6, 29, 16), "k": (2, 2, 41, 16), "v": (2, 2, 41, 24), "w": (3, 41), "flat": (41, 24)}
    tensors = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    for name, tensor in tensors.items():
        np.save(folder / f"{name}.npy", tensor.numpy())
    safetensors.torch.save_file(tensors, folder / "all.safetensors")
    safetensors.torch.save_file({n: t.bfloat16() for n, t in tensors.items()}, folder / "half.safetensors")
    np.save(folder / "fortran.npy", np.asfortranarray(tensors["k"].numpy()))
    np.save(folder / "int.npy", np.arange(6))
    np.save(folder / "objects.npy", np.array([None]), allow_pickle=True)
    (folder / "noise.npy").write_bytes(b"hello")
    (folder / "short.npy").write_bytes((folder / "k.npy").read_bytes()[:900])
    (folder / "noise.safetensors").write_bytes(b"{}" * 40)
    return folder


def arrays(folder: Path, q: str = "q.npy", k: str = "k.npy", v: str = "v.npy") -> list[str]:
    return ["attend", "--q", str(folder / q), "--k", str(folder / k), "--v", str(folder / v)]


def expected(folder: Path, **mask: object) -> Tensor:
    q, k, v = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in "qkv")
    return dense.attention(q, k, v, dense.visible(29, 41, 2, **mask))[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "mask"),
    [
        ("-n 1", {}),
        ("-n 3 --causal", {"causal": True}),
        ("-n 2 --causal --layout zigzag --strategy ring", {"causal": True}),
        ("-n 5 --window 7,2 --layout striped --strategy all_gather", {"window": (7, 2)}),
        ("-n 2 --causal --window 7,", {"causal": True, "window": (7, None)}),
        ("-n 2 --key-range 3,30", {"key_range": ([3, 3], [30, 30])}),
        ("-n 2 --key-range ,30 --kernel reference", {"key_range": ([0, 0], [30, 30])}),
        ("-n 3 --causal --reproducible --layout zigzag", {"causal": True}),
        ("-n 2 --causal --q-start 5", {"causal": True, "q_start": 5}),
    ],
)
def test_as_the_definition(
    capsys: Capture, folder: Path, tmp_path: Path, options: str, mask: dict[str, object]
) -> None:
    output = tmp_path / "out.npy"
    command = [*arrays(folder), "-o", str(output), *options.split(), "--transport", "threads", "--json"]
    done = shardsum(capsys, *command)
    assert done.status == 0, done.err
    assert done.json["shape"] == [2, 6, 29, 24]
    assert_close(torch.from_numpy(np.load(output)), expected(folder, **mask), STATE[torch.float32], options)


@pytest.mark.parametrize("transport", ["mpi", "gloo"])
def test_over_processes_from_safetensors(capsys: Capture, folder: Path, tmp_path: Path, transport: str) -> None:
    output = tmp_path / "out.safetensors"
    inputs = arrays(folder, "half.safetensors:q", "half.safetensors:k", "half.safetensors:v")
    done = shardsum(capsys, *inputs, "-o", output, "--causal", "--transport", transport)
    assert done.status == 0, done.err
    assert "41 keys on 2 ranks" in done.out
    out = safetensors.torch.load_file(output)["out"]
    assert out.dtype == torch.bfloat16
    half = safetensors.torch.load_file(folder / "half.safetensors")
    reference = dense.attention(half["q"], half["k"], half["v"], dense.visible(29, 41, 2, causal=True))[0]
    assert_close(out, reference, 2**-8, "bfloat16 output")


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("mpiexec", marks=pytest.mark.nightly)])
def test_under_a_launcher(folder: Path, tmp_path: Path, launcher: str) -> None:
    output = tmp_path / "out.npy"
    # torchrun takes --v for an abbreviation of an option of its own; -v is ours.
    inputs = [word.replace("--", "-") for word in arrays(folder, k="fortran.npy")]
    done = launched(launcher, *inputs, "-o", output, "--causal", "--json")
    assert done.status == 0, done.err
    assert done.json["ranks"] == 2
    assert_close(torch.from_numpy(np.load(output)), expected(folder, causal=True), STATE[torch.float32], launcher)


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_plain_weighted_sum(capsys: Capture, folder: Path, tmp_path: Path, ranks: int) -> None:
    output = tmp_path / "out.npy"
    inputs = ["attend", "--weights", folder / "w.npy", "--v", folder / "all.safetensors:flat"]
    done = shardsum(capsys, *inputs, "-o", output, "-n", ranks, "--transport", "threads")
    assert done.status == 0, done.err
    reference = np.load(folder / "w.npy").astype(float) @ np.load(folder / "flat.npy").astype(float)
    assert_close(torch.from_numpy(np.load(output)), torch.from_numpy(reference), STATE[torch.float32], "sum")


def test_heads_and_batch_may_be_missing(capsys: Capture, tmp_path: Path) -> None:
    x = torch.randn(11, 8, generator=torch.Generator().manual_seed(1))
    np.save(tmp_path / "x.npy", x.numpy())
    done = shardsum(
        capsys, *arrays(tmp_path, *["x.npy"] * 3), "-o", tmp_path / "out.npy", "--transport", "threads"
    )
    assert done.status == 0, done.err
    reference = dense.attention(*[x[None, None]] * 3, dense.visible(11, 11))[0][0, 0]
    assert_close(torch.from_numpy(np.load(tmp_path / "out.npy")), reference, STATE[torch.float32], "2-D")


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (("none.npy", "k.npy", "v.npy"), [], ["no such file", "none.npy"]),
        (("q.npy", "noise.npy", "v.npy"), [], ["noise.npy"]),
        (("q.npy", "short.npy", "v.npy"), [], ["short.npy"]),
        (("q.npy", "objects.npy", "v.npy"), [], ["objects.npy"]),
        (("q.npy", "noise.safetensors", "v.npy"), [], ["noise.safetensors"]),
        (("all.safetensors", "k.npy", "v.npy"), [], ["5 tensors"]),
        (("all.safetensors:x", "k.npy", "v.npy"), [], ["no tensor 'x'"]),
        (("int.npy", "k.npy", "v.npy"), [], ["floating-point", "int64"]),
        (("q.npy", "v.npy", "k.npy"), [], ["head_dim", "(2, 6, 29, 16)"]),
        (("q.npy", "k.npy", "flat.npy"), [], ["all lack", "(41, 24)"]),
        (("half.safetensors:q", "k.npy", "v.npy"), [], ["one dtype", "bfloat16"]),
        (("q.npy", "k.npy", "v.npy"), ["--window", "x"], ["--window", "'x'"]),
        (("q.npy", "k.npy", "v.npy"), ["--window", "9" * 20 + ","], ["window"]),
        (("q.npy", "k.npy", "v.npy"), ["--cu-seqlens", "0,9"], ["cu_seqlens", "29"]),
        (("q.npy", "k.npy", "v.npy"), ["--cu-seqlens", "0,x"], ["--cu-seqlens", "0,x"]),
        (("q.npy", "k.npy", "v.npy"), ["--scale", "nan"], ["scale", "nan"]),
    ],
)
def test_wrong_input_is_one_line_and_no_output(
    capsys: Capture, folder: Path, tmp_path: Path, names: Sequence[str], options: list[str], words: list[str]
) -> None:
    inputs = arrays(folder, *names)
    assert_refused(
        shardsum(capsys, *inputs, "-o", tmp_path / "out.npy", "--transport", "threads", *options), *words
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("missing/out.npy", ["no such folder"]),
        ("out.txt", [".npy or .safetensors"]),
        ("half.npy", ["bfloat16", "half.safetensors"]),
        ("folder.npy", ["is a folder"]),
    ],
)
def test_an_output_that_can_not_be(
    capsys: Capture, folder: Path, tmp_path: Path, output: str, words: list[str]
) -> None:
    (tmp_path / "folder.npy").mkdir()
    inputs = arrays(folder, *[f"half.safetensors:{name}" for name in "qkv"])
    done = shardsum(capsys, *inputs, "-o", tmp_path / output, "--transport", "threads")
    assert_refused(done, *words)


def test_an_output_that_breaks_off_leaves_nothing(
    capsys: Capture, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(path: Path, array: np.ndarray) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shardsum.arrays._save_npy", full_disk)
    (tmp_path / "out.npy").write_bytes(b"the old result")
    done = shardsum(capsys, *arrays(folder), "-o", tmp_path / "out.npy", "--transport", "threads")
    assert_refused(done, "can't write", "out.npy: No space left on device")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("out.npy", b"the old result")]


def test_weights_and_masks_exclude_each_other(capsys: Capture, folder: Path, tmp_path: Path) -> None:
    inputs = ["attend", "--weights", folder / "w.npy", "--v", folder / "v.npy", "-o", tmp_path / "out.npy"]
    assert_refused(shardsum(capsys, *inputs, "--causal"), "--weights")
    assert_refused(shardsum(capsys, "attend", "--v", folder / "v.npy", "-o", "x.npy"), "--weights")
    np.save(tmp_path / "w.npy", np.ones((3, 2, 41), dtype=np.float32))
    np.save(tmp_path / "v.npy", np.ones((5, 41, 2), dtype=np.float32))
    inputs = ["attend", "--weights", tmp_path / "w.npy", "--v", tmp_path / "v.npy", "-o", tmp_path / "out.npy"]
    assert_refused(shardsum(capsys, *inputs, "--transport", "threads"), "before the last two")

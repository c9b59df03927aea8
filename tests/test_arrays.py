"""A file or a folder appears whole, or what was there before stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardsum.arrays import appears_whole, open_array, save_array


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_replaces_the_old_one_when_it_is_whole(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")
    with appears_whole(path, durable) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
        assert unfinished.suffix == ".txt"  # writers go by it
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_with_all_that_is_in_it(tmp_path: Path) -> None:
    with appears_whole(tmp_path / "model") as unfinished:
        (unfinished / "deep").mkdir(parents=True)
        (unfinished / "deep" / "weights").write_bytes(b"1")
        assert not (tmp_path / "model").exists()
    assert (tmp_path / "model" / "deep" / "weights").read_bytes() == b"1"


def test_a_folder_with_content_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "first").touch()
    with pytest.raises(OSError, match="not empty"), appears_whole(tmp_path / "model") as unfinished:
        unfinished.mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "first"]


@pytest.mark.parametrize("folder", [True, False])
def test_what_breaks_off_leaves_the_old_one_alone(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "out"
    path.write_text("old")

    def break_off() -> None:
        with appears_whole(path) as unfinished:
            if folder:
                unfinished.mkdir()
            (unfinished / "half" if folder else unfinished).write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    assert [(left, left.read_text()) for left in tmp_path.iterdir()] == [(path, "old")]


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_an_array_is_read_as_it_was_written(tmp_path: Path, suffix: str) -> None:
    array = torch.randn(3, 5, 7).transpose(0, 2)
    save_array(tmp_path / f"x{suffix}", array)
    assert torch.equal(open_array(str(tmp_path / f"x{suffix}")), array)

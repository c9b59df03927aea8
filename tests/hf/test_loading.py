"""Loading models from the disk, and one sentence for everything that isn't one."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from shardsum.hf import load, loading

from .tiny import prompt, tiny, words


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model with a tokenizer, as `save_pretrained` leaves them."""
    tiny("Llama").save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_loads_in_silence(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load(folder)
    assert capfd.readouterr() == ("", "")
    assert not model.training
    assert model.dtype is torch.float32
    assert tokenizer("w3 w4").input_ids == [3, 4]
    assert torch.equal(model(prompt(9)).logits, tiny("Llama")(prompt(9)).logits)
    assert load(str(folder), dtype=torch.bfloat16)[0].dtype is torch.bfloat16


def test_verbosity_is_put_back(folder: Path) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load(folder)
    with pytest.raises(ValueError, match="no such model"):
        load(folder / "other")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def _says(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_no_such_path(tmp_path: Path) -> None:
    _says(tmp_path / "absent", "no such model: .*absent does not exist")
    _says(Path("meta-llama/Llama-3.1-8B"), "Only models on this machine are loaded")


def test_not_a_model(tmp_path: Path) -> None:
    _says(tmp_path, r"is not a model: expected config\.json or one \.gguf file in it, found neither")
    (tmp_path / "notes.txt").write_text("hello")
    _says(tmp_path / "notes.txt", r"is not a model: expected a folder with config\.json, or a \.gguf file")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    _says(tmp_path, "2 GGUF files; pass the path of one of them")
    (tmp_path / "parts").mkdir()
    for part in (1, 2):
        (tmp_path / "parts" / f"x-0000{part}-of-00002.gguf").write_bytes(b"GGUF")
    for path in (tmp_path / "parts", tmp_path / "parts" / "x-00002-of-00002.gguf"):
        _says(path, r"is one of 2 files of a model.*llama-gguf-split --merge")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all" * 100, b"GGUF" + b"\xff" * 200])
def test_malformed_gguf(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(content)
    _says(tmp_path / "x.gguf", r"can't load a model from .*x\.gguf: ")
    assert not [p for p in (tmp_path / "cache" / "shardsum").iterdir() if p.is_dir()]


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_malformed_safetensors(folder: Path, keep: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    _says(folder, "can't load a model from")


def test_malformed_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    _says(folder, "can't load a model from")
    (folder / "config.json").write_text('{"model_type": "no-such-model"}')
    _says(folder, "can't load a model from .*no-such-model")


def test_absent_weights_are_not_made_up(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _says(folder, r"lacks 1 of the model's weights.*model\.layers\.1\.mlp\.up_proj\.weight")


def test_absent_files(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "no-weights")
    (tmp_path / "no-weights" / "model.safetensors").unlink()
    _says(tmp_path / "no-weights", "can't load a model from .*no-weights")


def test_not_a_causal_language_model(tmp_path: Path) -> None:
    sizes = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, intermediate_size=16))
    bert.save_pretrained(tmp_path / "bert")
    _says(tmp_path / "bert", "BertForMaskedLM is not a causal language model")
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=97)
    )
    t5.save_pretrained(tmp_path / "t5")
    _says(tmp_path / "t5", "T5ForConditionalGeneration is an encoder-decoder model")


def test_a_gguf_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight ranks ask at once; one converts, and all find a whole result. The conversion itself is stubbed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    original, conversions = loading._from_folder, []

    def stub(folder: Path, dtype: torch.dtype, **where: str) -> Any:
        if "gguf_file" in where:
            conversions.append(folder)
            return tiny("Llama"), words()
        return original(folder, dtype)

    monkeypatch.setattr(loading, "_from_folder", stub)
    with ThreadPoolExecutor(8) as pool:
        models = [model for model, _ in pool.map(load, [tmp_path / "x.gguf"] * 8)]
    assert len(conversions) == 1
    assert len({model.lm_head.weight.sum().item() for model in models}) == 1
    load(tmp_path / "x.gguf", dtype=torch.bfloat16)
    assert len(conversions) == 2

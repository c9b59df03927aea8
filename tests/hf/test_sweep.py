"""The table of all causal language models: whole, without a wrong row, and true of a sample of them."""

from __future__ import annotations

import json

import pytest
import transformers

from . import sweep

SAMPLE = ["llama", "gpt_neox", "gemma3_text", "gpt_oss", "roberta", "mamba", "bloom"]
ROWS = {row["type"]: row for row in map(json.loads, sweep.TABLE.read_text().splitlines())}


def test_no_row_is_wrong_or_unclear() -> None:
    assert [row for row in ROWS.values() if not sweep.is_sound(row)] == []
    right = [row for row in ROWS.values() if "right" in row.values()]
    assert len(right) >= sweep.LEAST_RIGHT


@pytest.mark.skipif(transformers.__version__ != sweep.VERSION, reason="the table is of another Transformers")
def test_every_model_type_has_a_row() -> None:
    assert sorted(ROWS) == sweep.TYPES


@pytest.mark.skipif(transformers.__version__ != sweep.VERSION, reason="the table is of another Transformers")
@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_row_is_still_true(model_type: str) -> None:
    found = sweep.row(model_type, lengths=(23,))
    for use, says in found.items():
        assert says.split(":")[0] == ROWS[model_type][use].split(":")[0], (use, says)

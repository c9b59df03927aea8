"""Transformers' mask functions as intervals: the right window at any length, and nothing else taken for one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import masking_utils

from shardsum.errors import Unsupported
from shardsum.hf.masks import IntervalMask, Padding, interval_mask

CPU = torch.device("cpu")
LENGTHS = [1, 2, 7, 2048, 2049, 5000, 131_072, 1 << 20]


def _derive(function: Any, q_offset: int, kv_length: int, batch: int = 1) -> IntervalMask:
    return interval_mask(function, None, batch, q_offset, kv_length, CPU)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("window", [None, 1, 2, 512, 4096])
def test_windows(length: int, window: int | None) -> None:
    causal, sliding = masking_utils.causal_mask_function, masking_utils.sliding_window_causal_mask_function
    function = causal if window is None else sliding(window)
    expected = None if window is None or window >= length else window - 1
    for q_offset in (0, length // 2, length - 1):
        mask = _derive(function, q_offset, length, batch=2)
        assert mask.problem is None
        assert mask.left == expected


@pytest.mark.parametrize("length", [9, 5000, 131_072])
@pytest.mark.parametrize(
    "function",
    [
        masking_utils.bidirectional_mask_function,
        masking_utils.sliding_window_bidirectional_mask_function(4),
        masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64)),
        masking_utils.chunked_causal_mask_function(8, torch.tensor([0, 3])),
        masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k < 5),
        masking_utils.sliding_window_causal_mask_function(0),
        masking_utils.packed_sequence_mask_function(torch.arange(131_072).expand(2, -1) // 5),
    ],
    ids=["bidirectional", "two-sided window", "chunks", "chunks by row", "prefix", "nothing", "packed"],
)
def test_other_masks_are_refused(function: Any, length: int) -> None:
    assert "mask is not" in (_derive(function, 0, length, batch=2).problem or "")


def test_a_table_that_ends_is_refused() -> None:
    table = torch.arange(7).expand(1, -1)
    function = masking_utils.packed_sequence_mask_function(table)
    assert "not a rule for all positions" in str(_derive(function, 0, 100).problem)


def test_padding() -> None:
    mask = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 0, 0]])
    padding = Padding.of(mask, 3)
    assert padding.why_not_left(3) is None
    assert padding.start is not None
    assert padding.start.tolist() == [2, 0, 3]
    for whole in (None, torch.ones(2, 3)):
        assert Padding.of(whole, 3).start is None
        assert Padding.of(whole, 3).why_not_left(3) is None
    for wrong in ([[1, 1, 0]], [[1, 0, 1]], [[0, 1, 0]]):
        why_not = Padding.of(torch.tensor(wrong), 3).why_not_left(3)
        assert "only hide tokens on the left" in (why_not or "")
    assert "must be (batch, 3)" in (Padding.of(torch.ones(1, 4), 3).problem or "")


@pytest.mark.parametrize(
    "use",
    [
        lambda mask: mask[:, :, 0],
        lambda mask: mask.to(torch.float32),
        lambda mask: torch.where(mask, 0.0, 1.0),
        lambda mask: torch.ones(1) + mask,
    ],
    ids=["slice", "method", "function", "operator"],
)
def test_a_model_that_computes_with_its_mask_is_refused(use: Any) -> None:
    with pytest.raises(Unsupported, match="computes with its attention mask"):
        use(IntervalMask())

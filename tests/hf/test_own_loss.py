"""A model whose loss is another one than the mean cross-entropy of its logits is not trained by that."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from shardsum.comm import connect
from shardsum.hf import training

from .tiny import SIZES, prompt, tiny


def shifted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()


def smoothed(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    return F.cross_entropy(*shifted(logits, labels), label_smoothing=0.1)


def weighted(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    return F.cross_entropy(*shifted(logits, labels), weight=torch.arange(1.0, vocab_size + 1))


def summed(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    return F.cross_entropy(*shifted(logits, labels), reduction="sum")


def with_a_penalty(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    return ForCausalLMLoss(logits, labels, vocab_size) + 1e-2 * logits.logsumexp(-1).square().mean()


def focal(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    each = F.cross_entropy(*shifted(logits, labels), reduction="none")
    return ((1 - torch.exp(-each)) ** 2 * each).mean()


def unshifted(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def failing(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    raise RuntimeError("no loss today")


OWN: list[Callable[..., Tensor]] = [smoothed, weighted, summed, with_a_penalty, focal, unshifted]


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("own", OWN)
def test_it_is_refused_by_name(own: Callable[..., Tensor], mode: bool) -> None:
    model = tiny("Llama").train(mode)
    model.loss_function = own
    with (
        pytest.raises(ValueError, match=rf"LlamaForCausalLM has a loss of its own \({own.__name__}\)"),
        training(model, connect("single")),
    ):
        pass


def test_one_that_the_forward_pass_adds_to(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("Llama").train()
    forward = model.forward

    @functools.wraps(forward)
    def adding(self: Any, **inputs: Any) -> Any:
        out = forward(**inputs)
        out.loss = None if out.loss is None else out.loss + 0.5 * self.training
        return out

    monkeypatch.setattr(type(model), "forward", adding)
    with pytest.raises(ValueError, match="has a loss of its own"), training(model, connect("single")):
        pass


def test_one_that_fails_is_said() -> None:
    model = tiny("Llama").train()
    model.loss_function = failing
    with (
        pytest.raises(ValueError, match="LlamaForCausalLM's own loss fails: no loss today"),
        training(model, connect("single")),
    ):
        pass


def test_one_that_is_changed_inside_the_session() -> None:
    model = tiny("Llama").train()
    with training(model, connect("single")) as session:
        session.loss(prompt(5), prompt(5))
        model.loss_function = smoothed
        with pytest.raises(ValueError, match=r"model\.loss_function was changed in the session"):
            session.loss(prompt(5), prompt(5))


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Granite", "Cohere", "GPT2"])
def test_the_own_loss_of_a_family_is_computed(family: str) -> None:
    """Scaled, capped and tied logits are the model's own: the loss is of what it returns."""
    model = tiny(family).train()
    ids = prompt(9, 2)
    model.eval()
    expected = model(input_ids=ids, labels=ids).loss
    with training(model, connect("single")) as session:
        torch.testing.assert_close(session.loss(ids, ids), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("family", ["Roberta", "XLMRoberta", "Camembert", "RobertaPreLayerNorm", "Data2VecText"])
def test_positions_that_a_model_counts_by_itself_are_asked_for(family: str) -> None:
    """From the padding token's number on, where it is told none: another loss than that of positions from 0."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, is_decoder=True, pad_token_id=1)
    model, ids = transformers.AutoModelForCausalLM.from_config(config).eval(), prompt(9, 2)
    positions = torch.arange(2, 11)[None]
    expected = model(input_ids=ids, labels=ids).loss
    with training(model, connect("single")) as session:
        with pytest.raises(ValueError, match=r"counts positions in a way of its own.*pass position_ids"):
            session.loss(ids, ids)
        found = session.loss(ids, ids, position_ids=positions)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)


def test_labels_of_another_dtype_are_named() -> None:
    with training(tiny("Llama"), connect("single")) as session:
        for dtype in (torch.int32, torch.int16, torch.uint8, torch.float32, torch.bool):
            with pytest.raises(ValueError, match=rf"labels must be int64.*got {dtype}"):
                session.loss(prompt(5), prompt(5).to(dtype))
        assert session.loss(prompt(5).int(), prompt(5)).item() > 0

"""Loss and gradients of a model on shards of its tokens, beside those of one process, parameter by parameter."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shardsum.comm import connect
from shardsum.errors import Mismatch, Unsupported
from shardsum.hf import batch, training
from shardsum.launching import launch
from shardsum.layouts import Layout

from ..tolerances import assert_close
from .test_session import _state
from .tiny import GPT2_SIZES, prompt, tiny

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48},
    "Gemma2": {"head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 2.0},
    "GptOss": {"head_dim": 8, "num_local_experts": 4, "sliding_window": 5},
    "Mixtral": {"num_local_experts": 4},
    "GPT2": {**GPT2_SIZES, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
}
# Norms and rotary embeddings compute in float32, eager attention its softmax too: of loss, of gradients.
TOLERANCE = {torch.float32: (2e-6, 2e-5), torch.float64: (1e-6, 5e-6)}


def labelled(ids: Tensor) -> Tensor:
    """Labels of which some are -100, at the borders of shards too."""
    labels = ids.clone()
    labels[0, [0, 1, 6, 11, 12, 22]] = -100
    return labels


def alone(model: Any, ids: Tensor, labels: Tensor, **arguments: Any) -> dict[str, Tensor | None]:
    """Loss and gradients of Transformers' model in one process."""
    model = copy.deepcopy(model)
    logits = model(input_ids=ids, use_cache=False, **arguments).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def checkpointed(model: Any, **arguments: Any) -> None:
    """From now on the layers keep nothing, and are computed again in the backward pass."""
    model.activation_checkpointing_enable(arguments or None)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def gradients(model: Any) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def on_ranks(
    model: Any, ranks: int, ids: Tensor, labels: Tensor, execution: dict[str, Any], **arguments: Any
) -> list[dict[str, Tensor | None]]:
    """Loss and summed gradients on each rank; every rank has a model of its own."""
    models = [copy.deepcopy(model) for _ in range(ranks)]

    def run(comm: Any) -> dict[str, Tensor | None]:
        own = models[comm.rank]
        with training(own, comm, **execution) as sharded:
            loss = sharded.loss(ids, labels, **arguments)
            loss.backward()
            sharded.sum_gradients()
        return {"loss": loss.detach(), **gradients(own)}

    return launch(run, ranks=ranks, transport="threads")


def assert_same(
    expected: dict[str, Tensor | None], results: list[dict[str, Tensor | None]], dtype: torch.dtype
) -> None:
    """Every rank has the expected loss and gradients, and the first rank's bits."""
    of_loss, of_gradients = TOLERANCE[dtype]
    for rank, result in enumerate(results):
        for name, reference in expected.items():
            found, first = result[name], results[0][name]
            if reference is None or found is None or first is None:
                assert found is reference, f"rank {rank}, {name}"
                continue
            assert torch.equal(found, first), f"rank {rank}, {name}: other bits than rank 0"
            assert_close(found, reference, of_loss if name == "loss" else of_gradients, f"rank {rank}, {name}")


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_of_one_process(family: str, ranks: int) -> None:
    model, ids = tiny(family, **FAMILIES[family]).train(), prompt(23, 2)
    expected = alone(model, ids, labelled(ids))
    assert_same(expected, on_ranks(model, ranks, ids, labelled(ids), {}), torch.float32)


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GPT2"])
def test_float64(family: str) -> None:
    """Not experts: torch multiplies their matrices in no such dtype."""
    model, ids = tiny(family, **FAMILIES[family]).double().train(), prompt(23, 2)
    expected = alone(model, ids, labelled(ids))
    assert_same(expected, on_ranks(model, 3, ids, labelled(ids), {}), torch.float64)


WAYS = [
    *({"layout": layout, "strategy": "ring"} for layout in ("contiguous", "zigzag", "striped")),
    *({"strategy": strategy} for strategy in ("all_reduce", "all_gather", "pass_q")),
    {"layout": Layout.weighted([3, 0, 1]), "strategy": "all_gather"},
    {"kernel": "eager"},
]


@pytest.mark.parametrize("execution", WAYS, ids=str)
@pytest.mark.parametrize("family", ["Llama", "GptOss"])
def test_layouts_and_strategies(family: str, execution: dict[str, Any]) -> None:
    """One of the weighted ranks has no token, and still takes part."""
    model, ids = tiny(family, **FAMILIES[family]).train(), prompt(23, 2)
    expected = alone(model, ids, labelled(ids))
    assert_same(expected, on_ranks(model, 3, ids, labelled(ids), execution), torch.float32)


def test_more_ranks_than_tokens() -> None:
    model, ids = tiny("Llama").train(), prompt(4)
    assert_same(alone(model, ids, ids), on_ranks(model, 5, ids, ids, {}), torch.float32)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str) -> None:
    model, ids = tiny("Llama").train(), prompt(23, 2)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, slice(0, 9) if side == "left" else slice(14, 23)] = 0
    labels[mask == 0] = -100
    if side == "left":
        labels[1, 9] = -100  # the last token of padding predicts it, and what it sees is not defined
    expected = alone(model, ids, labels, attention_mask=mask)
    assert_same(expected, on_ranks(model, 3, ids, labels, {}, attention_mask=mask), torch.float32)


PACKED = {
    "alike": [[5, 9, 9], [5, 9, 9]],
    "other in each row": [[5, 9, 9], [12, 1, 10]],
    "one row of positions": [[7, 16]],
}


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GptOss"])
@pytest.mark.parametrize("documents", PACKED)
def test_packed_documents(family: str, documents: str) -> None:
    """Positions that begin again: as in Transformers documents do not see each other; gpt-oss takes no notice."""
    model, ids = tiny(family, **FAMILIES[family]).train(), prompt(23, 2)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in PACKED[documents]])
    expected = alone(model, ids, labelled(ids), position_ids=positions)
    crossing = alone(model, ids, labelled(ids))
    assert (expected["loss"] - crossing["loss"]).abs() > 1e-4  # type: ignore[operator]
    found = on_ranks(model, 3, ids, labelled(ids), {}, position_ids=positions)
    assert_same(expected, found, torch.float32)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["Llama", "GptOss"])
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    model, ids = tiny(family, **FAMILIES[family]).train(), prompt(23, 2)
    expected = alone(model, ids, labelled(ids))
    checkpointed(model, use_reentrant=reentrant)
    assert_same(expected, on_ranks(model, 2, ids, labelled(ids), {}), torch.float32)


def test_gradient_checkpointing_keeps_each_batchs_own_mask() -> None:
    """Layers are computed again after the next batch, with other documents, has been through the model."""
    model, ids = tiny("Llama").train(), prompt(23, 2)
    positions = [torch.arange(23)[None], torch.cat([torch.arange(8), torch.arange(15)])[None]]
    losses = [alone(model, ids, ids, position_ids=rows) for rows in positions]
    checkpointed(model)
    models = [copy.deepcopy(model) for _ in range(2)]

    def run(comm: Any) -> dict[str, Tensor | None]:
        with training(models[comm.rank], comm) as sharded:
            loss = sum(sharded.loss(ids, ids, position_ids=rows) for rows in positions)
            loss.backward()
            sharded.sum_gradients()
        return {"loss": loss.detach(), **gradients(models[comm.rank])}

    expected = {name: losses[0][name] + losses[1][name] for name in losses[0]}  # type: ignore[operator]
    assert_same(expected, launch(run, ranks=2, transport="threads"), torch.float32)


def test_gradient_accumulation() -> None:
    """Two batches of unlike numbers of labels, divided by those of both together."""
    model, ids = tiny("Llama").train(), prompt(23, 2)
    labels = labelled(ids)
    expected = alone(model, ids, labels)
    count = int((labels[:, 1:] != -100).sum())
    models = [copy.deepcopy(model) for _ in range(3)]

    def run(comm: Any) -> dict[str, Tensor | None]:
        with training(models[comm.rank], comm) as sharded:
            total = torch.zeros(())
            for row in (slice(0, 1), slice(1, 2)):
                loss = sharded.loss(ids[row], labels[row], num_items_in_batch=count)
                loss.backward()
                total += loss.detach()
            sharded.sum_gradients()
        return {"loss": total, **gradients(models[comm.rank])}

    assert_same(expected, launch(run, ranks=3, transport="threads"), torch.float32)


def test_the_optimizers_weights_stay_equal_to_the_bit() -> None:
    model, ids = tiny("Llama").train(), prompt(23, 2)

    def steps(own: Any, loss_of: Any, summing: Any) -> list[float]:
        optimizer, losses = torch.optim.AdamW(own.parameters(), lr=1e-3), []
        for _ in range(5):
            loss = loss_of()
            loss.backward()
            summing()
            torch.nn.utils.clip_grad_norm_(own.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    reference = copy.deepcopy(model)
    expected = steps(reference, lambda: reference(input_ids=ids, labels=ids).loss, lambda: None)
    models = [copy.deepcopy(model) for _ in range(3)]

    def run(comm: Any) -> list[float]:
        with training(models[comm.rank], comm) as sharded:
            return steps(models[comm.rank], lambda: sharded.loss(ids, ids), sharded.sum_gradients)

    for losses in launch(run, ranks=3, transport="threads"):
        assert losses == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0]
    for parameters in zip(*(own.parameters() for own in models), strict=True):
        assert all(torch.equal(parameters[0], other) for other in parameters[1:])


def test_attentions_dropout_is_the_same_on_any_ranks() -> None:
    model, ids = tiny("Llama", attention_dropout=0.3).train(), prompt(23, 2)
    without = alone(copy.deepcopy(model).eval(), ids, ids)
    expected, *_ = on_ranks(model, 1, ids, ids, {}, seed=7)
    assert_same(expected, on_ranks(model, 3, ids, ids, {}, seed=7), torch.float32)
    checkpointed(model)
    assert_same(expected, on_ranks(model, 2, ids, ids, {}, seed=7), torch.float32)
    drawn = on_ranks(model, 2, ids, ids, {})
    assert drawn[0]["loss"] == drawn[1]["loss"]
    losses = {float(x["loss"]) for x in (without, expected, drawn[0])}  # type: ignore[arg-type]
    assert len(losses) == 3


def test_evaluation_without_gradients() -> None:
    model, ids = tiny("Llama").eval(), prompt(23)
    models = [copy.deepcopy(model) for _ in range(2)]

    def run(comm: Any) -> Tensor:
        with training(models[comm.rank], comm) as sharded, torch.no_grad():
            return sharded.loss(ids, ids)

    for loss in launch(run, ranks=2, transport="threads"):
        assert not loss.requires_grad
        assert_close(loss, model(input_ids=ids, labels=ids).loss.detach(), 2e-6)


# What is refused, on every rank and with nothing left behind.

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no labels": ({"labels": torch.full((1, 9), -100)}, "0 of 9 tokens are labelled"),
    "the first label only": ({"labels": F.pad(torch.ones(1, 1).long(), (0, 8), value=-100)}, "0 of 9 tokens"),
    "labels' shape": ({"labels": prompt(8)}, r"labels must be of input_ids' shape \(1, 9\): got \(1, 8\)"),
    "no batch": ({"input_ids": prompt(9)[0]}, r"input_ids must be \(batch, tokens\)"),
    "no tokens": ({"input_ids": prompt(9)[:, :0]}, r"input_ids must be \(batch, tokens\), one at least"),
    "mask's shape": ({"attention_mask": torch.ones(2, 9)}, "attention_mask must be of input_ids' shape"),
    "positions' shape": ({"position_ids": torch.arange(8)[None]}, r"position_ids must be \(1, 9\) or \(1, 9\)"),
    "a label too large": (
        {"labels": prompt(9) + 97},
        "labels must be whole numbers from 0 to 96, labels also -100",
    ),
    "a token too large": ({"input_ids": prompt(9) + 97}, "input_ids must be whole numbers from 0 to 96"),
    "a position too large": ({"position_ids": torch.arange(9)[None] + 120}, "checked for 128 positions: got 129"),
    "no tensor": ({"labels": None}, "labels must be a torch tensor: got NoneType"),
    "a hole": ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 1]])}, "got a hole"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_batches_are_refused_and_the_next_one_works(case: str) -> None:
    arguments, message = WRONG[case]
    model, ids = tiny("Llama").train(), prompt(9)
    models = [copy.deepcopy(model) for _ in range(2)]

    def run(comm: Any) -> Tensor:
        with training(models[comm.rank], comm) as sharded:
            with pytest.raises(ValueError, match=message):
                sharded.loss(**{"input_ids": ids, "labels": ids, **arguments})
            return sharded.loss(ids, ids).detach()

    for loss in launch(run, ranks=2, transport="threads"):
        assert_close(loss, model(input_ids=ids, labels=ids).loss.detach(), 2e-6)


def test_batches_that_differ_between_ranks_are_refused() -> None:
    models = [tiny("Llama") for _ in range(2)]

    def run(comm: Any) -> None:
        with training(models[comm.rank], comm) as sharded:
            sharded.loss(prompt(9) + comm.rank, prompt(9))

    with pytest.raises(Mismatch, match="input_ids must be the same on every rank"):
        launch(run, ranks=2, transport="threads")


def test_one_ranks_mistake_of_any_kind_reaches_all() -> None:
    models = [tiny("Llama") for _ in range(2)]

    def run(comm: Any) -> str:
        with training(models[comm.rank], comm) as sharded, pytest.raises(Mismatch) as caught:
            sharded.loss(prompt(9), prompt(9), position_ids=[0] if comm.rank else None)  # type: ignore[arg-type]
        return str(caught.value)

    for said in launch(run, ranks=2, transport="threads"):
        assert said.startswith("rank 1 could not take part: AttributeError: 'list' object")


def test_weights_that_differ_between_ranks_are_refused() -> None:
    models = [tiny("Llama") for _ in range(2)]
    models[1].lm_head.weight.data[3, 4] += 1e-3

    def run(comm: Any) -> None:
        with training(models[comm.rank], comm):
            pass

    with pytest.raises(Mismatch, match="weights must be the same on every rank"):
        launch(run, ranks=2, transport="threads")


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "router loss": ("Mixtral", {"output_router_logits": True}, "MixtralForCausalLM has output_router_logits=True"),
    "a state space": ("Mamba", {}, r"MambaMixer\) mixes tokens"),
    "chunks": (
        "Llama4Text",
        {"head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 2, "attention_chunk_size": 8},
        r"\(Llama4TextAttention\): the attention mask is not",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_refused_by_name(case: str) -> None:
    family, sizes, message = REFUSED[case]
    model = tiny(family, **sizes)
    before = _state(model)
    with pytest.raises(Unsupported, match=message), training(model, connect("single")):
        pass
    assert _state(model) == before


@pytest.mark.parametrize("family", ["GPT2", "OPT"])
def test_dropout_outside_of_attention_is_refused_in_training_mode(family: str) -> None:
    """GPT2's is a module, OPT's a call; with p = 0 or in evaluation mode they do nothing."""
    model = tiny(family, **(GPT2_SIZES if family == "GPT2" else {"ffn_dim": 64, "word_embed_proj_dim": 32}))
    ids = prompt(9)
    with training(model, connect("single")) as sharded:
        expected = sharded.loss(ids, ids)
        model.train()
        with pytest.raises(Unsupported, match="calls dropout outside of attention"):
            sharded.loss(ids, ids)
        model.eval()
        assert torch.equal(sharded.loss(ids, ids), expected)


def test_everything_is_undone_and_modes_are_kept() -> None:
    model, ids = tiny("Llama").train(), prompt(9)
    model.model.layers[0].eval()
    before, modes = _state(model), [module.training for module in model.modules()]
    with contextlib.suppress(KeyError), training(model, connect("single")) as sharded:
        assert [module.training for module in model.modules()] == modes
        assert _state(model) != before
        sharded.loss(ids, ids).backward()
        raise KeyError("the caller's own")
    assert (_state(model), [module.training for module in model.modules()]) == (before, modes)
    with pytest.raises(ValueError, match="this training session is closed"):
        sharded.loss(ids, ids)


def test_the_model_alone_is_refused_inside_of_the_block() -> None:
    """It would attend to this rank's tokens only, and nobody would notice."""
    model = tiny("Llama")
    with training(model, connect("single")), pytest.raises(ValueError, match=r"call loss\(\)"):
        model(input_ids=prompt(9))


def test_a_backward_pass_after_the_block_that_computes_layers_again_is_refused() -> None:
    """The layers would be computed again with the model's own attention, over this rank's tokens only."""
    model, ids = tiny("Llama").train(), prompt(9)
    checkpointed(model)
    with training(model, connect("single")) as sharded:
        loss = sharded.loss(ids, ids)
    with pytest.raises(Unsupported, match="computes with its attention mask"):
        loss.backward()


def test_reproducible_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks hold whole segments, attention is told, and loss and gradients are those of one process."""
    model, ids = tiny("Llama", max_position_embeddings=700).double(), prompt(600)
    seen, attend = [], batch.attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Any:
        seen.append((given["comm"].size, given["comm"].rank, q.shape[2], given["reproducible"]))
        return attend(q, k, v, **given)

    monkeypatch.setattr(batch, "attention", spy)
    expected = alone(model, ids, ids)
    assert_same(
        expected, on_ranks(model, 2, ids, ids, {"reproducible": True, "layout": "contiguous"}), torch.float64
    )
    assert {call[1:] for call in seen if call[0] == 2} == {(0, 512, True), (1, 88, True)}


def test_ranks_that_do_not_agree_on_reproducible_are_told() -> None:
    models = [tiny("Llama") for _ in range(2)]

    def run(comm: Any) -> None:
        with training(models[comm.rank], comm, reproducible=comm.rank == 0):
            pass

    with pytest.raises(Mismatch, match="reproducible must be the same on every rank"):
        launch(run, ranks=2, transport="threads")

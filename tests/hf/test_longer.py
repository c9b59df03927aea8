"""Layers whose tokens meet only beyond seven of them are refused by name, on entry or where it happens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardsum.comm import Communicator, connect
from shardsum.errors import Mismatch, Unsupported
from shardsum.hf import sharded, training
from shardsum.hf.lengths import LARGEST, half_of, longest_stretch
from shardsum.launching import launch

from .tiny import prompt, tiny


class Mixing(nn.Module):
    """A layer that adds something of other tokens, by `mix`, in the way of an attribute that it names."""

    def __init__(self, inner: nn.Module, mix: Callable[[Tensor, int], Tensor], **named: int) -> None:
        super().__init__()
        self.inner, self.mix = inner, mix
        (self.number,) = named.values()
        vars(self).update(named)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y + 0.5 * self.mix(y, self.number)


def shift(y: Tensor, far: int) -> Tensor:
    """What stood `far` tokens before."""
    return nn.functional.pad(y, (0, 0, far, 0))[:, : y.shape[1]]


def of_whole_blocks(y: Tensor, size: int) -> Tensor:
    """The mean of each block, once it is full."""
    full = y.shape[1] // size * size
    means = y[:, :full].unflatten(1, (-1, size)).mean(2, keepdim=True).expand(-1, -1, size, -1).flatten(1, 2)
    return nn.functional.pad(means, (0, 0, 0, y.shape[1] - full))


def every_so_many(y: Tensor, stride: int) -> Tensor:
    """The sum of the tokens at multiples of the stride, but the first, at all tokens."""
    return y[:, stride::stride].sum(1, keepdim=True).expand_as(y)


def last_of_a_chunk(y: Tensor, chunk: int) -> Tensor:
    """The last token of each chunk at those of the next."""
    ends = y[:, chunk - 1 :: chunk].repeat_interleave(chunk, dim=1)
    return nn.functional.pad(ends, (0, 0, chunk, 0))[:, : y.shape[1]]


def pooled(y: Tensor, rate: int) -> Tensor:
    return (
        nn.functional.avg_pool1d(y.mT, rate, 1, ceil_mode=False).mT.sum(1, keepdim=True).expand_as(y)
        if (y.shape[1] >= rate)
        else torch.zeros_like(y)
    )


CASES: dict[str, tuple[Callable[[Tensor, int], Tensor], dict[str, int]]] = {
    "a shift": (shift, {"shift_tokens": 16}),
    "blocks": (of_whole_blocks, {"block_size": 32}),
    "strides": (every_so_many, {"stride": 8}),
    "chunks": (last_of_a_chunk, {"chunk": 24}),
    "a rate": (pooled, {"compress_rate": 40}),
    "a segment": (of_whole_blocks, {"segment_length": 20}),
}


def mixing(case: str) -> Any:
    model = tiny("Llama")
    mix, named = CASES[case]
    model.model.layers[1].mlp = Mixing(model.model.layers[1].mlp, mix, **named)
    return model


@pytest.mark.parametrize("use", [training, sharded])
@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_by_name(case: str, use: Any) -> None:
    with (
        pytest.raises(Unsupported, match=r"model\.layers\.1\.mlp \(Mixing\) mixes tokens"),
        use(mixing(case), connect("single")),
    ):
        pass


def test_a_number_of_tokens_in_the_configuration_is_crossed_too() -> None:
    model = tiny("Llama")
    assert longest_stretch(model, 1 << 20) == 7 or longest_stretch(model, 1 << 20) <= 2 * 8 + 3
    for named in ({"router_stride": 48}, {"rates": {"compress_rates": {"some_layer": 48}}}, {"chunks": [2, 48]}):
        for name, value in named.items():
            setattr(model.config, name, value)
        assert longest_stretch(model, 1 << 20) == 2 * 48 + 3
        assert longest_stretch(model, 60) == 60
        for name in named:
            delattr(model.config, name)
    model.config.block = LARGEST + 1
    assert longest_stretch(model, 1 << 20) < LARGEST


def test_changed_and_unchanged_tokens_stand_at_every_distance() -> None:
    chosen = {*half_of(259)}
    for distance in range(1, 200):
        pairs = [(t in chosen) and (t + distance not in chosen) for t in range(259 - distance)]
        assert sum(pairs) >= 3, distance


class Landmarks(nn.Module):
    """An attention layer's keys, and from `length` tokens on one more made of the first ones."""

    length = 20

    @staticmethod
    def put_into(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers.models.llama import modeling_llama

        choose = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface

        def more_keys(*names: Any) -> Any:
            attend = choose(*names)

            def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
                if k.shape[2] >= Landmarks.length:
                    k, v = (torch.cat([x, x[:, :, :4].mean(2, keepdim=True)], dim=2) for x in (k, v))
                return attend(module, q, k, v, *rest, **options)

            return attention

        monkeypatch.setattr(modeling_llama.ALL_ATTENTION_FUNCTIONS, "get_interface", more_keys)


def test_keys_made_at_run_time_are_refused_in_training_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe can't know: nothing names the length. Both ranks raise, and the next call works."""
    models = [tiny("Llama") for _ in range(2)]
    Landmarks.put_into(models[0], monkeypatch)

    def run(comm: Communicator) -> str:
        with training(models[comm.rank], comm, layout="contiguous") as session:
            session.loss(prompt(24), prompt(24))
            with pytest.raises((Unsupported, Mismatch)) as caught:
                session.loss(prompt(41), prompt(41))
            session.loss(prompt(24), prompt(24))
        return str(caught.value)

    said = launch(run, 2, "threads", deadline=20.0)
    assert all("keys and values must be those of the tokens themselves" in one for one in said), said
    assert any("attends with 21 queries in 4 heads over 22 keys" in one for one in said), said


def test_keys_made_at_run_time_are_refused_in_generation_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [tiny("Llama") for _ in range(2)]
    Landmarks.put_into(models[0], monkeypatch)

    def run(comm: Communicator) -> str:
        with sharded(models[comm.rank], comm, layout="contiguous") as session:
            cache = session.new_cache()
            session.prefill(cache, prompt(24))
            with pytest.raises((Unsupported, Mismatch)) as caught:
                session.prefill(cache, prompt(41))
            session.prefill(cache, prompt(24))
            assert cache.get_seq_length() == 48
        return str(caught.value)

    said = launch(run, 2, "threads", deadline=20.0)
    assert all("keys and values must be those of the tokens themselves" in one for one in said), said


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 1e38])
def test_broken_weights_are_not_said_to_mix_tokens(broken: float) -> None:
    for use in (training, sharded):
        model = tiny("Llama")
        model.model.layers[1].mlp.up_proj.weight.data[3] = broken
        with (
            contextlib.ExitStack() as stack,
            pytest.raises(ValueError, match=r"model\.layers\.1\.mlp.* returns NaN or Inf for ordinary tokens"),
        ):
            stack.enter_context(use(model, connect("single")))

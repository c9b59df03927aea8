"""Models that others have wrapped, sharded, compiled or hooked are refused: a sentence says what to pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor

from shardsum.comm import connect
from shardsum.hf import generate, sharded, training

from .tiny import prompt, tiny


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled_in_place() -> Any:
    model = tiny("Llama")
    model.compile(backend="eager")
    return model


def a_compiled_layer() -> Any:
    model = tiny("Llama")
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    return model


def of_dtensors() -> Any:
    model, mesh = tiny("Llama"), init_device_mesh("cpu", (1,))
    weight = model.lm_head.weight
    model.lm_head.weight = nn.Parameter(distribute_tensor(weight.detach(), mesh, [Replicate()]))
    return model


def offloaded() -> Any:
    model = tiny("Llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to("meta"))
    return model


def prepared_by_accelerate() -> Any:
    import accelerate

    return accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(tiny("Llama"))


def a_layer_in_a_wrapper() -> Any:
    model = tiny("Llama")
    model.model.layers[1].mlp = nn.DataParallel(model.model.layers[1].mlp)
    return model


class Adapter(nn.Module):
    """What peft's models offer."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = tiny("Llama")

    def get_base_model(self) -> Any:
        return self.base_model


WRAPPED: dict[str, tuple[Callable[[], Any], str]] = {
    "DistributedDataParallel": (lambda: nn.parallel.DistributedDataParallel(tiny("Llama")), r"Pass model\.module"),
    "DataParallel": (lambda: nn.DataParallel(tiny("Llama")), r"Pass model\.module, the model in this wrapper"),
    "FSDP1": (
        lambda: FullyShardedDataParallel(tiny("Llama"), device_id=torch.device("cpu")),
        r"Pass model\.module",
    ),
    "FSDP2": (lambda: fully_shard(tiny("Llama")), "is sharded by FSDP"),
    "torch.compile": (lambda: torch.compile(tiny("Llama"), backend="eager"), r"Pass model\._orig_mod"),
    "compiled twice": (
        lambda: torch.compile(nn.DataParallel(tiny("Llama")), backend="eager"),
        r"Pass model\.(_orig_mod\.)?module",
    ),
    "model.compile()": (compiled_in_place, r"is compiled \(the model\)"),
    "a compiled layer": (a_compiled_layer, "is compiled"),
    "DTensors": (of_dtensors, r"spread over ranks already \(lm_head\.weight is a DTensor\)"),
    "offloaded": (offloaded, "not in memory"),
    "accelerate": (prepared_by_accelerate, r"prepared by accelerate.*unwrap_model"),
    "a wrapped layer": (a_layer_in_a_wrapper, r"a wrapper inside, model\.layers\.1\.mlp \(DataParallel\)"),
    "adapters": (Adapter, r"Pass model\.get_base_model\(\)"),
    "no model": (lambda: nn.Linear(2, 2), "must be a Transformers model itself: got a Linear"),
    "nothing": (lambda: None, "must be a Transformers model itself: got a NoneType"),
}


@pytest.mark.filterwarnings("ignore:FSDP is switching")
@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("case", WRAPPED)
def test_a_wrapped_model_is_refused(case: str) -> None:
    make, message = WRAPPED[case]
    comm = connect("single")
    for use in (training, sharded):
        with pytest.raises(ValueError, match=message), contextlib.ExitStack() as stack:
            stack.enter_context(use(make(), comm))
    with pytest.raises(ValueError, match=message):
        generate(make(), prompt(5), comm=comm, max_new_tokens=2)


HOOKS: dict[str, Callable[[torch.Tensor], Any]] = {
    "on the gradient": lambda weight: weight.register_hook(lambda gradient: 2 * gradient),
    "after the gradient": lambda weight: weight.register_post_accumulate_grad_hook(lambda _: None),
}


@pytest.mark.parametrize("when", ["before", "inside"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_would_see_a_part_of_the_gradient_is_refused(hook: str, when: str) -> None:
    model = tiny("Llama").train()
    if when == "before":
        handle = HOOKS[hook](model.lm_head.weight)
        with (
            pytest.raises(ValueError, match=r"lm_head\.weight has a hook on its gradient"),
            training(model, connect("single")),
        ):
            pass
        handle.remove()
    with training(model, connect("single")) as session:
        session.loss(prompt(5), prompt(5)).backward()
        HOOKS[hook](model.lm_head.weight)
        with pytest.raises(ValueError, match=r"lm_head\.weight has a hook on its gradient"):
            session.loss(prompt(5), prompt(5))

"""Models that another library has wrapped, sharded or compiled: refused by a sentence that says what to pass."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..errors import Unsupported

# Where a wrapper keeps the model: DistributedDataParallel and others, torch.compile, peft, Lightning.
_INSIDE = ("module", "_orig_mod", "base_model", "model")


def check_whole(model: object) -> None:
    """Check that this is a Transformers model itself, whole on this rank and run as it is written.

    Raises: ValueError for a wrapper or another object, with what to pass instead; Unsupported for weights that are
    elsewhere, and for a compiled or converted forward pass.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model must be a Transformers model itself: got a {type(model).__name__}.{_advice(model)}"
        )
    if (why_not := _why_not_whole(model)) is not None:
        raise Unsupported(f"{type(model).__name__} {why_not}")


def check_no_hooks(model: PreTrainedModel) -> None:
    """Raises: Unsupported where something is to be done to a parameter's gradient before the ranks' are summed."""
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise Unsupported(
                f"{name} has a hook on its gradient (a clip, an optimizer in the backward pass, an all-reduce of "
                "another library), which would see this rank's part alone. Do that after sum_gradients() instead."
            )


def _advice(wrapper: Any) -> str:
    """Say what to pass in place of a wrapper, if a Transformers model is found in it."""
    if hasattr(wrapper, "get_base_model"):
        return " Pass model.get_base_model(), whose layers have the adapters in them."
    path, inner = "model", wrapper
    while isinstance(inner, nn.Module) and not isinstance(inner, PreTrainedModel):
        name = next((name for name in _INSIDE if isinstance(getattr(inner, name, None), nn.Module)), None)
        if name is None:
            return ""
        path, inner = f"{path}.{name}", getattr(inner, name)
    return f" Pass {path}, the model in this wrapper." if isinstance(inner, PreTrainedModel) else ""


def _why_not_whole(model: PreTrainedModel) -> str | None:
    """Say what is not the model's own or not here; None where nothing is."""
    modules = [*model.named_modules()]
    for name, module in modules:
        if isinstance(module, (FSDPModule, FullyShardedDataParallel)):
            return (
                f"is sharded by FSDP ({name or 'the model'}): each rank must hold whole weights. Load it without."
            )
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            return f"has a wrapper inside, {name} ({type(module).__name__}). Take its .module in its place."
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            return f"is compiled ({name or 'the model'}), which is not supported yet. Pass it as it was before."
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(x.data, DTensor) or isinstance(x, DTensor):
            return f"has weights that are spread over ranks already ({name} is a DTensor). Load it without."
        if x.is_meta:
            return (
                f"has weights that are not in memory ({name} is on the meta device). Load it without offloading."
            )
    if "_original_forward" in vars(model):
        return (
            "was prepared by accelerate, whose forward converts its outputs. "
            "Pass accelerator.unwrap_model(model, keep_fp32_wrapper=False)."
        )
    return None

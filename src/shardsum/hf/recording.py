"""What the modules of a model were given and returned in one forward pass, and where two passes differ."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .bound_model import BoundModel

# Rounding differs with the shape of a matrix product; relative to the largest element of a tensor. Transformers'
# eager attention takes its softmax in float32 whatever the dtype.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}

# By module, in the order of computation, the tensors that it was given, and last the one that it returned.
Outputs = dict[str, list[Tensor]]


@contextlib.contextmanager
def record_outputs(bound: BoundModel, shape: torch.Size, outputs: Outputs) -> Iterator[None]:
    """Write into `outputs` what modules compute in the block: tensors (batch, tokens, ...) of this shape."""

    def copy_tokens(values: Iterable[object]) -> list[Tensor]:
        tensors = [value for value in values if isinstance(value, Tensor)]
        return [x.detach().clone() for x in tensors if x.ndim > 2 and x.shape[:2] == shape]

    def record(module: nn.Module, args: Any, kwargs: dict[str, object], output: object) -> None:
        result = copy_tokens(output[:1] if isinstance(output, (tuple, list)) else [output])
        if result:
            inputs = copy_tokens([*args, *kwargs.values()])
            outputs.setdefault(bound.describe(module), inputs + result)

    handles = [module.register_forward_hook(record, with_kwargs=True) for module in bound.model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def module_of(bound: BoundModel, error: BaseException) -> str | None:
    """Name the innermost module of the model whose code an exception came through."""
    found, trace = None, error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and bound.names.get(module):
            found = bound.describe(module)
        trace = trace.tb_next
    return found


def select_rows(outputs: Outputs, sequence: int, tokens: Sequence[int]) -> Outputs:
    """Return the rows of some tokens of one sequence."""
    return {name: [x[sequence, list(tokens)] for x in values] for name, values in outputs.items()}


def first_difference(model: PreTrainedModel, expected: Outputs, actual: Outputs) -> str | None:
    """Name the first module, in the order of computation, that was given the same and returned something else."""

    def same(one: Tensor, other: Tensor) -> bool:
        if one.is_complex():  # rotations, of some models
            one, other = torch.view_as_real(one), torch.view_as_real(other)
        difference = (one.float() - other.float()).abs().max()
        return bool(difference <= TOLERANCE.get(model.dtype, 1e-4) * one.float().abs().max())

    for name, values in expected.items():
        if name in actual:
            *inputs, result = map(same, values, actual[name])
            if all(inputs) and not result:
                return name
    return None

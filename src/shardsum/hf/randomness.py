"""Random numbers that a model draws for its tokens: other ones on each rank than in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import Unsupported

DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
DRAWS = (torch.rand, torch.randn, torch.rand_like, torch.randn_like, torch.bernoulli)
DRAWS_IN_PLACE = (Tensor.uniform_, Tensor.normal_, Tensor.bernoulli_, Tensor.exponential_)


class NoRandomNumbers(TorchFunctionMode):
    """Refuses calls of this thread that draw random numbers inside the block."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.kind = type(model).__name__

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # torch hands a dropout's settings on by name, however they were given.
        drops = func in DROPOUTS and kwargs["training"] and kwargs["p"] > 0
        if drops or func in DRAWS or func in DRAWS_IN_PLACE:
            raise Unsupported(
                f"{self.kind} calls {func.__name__} outside of attention, where each rank would draw other random "
                "numbers for its tokens. Set the model's dropouts to 0 (attention's may stay), or model.eval()."
            )
        return func(*args, **kwargs)

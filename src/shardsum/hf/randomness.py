"""Random numbers that a model draws for its tokens: other ones on each rank than in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import Unsupported

DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
# Functions of torch and methods of tensors, by name; gumbel_softmax and the like draw by one of these.
DRAWS = {
    *("bernoulli", "multinomial", "normal", "poisson", "binomial", "rand", "rand_like", "randint", "randint_like"),
    *("randn", "randn_like", "randperm", "rrelu", "rrelu_", "rrelu_with_noise", "native_dropout", "bernoulli_"),
    *("cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_", "dropout_"),
    *("alpha_dropout_", "feature_dropout", "feature_dropout_", "fractional_max_pool2d", "fractional_max_pool3d"),
}


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
        name = getattr(func, "__name__", "").removesuffix(".default")
        if drops or (func not in DROPOUTS and name in DRAWS):
            raise Unsupported(
                f"{self.kind} calls {func.__name__} outside of attention, where each rank would draw other random "
                "numbers for its tokens. Set the model's dropouts to 0 (attention's may stay), or model.eval()."
            )
        return func(*args, **kwargs)

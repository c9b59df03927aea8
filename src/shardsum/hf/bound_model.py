"""A model bound to a communicator: what Transformers calls in place of its own attention and masks."""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..comm import Communicator, mistakes_reach_all
from ..copies import OnePerRank
from ..errors import Unsupported
from ..layouts import Layout
from .masks import IntervalMask, MaskFunction, as_interval_mask

# Masks are looked at up to this position; within a million, windows and chunks have long shown themselves.
MASK_POSITIONS = 1 << 20


class AttentionCall(NamedTuple):
    """One layer's attention over some tokens.

    Shapes: q, k, v (batch, heads, tokens, head_dim or v_dim).
    """

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    mask: IntervalMask
    scale: float | None


class AttentionSubstitute(Protocol):
    """What runs in the place of attention while a model is checked."""

    def attend(self, call: AttentionCall) -> Tensor: ...


class BoundModel(OnePerRank, ABC):
    """One model bound to one communicator: what the functions that Transformers calls belong to.

    - `comm`: the only place that keeps the communicator; whatever runs over the ranks takes it from here at each
      use. Between two calls another may be put here, on each of its ranks; caches of the one before are refused.
    - `positions`: the longest sequence that the model was checked for.
    - `probe`: while the model is being checked, what stands in for its attention.
    - `checked`: whether that is done, and all ranks have agreed.
    - `counts_from_zero`: whether the model gives tokens the positions 0, 1, 2 ... where none are passed.
    - `computed_options`: Transformers' options of an attention call that `attend` takes into account.
    """

    computed_options: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, model: PreTrainedModel, comm: Communicator, layout: Layout, positions: int) -> None:
        self.model, self.comm, self.layout, self.positions = model, comm, layout, positions
        self.names = {module: name for name, module in model.named_modules()}
        self.probe: AttentionSubstitute | None = None
        self.open, self.checked, self.counts_from_zero = True, False, True

    @abstractmethod
    def attend(self, call: AttentionCall, options: dict[str, Any]) -> Tensor:
        """Attend over the keys of all ranks. `options` are Transformers', among them all `computed_options`."""

    @abstractmethod
    def mask(self, batch_size: int, mask_function: MaskFunction) -> IntervalMask:
        """Make the mask of all layers of one kind; Transformers passes further arguments."""

    def attention(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: object,
        scaling: float | None = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Run one attention call of the model, and return (out, None) where Transformers wants weights too.

        Shapes: q, k, v as in `AttentionCall`; out (batch, tokens, heads, v_dim).
        Raises: Unsupported for options that `attend` does not take into account, and for keys that are not those
        of the tokens that ask; Mismatch on the other ranks.
        """
        options["dropout"] = dropout
        others = {name: value for name, value in options.items() if name not in self.computed_options}
        with self.mistakes():
            mask = as_interval_mask(self.describe(module), module, attention_mask, scaling, others)
            self.check_tokens(module, q, k, v)
        call = AttentionCall(module, q, k, v, mask, scaling)
        out = self.attend(call, options) if self.probe is None else self.probe.attend(call)
        return out.transpose(1, 2).contiguous(), None

    def mistakes(self) -> contextlib.AbstractContextManager[object]:
        """Surround what a rank may refuse inside the model; while it is being checked, who checks it tells all."""
        return mistakes_reach_all(self.comm) if self.checked else contextlib.nullcontext()

    def check_tokens(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, tokens: int | None = None) -> None:
        """Raises: Unsupported unless there is a query, a key and a value for each of the `tokens` at hand."""
        counts = tuple(x.shape[2] for x in (q, k, v))
        if set(counts) != {q.shape[2] if tokens is None else tokens} or q.shape[1] % k.shape[1]:
            here = "" if tokens is None else f" where this rank runs {tokens} tokens"
            raise Unsupported(
                f"{self.describe(module)} attends with {counts[0]} queries in {q.shape[1]} heads over {counts[1]} "
                f"keys in {k.shape[1]} and {counts[2]} values{here}: keys and values must be those of the tokens "
                "themselves, one for each (none are made of several tokens, added or left out)."
            )

    def describe(self, module: nn.Module) -> str:
        """Name the module by its place in the model, and its class."""
        return f"{self.names.get(module, 'a module')} ({type(module).__name__})"

    @contextlib.contextmanager
    def over(self, comm: Communicator) -> Iterator[None]:
        """Bind the model to another communicator inside the block."""
        before, self.comm = self.comm, comm
        try:
            yield
        finally:
            self.comm = before


def has_argument(model: PreTrainedModel, argument: str) -> bool:
    """Whether the model's forward has an argument of that name."""
    return argument in inspect.signature(model.forward).parameters

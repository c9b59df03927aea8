"""Plain `F.scaled_dot_product_attention` calls made distributed for as long as a `with` block lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .attention import attention
from .comm import Communicator, as_communicator, mistakes_reach_all
from .errors import Unsupported
from .layouts import Layout
from .strategies import Strategy


@contextlib.contextmanager
def context_parallel(
    comm: Communicator | Any = None,
    *,
    layout: str | Layout = "contiguous",
    strategy: str | Strategy = "auto",
) -> Iterator[None]:
    """Inside the block, this thread's F.scaled_dot_product_attention works on shards of q, k and v.

    Nothing is patched. Arguments mean what they mean to torch: `is_causal` is aligned top-left, so query i of the
    global sequence sees the keys up to i, whatever the lengths. `comm`, `layout`, `strategy`: as in `attention`.
    Raises: Unsupported inside the block for an attn_mask and for tensors that are not (batch, heads, length, dim).

    >>> import torch
    >>> q = torch.eye(2).view(1, 1, 2, 2)
    >>> with context_parallel():
    ...     F.scaled_dot_product_attention(q, q, q, is_causal=True)[0, 0, 0]
    tensor([1., 0.])
    """
    with _AttentionMode(as_communicator(comm), layout, strategy):
        yield


class _AttentionMode(TorchFunctionMode):
    """A mode over torch's functions, which belongs to one thread and sees calls before they are dispatched."""

    def __init__(self, comm: Communicator, layout: str | Layout, strategy: str | Strategy) -> None:
        super().__init__()
        self.comm, self.layout, self.strategy = comm, layout, strategy

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with mistakes_reach_all(self.comm):
            tensors, options = _translate(*args, **(kwargs or {}))
        return attention(*tensors, comm=self.comm, layout=self.layout, strategy=self.strategy, **options)


def _translate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """Turn torch's arguments into those of `attention`."""
    if attn_mask is not None:
        raise Unsupported(
            "attn_mask is not supported inside context_parallel: rows and keys lie on all ranks. Use "
            "shardsum.attention with window, key_range, cu_seqlens, key_intervals or bias."
        )
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise Unsupported(
            "context_parallel takes (batch, heads, length, dim): "
            f"got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}."
        )
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError(f"{query.shape[1]} query heads and {key.shape[1]} KV heads need enable_gqa=True.")
    options = {
        "causal": is_causal,
        "q_start": 0 if is_causal else None,
        "scale": scale,
        "dropout_p": dropout_p,
    }
    return (query, key, value), options

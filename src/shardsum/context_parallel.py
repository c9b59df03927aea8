"""Plain `F.scaled_dot_product_attention` calls made distributed for as long as a `with` block lasts."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .attention import attention
from .comm import Communicator, as_communicator, mistakes_reach_all
from .compiler import outside_graphs
from .errors import Unsupported
from .layouts import Layout
from .strategies import Strategy

_OPERATOR = torch.ops.aten.scaled_dot_product_attention
_COMPUTED = (F.scaled_dot_product_attention, _OPERATOR, _OPERATOR.default)
_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax, torch.ops.aten.softmax.int, torch.ops.aten._softmax.default)
# Parts of the names of what computes attention: by operators called directly, or inside one function of torch.
_ATTENTION = ("attention", "attn", "encoder_layer_fwd", "decoder_layer_fwd")


@contextlib.contextmanager
def context_parallel(
    comm: Communicator | Any = None,
    *,
    layout: str | Layout = "contiguous",
    strategy: str | Strategy = "auto",
) -> Iterator[None]:
    """Inside the block, this thread's F.scaled_dot_product_attention works on shards of q, k and v.

    Nothing is patched. Arguments mean what they mean to torch: `is_causal` is aligned top-left, so query i of the
    global sequence sees the keys up to i, whatever the lengths; `attn_mask` has this rank's rows, and a column for
    each key of all ranks. A checkpointed layer is computed again as it was, wherever its backward runs. `comm`,
    `layout`, `strategy`: as in `attention`.
    Raises: Unsupported for what computes attention otherwise (nn.MultiheadAttention, nn.TransformerEncoderLayer,
    flex_attention, torch.ops.aten._scaled_dot_product_*, a softmax of scores (..., q_len, kv_len) beside calls of
    such lengths), for a mask of this rank's keys alone, and for tensors that are not (batch, heads, length, dim);
    at its end, for a block that saw no attention at all. What a kernel of another library, or a function compiled
    by torch.jit, computes is not seen: such a model's attention stays this rank's own.

    >>> import torch
    >>> q = torch.eye(2).view(1, 1, 2, 2)
    >>> with context_parallel():
    ...     F.scaled_dot_product_attention(q, q, q, is_causal=True)[0, 0, 0]
    tensor([1., 0.])
    """
    mode = _AttentionMode(as_communicator(comm), layout, strategy)
    with mode, _what_cant_be_compiled():
        yield
    if mode.comm.size > 1 and not mode.calls:
        raise Unsupported(
            "context_parallel saw no F.scaled_dot_product_attention in its block: attention that is computed "
            "otherwise (softmax of a product, a kernel of another library) is of this rank's tokens alone."
        )


@contextlib.contextmanager
def _what_cant_be_compiled() -> Iterator[None]:
    """Say in a sentence of ours what the compiler, which flex_attention is run by, finds in its own words."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.startswith("torch._dynamo"):
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise Unsupported(
                "inside context_parallel the compiler met what it can't follow (flex_attention, fullgraph=True): "
                f"{reason} Call F.scaled_dot_product_attention, or shardsum.attention."
            ) from error
        raise


class _AttentionMode(TorchFunctionMode):
    """A mode over torch's functions, which belongs to one thread and sees calls before they are dispatched."""

    def __init__(self, comm: Communicator, layout: str | Layout, strategy: str | Strategy) -> None:
        super().__init__()
        self.comm, self.layout, self.strategy = comm, layout, strategy
        self.calls = 0
        # Shapes of the scores of what was computed, and of what a softmax was taken of: (all heads, rows, keys).
        self.computed: set[tuple[int, int, int]] = set()
        self.scores: set[tuple[int, int, int]] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _COMPUTED:
            if self.comm.size > 1:
                self._refuse_attention(func, args)
            return func(*args, **kwargs)
        self.calls += 1
        with mistakes_reach_all(self.comm):
            tensors, options = _translate(*args, **kwargs)
            if self.comm.size > 1:
                _check_part(*tensors[:2], options)
                batch, heads, rows, _ = tensors[0].shape
                self.computed.add((batch * heads, rows, tensors[1].shape[2]))
                self._refuse_scores()
            _compute_again_inside(self)
        return attention(*tensors, comm=self.comm, layout=self.layout, strategy=self.strategy, **options)

    def _refuse_attention(self, func: Callable[..., Any], args: Sequence[Any]) -> None:
        """Refuse what computes attention by itself, on every rank."""
        name = getattr(func, "__name__", str(func))
        with mistakes_reach_all(self.comm):
            if any(part in name for part in _ATTENTION):
                raise Unsupported(
                    f"{name} computes attention inside itself, of this rank's tokens alone. "
                    "Call F.scaled_dot_product_attention, or shardsum.attention."
                )
            if func in _SOFTMAX and isinstance(args[0], Tensor) and args[0].ndim > 2:
                *heads, rows, columns = args[0].shape
                self.scores.add((math.prod(heads), rows, columns))
                self._refuse_scores()

    def _refuse_scores(self) -> None:
        """Refuse attention that is written out beside a call that was computed, whichever comes first."""
        for _, rows, columns in self.computed & self.scores:
            raise Unsupported(
                f"a softmax of scores (..., {rows}, {columns}), as long as this rank's queries and keys: attention"
                " that is written out is of this rank's tokens alone. Call F.scaled_dot_product_attention."
            )


class _Again:
    """What a checkpoint computes again, inside the mode in which it was computed first."""

    def __init__(self, mode: _AttentionMode, compute: Callable[..., Any]) -> None:
        self.mode, self.compute = mode, compute

    def __call__(self, *args: Any) -> Any:
        with self.mode:
            return self.compute(*args)


@outside_graphs
def _compute_again_inside(mode: _AttentionMode) -> None:
    """Make every checkpoint whose forward is under way compute again inside this mode.

    torch.utils.checkpoint keeps autocast and random numbers for that, and no modes.
    """
    module = sys.modules.get("torch.utils.checkpoint")
    frame = None if module is None else sys._getframe()
    while frame is not None:
        holder, name = _what_computes_again(frame, module)
        if holder is not None and not isinstance(getattr(holder, name), _Again):
            setattr(holder, name, _Again(mode, getattr(holder, name)))
        frame = frame.f_back


def _what_computes_again(frame: FrameType, module: Any) -> tuple[Any, str]:
    """Where a frame that is a checkpoint's keeps what it computes again."""
    if frame.f_code is module.CheckpointFunction.forward.__code__:
        return frame.f_locals["ctx"], "run_function"
    if frame.f_code is module.checkpoint.__wrapped__.__code__ and "gen" in frame.f_locals:
        return frame.f_locals["gen"].gi_frame.f_locals["new_frame"], "recompute_fn"
    return None, ""


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
        "bias": None if attn_mask is None else _bias(attn_mask, query, is_causal),
    }
    return (query, key, value), options


def _check_part(query: Tensor, key: Tensor, options: dict[str, Any]) -> None:
    """Refuse what a model may have made of its rank's tokens as if they were all."""
    bias = options["bias"]
    if query.shape[2] == key.shape[2] == 1 and bias is None and not options["causal"]:
        raise Unsupported(
            "this rank holds one token and is_causal is False: a model may have left its mask out for that. "
            "Give each rank more tokens, or call shardsum.attention."
        )
    if bias is not None and bias.shape[3] in (1, key.shape[2]):
        of = "all keys of this rank at once" if bias.shape[3] == 1 else "each key of this rank"
        raise Unsupported(
            f"attn_mask has {bias.shape[3]} column{'s' * (bias.shape[3] > 1)}, for {of}: it must have one for each"
            " key of all ranks. Use is_causal, or shardsum.attention with window, key_range or cu_seqlens."
        )


def _bias(mask: Tensor, query: Tensor, is_causal: bool) -> Tensor:
    """An attn_mask as a bias, of this rank's rows and the keys of all ranks."""
    if is_causal:
        raise ValueError("attn_mask and is_causal exclude each other, as in F.scaled_dot_product_attention.")
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    mask = mask[(None,) * (4 - mask.ndim)]
    return mask.expand(*mask.shape[:2], query.shape[2], mask.shape[3])

"""What a call of attention asks for besides its tensors: checked, described for the agreement, and made a mask."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from .collectives import Collective, as_collective
from .digests import digest_numbers
from .errors import Unsupported
from .kernels import Kernel
from .layouts import Layout, as_layout
from .masks import Mask
from .problem import Sizes, state_dtype
from .scalars import LARGEST_BITS, at_least, flag, real, shown, whole
from .strategies import Strategy, as_strategy
from .tensors import check_tensors, has_numbers, no_gradient

Indices = Int[Tensor, " entries"] | Sequence[int]
Window = tuple[int | None, int | None]
_WHOLE = (torch.int64, torch.int32)
_INDICES = ("cu_seqlens", "cu_seqlens_k", "key_range", "prefix", "q_start")
# So many indices, and no more, are copied from a tensor to be recognised at the next call.
_MOST_SETTLED = 1024


@dataclass(frozen=True, eq=False)
class Arguments:
    """The arguments of `attention`, which documents each."""

    layout: str | Layout = "contiguous"
    strategy: str | Strategy = "auto"
    kernel: str | Kernel = "auto"
    collective: str | Collective = "auto"
    causal: bool = False
    window: Window | None = None
    cu_seqlens: Indices | None = None
    cu_seqlens_k: Indices | None = None
    key_range: tuple[Indices, Indices] | None = None
    prefix: int | Indices | None = None
    sink_tokens: int = 0
    key_intervals: tuple[Tensor, Tensor] | None = None
    scale: float | Tensor | None = None
    softcap: float | None = None
    alibi_slopes: Tensor | Sequence[float] | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    dropout_p: float = 0.0
    seed: int | None = None
    q_replicated: bool = False
    q_start: int | Indices | None = None
    q_len: int | None = None
    kv_len: int | None = None
    reproducible: bool = False
    return_bound: bool = False
    lengths: tuple[int, ...] | None = None  # of a cache: how many keys each sequence has; its queries end there
    reordered: int = 0  # of a cache: a digest of how its sequences were reordered

    @classmethod
    def names(cls) -> set[str]:
        """The names that `attention` has for these; what only a cache states is not among them."""
        return {field.name for field in fields(cls)} - {"lengths", "reordered"}

    def describe(self, sizes: Sizes) -> dict[str, Any]:
        """The arguments as JSON values, checked as far as one rank alone can check them."""
        layout, strategy = as_layout(self.layout), as_strategy(self.strategy)
        for name, pair in (
            ("key_range (start, end)", self.key_range),
            ("key_intervals (lo, hi)", self.key_intervals),
        ):
            if pair is not None and (
                not isinstance(pair, (tuple, list)) or [x is None for x in pair] != [False] * 2
            ):
                raise ValueError(f"{name} must be a tuple of two: got {shown(pair)}.")
        if self.cu_seqlens is None and self.cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k needs cu_seqlens: state the documents of the queries too.")
        _check_tensors(self)
        _check_scores(self, sizes)
        if self.return_bound:
            _check_bound(self, sizes.dtype)
        intervals = self.key_intervals
        return {
            "layout": layout.describe(),
            "strategy": "auto" if strategy is None else strategy.name,
            "collective": as_collective(self.collective).name,
            "causal": flag("causal", self.causal),
            "window": _window(self.window),
            "cu_seqlens": _ends("cu_seqlens", self.cu_seqlens),
            "cu_seqlens_k": _ends("cu_seqlens_k", self.cu_seqlens_k),
            "key_range": None if self.key_range is None else [listed("key_range", x) for x in self.key_range],
            "prefix": listed("prefix", self.prefix),
            "sink_tokens": at_least("sink_tokens", self.sink_tokens, 0),
            "key_intervals": None if intervals is None else _interval_rows(intervals, sizes),
            "scale": "a tensor" if isinstance(self.scale, Tensor) else self.scale and float(self.scale),
            "softcap": self.softcap and float(self.softcap),
            "alibi_slopes": digest_numbers(self.slopes(sizes.dtype)),
            "sinks": digest_numbers(self.sinks),
            "bias": None if self.bias is None else [*self.bias.shape[:2], self.bias.shape[3]],
            "dropout_p": float(self.dropout_p),
            "seed": None if self.seed is None else whole("seed", self.seed, 63),
            "q_replicated": flag("q_replicated", self.q_replicated),
            "q_start": listed("q_start", self.q_start),
            "q_len": None if self.q_len is None else whole("q_len", self.q_len),
            "kv_len": None if self.kv_len is None else whole("kv_len", self.kv_len),
            "reproducible": flag("reproducible", self.reproducible),
            "return_bound": flag("return_bound", self.return_bound),
            "lengths": self.lengths,
            "reordered": self.reordered,
        }

    def slopes(self, dtype: torch.dtype) -> Tensor | None:
        """alibi_slopes as a tensor; a list's as exact as sums over inputs of `dtype`."""
        if self.alibi_slopes is None or isinstance(self.alibi_slopes, Tensor):
            return self.alibi_slopes
        try:
            return torch.tensor(self.alibi_slopes, dtype=state_dtype(dtype))
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"alibi_slopes must be numbers: got {shown(self.alibi_slopes)}.") from None

    def mask(
        self, q_len: int, kv_len: int, batch: int, key_intervals: tuple[Tensor, Tensor] | None = None
    ) -> Mask:
        """The mask over the global lengths. Raises: ValueError where arguments and lengths do not agree."""
        for name, stated, found in (("q_len", self.q_len, q_len), ("kv_len", self.kv_len, kv_len)):
            if stated is not None and stated != found:
                raise ValueError(f"{name}={stated}, but the ranks together hold {found}.")
        if self.bias is not None and self.bias.shape[3] != kv_len:
            raise ValueError(f"bias must have a column for each of the {kv_len} keys: got {self.bias.shape[3]}.")
        documents = indices_of("cu_seqlens", self.cu_seqlens)
        documents_k = documents if self.cu_seqlens_k is None else indices_of("cu_seqlens_k", self.cu_seqlens_k)
        key_range = None
        if self.key_range is not None:
            start, end = (_per_sequence("key_range", bound, batch) for bound in self.key_range)
            key_range = (start, end)
        q_start = None if self.q_start is None else _per_sequence("q_start", self.q_start, batch)
        if self.lengths is not None and set(self.lengths) != {kv_len}:
            if q_start is not None:
                raise ValueError("q_start: the queries of sequences of different lengths end where each ends.")
            lengths = torch.tensor(self.lengths)
            start, end = (torch.zeros_like(lengths), lengths) if key_range is None else key_range
            key_range = (start, torch.minimum(end, lengths))
            q_start = lengths - q_len
        return Mask(
            q_len=q_len,
            kv_len=kv_len,
            causal=self.causal,
            window=_window(self.window),
            cu_seqlens=documents,
            cu_seqlens_k=documents_k,
            key_range=key_range,
            q_start=q_start,
            prefix=None if self.prefix is None else _per_sequence("prefix", self.prefix, batch),
            sink_tokens=self.sink_tokens,
            key_intervals=key_intervals,
        )


def settled(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a call in which indices that may change, as lists and tensors can, are tuples if they are few.

    What is wrong with them stays for `Arguments.describe` to refuse.
    """
    return {name: _settled(value) if name in _INDICES else value for name, value in options.items()}


def _settled(value: Any) -> Any:
    if (
        isinstance(value, Tensor)
        and value.dtype in _WHOLE
        and has_numbers(value)
        and value.numel() <= _MOST_SETTLED
    ):
        value = value.tolist()
    return tuple(map(_settled, value)) if isinstance(value, (list, tuple)) else value


def _check_tensors(arguments: Arguments) -> None:
    """Refuse tensors that can't be computed with, and gradients that nothing gives."""
    tensors = {name: value for name, value in vars(arguments).items() if isinstance(value, Tensor)}
    check_tensors(**tensors)
    for name, value in tensors.items():
        if name not in ("scale", "sinks", "bias"):
            no_gradient(name, value, f"Pass {name}.detach().")


def _check_scores(arguments: Arguments, sizes: Sizes) -> None:
    if isinstance(arguments.scale, Tensor):
        _check_scale(arguments.scale, sizes)
    elif arguments.scale is not None and not math.isfinite(real("scale", arguments.scale)):
        raise ValueError(f"scale must be a finite number: got {arguments.scale}.")
    if arguments.softcap is not None and not 0.0 < real("softcap", arguments.softcap) < math.inf:
        raise ValueError(f"softcap must be a positive number: got {arguments.softcap}.")
    if not 0.0 <= real("dropout_p", arguments.dropout_p) < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and less than 1: got {arguments.dropout_p}.")
    for name, tensor in (("sinks", arguments.sinks), ("bias", arguments.bias)):
        if tensor is not None and not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
            also = " A mask is a bias of 0 and -inf." if name == "bias" else ""
            raise ValueError(f"{name} must be a tensor of floats: got {shown(tensor)}.{also}")
    for name, values in (("alibi_slopes", arguments.slopes(sizes.dtype)), ("sinks", arguments.sinks)):
        shape = None if values is None else tuple(values.shape)
        if shape not in (None, (sizes.q_heads,)):
            raise ValueError(f"{name} must be (q_heads,): got {shape} for {sizes.q_heads} heads.")
    if arguments.bias is None:
        return
    allowed = ((1, sizes.batch), (1, sizes.q_heads), (sizes.q_len,))
    if arguments.bias.ndim != 4 or any(
        size not in s for size, s in zip(arguments.bias.shape[:3], allowed, strict=True)
    ):
        raise ValueError(
            "bias must be (batch or 1, q_heads or 1, this rank's queries, all keys): got "
            f"{tuple(arguments.bias.shape)}, batch {sizes.batch}, {sizes.q_heads} heads, {sizes.q_len} rows."
        )


def _check_bound(arguments: Arguments, dtype: torch.dtype) -> None:
    if not arguments.reproducible:
        raise Unsupported("return_bound rests on the order of sums: it needs reproducible=True.")
    if arguments.dropout_p:
        raise Unsupported(f"return_bound knows no dropout: got dropout_p={arguments.dropout_p}.")
    slopes = arguments.slopes(dtype)
    if slopes is not None and not torch.equal(slopes.float().to(slopes.dtype), slopes):
        raise Unsupported("return_bound takes alibi_slopes that are float32 numbers: pass slopes.float().")
    if torch.get_float32_matmul_precision() != "highest":
        raise Unsupported("return_bound needs torch.set_float32_matmul_precision('highest').")


def autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype, where that is on; as torch does it, float64 stays.

    What is no tensor of floats is for the agreement to refuse.
    """
    floats = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
    if not floats or not torch.amp.is_autocast_available(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x


def _check_scale(scale: Tensor, sizes: Sizes) -> None:
    allowed = ((1, sizes.batch), (1, sizes.q_heads), (sizes.q_len,))
    per_query = scale.ndim == 3 and all(size in s for size, s in zip(scale.shape, allowed, strict=True))
    if scale.is_complex() or not (scale.ndim == 0 or tuple(scale.shape) == (sizes.q_heads,) or per_query):
        raise ValueError(
            "scale must be a number, or a tensor (), (q_heads,) or (batch or 1, q_heads or 1, this rank's "
            f"queries): got {shown(scale)}, batch {sizes.batch}, {sizes.q_heads} heads, {sizes.q_len} rows."
        )


def _interval_rows(intervals: tuple[Tensor, Tensor], sizes: Sizes) -> int:
    """The number of sequences that the intervals are given for: batch, or 1."""
    shapes = [(rows, sizes.q_len) for rows in (1, sizes.batch)]
    for bound in intervals:
        if not isinstance(bound, Tensor) or bound.is_floating_point() or tuple(bound.shape) not in shapes:
            raise ValueError(
                f"key_intervals must be (lo, hi), each whole numbers (batch or 1, {sizes.q_len} queries of this "
                f"rank): got {' and '.join(map(shown, intervals))}."
            )
    return int(torch.broadcast_shapes(*(bound.shape for bound in intervals))[0])


def _window(window: Window | None) -> Window:
    if window is None:
        return (None, None)
    sides = tuple(window) if isinstance(window, (tuple, list)) else ()
    try:
        left, right = (None if side is None or side == -1 else whole("window", side) for side in sides)
        if (left or 0) >= 0 and (right or 0) >= 0:
            return (left, right)
    except ValueError:
        pass
    raise ValueError(
        f"window must be (left, right), each a number of keys, or None or -1 for no limit: got {shown(window)}."
    )


def indices_of(name: str, values: Indices | None) -> Tensor | None:
    """The values as a tensor on the CPU. Raises: ValueError for what is no whole numbers."""
    if values is None:
        return None
    if isinstance(values, Tensor):
        check_tensors(**{name: values})
    try:
        indices = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be whole numbers: got {shown(values)}.") from None
    if indices.is_floating_point() and indices.numel():
        raise ValueError(f"{name} must be whole numbers: got {shown(values)}.")
    return indices.to(torch.int64)


def _per_sequence(name: str, values: int | Indices, batch: int) -> Tensor:
    indices = torch.as_tensor(values, dtype=torch.int64, device="cpu").reshape(-1)
    if len(indices) not in (1, batch):
        raise ValueError(f"{name} must have one entry for each sequence: got {len(indices)} for batch {batch}.")
    return indices


def listed(name: str, values: int | Indices | None) -> list[int] | int | None:
    """The values as JSON, for the agreement. Raises: ValueError for what is no whole numbers."""
    indices = indices_of(name, values)  # type: ignore[arg-type]
    if indices is None:
        return None
    if indices.numel() and int(indices.abs().max()) > 1 << LARGEST_BITS:
        raise ValueError(f"{name} must be between -2^40 and 2^40: got {indices.tolist()}.")
    listed: list[int] | int = indices.tolist()
    return listed


def _ends(name: str, values: Indices | None) -> list[int] | None:
    ends = listed(name, values)
    if isinstance(ends, int):
        raise ValueError(f"{name} must be (documents + 1,): got {ends}.")
    return ends

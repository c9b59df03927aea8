"""The mask of one layer as an interval of keys per query, derived from the function Transformers builds.

Transformers describes a mask as a function of (batch, head, query, key) indices. Ours are intervals: a causal
row sees the last `left + 1` keys up to its own, or all of them. The function is *evaluated*, not recognised by
name, so a mask that is something else (chunked, bidirectional, a prefix, packed documents) is found and refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import Unsupported

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_SAMPLED_ROWS = 16
_SAMPLED_KEYS = 2048
# What a mask function raises that looks its answers up in a table, where this ends.
NO_RULE = (IndexError, TypeError)
# Keyword arguments of an attention call that say nothing about scores, or are looked at elsewhere.
_HARMLESS = {
    "cache_position",
    "dropout",
    "is_causal",
    "logits_to_keep",
    "max_length_k",
    "max_length_q",
    "position_ids",
    "return_dict",
    "sliding_window",
    "use_cache",
}


@dataclass(frozen=True, eq=False)
class IntervalMask:
    """What travels through the model in place of a mask: `left` keys before a row's own, from `start` on.

    A model that computes with its mask (adds a bias, slices it) means another mask than this one; every such
    use is refused. `problem` says why the mask that was asked for is no interval: it is an error only once a
    layer attends with it, since models also build masks that none of their layers uses.
    Shapes: `start` (batch,), the first key of each row that is not padding; None without padding.
    """

    left: int | None = None
    start: Tensor | None = None
    problem: str | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _refuse_use(f"reads its {name!r}")

    def __getitem__(self, index: object) -> NoReturn:
        _refuse_use("slices it")

    @classmethod
    def __torch_function__(cls, function: Any, *_: object, **__: object) -> NoReturn:
        _refuse_use(f"passes it to torch's {getattr(function, '__name__', function)}")


def _refuse_use(what: str) -> NoReturn:
    raise Unsupported(f"the model computes with its attention mask (it {what}), which changes what a token sees.")


@dataclass(frozen=True, eq=False)
class Padding:
    """Which keys of each row are no padding: start .. end - 1; None where nothing is padded.

    `problem` says why a mask is none that hides tokens at the ends of a row.
    Shapes: start, end (batch,).
    """

    start: Tensor | None = None
    end: Tensor | None = None
    problem: str | None = None

    @classmethod
    def of(cls, attention_mask: Tensor | None, kv_length: int) -> Padding:
        """Find the padding that Transformers' attention_mask of `kv_length` tokens marks by 0."""
        if attention_mask is None:
            return cls()
        if attention_mask.ndim != 2 or attention_mask.shape[1] != kv_length:
            got = tuple(attention_mask.shape)
            return cls(
                problem=f"attention_mask must be (batch, {kv_length}), one value for each token so far: got {got}."
            )
        visible = attention_mask.bool()
        if not torch.equal(visible.to(attention_mask.dtype), attention_mask):
            return cls(problem="attention_mask may hold only 1, and 0 for padding: got other values.")
        if bool(visible.all()):
            return cls()
        keys = torch.arange(kv_length, device=visible.device)
        start = torch.where(visible, keys, kv_length).amin(dim=1)
        end = start + visible.sum(dim=1)
        if torch.equal(visible, (keys >= start[:, None]) & (keys < end[:, None])):
            return cls(start, end)
        return cls(problem="attention_mask may only hide tokens on the left or right of a row: got a hole.")

    def why_not_left(self, kv_length: int) -> str | None:
        """Say why there is something else than padding on the left; None where there isn't."""
        if self.end is None or not bool((self.end < kv_length).any()):
            return self.problem
        return (
            "attention_mask may only hide tokens on the left of a row: got padding on the right. "
            "Pad on the left (tokenizer.padding_side = 'left')."
        )


def interval_mask(
    mask_function: MaskFunction,
    attention_mask: Tensor | None,
    batch: int,
    q_offset: int,
    kv_length: int,
    device: torch.device,
) -> IntervalMask:
    """Derive the interval mask of the queries at positions q_offset .. kv_length - 1.

    Its `problem` is set where `mask_function` is not causal with at most a window, or padding is not on the left.
    """
    mask = _window_mask(mask_function, batch, q_offset, kv_length, device)
    if mask.problem is not None:
        return mask
    padding = Padding.of(attention_mask, kv_length)
    problem = padding.why_not_left(kv_length)
    return IntervalMask(problem=problem) if problem else IntervalMask(mask.left, padding.start)


def _window_mask(
    mask_function: MaskFunction, batch: int, q_offset: int, kv_length: int, device: torch.device
) -> IntervalMask:
    """Find how many keys before its own a query sees, 0 or more, or all; it is checked in samples."""
    if kv_length <= 0 or q_offset >= kv_length:
        return IntervalMask()
    try:
        first = _first_visible(mask_function, batch, torch.tensor([kv_length - 1], device=device))
        left = None if first == 0 else kv_length - 1 - first
        rows, keys = _sample(q_offset, kv_length, left, device)
        visible = evaluate(mask_function, batch, rows, keys)
    except NO_RULE as error:
        return IntervalMask(problem=why_no_rule(error))
    return IntervalMask(left, problem=_why_not_window(visible, left, rows, keys))


def as_interval_mask(
    where: str,
    module: nn.Module,
    mask: object,
    scaling: object,
    options: dict[str, Any],
) -> IntervalMask:
    """Return the mask of one attention call, once nothing in the call says otherwise.

    Raises: Unsupported, naming the option, where the call's scores are another thing than scale * q.k.
    """
    if not isinstance(mask, IntervalMask):
        raise Unsupported(
            f"{where} attends with {'no mask' if mask is None else 'a mask of its own'}, not one from "
            "Transformers' masking_utils; only causal attention is supported."
        )
    if mask.problem is not None:
        raise Unsupported(f"{where}: {mask.problem}")
    if dropout := options.get("dropout"):
        raise Unsupported(f"{where} drops out attention weights (dropout={dropout}): call model.eval().")
    if scaling is not None and not isinstance(scaling, (int, float)):
        raise Unsupported(
            f"{where} passes a scaling of type {type(scaling).__name__}; only a number is supported."
        )
    if options.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise Unsupported(f"{where} is not causal (is_causal=False); only causal attention is supported.")
    for option, value in options.items():
        if option not in _HARMLESS and value is not None and value is not False:
            raise Unsupported(f"{where} passes {option!r} to its attention, which is not supported yet.")
    return mask


def _first_visible(mask_function: MaskFunction, batch: int, row: Tensor) -> int:
    """Find the first key that a row sees, supposing that it sees one interval; 0 where it sees none."""
    coarse = torch.linspace(0, int(row), _SAMPLED_KEYS, device=row.device).long()
    index = int(evaluate(mask_function, batch, row, coarse)[0, 0].int().argmax())
    if index == 0:
        return 0
    fine = torch.arange(int(coarse[index - 1]) + 1, int(coarse[index]) + 1, device=row.device)
    return int(fine[evaluate(mask_function, batch, row, fine)[0, 0].int().argmax()]) if len(fine) else 0


def evaluate(mask_function: MaskFunction, batch: int, rows: Tensor, keys: Tensor) -> Tensor:
    """Return what the mask lets rows see of keys: (batch, rows, keys), bool.

    Raises: one of NO_RULE for a mask that is a table, and shorter than that.
    """
    sequence = torch.arange(batch, device=rows.device)[:, None, None]
    head = torch.zeros_like(sequence)
    visible = mask_function(sequence, head, rows[None, :, None], keys[None, None, :])
    return torch.as_tensor(visible, device=rows.device).bool().expand(batch, len(rows), len(keys))


def why_no_rule(error: Exception) -> str:
    """Say what one of NO_RULE means."""
    return (
        f"the attention mask is not a rule for all positions but a table ({error}); only causal masks, "
        "with or without a sliding window, are supported."
    )


def _why_not_window(visible: Tensor, left: int | None, rows: Tensor, keys: Tensor) -> str | None:
    """Say where a mask is no causal window of `left` keys before each row's own; None where it is one."""
    distance = rows[:, None] - keys[None, :]
    expected = (distance >= 0) if left is None else (distance >= 0) & (distance <= left)
    wrong = (visible != expected).nonzero()
    if not len(wrong):
        return None
    _, row, key = wrong[0].tolist()
    sees = "sees" if visible[tuple(wrong[0])] else "does not see"
    shape = "a causal mask" if left is None else f"a causal sliding window of {left + 1} tokens"
    return (
        f"the attention mask is not {shape}: position {int(rows[row])} {sees} key {int(keys[key])}. "
        "Bidirectional, prefix, chunked and packed masks are not supported yet."
    )


def _sample(q_offset: int, kv_length: int, left: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Choose rows among the queries and keys among all, the edges of the expected interval included."""
    if q_offset == kv_length - 1:
        rows = torch.tensor([q_offset], device=device)
        return rows, _sampled_keys(rows, kv_length, left)
    spread = torch.linspace(q_offset, kv_length - 1, _SAMPLED_ROWS, device=device).long()
    reach = kv_length if left is None else left
    edges = torch.tensor([q_offset + reach + step for step in (-1, 0, 1)], device=device)
    rows = torch.cat([spread, edges.clamp(q_offset, kv_length - 1)])
    return rows, _sampled_keys(rows, kv_length, left)


def _sampled_keys(rows: Tensor, kv_length: int, left: int | None) -> Tensor:
    if kv_length <= _SAMPLED_KEYS:
        return torch.arange(kv_length, device=rows.device)
    steps = torch.arange(-1, 2, device=rows.device)
    first = rows - (kv_length if left is None else left)
    edges = torch.cat([(rows[:, None] + steps).flatten(), (first[:, None] + steps).flatten()])
    spread = torch.linspace(0, kv_length - 1, _SAMPLED_KEYS, device=rows.device).long()
    return torch.cat([edges.clamp(0, kv_length - 1), spread])

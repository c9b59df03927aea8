"""Attention in real numbers, to 50 digits, of inputs as they are stored: no code of the library is used."""

from __future__ import annotations

import math
from typing import Any

import mpmath
from mpmath import mpf
from torch import Tensor

DIGITS = 50


def numbers(x: Tensor) -> Any:
    """The tensor's elements, exactly, as nested lists."""
    return _exactly(x.detach().double().tolist())


def _exactly(x: Any) -> Any:
    return [_exactly(y) for y in x] if isinstance(x, list) else mpf(x)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    *,
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    alibi: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> list[Any]:
    """out as nested lists (batch, q_heads, q_len, v_dim) of mpf, the arguments being those of dense.attention.

    `scale`: a number, by default the float64 1 / sqrt(head_dim), or (q_heads,). A row that sees no key gives 0.
    """
    with mpmath.workdps(DIGITS):
        batch, q_heads, q_len, head_dim = q.shape
        group = q_heads // k.shape[1]
        scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
        scales = numbers(scale) if isinstance(scale, Tensor) else [mpf(scale)] * q_heads
        all_q, all_k, all_v = numbers(q), numbers(k), numbers(v)
        biases = None if bias is None else numbers(bias.expand(batch, q_heads, -1, -1))
        slopes, distances = (None, None) if alibi is None else (numbers(alibi[0]), numbers(alibi[1]))
        logits = None if sinks is None else numbers(sinks)

        def score(b: int, h: int, i: int, j: int) -> Any:
            s = scales[h] * mpmath.fdot(all_q[b][h][i], all_k[b][h // group][j])
            if softcap is not None:
                s = mpf(softcap) * mpmath.tanh(s / mpf(softcap))
            if slopes is not None and distances is not None:
                s -= slopes[h] * distances[b % len(distances)][i][j]
            return s if biases is None else s + biases[b][h][i][j]

        def row(b: int, h: int, i: int) -> list[Any]:
            keys = seen[b % len(seen), i].nonzero().flatten().tolist()
            scores = [score(b, h, i, j) for j in keys]
            joined = scores if logits is None else [*scores, logits[h]]
            top = max(joined, default=mpf(0))
            weights = [mpmath.exp(s - top) for s in joined]
            columns = zip(*(all_v[b][h // group][j] for j in keys), strict=True) if keys else [()] * v.shape[3]
            total = mpmath.fsum(weights)
            return [mpmath.fdot(weights, column) / total if keys else mpf(0) for column in columns]

        return [[[row(b, h, i) for i in range(q_len)] for h in range(q_heads)] for b in range(batch)]


def errors(out: Tensor, exact: list[Any]) -> list[Any]:
    """|out - exact| of each component, in the order of out.flatten()."""
    with mpmath.workdps(DIGITS):
        return [abs(x - y) for x, y in zip(_flat(numbers(out)), _flat(exact), strict=True)]


def _flat(x: Any) -> list[Any]:
    return [z for y in x for z in _flat(y)] if isinstance(x, list) else [x]

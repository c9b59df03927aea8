"""How far rounding can have moved each component of an output: a bound made of attention itself.

What is computed for a row is sum_j w_j (1 + t_j) v_j, its weights w_j being the exact ones times e^(d_j) and a
common factor. All that rounding does is in d_j (scores, exponentials, logarithms, shares), in t_j (sums and
products of values) and in sum_j w_j, which should be 1. Three more attentions along the same tree say how much
that can be:

    sizes         over |v|: how large the terms of the sum are
    scores        of |q| and |k|, made so sharp that lse is the largest: how large the terms of scores are
    counts        all scores 0: how many keys a row sees, and how large their values are

docs/theory.md derives the formula and each constant below, and why the number of ranks is not in it.

Source: Blanchard, Higham, Higham 2021 (the log-sum-exp and softmax functions); Blanchard, Higham, Mary 2020
(blocked summation); Higham 2002 (Accuracy and Stability of Numerical Algorithms, sections 3.1 and 4.2).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .arguments import Arguments
from .comm import Communicator
from .errors import Unsupported
from .kernels import as_kernel
from .prepared import attend, scaled
from .problem import state_dtype
from .state import AttentionState
from .tree import SEGMENT

# In unit roundoffs. tests/test_rounding.py measures what elementary functions have to do with them.
OF_SCORE = 12  # times the terms of a score, besides one for each of head_dim: factors, shifts, sums, a leaf's lse
OF_SOFTCAP = 8  # more of them
OF_LEAF = 10  # of a weight in a leaf: two exponentials, a reciprocal, the logarithm of a sum
OF_LOGARITHM = 2  # times the logarithm
OF_MERGE = 8  # of a share, and of lse besides its own rounding
OF_SHIFT = 3  # of an exponential and its argument, times the argument
SHARPNESS = 64.0  # lse / SHARPNESS is the largest score, or above it by log(keys) / SHARPNESS
# As a scale this makes our kernel's factor 1. Any other rounds the largest score, but not the one that it is taken
# from in a fused multiply-add: with scores beyond 2^30 a row may then look as if it saw nothing.
_LN_2 = 1 / 1.4426950408889634


@torch.no_grad()
def error_bound(
    comm: Communicator, q: Tensor, k: Tensor, v: Tensor, arguments: Arguments, out: Tensor, returned: Tensor
) -> Tensor:
    """A bound on |returned - exact|, by component; `out` is what was computed, `returned` that in its last dtype.

    Exact is attention in real numbers of q, k, v and the options as they are stored.
    Shapes: that of out. Numerics: in out's dtype, rounded up; 0 for a row that sees no key, infinite for one that
    is not finite.
    Traffic: that of three calls of attention.
    Raises: Unsupported for kernels whose order of operations is not known here.
    """
    if not q.is_cpu:
        raise Unsupported(f"return_bound knows the kernels' arithmetic on CPUs: got tensors on {q.device}.")
    dtype = state_dtype(q.dtype)
    unit, tiny = torch.finfo(dtype).eps / 2, torch.finfo(dtype).tiny
    kernel = as_kernel(arguments.kernel, q.device, (q.shape[3], v.shape[3]))
    widened = isinstance(arguments.scale, Tensor)
    leaf = kernel.rounding(dtype if widened else q.dtype, bias=arguments.bias is not None)
    sizes = attend(comm, q, k, v.abs(), arguments, name="attention's bound: sizes").out.double()
    scores = _largest_scores(comm, q.to(dtype), k.to(dtype), arguments)
    counts = _counts(comm, q, k, v, arguments)
    keys = counts.lse.double().exp() * 1.001
    values = keys.unsqueeze(-1) * counts.out.double()  # the sum of |v|, or a little more
    merges, head_dim = _merges(keys, arguments), q.shape[3]
    of_values = leaf.unit * leaf.roundings + unit * (2 * merges + 1) + leaf.weight
    of_weights = _of_weights(leaf.unit, unit, scores, (keys + 1).log(), merges, head_dim, arguments)
    lost = 2 * head_dim * (1 + float(_scale(arguments, head_dim).sum())) + (arguments.softcap or 0.0) + 4
    of_weights = of_weights + tiny * lost
    flushed = tiny * (merges + 2).unsqueeze(-1) * (4 * values + 256)
    bound = _from_sizes(out.double().abs(), sizes, values, flushed, of_values, of_weights)
    bound = bound + (returned.double() - out.double()).abs()
    bound = bound.masked_fill((counts.lse == -torch.inf).unsqueeze(-1), 0.0)
    bound = bound.masked_fill(bound.isnan() | ~out.isfinite().all(dim=-1, keepdim=True), torch.inf)
    return _rounded_up(bound * (1 + 2.0**-20), dtype)


def _of_weights(
    of_leaf: float,
    unit: float,
    scores: Tensor,
    log_keys: Tensor,
    merges: Tensor,
    head_dim: int,
    arguments: Arguments,
) -> Tensor:
    """How far rounding can move the logarithm of a row's weights: eta of section 3."""
    lse = scores + log_keys  # the largest of any keys
    of_scores = head_dim + OF_SCORE + (0 if arguments.softcap is None else OF_SOFTCAP)
    leaf = of_scores * scores + OF_LOGARITHM * log_keys + OF_LEAF
    tree = merges * (lse + OF_MERGE) + merges.clamp(max=1) * OF_SHIFT * (scores + lse)
    return of_leaf * leaf + unit * (scores + lse + tree)


def _from_sizes(
    out: Tensor, sizes: Tensor, values: Tensor, flushed: Tensor, of_values: Tensor, of_weights: Tensor
) -> Tensor:
    """The bound itself: section 6."""
    weights, both = of_weights.unsqueeze(-1), (of_values + of_weights).unsqueeze(-1)
    bound = (7 * both).exp() * (both * (sizes + flushed) + (both + weights) * out) + 2 * flushed
    trivial = out + values  # no weighted mean is larger than the values that it is of
    return torch.where(both <= 0.5, torch.minimum(bound, trivial), trivial)


def _largest_scores(comm: Communicator, q: Tensor, k: Tensor, arguments: Arguments) -> Tensor:
    """The largest sum of a score's terms in size, of each row; 0 or more.

    `least` is added to elements, and a scale below eps counts as eps: what these lose where they underflow is less
    than a rounding of that.
    """
    eps, tiny = torch.finfo(q.dtype).eps, torch.finfo(q.dtype).tiny
    least, slopes = tiny / eps**2, arguments.slopes(q.dtype)
    changes: dict[str, Any] = {
        "scale": _LN_2,
        "softcap": None,
        "alibi_slopes": None if slopes is None else -_sharp(slopes),
        "bias": None if arguments.bias is None else _sharp(arguments.bias.to(q.dtype)),
        "sinks": None if arguments.sinks is None else _sharp(arguments.sinks.to(q.dtype)),
    }
    sharp = scaled(q.abs() + least, _scale(arguments, q.shape[3]).clamp(min=eps) * (SHARPNESS / _LN_2))
    tensors = (sharp, k.abs() + least, torch.zeros_like(k[..., :1]))
    lse = attend(comm, *tensors, replace(arguments, **changes), name="attention's bound: scores").lse.double()
    return (lse / SHARPNESS * (1.001 + 2 * q.shape[3] * eps)).clamp(min=0.0)


def _sharp(x: Tensor) -> Tensor:
    """-inf stays: it says that something is not there."""
    return torch.where(x == -torch.inf, x, SHARPNESS * x.abs())


def _scale(arguments: Arguments, head_dim: int) -> Tensor:
    """How large the scale is."""
    scale = 1.0 / math.sqrt(head_dim) if arguments.scale is None else arguments.scale
    return torch.as_tensor(scale, dtype=torch.float64).abs()


def _counts(comm: Communicator, q: Tensor, k: Tensor, v: Tensor, arguments: Arguments) -> AttentionState:
    """How many keys a row sees, as lse, and the mean size of their values."""
    changes: dict[str, Any] = {"scale": 0.0, "softcap": None, "alibi_slopes": None, "bias": None, "sinks": None}
    alike = (torch.zeros_like(q[..., :1]), torch.zeros_like(k[..., :1]), v.abs())
    return attend(comm, *alike, replace(arguments, **changes), name="attention's bound: counts")


def _merges(keys: Tensor, arguments: Arguments) -> Tensor:
    """How many merges a row's leaf goes through at most, if so many keys are seen."""
    segments = ((keys + SEGMENT - 2) / SEGMENT).floor() + 1
    levels = (segments - 1).clamp(min=1).log2().ceil() + 1
    parts = bool(arguments.sink_tokens) or arguments.prefix is not None
    return torch.where(segments > 1, levels, 0.0) + (arguments.sinks is not None) + parts


def _rounded_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    near = x.to(dtype)
    return torch.where(near.double() < x, near.nextafter(torch.full_like(near, torch.inf)), near)

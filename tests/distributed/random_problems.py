"""Problems drawn at random from everything that `attention` takes, with gradients, against float64."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import shardsum
from shardsum.comm import Communicator
from shardsum.kernels import available
from shardsum.scores import Scores
from shardsum.strategies import STRATEGIES, Ring, Strategy

from .. import dense
from .cases import layout_of, ragged, recorded, supported

# Relative norms; a gradient is rounded to its tensor's dtype at the end.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float64: 1e-12}
INPUTS = ("q", "k", "v", "sinks", "scale", "bias")


@dataclass
class Drawn:
    """One problem, whole, and what it should give: values and gradients by name, in float64."""

    seed: int
    ranks: int
    strategy: str
    layout: str
    kernel: str
    q_replicated: bool
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    normal: Callable[..., Tensor]
    d_out: Tensor = field(default_factory=lambda: torch.empty(0))
    d_lse: Tensor = field(default_factory=lambda: torch.empty(0))
    expected: dict[str, Tensor] = field(default_factory=dict)
    terms: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        shapes = {name: (tuple(x.shape), str(x.dtype)) for name, x in self.tensors.items()}
        return (
            f"seed {self.seed}: {self.ranks} ranks, {self.strategy}, {self.layout}, {self.kernel}, "
            f"replicated={self.q_replicated}, {shapes}, {self.options}"
        )


def made(drawn: Drawn) -> Strategy:
    """The strategy; of rings, every second lets one KV head go round at a time."""
    one_head = drawn.strategy == "ring" and drawn.seed % 2 == 1
    return Ring(piece_bytes=1) if one_head else STRATEGIES[drawn.strategy]()


def draw(seed: int) -> Drawn:
    """The problem of that number."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = pick.choices([torch.float32, torch.bfloat16, torch.float64], [6, 2, 1])[0]
    batch, kv_heads, group = pick.choice([1, 2]), pick.choice([1, 2, 3]), pick.choice([1, 2, 3])
    q_heads = kv_heads * group
    head_dim, v_dim = pick.choice([1, 4, 8, 13]), pick.choice([1, 4, 8, 17])
    q_len = pick.choice([0, 1, 2, pick.randint(3, 40), pick.randint(3, 40), pick.randint(60, 160)])
    kv_len = pick.choice([q_len, q_len, pick.randint(0, 50), pick.randint(60, 200)])

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = {
        "q": normal(batch, q_heads, q_len, head_dim).to(dtype),
        "k": normal(batch, kv_heads, kv_len, head_dim).to(dtype),
        "v": normal(batch, kv_heads, kv_len, v_dim).to(dtype),
    }
    ranks = pick.randint(1, 6)
    strategy = pick.choice([name for name in sorted(STRATEGIES) if supported(name, ranks, q_heads)])
    q_replicated = pick.random() < 0.25
    options: dict[str, Any] = {}
    if pick.random() < 0.6:
        options["causal"] = True
    if pick.random() < 0.35:
        options["window"] = (pick.choice([None, 0, 3, 17]), pick.choice([None, 0, 5]))
    if pick.random() < 0.25:
        ends = sorted(pick.randint(0, q_len) for _ in range(3)), sorted(pick.randint(0, kv_len) for _ in range(3))
        options["cu_seqlens"], options["cu_seqlens_k"] = [0, *ends[0], q_len], [0, *ends[1], kv_len]
    elif pick.random() < 0.25:
        options["q_start"] = [pick.randint(-5, kv_len) for _ in range(batch)]
    if pick.random() < 0.25:
        starts = [pick.randint(0, kv_len) for _ in range(batch)]
        options["key_range"] = (starts, [pick.randint(s, kv_len) for s in starts])
    if pick.random() < 0.25:
        options["sink_tokens"] = pick.randint(1, 6)
    if pick.random() < 0.2:
        options["prefix"] = [pick.randint(0, 9) for _ in range(batch)]
    if pick.random() < 0.15:
        rows = (pick.choice([1, batch]), q_len)
        lo = torch.randint(0, kv_len + 1, rows, generator=generator)
        options["key_intervals"] = (lo, lo + torch.randint(0, kv_len + 1, rows, generator=generator))
    if pick.random() < 0.2:
        options["softcap"] = pick.choice([2.0, 30.0])
    if pick.random() < 0.2:
        options["alibi_slopes"] = torch.rand(q_heads, generator=generator) * 12 / (q_len + kv_len + 1)
    if pick.random() < 0.25:
        tensors["sinks"] = normal(q_heads).to(dtype)
    kind = pick.random()
    if kind < 0.15:
        options["scale"] = pick.choice([0.0, -0.3, 0.7])
    elif kind < 0.4:
        shape = pick.choice([(), (q_heads,), (pick.choice([1, batch]), pick.choice([1, q_heads]), q_len)])
        tensors["scale"] = 0.3 * torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    if (STRATEGIES[strategy].rows_stay or q_replicated) and pick.random() < 0.3:
        tensors["bias"] = normal(pick.choice([1, batch]), pick.choice([1, q_heads]), q_len, kv_len).to(dtype)
    if pick.random() < 0.15:
        options |= {"dropout_p": 0.3, "seed": seed}
    layout = pick.choice(["contiguous", "zigzag", "striped", "weighted", "ragged"])
    kernel = pick.choices(["aten", "eager", "reference", "native"], [4, 1, 1, 4])[0]
    kernel = kernel if kernel in available() else "aten"
    return _solved(Drawn(seed, ranks, strategy, layout, kernel, q_replicated, tensors, options, normal))


def plain(strategy: str) -> Drawn:
    """A problem without any option, of equal shards, in which every key and every gradient matters."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = {name: normal(1, heads, 12, 8).float() for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    return _solved(Drawn(1, 3, strategy, "contiguous", "aten", False, tensors, {}, normal))


def _solved(drawn: Drawn) -> Drawn:
    """The problem with its expected values and gradients, and the size of the terms that cancel in them."""
    drawn.expected = _gradients(drawn, torch.float64)
    x = {name: tensor.double() for name, tensor in drawn.tensors.items()}
    group, heads, kv_len = x["q"].shape[1] // x["k"].shape[1], x["q"].shape[1], x["k"].shape[2]
    one_hot = torch.eye(kv_len, dtype=torch.float64).expand(x["v"].shape[0], x["v"].shape[1], kv_len, kv_len)
    weights, lse = _definition(drawn, x | {"v": one_hot}, torch.float64)
    q, k, v = (x[n].abs() if n == "q" else x[n].abs().repeat_interleave(group, dim=1) for n in "qkv")
    d_out, d_lse = drawn.d_out.abs(), drawn.d_lse.abs()
    of_row = (d_out * drawn.expected["out"].abs()).sum(dim=-1) + d_lse
    of_score = weights.abs() * (d_out @ v.mT + of_row.unsqueeze(-1))
    scale = torch.as_tensor(x.get("scale", drawn.options.get("scale", 1 / math.sqrt(q.shape[3])))).double().abs()
    scale = scale.view(1, -1, 1, 1) if scale.ndim == 1 else scale.unsqueeze(-1)
    drawn.terms = {
        "out": float((weights.abs() @ v).norm()),
        "lse": 1.0,
        "q": float((scale * of_score @ k).norm()),
        "k": float(((scale * of_score).mT @ q).unflatten(1, (-1, group)).sum(dim=2).norm()),
        "v": float((weights.abs().mT @ d_out).unflatten(1, (-1, group)).sum(dim=2).norm()),
        "scale": float((of_score * (q @ k.mT)).sum()),
        "bias": float(of_score.norm()),
    }
    if "sinks" in x:
        sink = torch.where(lse.isfinite(), (x["sinks"].view(-1, 1) - lse).exp() * of_row, 0.0)
        drawn.terms["sinks"] = float(sink.transpose(0, 1).reshape(heads, -1).sum(dim=1).norm())
    return drawn


def _gradients(drawn: Drawn, dtype: torch.dtype) -> dict[str, Tensor]:
    """Values and gradients of one process that computes all of it in that dtype."""
    inputs = {name: x.detach().to(dtype).requires_grad_() for name, x in drawn.tensors.items()}
    out, lse = _definition(drawn, inputs, dtype)
    if not drawn.d_out.numel():
        drawn.d_out, drawn.d_lse = drawn.normal(*out.shape), drawn.normal(*lse.shape)
        drawn.d_lse = torch.where(lse.isfinite() & bool(drawn.seed % 2), drawn.d_lse, 0.0)
    loss = (out * drawn.d_out.to(dtype)).sum()
    loss = loss + (torch.where(lse.isfinite(), lse, 0.0) * drawn.d_lse.to(dtype)).sum()
    gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    found = {"out": out.detach(), "lse": lse.detach()}
    for (name, x), gradient in zip(inputs.items(), gradients, strict=True):
        found[name] = torch.zeros_like(x) if gradient is None else gradient
    return found


def _definition(drawn: Drawn, inputs: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    options, (q, k) = drawn.options, (drawn.tensors["q"], drawn.tensors["k"])
    names = ("causal", "window", "cu_seqlens", "cu_seqlens_k", "key_range", "q_start", "prefix", "sink_tokens")
    masks = {name: options[name] for name in (*names, "key_intervals") if name in options}
    batch, heads, q_len, kv_len = *q.shape[:3], k.shape[2]
    alibi = kept = None
    if "alibi_slopes" in options:
        alibi = options["alibi_slopes"], dense.distances(q_len, kv_len, batch, **masks)
    if "dropout_p" in options:
        scores = Scores(
            1.0,
            dropout_p=options["dropout_p"],
            seed=options["seed"],
            rows=torch.arange(q_len),
            keys=torch.arange(kv_len),
        )
        kept = scores.kept(torch.zeros(batch, heads, q_len, kv_len, dtype=torch.float64))
    scale = inputs.get("scale", options.get("scale"))
    if isinstance(scale, Tensor):
        scale = scale.view(1, -1, 1, 1) if scale.ndim == 1 else scale.unsqueeze(-1) if scale.ndim else scale
    seen = dense.visible(q_len, kv_len, batch, **masks)
    return dense.attention(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        seen,
        scale,
        softcap=options.get("softcap"),
        alibi=alibi,
        bias=inputs.get("bias"),
        sinks=inputs.get("sinks"),
        kept=kept,
        dtype=dtype,
    )


def check(comm: Communicator, drawn: Drawn) -> None:
    """Solve the problem on this rank's shards, and compare everything that this rank gets."""
    layout = "contiguous" if drawn.layout == "ragged" else layout_of(drawn.layout, comm.size)

    def positions(length: int) -> Tensor:
        if drawn.layout == "ragged":
            return torch.arange(*ragged(length, comm.rank, comm.size))
        return (
            shardsum.Layout(layout).positions(length, comm.rank, comm.size)
            if isinstance(layout, str)
            else (layout.positions(length, comm.rank, comm.size))
        )

    q_len, kv_len = drawn.tensors["q"].shape[2], drawn.tensors["k"].shape[2]
    rows = torch.arange(q_len) if drawn.q_replicated else positions(q_len)
    cut = {"q": rows, "k": positions(kv_len), "v": positions(kv_len), "bias": rows, "out": rows, "lse": rows}

    def own(name: str, x: Tensor) -> Tensor:
        if name == "scale" and x.ndim == 3:
            return x[:, :, rows]
        return x[:, :, cut[name]] if name in cut else x

    inputs = {name: own(name, x).detach().clone().requires_grad_() for name, x in drawn.tensors.items()}
    options = dict(drawn.options)
    if "key_intervals" in options:
        options["key_intervals"] = tuple(bound[:, rows] for bound in options["key_intervals"])
    state = shardsum.attention(
        **inputs,
        comm=comm,
        layout=layout,
        strategy=recorded(made(drawn)),
        kernel=drawn.kernel,
        q_replicated=drawn.q_replicated,
        return_state=True,
        **options,
    )
    d_out, d_lse = (own(n, x).to(state.out.dtype) for n, x in (("out", drawn.d_out), ("lse", drawn.d_lse)))
    loss = (state.out * d_out).sum() + torch.where(d_lse == 0, 0.0, state.lse * d_lse).sum()
    loss.backward()
    found = {"out": state.out.detach(), "lse": state.lse.detach()}
    for name, x in inputs.items():
        assert x.grad is not None, (name, str(drawn))
        found[name] = x.grad
        whole = name == "sinks" or (name == "scale" and x.ndim < 3)
        if whole and not drawn.q_replicated:  # the part of this rank's rows: the trainer sums them
            found[name] = torch.stack(comm.all_gather(x.grad.double())).sum(dim=0)
    dtype = drawn.tensors["q"].dtype
    for name, value in found.items():
        tolerance = TOLERANCE[dtype]
        exact = name == "lse" or (name == "out" and drawn.kernel != "native")  # which rounds weights
        if dtype is torch.bfloat16 and exact and "scale" not in drawn.tensors:
            tolerance = TOLERANCE[torch.float32]  # nothing was rounded on the way
        _compare(name, value.double(), own(name, drawn.expected[name]), tolerance, drawn, comm.rank)


def _compare(name: str, found: Tensor, expected: Tensor, tolerance: float, drawn: Drawn, rank: int) -> None:
    finite = expected.isfinite()
    assert torch.equal(found[~finite], expected[~finite]), f"{name} on rank {rank}, {drawn}"
    difference, whole = (found - expected)[finite].norm(), drawn.expected[name]
    # A rank's part is held against its own norm, or its share of the whole's.
    share = math.sqrt(expected.numel() / max(1, whole.numel()))
    size = torch.maximum(expected[finite].norm(), share * whole[whole.isfinite()].norm())
    # Where terms cancel, four roundings of their size are allowed, or three times what one process errs that
    # computes all of it in this dtype.
    allowed = torch.maximum(tolerance * size, torch.tensor(tolerance / 8 * share * drawn.terms[name]).double())
    if difference > allowed:
        plainly = _gradients(drawn, drawn.tensors["q"].dtype)[name].double()
        allowed = torch.maximum(allowed, 3 * share * (plainly - whole)[whole.isfinite()].norm())
    assert difference <= allowed, (
        f"{name} on rank {rank} is off by {float(difference):.1e}, norm {float(size):.1e}, "
        f"allowed {float(allowed):.1e}: {drawn}"
    )
    assert math.isfinite(float(difference))

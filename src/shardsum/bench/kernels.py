"""The native kernels beside PyTorch's attention and the machine's limits, each row in one alternating run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import attention
from ..blocks import Dense, Int8
from ..comm import connect
from ..kernels import NativeKernel
from ..kernels.limits import flops_per_second, read_bytes_per_second
from ..masks import Bounds
from ..quantized import Quantized
from ..scores import Scores
from .timing import alternate, machine, ratio

Sides = dict[str, Callable[[], object]]
FREE = "any order"  # the side of a reproducible row
# Of the tensors; int8 stands for keys and values quantized from these.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.bfloat16}


@dataclass(frozen=True)
class Work:
    """One row: sizes and what is done. `target`: by side, how many times as fast ours should be.

    `reproducible`: ours goes along the fixed tree, beside the same kernel that does not.
    """

    what: str  # "decode" | "prefill" | "training"
    dtype: str
    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    length: int
    causal: bool
    target: dict[str, float]
    reproducible: bool = False

    @property
    def name(self) -> str:
        kind = "" if self.what == "decode" else " causal" if self.causal else " full"
        kind += " reproducible" if self.reproducible else ""
        heads = f"H{self.q_heads}" if self.q_heads == self.kv_heads else f"H{self.q_heads}/{self.kv_heads}"
        return f"{self.what} B{self.batch} {heads} D{self.head_dim} {self.length:,}{kind} {self.dtype}"

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.length)
        q_len = 1 if self.what == "decode" else self.length
        shapes = [(self.q_heads, q_len), (self.kv_heads, self.length), (self.kv_heads, self.length)]
        q, k, v = (torch.randn(self.batch, *shape, self.head_dim, generator=generator) for shape in shapes)
        return tuple(x.to(DTYPES[self.dtype]) for x in (q, k, v))  # type: ignore[return-value]

    @property
    def flops(self) -> float:
        """Multiplications and additions of the products alone: two forward, five more backward."""
        pairs = self.batch * self.q_heads * self.length * (self.length + 1) / 2
        pairs = pairs if self.causal else self.batch * self.q_heads * self.length**2
        return 2 * self.head_dim * pairs * (7 if self.what == "training" else 2)


WORK = [
    *(
        Work("decode", dtype, 1, 32, 8, 128, 131072, False, {"aten folded": folded, "F.sdpa": sdpa})
        for dtype, folded, sdpa in (("bfloat16", 5, 40), ("float32", 2.4, 7), ("float16", 15, 50))
    ),
    Work("decode", "int8", 1, 32, 8, 128, 131072, False, {"native bfloat16": 1.7}),
    Work("decode", "bfloat16", 8, 16, 4, 64, 16384, False, {"aten folded": 7}),
    *(
        Work("prefill", dtype, 1, 8, 8, 64, 8192, causal, {"F.sdpa": target})
        for dtype, target in (("float32", 2.2), ("bfloat16", 3.5))
        for causal in (True, False)
    ),
    *(
        Work("prefill", dtype, 1, 16, 4, 128, 4096, True, {"F.sdpa": target})
        for dtype, target in (("float32", 2.2), ("bfloat16", 3.5))
    ),
    *(
        Work("training", dtype, 1, 8, 8, 64, 8192, True, {"F.sdpa": target})
        for dtype, target in (("float32", 2), ("bfloat16", 3))
    ),
    *(
        Work(what, dtype, 1, heads, kv_heads, head_dim, length, True, {FREE: round(1 / most, 2)}, True)
        for what, heads, kv_heads, head_dim, length, most in (
            ("decode", 32, 8, 128, 131072, 1.10),
            ("prefill", 8, 8, 64, 8192, 1.15),
            ("training", 8, 8, 64, 8192, 1.25),
        )
        for dtype in ("float32", "bfloat16")
    ),
]


def measure(work: Work, repetitions: int) -> dict[str, Any]:
    """The row as one JSON object: the median seconds of each side, the ratios, and the share of the limit."""
    before, sides = machine(), _sides(work)
    limits: list[float] = []
    dtype = DTYPES[work.dtype]

    def limit() -> None:
        limits.append(read_bytes_per_second() if work.what == "decode" else flops_per_second(dtype))

    with torch.set_grad_enabled(work.what == "training"):
        times = alternate({**sides, "limit": limit}, repetitions)
    ours = times[NativeKernel.name]
    median = sorted(ours)[len(ours) // 2]
    best = sorted(limits[1:])[len(limits[1:]) // 2]
    done = _kv_bytes(work) if work.what == "decode" else work.flops
    return {
        "benchmark": "kernels",
        "work": work.name,
        "seconds": {name: round(sorted(t)[len(t) // 2], 6) for name, t in times.items() if name != "limit"},
        "ratio": {name: ratio(times[name], ours) for name in sides if name != NativeKernel.name},
        "target": work.target,
        "limit": "bytes read per second" if work.what == "decode" else f"flops per second in {work.dtype}",
        "limit_per_second": round(best),
        "share_of_limit": round(done / median / best, 3),
        "repetitions": repetitions,
        **before,
    }


def _kv_bytes(work: Work) -> int:
    row_bytes = work.head_dim + 4 if work.dtype == "int8" else work.head_dim * DTYPES[work.dtype].itemsize
    return 2 * work.batch * work.kv_heads * work.length * row_bytes


def _sides(work: Work) -> Sides:
    q, k, v = work.tensors()
    grouped = work.q_heads != work.kv_heads
    if work.what == "training":
        beside = {FREE: _ours(reproducible=False)} if work.reproducible else {"F.sdpa": _sdpa}
        return {
            name: _training(q, k, v, attend)
            for name, attend in ({NativeKernel.name: _ours(work.reproducible)} | beside).items()
        }
    rows = q.shape[2]
    causal = work.causal and rows > 1
    hi = torch.arange(1, rows + 1).unsqueeze(0) if causal else torch.full((1, rows), work.length)
    scores, lo = Scores(work.head_dim**-0.5), torch.zeros(1, rows, dtype=torch.int64)
    bounds, block = Bounds(lo, hi), Dense(k, v)
    kernel = NativeKernel()
    if work.reproducible:
        return {
            NativeKernel.name: lambda: kernel.forward_tree(q, block, bounds, scores),
            FREE: lambda: kernel.forward(q, block, bounds, scores),
        }
    if work.dtype == "int8":
        of_int8 = Int8(Quantized.of(k), Quantized.of(v))
        return {
            NativeKernel.name: lambda: kernel.forward(q, of_int8, bounds, scores),
            "native bfloat16": lambda: kernel.forward(q, block, bounds, scores),
        }
    sides: Sides = {NativeKernel.name: lambda: kernel.forward(q, block, bounds, scores)}
    if work.what == "decode":
        folded = q.view(work.batch, work.kv_heads, -1, work.head_dim)
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        sides["aten folded"] = lambda: operator(folded, k, v)
    sides["F.sdpa"] = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
    return sides


def _ours(reproducible: bool) -> Callable[..., Tensor]:
    return partial(attention, comm=connect("single"), causal=True, reproducible=reproducible)


_sdpa = partial(F.scaled_dot_product_attention, is_causal=True)


def _training(q: Tensor, k: Tensor, v: Tensor, attend: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attend(*inputs)
        return list(torch.autograd.grad(out, inputs, torch.ones_like(out)))

    return run

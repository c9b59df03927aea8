"""Each peer's attention over two ranks, called the way its authors mean it to be called on a CPU.

A side takes this rank's q, k, v in its own dim order and layout and returns this rank's rows of the output. What a
peer can only do by transposing is not timed: it is given its own order.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import shardsum

BY_HEADS, BY_POSITIONS = "batch heads length dim", "batch length heads dim"
OURS = "shardsum"
OPERATOR = "_scaled_dot_product_flash_attention_for_cpu"


@dataclass(frozen=True)
class Side:
    """One way to compute attention over the ranks."""

    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    layout: str = "contiguous"
    inputs: str = BY_HEADS
    output: str = BY_HEADS


Maker = Callable[[], Side]


def ours(comm: shardsum.Communicator, causal: bool) -> dict[str, Maker]:
    """What makes the side of each of our strategies."""
    layout = "zigzag" if causal else "contiguous"

    def make(strategy: str) -> Side:
        options = {"layout": layout, "strategy": strategy, "kernel": "aten", "causal": causal}
        return Side(functools.partial(shardsum.attention, comm=comm, **options), layout)

    strategies = ("all_gather", "ring", "pass_q", "ulysses")
    return {f"{OURS} {name}, {comm.transport}": functools.partial(make, name) for name in strategies}


def peers(causal: bool) -> dict[str, Maker]:
    """What makes each peer's side: it fails where the peer can't be imported."""
    makers = {
        "torch's own ring": torch_ring,
        "para-attn ulysses": para_attn_ulysses,
        "deepspeed ulysses": deepspeed_ulysses,
        "ringmaster ulysses": ringmaster_ulysses,
        "ringmaster ring": ringmaster_ring,
        "ringmaster gather": ringmaster_gather,
        "ring-attention-pytorch": lucidrains_ring,
    }
    return {name: functools.partial(make, causal) for name, make in makers.items()}


def torch_ring(causal: bool) -> Side:
    """The ring under torch's context_parallel, which on a CPU is right where its public function is not."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as ring

    group, aten = dist.group.WORLD, torch.ops.aten
    ring._cp_options.enable_load_balance = causal  # zigzag

    class Ring(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, lse = ring._templated_ring_attention(
                group, 2, getattr(aten, OPERATOR), q, k, v, is_causal=causal, dropout_p=0.0
            )
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:
            q, k, v, out, lse = ctx.saved_tensors
            operator = getattr(aten, f"{OPERATOR}_backward")
            return ring._templated_ring_attention_backward(
                group, 2, operator, d_out, "grad_out", q, k, v, out, lse, is_causal=causal, dropout_p=0.0
            )[:3]

    return Side(Ring.apply, "zigzag" if causal else "contiguous")


def para_attn_ulysses(causal: bool) -> Side:
    from para_attn.para_attn_interface import ulysses_attn_func

    grouped = functools.partial(F.scaled_dot_product_attention, enable_gqa=True)
    call = functools.partial(ulysses_attn_func, is_causal=causal, mesh=dist.group.WORLD, attn_func=grouped)
    return Side(call)


def deepspeed_ulysses(causal: bool) -> Side:
    import deepspeed.comm
    from deepspeed.sequence.layer import DistributedAttention

    if not deepspeed.comm.is_initialized():
        deepspeed.comm.init_distributed("gloo", dist_init_required=False, verbose=False)

    def local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)

    attention = DistributedAttention(local, dist.group.WORLD, scatter_idx=2, gather_idx=1)
    return Side(lambda q, k, v: attention(q, k, v, 0), inputs=BY_POSITIONS, output=BY_POSITIONS)


def lucidrains_ring(causal: bool) -> Side:
    from ring_attention_pytorch.ring_flash_attention import ring_flash_attn

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = ring_flash_attn(q, k, v, causal=causal, bucket_size=512, ring_reduce_col=True)
        return out

    return Side(call, inputs=BY_POSITIONS, output=BY_POSITIONS)


def ringmaster_ulysses(causal: bool) -> Side:
    import ringmaster
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = ringmaster.RingmasterConfig(size=2, backend=ringmaster.Backend.ULYSSES)
    runtime = ringmaster.setup(config, device_type="cpu", inner_attn="sdpa")
    attend = ALL_ATTENTION_FUNCTIONS[runtime.attn_implementation]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        module = types.SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1])
        out: Tensor = attend(module, q, k, v, None, is_causal=causal)[0]
        return out

    return Side(call, output=BY_POSITIONS)


def ringmaster_ring(causal: bool) -> Side:
    return _ringmaster("ALLTOALL", causal)


def ringmaster_gather(causal: bool) -> Side:
    return _ringmaster("ALLGATHER", causal)


def _ringmaster(rotate: str, causal: bool) -> Side:
    """Its loop over shards, with the one of its kernels that is for a CPU."""
    import ringmaster
    from ringmaster.ring import ring_attention

    call = functools.partial(
        ring_attention, group=dist.group.WORLD, causal=causal, scaling=None, dropout=0.0, provider="math",
        rotate_method=ringmaster.RotateMethod[rotate], attn_implementation="math",
    )  # fmt: skip
    return Side(call, output=BY_POSITIONS)

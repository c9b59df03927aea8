"""The ways in which one rank can call `attention` otherwise than the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import shardsum
from shardsum import Layout
from shardsum.comm import Communicator
from shardsum.strategies import STRATEGIES

SCALE = 0.4
Q_LEN, KV_LEN = 13, 19


@dataclass
class Shards:
    """One rank's part of a problem, to be spoilt, and the communicator."""

    comm: Communicator
    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def attend(self) -> Tensor:
        out: Tensor = shardsum.attention(self.q, self.k, self.v, comm=self.comm, **self.options)
        return out


@dataclass
class Kind:
    """A mismatch: the options that all ranks share, what one of them has otherwise, what the message must name."""

    named: str
    shared: dict[str, Any] = field(default_factory=dict)
    other: dict[str, Any] = field(default_factory=dict)
    tensors: Callable[[Shards], tuple[Tensor, Tensor, Tensor]] | None = None

    def run(self, shards: Shards, odd: bool) -> None:
        shards.options |= self.shared
        if odd:
            shards.options |= self.other
            if self.tensors is not None:
                shards.q, shards.k, shards.v = self.tensors(shards)
        shards.attend()


def _cut(x: Tensor, dim: int) -> Tensor:
    return x.narrow(dim, 0, x.shape[dim] - 1)


SLOPES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
DOCUMENTS = [0, 4, 13]
DOCUMENTS_K = [0, 6, 19]
WEIGHTED = [1.0, 2.0, 3.0]

KINDS: dict[str, Kind] = {
    "causal": Kind("causal", {}, {"causal": False}),
    "a window on one rank": Kind("window", {}, {"window": (4, 2)}),
    "the left of a window": Kind("window", {"window": (4, 2)}, {"window": (5, 2)}),
    "the right of a window": Kind("window", {"window": (4, 2)}, {"window": (4, None)}),
    "a window that is none": Kind("window", {}, {"window": (4,)}),
    "documents on one rank": Kind("cu_seqlens", {}, {"cu_seqlens": DOCUMENTS, "cu_seqlens_k": DOCUMENTS_K}),
    "where documents end": Kind(
        "cu_seqlens", {"cu_seqlens": DOCUMENTS, "cu_seqlens_k": DOCUMENTS_K}, {"cu_seqlens": [0, 5, 13]}
    ),
    "where documents of keys end": Kind(
        "cu_seqlens_k", {"cu_seqlens": DOCUMENTS, "cu_seqlens_k": DOCUMENTS_K}, {"cu_seqlens_k": [0, 7, 19]}
    ),
    "padding on one rank": Kind("key_range", {}, {"key_range": ([0, 2], [19, 17])}),
    "the padding's numbers": Kind(
        "key_range", {"key_range": ([0, 2], [19, 17])}, {"key_range": ([0, 2], [19, 16])}
    ),
    "padding that is none": Kind("key_range", {}, {"key_range": ([0.5, 0], [19, 17])}),
    "prefix": Kind("prefix", {"prefix": [3, 4]}, {"prefix": [3, 5]}),
    "sink_tokens": Kind("sink_tokens", {"window": (4, None), "sink_tokens": 2}, {"sink_tokens": 3}),
    "sink_tokens below 0": Kind("sink_tokens", {}, {"sink_tokens": -1}),
    "scale": Kind("scale", {}, {"scale": 0.5}),
    "no scale": Kind("scale", {}, {"scale": None}),
    "a scale that is a tensor": Kind("scale", {}, {"scale": torch.tensor(SCALE)}),
    "a scale that is infinite": Kind("scale", {}, {"scale": float("inf")}),
    "softcap on one rank": Kind("softcap", {}, {"softcap": 20.0}),
    "the softcap's number": Kind("softcap", {"softcap": 20.0}, {"softcap": 30.0}),
    "ALiBi on one rank": Kind("alibi_slopes", {}, {"alibi_slopes": SLOPES}),
    "ALiBi's slopes": Kind("alibi_slopes", {"alibi_slopes": SLOPES}, {"alibi_slopes": SLOPES[::-1]}),
    "too few slopes": Kind("alibi_slopes", {"alibi_slopes": SLOPES}, {"alibi_slopes": SLOPES[:5]}),
    "sinks on one rank": Kind("sinks", {}, {"sinks": torch.arange(6.0)}),
    "the sinks' values": Kind("sinks", {"sinks": torch.arange(6.0)}, {"sinks": torch.arange(6.0) + 1}),
    "dropout_p": Kind("dropout_p", {"dropout_p": 0.1, "seed": 1}, {"dropout_p": 0.2}),
    "dropout on one rank": Kind("dropout_p", {}, {"dropout_p": 0.2, "seed": 1}),
    "seed": Kind("seed", {"dropout_p": 0.1, "seed": 1}, {"seed": 2}),
    "q_replicated": Kind("q_replicated", {}, {"q_replicated": True}),
    "q_start on one rank": Kind("q_start", {}, {"q_start": 3}),
    "the numbers of q_start": Kind("q_start", {"q_start": [3, 4]}, {"q_start": [3, 5]}),
    "q_len": Kind("q_len", {"q_len": Q_LEN}, {"q_len": Q_LEN + 1}),
    "kv_len": Kind("kv_len", {"kv_len": KV_LEN}, {"kv_len": KV_LEN + 1}),
    "strategy": Kind("strategy", {}, {"strategy": "another"}),
    "a strategy that is none": Kind("strategy", {}, {"strategy": "smoke"}),
    "kernel": Kind("kernel", {}, {"kernel": "reference"}),
    "collective": Kind("collective", {}, {"collective": "tree"}),
    "layout": Kind("layout", {}, {"layout": "striped"}),
    "reproducible": Kind("reproducible", {}, {"reproducible": True}),
    "a layout's weights": Kind(
        "layout", {"layout": Layout.weighted(WEIGHTED)}, {"layout": Layout.weighted(WEIGHTED[::-1])}
    ),
    "batch": Kind("batch", tensors=lambda x: (_cut(x.q, 0), _cut(x.k, 0), _cut(x.v, 0))),
    "q_heads": Kind("q_heads", tensors=lambda x: (x.q[:, :4], x.k, x.v)),
    "kv_heads": Kind("kv_heads", tensors=lambda x: (x.q, _cut(x.k, 1), _cut(x.v, 1))),
    "head_dim": Kind("head_dim", tensors=lambda x: (_cut(x.q, 3), _cut(x.k, 3), x.v)),
    "v_dim": Kind("v_dim", tensors=lambda x: (x.q, x.k, _cut(x.v, 3))),
    "dtype": Kind("dtype", tensors=lambda x: (x.q.double(), x.k.double(), x.v.double())),
    "a dtype of k alone": Kind("dtype", tensors=lambda x: (x.q, x.k.bfloat16(), x.v)),
    "keys without values": Kind("v must", tensors=lambda x: (x.q, x.k, _cut(x.v, 2))),
    "heads that no group divides": Kind("kv_heads", tensors=lambda x: (_cut(x.q, 1), x.k, x.v)),
    "q without a batch": Kind("q must", tensors=lambda x: (x.q[0], x.k, x.v)),
    "nothing for q": Kind("NoneType", tensors=lambda x: (None, x.k, x.v)),  # type: ignore[return-value]
    "device": Kind("meta", tensors=lambda x: (x.q.to("meta"), x.k.to("meta"), x.v.to("meta"))),
    "gradients": Kind("gradients", tensors=lambda x: (x.q.clone().requires_grad_(), x.k, x.v)),
    "key_intervals on one rank": Kind("key_intervals", {}, {"key_intervals": "some"}),
    "bias on one rank": Kind("bias", {}, {"bias": "some"}),
}


def fitted(kind: Kind, shards: Shards, strategy: str, size: int) -> Kind:
    """The kind with what depends on the rank and the strategy filled in."""
    rows, other = shards.q.shape[2], dict(kind.other)
    if other.get("strategy") == "another":
        other["strategy"] = sorted({*STRATEGIES} - {strategy})[0]
    if other.get("key_intervals") == "some":
        other["key_intervals"] = (torch.zeros(2, rows).long(), torch.full((2, rows), KV_LEN))
    if other.get("bias") == "some":
        other["bias"] = torch.zeros(1, 1, rows, KV_LEN)
    found = [dict(kind.shared), other]
    for options in found:
        if isinstance(options.get("layout"), Layout):
            options["layout"] = Layout.weighted(options["layout"].weights[-size:])
    return Kind(kind.named, found[0], found[1], kind.tensors)

"""One attention call as all ranks share it: sizes, mask, who holds what; no tensors and no communicator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from .masks import Mask
from .placement import Placement

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Ask = TypeVar("Ask", bound=Callable[..., Any])


class Sizes(NamedTuple):
    """The sizes of q, k and v as one rank has them; q_len and kv_len are its own, the rest is equal on all ranks.

    Raises: ValueError where q, k and v do not fit together.
    """

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, *, quantized: bool = False) -> Sizes:
        """The sizes of q, k and v; k and v may be int8 if `quantized`."""
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            check_dims(name, tensor)
        batch, q_heads, q_len, head_dim = q.shape
        kv_heads, kv_len, v_dim = k.shape[1], k.shape[2], v.shape[3]
        wrong = None  # the message is made only where one is needed: every decode step comes here
        if k.shape[:3] != v.shape[:3]:
            wrong = "k and v must have the same batch, heads and length"
        elif batch != k.shape[0] or head_dim != k.shape[3]:
            wrong = "q and k must have the same batch and head_dim"
        elif not (head_dim and v_dim):
            wrong = "head_dim and v_dim must be at least 1"
        elif kv_heads == 0 or q_heads % kv_heads:
            wrong = "kv_heads must divide q_heads"
        if wrong is not None:
            shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
            raise ValueError(f"{wrong}: got {shapes}.")
        of_keys = torch.int8 if quantized else q.dtype
        if not of_keys == k.dtype == v.dtype or q.dtype not in DTYPES:
            raise ValueError(
                "q, k and v must have one dtype of float64, float32, bfloat16, float16: "
                f"got {q.dtype}, {k.dtype}, {v.dtype}."
            )
        if not q.device == k.device == v.device:
            raise ValueError(f"q, k and v must be on one device: got {q.device}, {k.device}, {v.device}.")
        return cls(batch, q_heads, kv_heads, q_len, kv_len, head_dim, v_dim, q.dtype)


@dataclass(frozen=True, eq=False)
class Problem:
    """One attention call of all ranks together: what decides who computes what, what travels and what it costs.

    `queries`, `keys`: which rows each rank has and which keys each computes with. With `q_replicated` every rank
    has all rows. `reproducible`: sums go along the fixed tree. `bias_shape` (batch or 1, q_heads or 1): of an
    additive bias, if there is one. `q_dtype`, if queries are wider than keys (a scale that is a tensor widens
    them). `hosts`: the name of each rank's host, where it is known. `known`: what was found out so far.
    """

    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    dtype: torch.dtype
    mask: Mask
    queries: Placement
    keys: Placement
    q_replicated: bool = False
    reproducible: bool = False
    bias_shape: tuple[int, int] | None = None
    q_dtype: torch.dtype | None = None
    device: str = "cpu"
    hosts: tuple[str, ...] | None = None
    known: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False)

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.keys.size

    @property
    def heads_per_kv_head(self) -> int:
        """How many query heads read one KV head."""
        return self.q_heads // self.kv_heads

    def q_len(self, rank: int) -> int:
        """How many query rows a rank has."""
        return self.queries.lengths[rank]

    def kv_len(self, rank: int) -> int:
        """How many keys a rank computes with."""
        return self.keys.lengths[rank]

    def heads(self, kv_heads: int) -> Problem:
        """The problem of this many of the KV heads and the query heads that read them; who sees what stays."""
        return replace(self, kv_heads=kv_heads, q_heads=kv_heads * self.heads_per_kv_head)

    # Shapes and bytes of what travels.

    @property
    def row_dtype(self) -> torch.dtype:
        """The dtype in which query rows travel."""
        return self.q_dtype or self.dtype

    @property
    def sum_bytes(self) -> int:
        """Bytes of one number of a partial sum."""
        return state_dtype(self.dtype).itemsize

    def q_shape(self, rank: int) -> tuple[int, ...]:
        """The shape of the query rows of a rank."""
        return self.row_shape(rank, self.head_dim)

    def k_shape(self, keys: int) -> tuple[int, ...]:
        """The shape of this many keys."""
        return (self.batch, self.kv_heads, keys, self.head_dim)

    def v_shape(self, keys: int) -> tuple[int, ...]:
        """The shape of the values of this many keys."""
        return (self.batch, self.kv_heads, keys, self.v_dim)

    def row_shape(self, rank: int, components: int) -> tuple[int, ...]:
        """The shape of `components` numbers for each query row of a rank."""
        return (self.batch, self.q_heads, self.q_len(rank), components)

    def q_bytes(self, rows: int) -> int:
        """Bytes of this many query rows, as they come."""
        return self.batch * self.q_heads * rows * self.head_dim * self.row_dtype.itemsize

    def kv_bytes(self, keys: int) -> int:
        """Bytes of this many keys and values, as they come."""
        return self.kv_numbers(keys) * self.dtype.itemsize

    def kv_gradient_bytes(self, keys: int) -> int:
        """Bytes of the gradients of this many keys and values."""
        return self.kv_numbers(keys) * self.sum_bytes

    def row_bytes(self, rows: int, components: int) -> int:
        """Bytes of `components` numbers of a partial sum for each of this many query rows."""
        return rows * self.batch * self.q_heads * components * self.sum_bytes

    def kv_numbers(self, keys: int) -> int:
        """How many numbers this many keys and values have."""
        return keys * self.batch * self.kv_heads * (self.head_dim + self.v_dim)


def per_problem(ask: Ask) -> Ask:
    """Decorate a function of a Problem and of whole numbers: it is computed once, and its results are shared."""

    @functools.wraps(ask)
    def asked(problem: Problem, *numbers: int) -> Any:
        key = (ask, *numbers)
        if key not in problem.known:
            problem.known[key] = ask(problem, *numbers)
        return problem.known[key]

    return cast(Ask, asked)


def check_dims(name: str, x: Tensor) -> None:
    """Raise ValueError unless x has the dims of q, k and v."""
    if x.ndim != 4:
        raise ValueError(
            f"{name} must be (batch, heads, length, dim): got {tuple(x.shape)}. Add the missing dims."
        )


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over inputs of `dtype` are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32

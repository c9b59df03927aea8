"""Decode over pages, on every instruction set that this machine has, against the float64 definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from shardsum import AttentionState, decode_paged, merge
from shardsum.scores import Scores

from ..tolerances import STATE
from .native import check_state, each_instruction_set, normal

each_dtype = pytest.mark.parametrize("dtype", list(STATE))


def gathered(pages: Tensor, table: Tensor) -> Tensor:
    """Every sequence's rows in their order: (batch, kv_heads, max_pages * page_len, dim)."""
    return torch.stack([torch.cat([pages[int(p)] for p in row], dim=1) for row in table])


def expect(
    state: AttentionState, q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, **o: Any
) -> None:
    own = lengths.long().unsqueeze(1) - q.shape[2] + torch.arange(q.shape[2])
    window = o.get("window")
    lo = torch.zeros_like(own) if window is None else (own - window).clamp(min=0)
    hi, softcap = (own + 1).clamp(min=0), o.get("softcap")
    scores = Scores(o.get("scale") or 1 / math.sqrt(q.shape[3]), softcap=softcap)
    k, v = gathered(k, table), gathered(v, table)
    check_state(state, STATE[q.dtype], q, k, v, lo, hi, scores, softcap=softcap)


def pool(seed: int, pages: int, heads: int, page_len: int, dim: int, dtype: torch.dtype, outside: bool) -> Tensor:
    """Pages of random rows; positions may lie outside heads."""
    if outside:
        return normal(seed, pages, page_len, heads, dim + 3, dtype=dtype)[..., :dim].transpose(1, 2)
    return normal(seed, pages, heads, page_len, dim, dtype=dtype)


@each_instruction_set
@each_dtype
@pytest.mark.parametrize("page_len", [1, 7, 16, 64, 100, 600])
@pytest.mark.parametrize("q_len", [1, 3])
def test_lengths_shared_pages_and_any_order(isa: str, dtype: torch.dtype, page_len: int, q_len: int) -> None:
    most, batch = -(-700 // page_len), 4
    generator = torch.Generator().manual_seed(page_len)
    table = torch.stack([torch.randperm(most + 5, generator=generator)[:most] for _ in range(batch)])
    table[1, : most // 2] = table[0, : most // 2]  # a common prefix
    q = normal(0, batch, 6, q_len, 48, dtype=dtype)
    k = pool(1, most + 5, 2, page_len, 48, dtype, outside=False)
    v = pool(2, most + 5, 2, page_len, 33, dtype, outside=True)
    lengths = torch.tensor([700, 513, 0, 2])
    for options in ({}, {"window": 100, "softcap": 2.0, "scale": -0.2}):
        found = decode_paged(q, k, v, table.int(), lengths.int(), instruction_set=isa, **options)
        expect(found, q, k, v, table, lengths, **options)
        assert bool((found.lse[2] == -torch.inf).all())
        assert not bool(found.out[2].any())


@each_instruction_set
@each_dtype
def test_what_lies_beyond_a_length_does_not_matter(isa: str, dtype: torch.dtype) -> None:
    q, k, v = normal(0, 3, 4, 1, 64, dtype=dtype), *(pool(i, 9, 2, 16, 64, dtype, outside=False) for i in (1, 2))
    table, lengths = torch.tensor([[8, 0, 5, 2], [1, 7, 3, 4], [6, 6, 6, 6]]), torch.tensor([50, 17, 0])
    clean = decode_paged(q, k, v, table, lengths, instruction_set=isa)
    for x in (k, v):
        x[2, :, 2:] = x[7, :, 1:] = x[3:5] = x[6] = math.nan
    table[1, 2:], table[2] = 1 << 40, -1
    state = decode_paged(q, k, v, table, lengths, instruction_set=isa)
    assert torch.equal(state.out, clean.out)
    assert torch.equal(state.lse, clean.lse)


@each_instruction_set
def test_states_of_two_pools_merge_to_that_of_all_tokens(isa: str) -> None:
    q = normal(0, 2, 6, 1, 32, dtype=torch.float32)
    k, v = (pool(i, 12, 3, 8, 32, torch.float32, outside=False) for i in (1, 2))
    table, lengths = (
        torch.randperm(12, generator=torch.Generator().manual_seed(0)).view(2, 6),
        torch.tensor([45, 33]),
    )
    first = decode_paged(q, k, v, table[:, :3], torch.tensor([24, 24]), instruction_set=isa)
    second = decode_paged(q, k, v, table[:, 3:], lengths - 24, instruction_set=isa)
    expect(merge(first, second), q, k, v, table, lengths)


def test_wrong_inputs_are_refused() -> None:
    q, pages, table, lengths = torch.ones(2, 2, 1, 4), torch.ones(3, 1, 8, 4), torch.zeros(2, 2).long(), [9, 0]

    def refused(message: str, **changed: Any) -> None:
        given = {
            "q": q,
            "k_pages": pages,
            "v_pages": pages,
            "block_table": table,
            "lengths": torch.tensor(lengths),
        }
        with pytest.raises(ValueError, match=message):
            decode_paged(**{**given, **changed})

    beyond = torch.tensor([[0, 3], [0, 0]])
    refused("block_table must name pages from 0 to 2: got 3 for page 1 of sequence 0", block_table=beyond)
    refused("block_table must name pages from 0 to 2: got -1 for page 0 of sequence 0", block_table=table - 1)
    refused(r"lengths must be from 0 to the 16 tokens of max_pages: got \[-1, 3\]", lengths=torch.tensor([-1, 3]))
    refused(r"lengths must be from 0 to the 16 tokens of max_pages: got \[17, 3\]", lengths=torch.tensor([17, 3]))
    refused("int32 or int64: got torch.float32 and torch.int64", block_table=table.float())
    refused(r"must be \(2, max_pages\) and \(2,\): got \(1, 2\)", block_table=table[:1])
    refused("one dtype of", k_pages=pages.double())
    refused("kv_heads must divide q_heads", k_pages=pages.expand(3, 3, 8, 4), v_pages=pages.expand(3, 3, 8, 4))
    refused("must have one head_dim", q=torch.ones(2, 2, 1, 5))
    refused("must be .pages, kv_heads, page_len, dim.", v_pages=pages[:2])
    refused("in one piece", v_pages=torch.ones(3, 1, 8, 8)[..., ::2])
    refused("window must be 0 keys or more", window=-1)

"""The call that a strategy works on, as a rank sees it: its tensors, all ranks' problem, and its communicator."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..blocks import Block, Dense
from ..collectives import Collective
from ..comm import Communicator
from ..errors import NonFiniteWarning
from ..geometry import intervals, local_intervals, localized
from ..kernels import Gradients, Kernel, OutputGradient
from ..kernels.along_tree import GradientsOfNodes, Spans, states_of_nodes
from ..masks import Bounds
from ..partials import STATES, SUMS, AlongTree, Merged, Partial, union
from ..placement import Runs, Subset
from ..problem import Problem
from ..scores import Scores
from ..state import AttentionState, merge

ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Contribution:
    """What some rows and keys contribute to the gradients: q, and k and v side by side along the last dim."""

    q: Partial[Tensor]
    kv: Partial[Tensor]
    bias: Tensor | None = None


class PlacedBlock(NamedTuple):
    """A block that this rank computes with, and which of its keys these are: all, if it is the only one."""

    block: Block
    keys: Subset = ALL


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call as a rank sees it once all ranks have agreed.

    `blocks`: the keys and values that this rank computes with, wherever they lie. `name`: how a message names this
    rank and call; `holder`: what `problem` counts as ranks.
    """

    comm: Communicator
    problem: Problem
    kernel: Kernel
    q: Tensor
    blocks: Sequence[PlacedBlock]
    scores: Scores
    collective: Collective
    name: str = "attention"
    holder: str = "rank"

    @functools.cached_property
    def dense(self) -> Dense:
        """This rank's keys and values as two tensors, in their order: what strategies that move keys send."""
        parts = [placed.block.dense(self.problem.dtype) for placed in self.blocks]
        if len(parts) == 1:
            return parts[0]
        held = [placed.keys for placed in self.blocks]
        order = torch.cat([torch.arange(self.problem.kv_len(self.comm.rank))[keys] for keys in held]).argsort()
        k, v = (torch.cat(x, dim=2) for x in zip(*((part.k, part.v) for part in parts), strict=True))
        return Dense(k.index_select(2, order.to(k.device)), v.index_select(2, order.to(v.device)))

    def partial(
        self, q: Tensor, block: Block, *, rows_of: int, keys_of: int, rows: Subset = ALL, keys: Subset = ALL
    ) -> Partial[AttentionState]:
        """The state of the query rows of one rank over the keys of one rank, or of some of them, computed here.

        Warns: NonFiniteWarning, naming this rank, the call, whose keys gave NaN or Inf, and where first.
        """
        scores, bounds = self._local(rows_of, keys_of, rows, keys)
        problem = self.problem
        if problem.reproducible:
            block = block.dense(problem.dtype)  # alike, whether it stays or travels
            spans = _spans(problem.keys.runs(keys_of), keys, problem.mask.kv_len)
            forest = states_of_nodes(self.kernel, q, block, bounds, scores, spans, problem.mask.kv_len)
            state: Partial[AttentionState] = AlongTree(forest, STATES)
        else:
            states = [self.kernel.forward(q, block, one, scores) for one in bounds]
            state = Merged(functools.reduce(merge, states), STATES)
        for value in state.values():
            self._warn_unless_finite(value, rows_of, keys_of)
        return state

    def partial_of_blocks(self, q: Tensor, *, rows_of: int, rows: Subset = ALL) -> Partial[AttentionState]:
        """The state of the query rows of one rank over all keys of this rank, block by block, where they lie."""
        place = {"rows_of": rows_of, "keys_of": self.comm.rank}
        return union(self.partial(q, placed.block, **place, rows=rows, keys=placed.keys) for placed in self.blocks)

    def partial_backward(
        self,
        q: Tensor,
        block: Dense,
        gradient: OutputGradient,
        *,
        rows_of: int,
        keys_of: int,
        rows: Subset = ALL,
        keys: Subset = ALL,
    ) -> Contribution:
        """What the query rows of one rank and the keys of one rank, or some of them, contribute, computed here.

        The bias' gradient is of all its keys, zero but for these.
        """
        scores, bounds = self._local(rows_of, keys_of, rows, keys)
        problem, key_runs = self.problem, self.problem.keys.runs(keys_of)
        if problem.reproducible:
            of_rows = _spans(problem.queries.runs(rows_of), rows, problem.mask.q_len)
            of_keys = _spans(key_runs, keys, problem.mask.kv_len)
            nodes = GradientsOfNodes(self.kernel, q, block, bounds, scores, gradient)
            d_q, d_kv, d_bias = nodes.by_nodes(of_rows, of_keys, problem.mask.q_len, problem.mask.kv_len)
            found = Contribution(AlongTree(d_q, SUMS), AlongTree(d_kv, SUMS), d_bias)
        else:
            parts = [self.kernel.backward(q, block, one, scores, gradient) for one in bounds]
            summed = functools.reduce(Gradients.__add__, parts)
            kv = torch.cat([summed.k, summed.v], dim=3)
            found = Contribution(Merged(summed.q, SUMS), Merged(kv, SUMS), summed.bias)
        if found.bias is None or self.scores.bias is None:
            return found
        bias = torch.zeros_like(self.scores.bias, dtype=found.bias.dtype)
        bias[..., key_runs.some(keys).positions.to(bias.device)] = found.bias
        return replace(found, bias=bias)

    def heads(self, kv_heads: slice) -> Call:
        """The call of some of the KV heads, and of the query heads that read them."""
        q_heads, problem = self.q_heads(kv_heads), self.problem
        blocks = [PlacedBlock(placed.block.heads(kv_heads), placed.keys) for placed in self.blocks]
        return replace(
            self,
            problem=problem.heads(kv_heads.stop - kv_heads.start),
            q=self.q[:, q_heads],
            blocks=blocks,
            scores=self.scores.some_heads(q_heads.start, q_heads.stop),
        )

    def q_heads(self, kv_heads: slice) -> slice:
        """The query heads that read these KV heads."""
        group = self.problem.heads_per_kv_head
        return slice(kv_heads.start * group, kv_heads.stop * group)

    def halves(self, d_kv: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of k and of v, which lie side by side."""
        d_k, d_v = d_kv.split([self.problem.head_dim, self.problem.v_dim], dim=3)
        return d_k, d_v

    def _local(self, rows_of: int, keys_of: int, rows: Subset, keys: Subset) -> tuple[Scores, list[Bounds]]:
        problem, scores = self.problem, self.scores
        if not scores.plain:
            own = problem.queries.positions(rows_of)[rows]
            positions = problem.keys.runs(keys_of).some(keys).positions
            scores = scores.localize(own, positions, problem.mask.diagonal(own))
        if _is_all(rows) and _is_all(keys):
            return scores, local_intervals(problem, rows_of, keys_of)
        bounds = [Bounds(lo[:, rows], hi[:, rows]) for lo, hi in intervals(problem, rows_of)]
        return scores, localized(bounds, problem.keys.runs(keys_of).some(keys))

    def _warn_unless_finite(self, state: AttentionState, rows_of: int, keys_of: int) -> None:
        if not state.is_finite():
            bad = state.lse.isnan() | (state.lse == torch.inf) | ~state.out.isfinite().all(dim=-1)
            batch, head, row = bad.nonzero()[0].tolist()
            first = (batch, head + self.scores.head, row)
            warnings.warn(
                f"{self.name}: the attention over the keys of {self.holder} {keys_of} gave NaN or Inf, "
                f"first at (batch, head, row) {first} of the queries of {self.holder} {rows_of}.",
                NonFiniteWarning,
                stacklevel=3,
            )


def _is_all(some: Subset) -> bool:
    return isinstance(some, slice) and some == ALL


def _spans(runs: Runs, some: Subset, length: int) -> Spans:
    """The nodes of the fixed tree that some of these positions make, and where each one's lie."""
    return runs.some(some).spans(length)

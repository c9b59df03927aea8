"""Training a model with its sequence sharded: each rank runs it on its own tokens, and gradients are summed.

with shardsum.hf.training(model, comm=comm) as sharded:
    loss = sharded.loss(input_ids, labels)      # whole sequences, the same on every rank
    loss.backward()
    sharded.sum_gradients()                     # now as in one process, bit-equal on every rank
    optimizer.step()
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..collectives import as_collective
from ..comm import Communicator, agree, as_communicator, connect, mistakes_reach_all
from ..compiler import outside_graphs
from ..errors import Unsupported
from ..kernels import Kernel
from ..layouts import Layout, as_layout
from ..problem import state_dtype
from ..sharding import sum_over_ranks
from ..strategies import Strategy, as_strategy
from .batch import Batch, BatchMask, Execution
from .binding import longest_sequence, register
from .bound_model import MASK_POSITIONS, AttentionCall, BoundModel, has_argument
from .gradients import sum_gradients
from .identity import describe_model
from .masks import NO_RULE, MaskFunction, evaluate, interval_mask, why_no_rule
from .own_loss import check_losses
from .probe import TOKENS, probe_training
from .randomness import NoRandomNumbers
from .sequences import IGNORE_INDEX, Sequences
from .wrappers import check_no_hooks, check_whole


@contextlib.contextmanager
def training(
    model: PreTrainedModel,
    comm: Communicator | Any = None,
    layout: str | Layout = "zigzag",
    strategy: str | Strategy = "auto",
    kernel: str | Kernel = "auto",
    positions: int | None = None,
    reproducible: bool = False,
) -> Iterator[Training]:
    """Open a `Training` in which the model runs on sequences whose tokens are spread over the ranks.

    Every rank holds the whole model, with the same weights, and an optimizer of its own. On entry a few forward
    passes over a few tokens find out whether tokens meet in softmax attention only; see `shardsum.hf.probe`.
    `comm`, `layout`, `strategy`, `kernel` are those of `shardsum.attention`; `positions` is the longest sequence
    to expect, by default the model's own limit. A model may be in training mode or not. Backward passes belong
    inside the block. Everything is undone on exit, after an exception too; weights and gradients stay.

    `reproducible`: ranks hold whole segments of 256 tokens; attention, and the gradients of its queries, keys and
    values, have the same bits for the same inputs on any number of ranks. Those of the model's other layers and of
    the weights' gradients, which are sums over the ranks' tokens, are not promised.

    Refused: models in which tokens meet elsewhere too (convolutions, state spaces, keys made of several tokens);
    masks that are not causal with at most a window; a loss of the model's own that is not the mean cross-entropy
    of its logits (label smoothing, weights, a router's auxiliary loss), which it is asked for on entry; dropout
    outside of attention, which would be drawn for each rank apart.

    Traffic: 64 bytes to each other rank.
    Raises: Unsupported, naming the module or option that stands in the way; ValueError for a model that is in a
    session already, or more positions than it has; Mismatch where the ranks' models or arguments differ.
    """
    comm = as_communicator(comm)
    with contextlib.ExitStack() as undo:
        with mistakes_reach_all(comm):
            check_whole(model)
            bound = Training(model, comm, Execution(as_layout(layout), strategy, kernel, reproducible), 0)
            check_losses(model)
            check_no_hooks(model)
            bound.positions = longest_sequence(model, positions)
            name = undo.enter_context(register(bound))
            with _evaluation_mode(model):
                probe_training(bound, name, bound.run_batch(_batch_on_one_rank(bound.execution, TOKENS)))
                bound.find_out_about_documents()
            call = _describe(bound)
        agree(comm, {"call": "hf.training", **call})
        bound.checked = True
        yield bound


class Training(BoundModel):
    """One model bound to one communicator for training; `training` makes it.

    - `comm`: the communicator, which may be replaced between two steps; see `BoundModel`.
    - `loss(input_ids, labels)`: the loss of whole sequences, the same number on every rank.
    - `sum_gradients()`: the gradients of this loss, once it has been backpropagated.
    """

    computed_options = frozenset({"dropout", "softcap", "s_aux"})

    def __init__(self, model: PreTrainedModel, comm: Communicator, execution: Execution, positions: int) -> None:
        super().__init__(model, comm, execution.layout, positions)
        self.execution = execution
        self.batch: Batch | None = None
        self.own_loss = model.loss_function
        # Whether the model's masks keep packed documents apart, and the answers of each while that is found out.
        self.separates_documents = True
        self._separations: list[bool] | None = None

    @outside_graphs
    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Return the mean cross-entropy of the labelled tokens of all ranks: the model's own loss in one process.

        Labels are those of Transformers: the same tokens as input_ids, or -100; token t is compared with label
        t + 1, on whichever rank that lies.

        - `attention_mask`: 0 where a row is padded, on the left or right. Positions count padding too unless
          `position_ids` says otherwise, as in Transformers.
        - `position_ids`: without an attention_mask, a document begins wherever they do not go on by one, and sees
          only itself, as in Transformers; of a model that takes no notice of documents there (gpt-oss), not here
          either.
        - `num_items_in_batch`: what the sum of losses is divided by, in place of the number of labelled tokens;
          for gradient accumulation, that of all batches together.
        - `seed`: of attention's dropout; by default rank 0's torch generator draws one. Weights are dropped by
          position, so they are the same ones on any ranks.

        Shapes: input_ids, labels, attention_mask (batch, tokens), position_ids (batch or 1, tokens), each whole
        and the same on every rank. The result is a scalar in float32 or wider.
        Gradients: the loss of all ranks is the sum of what they backpropagate: each gets the part of the weights'
        gradients, learned sinks included, that comes from its own tokens. `sum_gradients` adds these up.
        Traffic: 64 bytes to each other rank, each layer's attention, and one number to each other rank.
        Raises: ValueError for shapes that do not fit, numbers that are no tokens, no labelled token, or a sequence
        longer than `positions`; Unsupported for holes in attention_mask, for random numbers drawn outside of
        attention in training mode, and where a strategy can't do it; Mismatch where the ranks' batches differ.
        """
        sequences = Sequences(input_ids, labels, attention_mask, position_ids)
        with mistakes_reach_all(self.comm):
            batch, divisor = self._prepare(sequences, num_items_in_batch, seed)
        call = {"call": "hf.training.loss", "mode": self.model.training, "divisor": divisor, "seed": seed}
        agree(self.comm, call | sequences.digests())
        logits = self._logits(batch, input_ids, position_ids)
        targets = sequences.targets()
        targets = batch.local(targets) if len(batch.rows) else labels.new_full(logits.shape[:2], IGNORE_INDEX)
        logits = logits.to(state_dtype(logits.dtype)).flatten(0, 1)
        total = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        return sum_over_ranks(total / divisor, batch.comm, as_collective("auto"))

    @outside_graphs
    def sum_gradients(self) -> None:
        """Replace each parameter's gradient by its sum over the ranks: that of the whole loss, on every rank.

        Call it once before each optimizer step, after as many backward passes as the step is made of. Gradients,
        and so weights, have the same bits on every rank; clip them afterwards.

        Traffic, Numerics, Raises: see `shardsum.hf.gradients.sum_gradients`.
        """
        sum_gradients(self.comm, self.model.parameters())

    @contextlib.contextmanager
    def run_batch(self, batch: Batch) -> Iterator[None]:
        """Run the model on this rank's tokens of `batch` inside the block."""
        self.batch = batch
        try:
            yield
        finally:
            self.batch = None

    @torch.no_grad()
    def find_out_about_documents(self) -> None:
        """Run the model on two tokens that are a document each: its masks say whether it keeps them apart."""
        self._separations, zeros = [], torch.zeros(1, 2, dtype=torch.int64, device=self.model.device)
        try:
            with self.run_batch(_batch_on_one_rank(self.execution, 2)):
                self.model(input_ids=zeros, position_ids=zeros, use_cache=False)
            self.separates_documents = all(self._separations)
        finally:
            self._separations = None

    def _prepare(
        self, sequences: Sequences, num_items_in_batch: int | None, seed: int | None
    ) -> tuple[Batch, int]:
        """Return the batch, and what the sum of its token losses is divided by."""
        _check_usable(self, sequences)
        sequences.check(self.model, self.positions)
        documents = sequences.position_ids if self.separates_documents else None
        length = sequences.input_ids.shape[1]
        batch = Batch.of(self.comm, self.execution, length, sequences.attention_mask, documents, seed)
        return batch, sequences.divisor(num_items_in_batch)

    def _logits(self, batch: Batch, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        """Compute the logits of this rank's tokens: (batch, tokens, vocabulary)."""
        own = batch.local(input_ids)
        if position_ids is None:
            position_ids = torch.arange(batch.length, device=input_ids.device)[None]
        # With a mask of ones, Transformers does not take jumps from one chunk to the next for new documents.
        inputs = {"attention_mask": torch.ones_like(own), "use_cache": False}
        inputs = {name: value for name, value in inputs.items() if has_argument(self.model, name)}
        mode = NoRandomNumbers(self.model) if self.model.training else contextlib.nullcontext()
        with self.run_batch(batch), mode:
            logits: Tensor = self.model(input_ids=own, position_ids=batch.local(position_ids), **inputs).logits
        return logits

    def attend(self, call: AttentionCall, options: dict[str, Any]) -> Tensor:
        """Attend over the keys of the batch that the mask belongs to."""
        assert isinstance(call.mask, BatchMask)
        assert call.mask.batch is not None
        with self.mistakes():
            self.check_tokens(call.module, call.q, call.k, call.v, max(len(call.mask.batch.rows), 1))
        scores = {"softcap": options.get("softcap"), "sinks": options.get("s_aux")}
        return call.mask.batch.attend(call, options["dropout"], **scores)

    def mask(
        self,
        batch_size: int,
        mask_function: MaskFunction,
        device: torch.device | str = "cpu",
        **_: object,
    ) -> BatchMask:
        """Make one mask for all layers of a kind, over the whole sequence; its arguments are Transformers'.

        Raises: ValueError where the model is called by itself.
        """
        if self.probe is None and self.batch is None:
            raise ValueError("the model is bound to all ranks: call loss() of `training(...)`, not the model.")
        if self._separations is not None:
            self._separations.append(_separates_two(mask_function, batch_size, device))
            return BatchMask(batch=self.batch)
        length = min(self.positions, MASK_POSITIONS) if self.batch is None else self.batch.length
        found = interval_mask(mask_function, None, batch_size, 0, length, torch.device(device))
        return BatchMask(found.left, None, found.problem, self.batch)


def _separates_two(mask_function: MaskFunction, batch_size: int, device: torch.device | str) -> bool:
    """Whether the second of two tokens does not see the first. Raises: Unsupported for a mask that is no rule."""
    second, first = (torch.tensor([token], device=device) for token in (1, 0))
    try:
        return not evaluate(mask_function, batch_size, second, first).any()
    except NO_RULE as error:
        raise Unsupported(why_no_rule(error)) from error


def _check_usable(bound: Training, sequences: Sequences) -> None:
    if not bound.open:
        raise ValueError("this training session is closed. Use it inside of `with training(...)`.")
    check_no_hooks(bound.model)
    if bound.model.loss_function is not bound.own_loss:
        raise ValueError("model.loss_function was changed in the session, which computes the one that it had.")
    if sequences.position_ids is None and not bound.counts_from_zero:
        raise Unsupported(
            f"{type(bound.model).__name__} counts positions in a way of its own where none are given (on from its "
            "padding token, say), which a rank's share of the tokens does not show: pass position_ids to loss()."
        )


def _describe(bound: Training) -> dict[str, Any]:
    """Describe what has to be the same on every rank."""
    strategy = as_strategy(bound.execution.strategy)
    return {
        "layout": bound.layout.describe(),
        "strategy": "auto" if strategy is None else strategy.name,
        "reproducible": bound.execution.reproducible,
        **describe_model(bound.model, bound.comm.size),
    }


def _batch_on_one_rank(execution: Execution, length: int) -> Batch:
    """Make a batch for checking the model, by a strategy and layout that fit any model."""
    own = Execution(Layout("contiguous"), "auto", execution.kernel, execution.reproducible)
    return Batch.of(connect("single"), own, length)


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode inside the block."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode

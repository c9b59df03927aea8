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
from ..comm import Communicator, agree, as_communicator, connect
from ..digests import digest_indices
from ..errors import Unsupported
from ..kernels import Kernel
from ..layouts import Layout, as_layout
from ..problem import state_dtype
from ..sharding import sum_over_ranks
from ..strategies import Strategy, as_strategy
from .batch import IGNORED, Batch, BatchMask, Ways, shifted
from .binding import longest, registered
from .gradients import sum_gradients, weights_digest
from .masks import MaskFunction, checked_mask, evaluate, interval_mask
from .probe import TOKENS, probe_training
from .randomness import NoRandomNumbers
from .session import MASK_POSITIONS, Bound, takes


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
    """A `Training` in which the model runs on sequences whose tokens are spread over the ranks.

    Every rank holds the whole model, with the same weights, and an optimizer of its own. On entry a few forward
    passes over seven tokens find out whether tokens meet in softmax attention only; see `shardsum.hf.probe`.
    `comm`, `layout`, `strategy`, `kernel` are those of `shardsum.attention`; `positions` is the longest sequence
    to expect, by default the model's own limit. A model may be in training mode or not. Backward passes belong
    inside the block. Everything is undone on exit, after an exception too; weights and gradients stay.

    `reproducible`: ranks hold whole segments of 256 tokens; attention, and the gradients of its queries, keys and
    values, have the same bits for the same inputs on any number of ranks. Those of the model's other layers and of
    the weights' gradients, which are sums over the ranks' tokens, are not promised.

    Refused: models in which tokens meet elsewhere too (convolutions, state spaces); masks that are not causal
    with at most a window; a router's auxiliary loss (`output_router_logits`), which is a product of averages over
    all tokens and not a sum over tokens; dropout outside of attention, which would be drawn for each rank apart.

    Traffic: 64 bytes to each other rank.
    Raises: Unsupported, naming the module or option that stands in the way; ValueError for a model that is in a
    session already, or more positions than it has; Mismatch where the ranks' models or arguments differ.
    """
    comm = as_communicator(comm)
    ways, problem, call = Ways(comm, as_layout(layout), strategy, kernel, reproducible), None, {}
    bound = Training(model, ways, 0)
    with contextlib.ExitStack() as undo:
        try:
            _check_losses(model)
            bound.positions = longest(model, positions)
            name = undo.enter_context(registered(bound))
            with _evaluating(model):
                probe_training(bound, name, bound.running(Batch.of(_alone(ways), TOKENS)))
                bound.find_out_about_documents()
            call = _description(bound)
        except Exception as error:  # noqa: BLE001 (raised again here, once the others know)
            problem = error
        agree(comm, {"call": "hf.training", **call}, error=problem)
        yield bound


class Training(Bound):
    """One model bound to one communicator for training; `training` makes it.

    - `loss(input_ids, labels)`: the loss of whole sequences, the same number on every rank.
    - `sum_gradients()`: the gradients of this loss, once it has been backpropagated.
    """

    def __init__(self, model: PreTrainedModel, ways: Ways, positions: int) -> None:
        super().__init__(model, ways.comm, ways.layout, positions)
        self.ways = ways
        self.batch: Batch | None = None
        # Whether the model's masks keep packed documents apart, and the answers of each while that is found out.
        self.documents_apart = True
        self._apart: list[bool] | None = None

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """The mean cross-entropy of the labelled tokens of all ranks: what the model's own loss is in one process.

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
        problem, batch, divisor = None, None, 0
        try:
            self._check(input_ids, labels, attention_mask, position_ids)
            documents = position_ids if self.documents_apart else None
            batch = Batch.of(self.ways, input_ids.shape[1], attention_mask, documents, seed)
            divisor = _divisor(labels, num_items_in_batch)
        except Exception as error:  # noqa: BLE001 (raised again here, once the others know)
            problem = error
        call: dict[str, Any] = {
            "call": "hf.training.loss",
            "mode": self.model.training,
            "divisor": divisor,
            "seed": seed,
        }
        given: dict[str, Tensor | None] = {"input_ids": input_ids, "labels": labels}
        given |= {"attention_mask": attention_mask, "position_ids": position_ids}
        digests = {} if problem else {name: digest_indices(x) for name, x in given.items()}
        agree(self.comm, call | digests, error=problem)
        assert batch is not None, "agree() has raised what is wrong"
        logits = self._logits(batch, input_ids, position_ids)
        targets = batch.own(shifted(labels)) if len(batch.rows) else labels.new_full(logits.shape[:2], IGNORED)
        logits = logits.to(state_dtype(logits.dtype)).flatten(0, 1)
        total = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return sum_over_ranks(total / divisor, self.comm, as_collective("auto"))

    def sum_gradients(self) -> None:
        """Replace each parameter's gradient by its sum over the ranks: that of the whole loss, on every rank.

        Call it once before each optimizer step, after as many backward passes as the step is made of. Gradients,
        and so weights, have the same bits on every rank; clip them afterwards.

        Traffic, Numerics, Raises: see `shardsum.hf.gradients.sum_gradients`.
        """
        sum_gradients(self.comm, self.model.parameters())

    @contextlib.contextmanager
    def running(self, batch: Batch) -> Iterator[None]:
        """Inside the block the model runs on this rank's tokens of `batch`."""
        self.batch = batch
        try:
            yield
        finally:
            self.batch = None

    @torch.no_grad()
    def find_out_about_documents(self) -> None:
        """Run the model on two tokens that are a document each: its masks say whether it keeps them apart."""
        self._apart, zeros = [], torch.zeros(1, 2, dtype=torch.int64, device=self.model.device)
        try:
            with self.running(Batch.of(_alone(self.ways), 2)):
                self.model(input_ids=zeros, position_ids=zeros, use_cache=False)
            self.documents_apart = all(self._apart)
        finally:
            self._apart = None

    def _check(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> None:
        """Raises: ValueError where a tensor is not what `loss` asks for."""
        if not self.open:
            raise ValueError("this training session is closed. Use it inside of `with training(...)`.")
        for name, given in (("input_ids", input_ids), ("labels", labels)):
            if not isinstance(given, Tensor):
                raise ValueError(f"{name} must be a torch tensor: got {type(given).__name__}.")
        if input_ids.ndim != 2 or not input_ids.numel():
            raise ValueError(f"input_ids must be (batch, tokens), one at least: got {tuple(input_ids.shape)}.")
        whole = tuple(input_ids.shape)
        for name, x in (("labels", labels), ("attention_mask", attention_mask)):
            if x is not None and tuple(x.shape) != whole:
                raise ValueError(f"{name} must be of input_ids' shape {whole}: got {tuple(x.shape)}.")
        if position_ids is not None and tuple(position_ids.shape) not in (whole, (1, whole[1])):
            raise ValueError(f"position_ids must be {whole} or (1, {whole[1]}): got {tuple(position_ids.shape)}.")
        words = self.model.config.get_text_config(decoder=True).vocab_size
        for name, x in (("input_ids", input_ids), ("labels", labels.masked_fill(labels == IGNORED, 0))):
            if x.is_floating_point() or int(x.min()) < 0 or int(x.max()) >= words:
                raise ValueError(f"{name} must be whole numbers from 0 to {words - 1}, labels also {IGNORED}.")
        length = whole[1] if position_ids is None else int(position_ids.max()) + 1
        if length > self.positions:
            raise ValueError(
                f"{type(self.model).__name__} was checked for {self.positions} positions: got {length}. "
                "Shorten the sequence, or say positions=... to training()."
            )

    def _logits(self, batch: Batch, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        """The logits of this rank's tokens: (batch, tokens, vocabulary)."""
        own = batch.own(input_ids)
        if position_ids is None:
            position_ids = torch.arange(batch.length, device=input_ids.device)[None]
        # With a mask of ones, Transformers does not take jumps from one chunk to the next for new documents.
        inputs = {"attention_mask": torch.ones_like(own), "use_cache": False}
        inputs = {name: value for name, value in inputs.items() if takes(self.model, name)}
        mode = NoRandomNumbers(self.model) if self.model.training else contextlib.nullcontext()
        with self.running(batch), mode:
            logits: Tensor = self.model(input_ids=own, position_ids=batch.own(position_ids), **inputs).logits
        return logits

    # What Transformers calls, under the registered name.

    def attention(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: object,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **options: object,
    ) -> tuple[Tensor, None]:
        """The attention function: (out in (batch, length, heads, v_dim), no weights)."""
        mask = checked_mask(self.describe(module), module, attention_mask, scaling, 0.0, options)
        if self.probe is not None:
            out = self.probe.attend(module, q, k, v, mask, scaling)
        else:
            assert isinstance(mask, BatchMask)
            assert mask.batch is not None
            layer: Any = getattr(module, "layer_idx", 0)
            out = mask.batch.attend(layer, q, k, v, mask.left, scaling, dropout, softcap=softcap, sinks=s_aux)
        return out.transpose(1, 2).contiguous(), None

    def mask(
        self,
        batch_size: int,
        mask_function: MaskFunction,
        device: torch.device | str = "cpu",
        **_: object,
    ) -> BatchMask:
        """The mask function: one mask for all layers of a kind, over the whole sequence.

        Raises: ValueError where the model is called by itself.
        """
        if self.probe is None and self.batch is None:
            raise ValueError("the model is bound to all ranks: call loss() of `training(...)`, not the model.")
        if self._apart is not None:
            second, first = (torch.tensor([token], device=device) for token in (1, 0))
            self._apart.append(not evaluate(mask_function, batch_size, second, first).any())
            return BatchMask(batch=self.batch)
        length = min(self.positions, MASK_POSITIONS) if self.batch is None else self.batch.length
        found = interval_mask(mask_function, None, batch_size, 0, length, torch.device(device))
        return BatchMask(found.left, None, found.problem, self.batch)


def _divisor(labels: Tensor, num_items_in_batch: int | None) -> int:
    """What the sum of the token losses is divided by. Raises: ValueError where no token is labelled."""
    labelled = int((shifted(labels) != IGNORED).sum())
    divisor = labelled if num_items_in_batch is None else int(num_items_in_batch)
    if divisor > 0:
        return divisor
    raise ValueError(
        f"{labelled} of {labels.numel()} tokens are labelled (the first of a row never counts) and "
        f"num_items_in_batch is {num_items_in_batch}: there is no mean."
    )


def _check_losses(model: PreTrainedModel) -> None:
    """Raises: Unsupported for a router's auxiliary loss."""
    if getattr(model.config.get_text_config(decoder=True), "output_router_logits", False):
        raise Unsupported(
            f"{type(model).__name__} has output_router_logits=True: a router's auxiliary loss is a product of "
            "averages over all tokens, not a sum over tokens. Set config.output_router_logits = False."
        )


def _description(bound: Training) -> dict[str, Any]:
    """What has to be the same on every rank."""
    model, strategy = bound.model, as_strategy(bound.ways.strategy)
    return {
        "model": type(model).__name__,
        "layout": bound.layout.describe(),
        "strategy": "auto" if strategy is None else strategy.name,
        "reproducible": bound.ways.reproducible,
        "weights": weights_digest(model) if bound.comm.size > 1 else None,
    }


def _alone(ways: Ways) -> Ways:
    """The same on one rank, where the model is checked: by a strategy and layout that fit any model."""
    return Ways(connect("single"), Layout("contiguous"), "auto", ways.kernel, ways.reproducible)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode inside the block."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode

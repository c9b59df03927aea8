"""Whole sequences and their labels, checked before ranks cut them up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..digests import digest_indices

IGNORE_INDEX = -100  # Transformers' label of a token that is not to be predicted


@dataclass(frozen=True, eq=False)
class Sequences:
    """What a model is trained on, the same on every rank.

    Shapes: input_ids, labels, attention_mask (batch, tokens); position_ids (batch or 1, tokens).
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None

    def check(self, model: PreTrainedModel, positions: int) -> None:
        """Raises: ValueError where a tensor has a wrong shape or value, or there are more than `positions`."""
        for name, tensor in (("input_ids", self.input_ids), ("labels", self.labels)):
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{name} must be a torch tensor: got {type(tensor).__name__}.")
        self._check_shapes()
        if self.labels.dtype != torch.int64:
            raise ValueError(f"labels must be int64, as the model's own loss takes them: got {self.labels.dtype}.")
        words = model.config.get_text_config(decoder=True).vocab_size
        labels = self.labels.masked_fill(self.labels == IGNORE_INDEX, 0)
        for name, x in (("input_ids", self.input_ids), ("labels", labels)):
            if x.is_floating_point() or int(x.min()) < 0 or int(x.max()) >= words:
                raise ValueError(
                    f"{name} must be whole numbers from 0 to {words - 1}, labels also {IGNORE_INDEX}."
                )
        length = self.input_ids.shape[1] if self.position_ids is None else int(self.position_ids.max()) + 1
        if length > positions:
            raise ValueError(
                f"{type(model).__name__} was checked for {positions} positions: got {length}. "
                "Shorten the sequence, or say positions=... to training()."
            )

    def _check_shapes(self) -> None:
        whole = tuple(self.input_ids.shape)
        if len(whole) != 2 or not self.input_ids.numel():
            raise ValueError(f"input_ids must be (batch, tokens), one at least: got {whole}.")
        for name, x in (("labels", self.labels), ("attention_mask", self.attention_mask)):
            if x is not None and tuple(x.shape) != whole:
                raise ValueError(f"{name} must be of input_ids' shape {whole}: got {tuple(x.shape)}.")
        if self.position_ids is not None and tuple(self.position_ids.shape) not in (whole, (1, whole[1])):
            raise ValueError(
                f"position_ids must be {whole} or (1, {whole[1]}): got {tuple(self.position_ids.shape)}."
            )

    def digests(self) -> dict[str, str | None]:
        """Describe each tensor, for the agreement."""
        return {name: digest_indices(tensor) for name, tensor in vars(self).items()}

    def targets(self) -> Tensor:
        """Return at each token the label of the next: the shift comes before tokens are dealt out to ranks."""
        return F.pad(self.labels[:, 1:], (0, 1), value=IGNORE_INDEX)

    def divisor(self, num_items_in_batch: int | None) -> int:
        """Return what the sum of the token losses is divided by.

        Raises: ValueError where no token is labelled.
        """
        labelled = int((self.targets() != IGNORE_INDEX).sum())
        divisor = labelled if num_items_in_batch is None else int(num_items_in_batch)
        if divisor > 0:
            return divisor
        raise ValueError(
            f"{labelled} of {self.labels.numel()} tokens are labelled (the first of a row never counts) and "
            f"num_items_in_batch is {num_items_in_batch}: there is no mean."
        )

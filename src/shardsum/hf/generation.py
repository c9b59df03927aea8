"""Text generation over sharded keys and values: the prompt in shards, then token by token, ranks in step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode

from ..comm import Communicator, agree, as_communicator, mistakes_reach_all
from ..compiler import outside_graphs
from ..errors import Unsupported
from ..layouts import Layout
from .binding import sharded
from .cache import ShardedCache
from .masks import Padding
from .requests import (
    check_request,
    describe_request,
    inputs_of_tokens,
    requested_length,
    take_stopping_criteria,
)
from .session import Session

_SAMPLING = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_BEAMS = (GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)


@outside_graphs
def generate(
    model: PreTrainedModel | Session,
    input_ids: Tensor | None = None,
    comm: Communicator | None = None,
    attention_mask: Tensor | None = None,
    layout: str | Layout = "zigzag",
    reproducible: bool = False,
    **arguments: Any,
) -> Any:
    """Generate as `model.generate` does, the same on every rank, with the KV cache spread over the ranks.

    `arguments` are those of `model.generate`. All but the last prompt token are prefilled in shards, each rank
    running the model on its own; then all ranks decode together. Rank 0 chooses the tokens and decides when to
    stop, so ranks stay in step whatever their random generators say; a `streamer` is heard on rank 0.
    `prefill_chunk_size` prefills that many tokens (of all ranks together) at a time. An open session may take the
    place of the model; its `comm` and `layout` count, and `past_key_values` may be a cache of it that holds the
    first part.

    `reproducible`: logits have the same bits on any number of ranks, over any transport, under any layout of whole
    segments, with any number of threads and beside any batch of as many positions. Tokens are run 256 at a time,
    each time by one thread (see `shardsum.hf.tiles`). Of an open session this is decided when it is opened.

    Shapes: input_ids (batch, tokens), the same on every rank; attention_mask alike, with padding on the left.
    Raises: Unsupported for models, masks and ways of decoding that can't be sharded; ValueError where prompt
    and new tokens exceed the model's positions; Mismatch where the ranks' prompts or settings differ.
    """
    if isinstance(model, Session):
        with mistakes_reach_all(model.comm):
            if reproducible and not model.reproducible:
                raise ValueError("this session is not reproducible: open it with sharded(..., reproducible=True).")
            tokens = check_request(model.model, input_ids, attention_mask, arguments)
        return _generate(model, tokens, attention_mask=attention_mask, **arguments)
    comm = as_communicator(comm)
    with mistakes_reach_all(comm):
        tokens = check_request(model, input_ids, attention_mask, arguments)
        wanted = requested_length(model, tokens, attention_mask, arguments)
    with sharded(model, comm, layout, positions=wanted, reproducible=reproducible) as session:
        return _generate(session, tokens, attention_mask=attention_mask, **arguments)


def _generate(session: Session, input_ids: Tensor, **arguments: Any) -> Any:
    loop = _Loop(session)
    model: Any = session.model  # its `generate` comes from a mixin that torch's Module hides from type checkers
    with mistakes_reach_all(session.comm):
        arguments = _arrange(loop, arguments)
    with session.shared_call.over(arguments["past_key_values"], session.comm):
        return model.generate(input_ids, **arguments)


def _arrange(loop: _Loop, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments for `model.generate` that make it decode by `loop`."""
    session = loop.session
    cache = arguments.pop("past_key_values", None)
    cache = session.new_cache() if cache is None else cache
    if not (isinstance(cache, ShardedCache) and cache.owner is session):
        raise Unsupported(f"past_key_values must be this session's new_cache(): got {type(cache).__name__}.")
    session.check(cache)
    # Transformers hands neither the streamer nor the tokenizer on to a decoding loop that is passed in.
    criteria, loop.stops = take_stopping_criteria(arguments)
    streamer = arguments.pop("streamer", None)
    loop.streamer = streamer if session.comm.rank == 0 else None
    own = {"custom_generate": loop.decode, "stopping_criteria": criteria, "streamer": loop.streamer}
    return {**arguments, **own, "past_key_values": cache}


class _Loop:
    """Transformers' decoding loop between a sharded prefill and ranks kept in step.

    It runs where `model.generate` would start decoding, when mask, positions and beams are laid out already.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.streamer: Any = None
        self.stops: dict[str, Any] = {}  # what stops generation, as far as all ranks have to mean the same

    def decode(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        if (problem := self._problem(generation_config, input_ids, model_kwargs)) is not None:
            raise problem
        seen = model_kwargs["past_key_values"].get_seq_length()
        inputs = inputs_of_tokens(model, input_ids, seen, model_kwargs)
        described = describe_request(input_ids, generation_config, model_kwargs, inputs, [*logits_processor])
        agree(self.session.comm, {"call": "hf.generate", **described, **self.stops})
        self.session.renew()
        beams = generation_config.get_generation_mode() in _BEAMS
        self._prefill(input_ids, generation_config, model_kwargs, inputs)
        stopping_criteria = _RankZeroCriteria(stopping_criteria, self.session)
        if beams:
            logits_processor.append(_RankZeroScores(self.session))
        else:
            model_kwargs["streamer"] = self.streamer
        if self.session.comm.rank:
            # Only rank 0's draws count; ranks that are threads would draw from the same generator in between.
            generation_config.do_sample = False
        return getattr(type(model), "_beam_search" if beams else "_sample")(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            **model_kwargs,
        )

    def _prefill(
        self,
        input_ids: Tensor,
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
        inputs: dict[str, Tensor],
    ) -> None:
        """Put all tokens but the last into the cache, once for each prompt, then one copy for each beam."""
        cache, mask = model_kwargs["past_key_values"], model_kwargs.get("attention_mask")
        copies = max(config.num_beams, config.num_return_sequences)
        start, stop = cache.get_seq_length(), input_ids.shape[1] - 1
        chunk = config.prefill_chunk_size or max(stop - start, 1)
        config.prefill_chunk_size = None
        # Inputs are expanded with the prompts unless they have one row for all.
        inputs = {name: x if x.shape[-2] == 1 else x[..., ::copies, :] for name, x in inputs.items()}
        for begin in range(start, stop, chunk):
            end = min(begin + chunk, stop)
            self.session.prefill(
                cache,
                input_ids[::copies, begin:end],
                None if mask is None else mask[::copies, :end],
                **{name: x[..., begin - start : end - start] for name, x in inputs.items()},
            )
        cache.batch_repeat_interleave(copies)

    def _problem(
        self, config: GenerationConfig, input_ids: Tensor, model_kwargs: dict[str, Any]
    ) -> ValueError | None:
        """Return what is wrong with the call, if anything, as the exception to raise."""
        return self._problem_with_settings(config) or self._problem_with_prompt(config, input_ids, model_kwargs)

    def _problem_with_settings(self, config: GenerationConfig) -> ValueError | None:
        mode = config.get_generation_mode()
        if mode not in (*_SAMPLING, *_BEAMS):
            return Unsupported(f"{mode.value} is not supported over sharded keys. Use sampling or beam search.")
        if mode is GenerationMode.BEAM_SAMPLE and self.session.comm.size > 1:
            return Unsupported("beam search with do_sample=True can't be kept in step. Use one of the two.")
        if config.output_attentions or config.output_hidden_states:
            return Unsupported(
                "output_attentions and output_hidden_states: those of the prompt are never whole on one rank."
            )
        if self.streamer is not None and mode in _BEAMS:
            return ValueError("a streamer can't follow beam search, whose tokens may change until the end.")
        if not config.use_cache:
            return Unsupported("use_cache=False: the sharded cache is where the ranks meet.")
        return None

    def _problem_with_prompt(
        self, config: GenerationConfig, input_ids: Tensor, model_kwargs: dict[str, Any]
    ) -> ValueError | None:
        seen, length = model_kwargs["past_key_values"].get_seq_length(), input_ids.shape[1]
        if seen >= length:
            return ValueError(
                f"the cache holds {seen} tokens already, and input_ids, which starts with these, has {length}: "
                "at least one more is needed."
            )
        if seen and max(config.num_beams, config.num_return_sequences) > 1:
            return Unsupported("several sequences from one prompt need an empty cache.")
        padding = Padding.of(model_kwargs.get("attention_mask"), length)
        if (why_not := padding.why_not_left(length)) is not None:
            return Unsupported(why_not)
        padded = 0 if padding.start is None else int(padding.start.min())
        if config.max_length - padded > self.session.positions:
            return ValueError(
                f"{type(self.session.model).__name__} was checked for {self.session.positions} positions: "
                f"got a prompt of {length - padded} tokens and up to {config.max_length - length} new ones. "
                "Ask for fewer."
            )
        return None


class _RankZeroCriteria(StoppingCriteriaList):
    """Rank 0's new tokens and its decision to stop, on every rank; the other ranks' criteria are not asked.

    `_sample` calls the criteria with the very tensor that it goes on with, so the tokens are written into it.
    Traffic: 64 bytes to each other rank; two int64 for each row, from rank 0 to each other rank.
    """

    def __init__(self, criteria: StoppingCriteriaList, session: Session) -> None:
        super().__init__(criteria)
        self.session = session

    def __call__(self, input_ids: Tensor, scores: Any, **arguments: Any) -> Tensor:
        decision = torch.empty(0)
        if self.session.comm.rank == 0:
            stop: Tensor = super().__call__(input_ids, scores, **arguments)
            decision = torch.stack([input_ids[:, -1], stop.to(input_ids.dtype)])
        decision = _broadcast_from_rank_zero(self.session, decision, (2, len(input_ids)), input_ids)
        input_ids[:, -1] = decision[0]
        return decision[1].bool()


class _RankZeroScores(LogitsProcessor):
    """Rank 0's scores on every rank: equal scores give equal beams. Traffic: as above, but the scores."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return _broadcast_from_rank_zero(self.session, scores, scores.shape, scores)


def _broadcast_from_rank_zero(session: Session, part: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return rank 0's `part`, of that shape, with dtype and device of `like`; other ranks' is not looked at.

    Raises: Mismatch where a rank has failed since the last agreement, or is at another step.
    """
    comm = session.comm
    agree(comm, {"call": "hf.generate: what rank 0 chooses", "shape": list(shape), "dtype": str(like.dtype)})
    mine = part.to(like.dtype) if comm.rank == 0 else like.new_empty((0,))
    chosen = comm.all_gather(mine, [tuple(shape), *[(0,)] * (comm.size - 1)])[0]
    session.renew()
    return chosen

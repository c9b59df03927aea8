"""Whether a model's tokens meet in plain softmax attention and nowhere else, found out by running it.

A list of supported architectures would always be out of date, and wrong for a variant. Instead, four questions
are put to the model itself, in a few forward passes over seven tokens, and the first two again over as many as
cross every stride, block, chunk and rate of up to 512 tokens that its configuration and modules name (lengths.py):

1. With attention replaced by one that mixes nothing (each token receives its own value), does changing some tokens
   change anything at the others? Then something else mixes tokens: a convolution, a state space, a recurrence.
2. Run on some of its tokens only, with their positions, does the model compute the same at these tokens? If not,
   it does not place tokens by `position_ids` alone, and a shard would come out differently.
3. Does the model over our attention give the same logits as over its own? If not, its scores are not those we
   were told of.
4. Does every layer attend once, with a causal mask, windowed or not, up to the longest position, and to generate
   over the keys and values that it put into the cache?

The first module at which a comparison fails is named.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..comm import connect
from ..errors import RankLost, Unsupported
from .bound_model import AttentionCall, BoundModel, has_argument
from .cache import CacheShape, LocalTokens, ShardedCache
from .lengths import half_of, longest_stretch
from .loading import silence
from .recording import Outputs, first_difference, module_of, record_outputs, select_rows
from .session import Session

TOKENS, CHANGED, SHARD = 7, [1], [0, 2, 3]


def probe(session: Session, name: str) -> CacheShape:
    """Put the questions to a model, and return the shape of its cache.

    The session is registered as `name`, which the model uses afterwards.

    Raises: Unsupported, naming the module or option, for a model that can't be sharded without changing its
    results; ValueError for a model in training mode.
    """
    try:
        with _questions(session, name) as (own, probing):
            whole = _check_mixing(session, TOKENS)
            shape = probing.shape(session)
            _check_shard(session, whole, SHARD, past_key_values=_EchoCache(session, shape))
            _check_longer(session)
            session.probe = None
            _check_scores(session, shape, probing.attention_outputs(own))
    finally:
        session.updated.clear()
    return shape


def probe_training(session: BoundModel, name: str, attending: contextlib.AbstractContextManager[object]) -> None:
    """Ask whether the model can be trained in shards: the same questions, without a cache.

    Inside `attending` the session's attention runs over TOKENS tokens that all lie on this rank.
    Raises: as `probe`.
    """
    with _questions(session, name) as (own, probing):
        whole = _check_mixing(session, TOKENS)
        probing.check_layers(session)
        _check_shard(session, whole, SHARD)
        _check_longer(session)
        session.probe = None
        with attending:
            ours = _run(session, _tokens(session.model, TOKENS), **_whole(TOKENS))
        _refuse_other_scores(first_difference(session.model, probing.attention_outputs(own), ours))


@contextlib.contextmanager
def _questions(session: BoundModel, name: str) -> Iterator[tuple[Outputs, _Probe]]:
    """Return what the model computes with its own attention, and what stands in for that inside of the block."""
    model = session.model
    _check_kind(model)
    try:
        with torch.no_grad():
            own = _run(session, _tokens(model, TOKENS), **_whole(TOKENS))
            _check_finite(session, own)
            session.counts_from_zero = first_difference(model, own, _run(session, _tokens(model, TOKENS))) is None
            with silence():  # it warns where a model's attention can't be chosen; the probe finds out
                model.set_attn_implementation(name)
            session.probe = probing = _Probe(session)
            yield own, probing
    except RankLost:
        raise
    except (RuntimeError, AttributeError, TypeError, LookupError, ArithmeticError, AssertionError) as error:
        where = module_of(session, error)
        raise Unsupported(
            f"{where or type(model).__name__} can't run on shards of its tokens: {type(error).__name__}: {error}"
        ) from error
    finally:
        session.probe = None


def _check_kind(model: PreTrainedModel) -> None:
    kind = type(model).__name__
    if model.config.is_encoder_decoder:
        raise Unsupported(f"{kind} is an encoder-decoder model; only decoder-only language models are supported.")
    if not model.can_generate():
        raise Unsupported(f"{kind} does not generate text; a causal language model is needed.")
    if model.training:
        raise ValueError(f"{kind} is in training mode: call model.eval() first.")


def _check_finite(session: BoundModel, own: Outputs) -> None:
    """Raises: ValueError, naming the first module whose outputs aren't numbers, by the model's own attention."""
    for name, (*_, result) in own.items():
        if not bool(result.isfinite().all()):
            raise ValueError(
                f"{name} returns NaN or Inf for ordinary tokens, by its own attention: the model's weights are "
                f"broken, or too large for {session.model.dtype}."
            )


def _check_mixing(session: BoundModel, length: int) -> Outputs:
    """Put question 1, and return what the model computes where attention mixes nothing."""
    model, tokens = session.model, _tokens(session.model, length).repeat(2, 1)
    changed = CHANGED if length == TOKENS else half_of(length)
    tokens[1, changed] = tokens[0].roll(1)[changed]
    inputs = {
        "attention_mask": torch.ones_like(tokens),
        "position_ids": _far_positions(session, length).expand(2, -1),
    }
    whole = _run(session, tokens, **inputs)
    others = [t for t in range(length) if t not in {*changed}]
    mixer = first_difference(model, select_rows(whole, 0, others), select_rows(whole, 1, others))
    if mixer is not None:
        raise Unsupported(
            f"{mixer} mixes tokens outside of Transformers' AttentionInterface (a convolution, a recurrence, a "
            "state space, or attention of its own); only models whose tokens meet nowhere else can be sharded."
        )
    return whole


def _check_longer(session: BoundModel) -> None:
    """Put the first two questions again over tokens that cross all that the model does by several at a time."""
    length = longest_stretch(session.model, session.positions)
    if length > TOKENS:
        _check_shard(session, _check_mixing(session, length), half_of(length))


def _check_shard(session: BoundModel, whole: Outputs, shard: list[int], **cache: ShardedCache) -> None:
    """Put questions 2 and 4 by some of the tokens, going into the cache if there is one."""
    length = next(iter(whole.values()))[-1].shape[1]
    model, tokens = session.model, _tokens(session.model, length)[:, shard]
    for argument in ("position_ids", *cache):
        if not has_argument(model, argument):
            raise Unsupported(
                f"{type(model).__name__} takes no {argument}, so a rank can't run it on its share of the tokens."
            )
    seen = torch.ones(1, length if cache else len(shard), dtype=torch.int64)
    if cache:
        seen[0, 0] = 0
    for each in cache.values():
        each.local_tokens = LocalTokens(session.layout, local=len(shard), total=length)
    inputs = {"attention_mask": seen, "position_ids": _far_positions(session, length)[:, shard]}
    part = _run(session, tokens, use_cache=bool(cache), **inputs, **cache)
    shard_only = first_difference(model, select_rows(whole, 0, shard), select_rows(part, 0, range(len(shard))))
    if shard_only is not None:
        raise Unsupported(
            f"{shard_only} computes something else for a token when others are on another rank (its rotary "
            f"embedding or positions depend on the whole sequence, here of up to {session.positions} tokens)."
        )


def _check_scores(session: Session, shape: CacheShape, own: Outputs) -> None:
    """Put question 3: the last token is decoded over our cache on one rank, the others are prefilled."""
    model, tokens = session.model, _tokens(session.model, TOKENS)
    inputs = _whole(TOKENS - 1)
    last = torch.full_like(tokens[:, -1:], TOKENS - 1)
    with session.over(connect("single")):
        cache = ShardedCache(session, session.comm, shape)
        _run(session, tokens[:, :-1], past_key_values=cache, use_cache=True, **inputs)
        ours = _run(session, tokens[:, -1:], past_key_values=cache, position_ids=last, use_cache=True)
    _refuse_other_scores(first_difference(model, select_rows(own, 0, [TOKENS - 1]), select_rows(ours, 0, [0])))


def _refuse_other_scores(wrong: str | None) -> None:
    if wrong is not None:
        raise Unsupported(
            f"{wrong} computes something else than softmax(scale * q.k) v under a causal mask (a bias, sink, "
            "cap or penalty on its scores), which is not supported yet."
        )


class _Probe:
    """Stands in for attention: mixes nothing, and writes down what it was given."""

    def __init__(self, session: BoundModel) -> None:
        self.session = session
        self.shapes: dict[object, CacheShape] = {}
        self.attending: set[str] = set()
        self.seen: Outputs = {}
        self.echo: _EchoCache | None = None

    def attend(self, call: AttentionCall) -> Tensor:
        q, k, v = call.q, call.k, call.v
        where, layer = self.session.describe(call.module), getattr(call.module, "layer_idx", None)
        for what, states in (("queries", q), ("keys", k), ("values", v)):
            name = f"the {what} of {where}"
            if name in self.seen:
                raise Unsupported(f"{where} attends more than once in one pass, which is not supported.")
            self.seen[name] = [states.transpose(1, 2).detach().clone()]
        self.attending.add(where)
        if self.echo is not None:
            self.echo.check(where, layer, k, v)
        self.shapes[layer] = CacheShape(0, k.shape[1], k.shape[3], v.shape[3], k.dtype, k.device)
        return v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)

    def attention_outputs(self, outputs: Outputs) -> Outputs:
        """Select what scores decide: other modules may make much of roundings (0.058 of 0.023 in SmolLM2)."""
        return {name: values for name, values in outputs.items() if name in {*self.attending, "the logits"}}

    def check_layers(self, session: BoundModel) -> None:
        """Raises: Unsupported where a layer did not attend."""
        kind, layers = type(session.model).__name__, session.model.config.get_text_config(decoder=True)
        count = layers.num_hidden_layers
        if set(self.shapes) != set(range(count)):
            silent = sorted(set(range(count)) - set(self.shapes))
            raise Unsupported(
                f"{kind}: {len(silent)} of {count} layers (the first: {silent[0] if silent else 'none'}) do not "
                "call the attention function; every layer must attend, numbered from 0 by layer_idx."
            )

    def shape(self, session: BoundModel) -> CacheShape:
        """Return the cache's shape. Raises: Unsupported where a layer did not attend, or layers differ."""
        self.check_layers(session)
        first, *rest = self.shapes.values()
        odd = [shape for shape in rest if shape != first]
        if odd:
            kind = type(session.model).__name__
            raise Unsupported(f"{kind} caches other heads in some layers than in others: {first}, {odd[0]}.")
        return replace(first, layers=len(self.shapes))


class _EchoCache(ShardedCache):
    """A cache that keeps nothing and checks that what is attended to is what it was given."""

    def __init__(self, session: Session, shape: CacheShape) -> None:
        super().__init__(session, connect("single"), shape)
        self.updates: dict[object, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        self.updates[layer_idx] = key_states, value_states
        return key_states, value_states

    def check(self, where: str, layer: object, k: Tensor, v: Tensor) -> None:
        update = self.updates.pop(layer, None)
        if update is None or not (torch.equal(update[0], k) and torch.equal(update[1], v)):
            raise Unsupported(
                f"{where} attends to other keys and values than it puts into the cache "
                "(shared between layers, or changed afterwards), which is not supported."
            )


def _tokens(model: PreTrainedModel, length: int) -> Tensor:
    """Make tokens of which no two neighbours are equal, without touching a random generator: (1, length)."""
    vocabulary: int = model.config.get_text_config(decoder=True).vocab_size
    return (torch.arange(1, length + 1, device=model.device) * 7919 % max(vocabulary, 1))[None]


def _far_positions(session: BoundModel, length: int) -> Tensor:
    """Place the tokens, the last as far off as positions get: (1, length)."""
    positions = torch.arange(length)
    positions[-1] = max(session.positions - 1, length - 1)
    return positions[None]


def _whole(length: int) -> dict[str, Tensor]:
    return {
        "position_ids": torch.arange(length)[None],
        "attention_mask": torch.ones(1, length, dtype=torch.int64),
    }


def _run(session: BoundModel, tokens: Tensor, **inputs: Any) -> Outputs:
    """Run one forward pass, and return all outputs that have a row for each token, in order, the logits last."""
    inputs = {"use_cache": False, **inputs}
    inputs = {name: value for name, value in inputs.items() if has_argument(session.model, name)}
    inputs = {k: v.to(tokens.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    outputs: Outputs = {}
    probing = session.probe
    if isinstance(probing, _Probe):
        cache = inputs.get("past_key_values")
        probing.seen, probing.echo = outputs, cache if isinstance(cache, _EchoCache) else None
    with silence(), record_outputs(session, tokens.shape, outputs):
        result = session.model(input_ids=tokens, **inputs)
    outputs["the logits"] = [result.logits]
    return outputs

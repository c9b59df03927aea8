"""An open session goes on over other ranks once its communicator is replaced: what a later recovery builds on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from shardsum.comm import subgroup
from shardsum.hf import generate, sharded, training
from shardsum.launching import launch

from .test_training import alone, assert_same, gradients, labelled
from .tiny import plain, prompt, tiny

STAYING = [0, 2]


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_goes_on(beams: int, reproducible: bool) -> None:
    model, ids = tiny("Llama"), prompt(20)
    expected = plain(model, ids, num_beams=beams)
    models = [copy.deepcopy(model) for _ in range(3)]

    def run(comm: Any) -> Any:
        with sharded(models[comm.rank], comm, reproducible=reproducible) as session:
            before = session.new_cache()
            session.prefill(before, ids[:, :13])
            if comm.rank not in STAYING:
                return None
            session.comm = subgroup(comm, STAYING)
            with pytest.raises(ValueError, match="the communicator that the session had before"):
                generate(session, ids, past_key_values=before)
            with pytest.raises(ValueError, match="the communicator that the session had before"):
                models[comm.rank](ids[:, 13:], past_key_values=before)
            out = generate(
                session,
                ids,
                past_key_values=session.new_cache(),
                max_new_tokens=5,
                do_sample=False,
                num_beams=beams,
                return_dict_in_generate=True,
                output_logits=True,
            )
            return out.sequences, torch.stack(out.logits)

    results = launch(run, ranks=3, transport="threads")
    assert results[1] is None
    for rank in STAYING:
        sequences, logits = results[rank]
        assert torch.equal(sequences, expected.sequences)
        reference = torch.stack(expected.logits)
        assert (logits - reference).norm() <= 1e-4 * reference.norm()


def test_training_goes_on() -> None:
    model, ids = tiny("Llama"), prompt(23, batch=2)
    labels = labelled(ids)
    expected = alone(model, ids, labels)
    models = [copy.deepcopy(model) for _ in range(3)]

    def run(comm: Any) -> Any:
        own = models[comm.rank]
        with training(own, comm) as sharded_model:
            sharded_model.loss(ids, labels).backward()
            own.zero_grad()
            if comm.rank not in STAYING:
                return None
            sharded_model.comm = subgroup(comm, STAYING)
            loss = sharded_model.loss(ids, labels)
            loss.backward()
            sharded_model.sum_gradients()
        return {"loss": loss.detach(), **gradients(own)}

    results = launch(run, ranks=3, transport="threads")
    assert results[1] is None
    assert_same(expected, [results[rank] for rank in STAYING], torch.float32)

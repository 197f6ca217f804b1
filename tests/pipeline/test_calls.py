"""A call of a pipeline has its own state: calls inside of callbacks, and calls of other threads, do not disturb it."""

from __future__ import annotations

from threading import Event, Thread

import pytest
import torch
from micro_stiv import micro_pipeline

from lumos import LumosPipeline, VideoPipeline
from lumos.errors import RunError, UserError
from lumos.models.lumos1.cache import PrefixCache
from lumos.runtime import plain_defaults

PROMPT = "a red circle moves left"


@pytest.fixture(params=["lumos1", "stiv"])
def pipe(request, micro_folder) -> VideoPipeline:
    return LumosPipeline.from_pretrained(micro_folder, device="cpu") if request.param == "lumos1" else micro_pipeline()


def test_a_callback_may_call_the_pipeline(pipe):
    alone, inner = pipe(PROMPT, seed=1).latents, pipe(PROMPT, seed=2).latents
    found = []

    def callback(pipe, step, left, tensors):
        if step == 0:
            found.append(pipe(PROMPT, seed=2).latents)

    assert torch.equal(pipe(PROMPT, seed=1, callback_on_step_end=callback).latents, alone)
    assert torch.equal(found[0], inner)


def test_a_call_is_interrupted_though_another_has_ended(pipe):
    def callback(pipe, step, left, tensors):
        pipe(PROMPT, seed=2)
        pipe._interrupt = True

    with pytest.raises(RunError, match="before its first latent frame"):
        pipe(PROMPT, seed=1, num_inference_steps=3, callback_on_step_end=callback)


def test_an_answer_of_a_callback_without_effect_is_refused(pipe):
    for answer, said in (({"prompt_embeds": 1}, "'prompt_embeds', which this pipeline"), (5, "gave 5; give nothing")):
        with pytest.raises(UserError, match=said):
            pipe(PROMPT, seed=1, callback_on_step_end=lambda *_, answer=answer: answer)
    whole = pipe(PROMPT, seed=1).latents
    same = pipe(PROMPT, seed=1, callback_on_step_end=lambda pipe, step, left, tensors: tensors,
                callback_on_step_end_tensor_inputs=pipe.tensor_inputs)  # fmt: skip
    assert torch.equal(same.latents, whole)


def test_the_default_dtype_is_set_back_by_the_last_call():
    begun, first_is_over, found = Event(), Event(), []

    def second():
        with plain_defaults():
            begun.set()
            first_is_over.wait(60)
            found.append(torch.zeros(1).dtype)

    torch.set_default_dtype(torch.float64)
    try:
        with plain_defaults():
            thread = Thread(target=second)
            thread.start()
            begun.wait(60)
        first_is_over.set()
        thread.join()
        assert (found, torch.get_default_dtype()) == ([torch.float32], torch.float64)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_saved_prefix_is_that_of_its_ids_whatever_others_save(micro_folder, monkeypatch):
    model = LumosPipeline.from_pretrained(micro_folder, device="cpu").model
    shared, (mine, other) = PrefixCache(), (torch.tensor([1, 2]), torch.tensor([3]))
    values = {2: (torch.zeros(2), torch.zeros(2)), 1: (torch.ones(1), torch.ones(1))}
    shared.save(model, mine, values[2])
    key_of = PrefixCache._key_of

    def meanwhile(model, prefix):
        monkeypatch.setattr(PrefixCache, "_key_of", staticmethod(key_of))
        shared.save(model, other, values[1])  # by another thread
        return key_of(model, prefix)

    monkeypatch.setattr(PrefixCache, "_key_of", staticmethod(meanwhile))
    assert shared.load(model, mine) in (None, values[2])

"""Every way to run the decoder that keeps the result gives the published logits of the golden traces, call by call."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lumos import LumosForVideoGeneration
from lumos.models.lumos1.cache import PrefixCache
from lumos.models.lumos1.engine import DecodingEngine, code_offsets
from lumos.models.lumos1.modeling import COMPILED
from lumos.models.lumos1.sampling import guide
from lumos.models.lumos1.sequence import Frame
from lumos.pipeline.acceleration import compile_parts, use_int8_weights
from lumos.pipeline.placement import is_spread, loading_arguments

TOLERANCE = {"atol": 2e-4, "rtol": 0}
BRANCHES = ("cond", "uncond")


class Trace:
    """Inputs and outputs of the published system, call by call (tests/golden/README.md), for both branches together."""

    def __init__(self, golden: Path, name: str):
        self.settings = json.loads((golden / f"{name}.json").read_text())
        self.tensors, self.grid = load_file(golden / f"{name}.safetensors"), tuple(self.settings["grid"])
        self.calls = [call.removesuffix("_cond") for call in self.settings["order"] if call.endswith("_cond")]
        assert [f"{call}_{b}" for call in self.calls for b in BRANCHES] == self.settings["order"]
        self.span, self.commits = Frame(0, *self.grid).end, sum("commit" in call for call in self.calls)

    @cached_property
    def prefixes(self) -> list[Tensor]:
        return [self.tensors[f"{self.calls[0]}_{b}.input_ids"][0, : -self.span] for b in BRANCHES]

    def ids(self, call: str) -> Tensor:
        """[2, n]"""
        return torch.stack([self.tensors[f"{call}_{b}.input_ids"][0, -self.span :] for b in BRANCHES])

    def positions(self, call: str) -> Tensor:
        """[2, 3, n]"""
        axes = [[self.tensors[f"{call}_{b}.position_{axis}"][0, -self.span :] for axis in "thw"] for b in BRANCHES]
        return torch.stack([torch.stack(of_branch) for of_branch in axes])

    def logits(self, call: str) -> Tensor:
        """[2, h * w, K]"""
        return torch.stack([self.tensors[f"{call}_{b}.logits"].flatten(0, -2) for b in BRANCHES])


@pytest.fixture(scope="module")
def model(golden):
    return LumosForVideoGeneration.from_pretrained(golden, dtype=torch.float32).eval()


@pytest.fixture(params=["trace_t2v", "trace_i2v"])
def trace(golden, request):
    return Trace(golden, request.param)


def steps(
    trace: Trace, engine: DecodingEngine, *, fused: bool = True, again: bool = False, **prefill
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Feed a trace to an engine: (call, ids [2, n], ids of the finished frame to commit with it) of each step.

    fused: the step after a frame commits it. again: the whole prefix is computed again, as at a later prompt.
    """
    capacity = max(map(len, trace.prefixes)) + trace.span * trace.commits
    engine.prefill(trace.prefixes, capacity, **prefill)
    finished, behind = None, trace.prefixes
    for call in trace.calls:
        ids = trace.ids(call)
        places = engine.frame_position_ids(ids, int(finished is not None))
        assert torch.equal(places[:, :, 3:-1], trace.positions(call)[:, :, 3:-1]), call
        if "commit" not in call:
            yield call, ids, finished
            finished = None
        elif again:
            behind = [torch.cat(parts) for parts in zip(behind, ids, strict=True)]
            engine.prefill(behind, capacity, **prefill)
        elif fused:
            finished = ids
        else:
            engine.commit(ids)


def check(trace: Trace, model: LumosForVideoGeneration, **how) -> None:
    engine = DecodingEngine(model)
    for call, ids, finished in steps(trace, engine, **how):
        logits = engine.denoise(ids, committing=finished)
        torch.testing.assert_close(logits, trace.logits(call), **TOLERANCE, msg=lambda m, call=call: f"{call}: {m}")


@pytest.mark.parametrize("how", [{"fused": False}, {"fused": True}, {"again": True}, {"history": 4}], ids=str)
def test_logits_agree_for_every_way_of_filling_the_cache(model, trace, how):
    """Frames are committed by a separate forward pass, by the next step, by a new prefix, or into a history with all frames."""
    check(trace, model, **how)


def test_a_kept_prefix_is_not_computed_again(model, trace, monkeypatch):
    prefix_cache, fed, forward = PrefixCache(), [], model.model.forward
    check(trace, model, prefix_cache=prefix_cache)
    monkeypatch.setattr(model.model, "forward", lambda ids, *a: fed.append(ids) or forward(ids, *a))
    check(trace, model, prefix_cache=prefix_cache)
    assert len(fed) == 1 + len(trace.calls) - trace.commits  # one prefix, not two


def test_in_a_batch_with_a_clip_of_another_prompt(model, trace):
    """Rows [other, cond, uncond, cond]; the other prompt is one token shorter."""
    engine, rows = DecodingEngine(model), torch.tensor([0, 0, 1, 0])
    cond, uncond = trace.prefixes
    other = torch.cat([cond[:1], cond[2:]])
    engine.prefill([other, cond, uncond, cond], len(cond) + trace.span * trace.commits)
    finished = None
    for call in trace.calls:
        ids = trace.ids(call)[rows]
        if "commit" in call:
            finished = ids
            continue
        logits = engine.denoise(ids, committing=finished)
        torch.testing.assert_close(logits[1:], trace.logits(call)[rows[1:]], **TOLERANCE)
        assert (logits[0] - logits[1]).abs().max() > 1e-3
        finished = None


def test_steps_of_one_branch_leave_the_other_as_it_is(model, trace):
    """Every second step has no unconditional row, as outside of a guidance interval."""
    engine = DecodingEngine(model)
    for number, (call, ids, finished) in enumerate(steps(trace, engine, fused=False)):
        rows = 1 + number % 2
        torch.testing.assert_close(engine.denoise(ids[:rows], committing=finished), trace.logits(call)[:rows], **TOLERANCE)


def test_guided_states_are_the_guided_logits(model, trace):
    """A step computes the head once, on the guided states of the codes that are still masked."""
    engine, scale, offsets = DecodingEngine(model), trace.settings["guidance_scale"], code_offsets(Frame(0, *trace.grid))
    for call, ids, finished in steps(trace, engine):
        masked = (ids[0, offsets] == model.config.mask_token_id).nonzero()[:, 0]
        states = engine.hidden(ids, offsets[masked].expand(2, -1), finished)
        with torch.no_grad():
            logits = model.lm_head(guide(states, scale), visual_only=True)
        cond, uncond = trace.logits(call)[:, masked]
        torch.testing.assert_close(logits[0], uncond + scale * (cond - uncond), atol=TOLERANCE["atol"] * 2 * scale, rtol=0)


@pytest.mark.slow
def test_compiled_parts(model, trace):
    """Uses a backend of torch.compile that only traces."""
    compiled = copy.deepcopy(model)
    compile_parts(compiled, COMPILED, backend="eager")
    check(trace, compiled)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_fewer_bits_stay_close(model, trace, precision):
    """These ways change the result: logits may differ by a tenth of their range, with all steps through one cache."""
    changed = copy.deepcopy(model)
    if precision == "int8":
        pytest.importorskip("torchao")
        use_int8_weights(changed.model.layers)
    else:
        changed.to(torch.bfloat16)
    engine = DecodingEngine(changed)
    for call, ids, finished in steps(trace, engine):
        ours, theirs = engine.denoise(ids, committing=finished), trace.logits(call)
        assert 1e-3 < (ours - theirs).abs().max() < 0.1 * theirs.abs().max(), call


def test_logits_agree_with_layers_offloaded_to_disk(golden, trace):
    placement = loading_arguments(torch.device("cpu"), "auto", {"cpu": (golden / "model.safetensors").stat().st_size})
    spread = LumosForVideoGeneration.from_pretrained(golden, dtype=torch.float32, **placement).eval()
    assert is_spread(spread)
    check(trace, spread)

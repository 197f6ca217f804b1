"""The plain form of the generation bench, and the counts of the bench. No times are judged."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lumos.models.lumos1.benchmarks.generate as bench
from lumos.benchmarks.measure import Bench
from lumos.benchmarks.roofline import profiled
from lumos.errors import RunError, UserError
from lumos.models.lumos1.benchmarks.baseline import plain_frames
from lumos.models.lumos1.benchmarks.decoding import DecodingCase, generate, generate_plainly, logits_difference, make_case
from lumos.models.lumos1.benchmarks.roofline import products
from lumos.models.lumos1.engine import DecodingEngine
from lumos.models.lumos1.modeling import COMPILED
from lumos.pipeline.acceleration import compile_parts


@pytest.fixture(scope="module")
def case() -> DecodingCase:
    return make_case("small", "", "", "cpu", "float32")


def test_engine_and_baseline_have_the_same_logits(case):
    found = logits_difference(case)
    assert found.largest < 1e-5 < 0.1 < found.scale
    assert found.same_likeliest == 1


def test_a_difference_ends_the_bench(case, monkeypatch):
    """An engine whose frames are one place too far is noticed, and its time is not reported."""
    assert bench.check_logits(case, "small", "float32") < 1e-5
    right = DecodingEngine.frame_position_ids
    monkeypatch.setattr(DecodingEngine, "frame_position_ids", lambda self, *args: right(self, *args) + 1)
    with pytest.raises(RunError, match="logits of engine and of the published method differ"):
        bench.check_logits(case, "small", "float32")


def test_the_baseline_does_what_the_release_does(case, monkeypatch):
    """The published form does two forward passes of batch one for each step, with logits of all inputs, and commits each frame."""
    fed, logits = [], []
    forward, head = case.model.model.forward, case.model.lm_head.forward
    monkeypatch.setattr(case.model.model, "forward", lambda ids, *a: fed.append(tuple(ids.shape)) or forward(ids, *a))
    monkeypatch.setattr(case.model.lm_head, "forward", lambda *a: logits.append(head(*a)) or logits[-1])
    generate_plainly(case)
    first = [(1, len(p) + case.span) for p in (case.conditional, case.unconditional)]
    assert fed == first + [(1, case.span)] * (2 * case.frames * (case.settings.num_inference_steps + 1) - 2)
    assert [tuple(x.shape) for x in logits] == [(*shape, case.model.config.vocab_size) for shape in fed]


def test_the_baseline_makes_whole_frames(case):
    def frames(seed):
        return torch.cat(list(plain_frames(
            case.model, case.conditional, case.unconditional, grid=case.grid, new_frames=2, settings=case.settings, seed=seed
        )))  # fmt: skip

    codes = frames(0)
    assert codes.shape == (2, *case.grid)
    assert 0 <= int(codes.min()) <= int(codes.max()) < case.model.config.visual_token_count
    assert torch.equal(codes, frames(0))
    assert not torch.equal(codes, frames(1))


@pytest.mark.slow
def test_shares_are_of_the_whole_time(case):
    shares = profiled(lambda: generate(case), "cpu")
    assert shares["products"] > 0
    assert shares["attention"] > 0
    assert sum(shares.values()) == pytest.approx(1, abs=0.05)


def test_flops_are_those_of_the_formula(case):
    """Two branches of 32 tokens, 3 frames of 3 steps and 2 commits; 24, 20 and 12 masked codes count in last layer and head."""
    c, parts = case.model.config, {p.part: p.flops for p in products(case)}
    assert c.num_hidden_layers == 2
    tokens, wanted = 2 * 32 * 11 + len(case.conditional) + len(case.unconditional), 2 * 3 * (24 + 20 + 12)
    assert parts["mlp.up_proj"] == 2 * (tokens + wanted) * c.hidden_size * c.intermediate_size
    assert parts["self_attn.k_proj"] == 2 * (tokens + tokens) * c.hidden_size * c.head_dim
    assert parts["head"] == wanted * c.hidden_size * c.visual_token_count
    steps = [(f, m) for f in range(3) for m in (24, 20, 12, 0)][:-1]
    pairs = sum((len(p) + 32 * (f + 1)) * (32 + m) for p in (case.conditional, case.unconditional) for f, m in steps)
    assert parts["attention"] == 2 * 2 * pairs * c.hidden_size


TRADED = {"guidance_interval": (0.0, 0.4), "later_steps": 2, "history_frames": 1, "history_thinning": True}


@pytest.mark.parametrize("options", [
    {}, TRADED, {"guidance_interval": (0.5, 1.0)}, {"step_reuse": 2}, {"step_reuse": 3, "guidance_interval": (0.5, 1.0)},
])  # fmt: skip
def test_the_engine_spends_these_flops_and_no_more(case, options):
    """Compares with torch's count: products of layers and head, and attention, without the attention of the prompt."""
    case = bench.with_options(replace(case, frames=4), options)
    with FlopCounterMode(display=False) as counter:
        generate(case)
    counted = {str(name).removeprefix("aten."): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    parts = {p.part: p.flops for p in products(case)}
    attention = parts.pop("attention")
    steps = [(s, n) for f in range(4) for n in [case.settings.steps_of(f)] for s in range(n)]
    passes = sum(1 + case.settings.guides(s, n) for s, n in steps if case.settings.runs_all(s, n)) + 2 * 3
    prompt = (len(case.conditional) + len(case.unconditional)) / (32 * passes)
    products_counted = counted["mm"] + counted.get("addmm", 0)
    assert sum(parts.values()) <= products_counted <= (1 + prompt) * sum(parts.values())
    if len(counted) > 1:
        assert attention <= sum(counted.values()) - products_counted <= (1 + prompt) * attention


def steps_taken(step):
    """Return the number of decoding steps in one call of `step`."""
    steps, hidden = [], DecodingEngine.hidden
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodingEngine, "hidden", lambda *args: steps.append(1) or hidden(*args))
        step()
    return len(steps)


@pytest.mark.slow
def test_options_are_timed_beside_the_baseline(case, monkeypatch):
    """Faster forms have a roofline and cache of their own; with a threshold, which decides the number of steps, they have none."""
    monkeypatch.setattr(bench, "run_isolated", lambda *args, **named: 2**20)
    monkeypatch.setattr(bench, "product_gflops", lambda *args: 50.0)
    measure = Bench("cpu", "float32", 1, 1, {"float32": 50.0})
    options = {"later_steps": 1, "history_frames": 1, "guidance_interval": (0.0, 0.5)}
    settings = bench.GenerationBenchmarkSettings("", "", ("small",), options, ("bfloat16",))
    profiles, profiled = [], bench.profiled
    monkeypatch.setattr(bench, "profiled", lambda step, device: profiles.append(steps_taken(step)) or profiled(step, device))
    row, of, table = bench.run_shape("small", settings, measure)
    assert profiles == [3 * 3]  # the whole clip: three frames of three steps
    changed = row["lumos_with_options"]
    assert changed["gflops_that_must_be_done"] < 0.7 * row["gflops_that_must_be_done"]
    assert changed["later_steps"] == 1
    assert of["published_over_lumos_with_options_time"] == pytest.approx(row["published"]["seconds"] / changed["seconds"], rel=1e-2)
    assert [line[0] for line in table] == ["small", "small, options"]
    assert len({len(line) for line in table}) == 1
    found = row["precision_differences"]["bfloat16"]
    assert 1e-4 < found["largest"] < 0.1 * found["scale"]
    assert 0.5 < found["same_likeliest"] <= 1
    row, of, _ = bench.run_shape("small", replace(settings, options={"dtype": "bfloat16"}, memory=("lumos",)), measure)
    assert row["lumos_with_options"]["dtype"] == "bfloat16"
    assert row["lumos_with_options"]["cache_mb"] == pytest.approx(row["cache_mb"] / 2, rel=1e-2)
    assert [row[form]["extra_memory_mb"] for form in ("lumos", "published")] == [1.0, None]
    assert of["published_over_lumos_memory"] is None
    unknown = bench.form_figures(bench.with_options(case, {"confidence_threshold": 0.9}), 1.0, measure)
    assert unknown["bound_seconds"] is None


def test_int8_weights_are_close(case):
    pytest.importorskip("torchao")
    found = bench.precision_difference(case, "int8")
    assert 1e-4 < found["largest"] < 0.1 * found["scale"]


def test_int8_without_torchao_names_the_extra(case, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"int8 weights need torchao .*\[int8\]"):
        bench.precision_difference(case, "int8")


@pytest.mark.slow
def test_compiled_parts_give_the_same_logits(case):
    """Uses a backend of torch.compile that only traces, because a compiler takes long."""
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    compiled = copy.deepcopy(case.model)
    compile_parts(compiled, COMPILED, backend="eager")
    assert logits_difference(case, compiled).largest < 1e-5
    assert counters["stats"]["unique_graphs"] - before >= 4  # the probe, RMSNorm, HeadNorm, MLP
    assert counters["graph_break"] == {}


def test_a_missing_compiler_is_told(case, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no C++ compiler\nmore")))
    with pytest.raises(UserError, match=r"torch.compile does not work here \(no C\+\+ compiler\); leave compile out"):
        compile_parts(case.model, COMPILED)

"""`plan`: its memory against real steps, figures worked out by hand, and its output."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measured_steps import TEXT_TOKENS
from planned_cases import CASES, MORE
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lumos import LumosConfig, LumosForVideoGeneration
from lumos.cli import main
from lumos.data.curriculum import Curriculum
from lumos.errors import UserError
from lumos.lora import Lora, add_adapters
from lumos.models.lumos1.attention import attention_for
from lumos.models.lumos1.cache import Cache
from lumos.models.lumos1.clip_cost import LumosClipCost, clip_cost, lighter, out_of_memory_advice
from lumos.models.lumos1.flops import adapter_weights, training_flops
from lumos.models.lumos1.sampling import generate_frames
from lumos.models.lumos1.sequence import Frame, SequenceLayout, build_prefix
from lumos.models.lumos1.settings import GenerationSettings
from lumos.models.lumos1.training_cost import mean_mask_ratio, meta_model, training_cost
from lumos.models.lumos1.training_settings import LORA_TARGETS, MaskingSettings
from lumos.pipeline.defaults import ClipDefaults
from lumos.planning.gpus import GIB, RESERVED, Hardware
from lumos.planning.training import SHIPPED, TrainingPlan
from lumos.runtime import parameter_count
from lumos.training.deepspeed_engine import deepspeed_options
from lumos.training.sections import StageSettings
from lumos.training.settings import build_settings, load_settings

ROOT = Path(__file__).parents[2]
H100 = Hardware("h100", 48, 80 * GIB, 1e15)
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def planned(*overrides: str, recipe: str = "3b-stage2", hardware: Hardware = H100, text_tokens: int = 160) -> TrainingPlan:
    settings = load_settings(f"configs/lumos1/{recipe}.yaml", list(overrides))
    return TrainingPlan(settings, training_cost, hardware, utilisation=0.4, text_tokens=text_tokens)


# ---- memory against real steps

@pytest.fixture(scope="module")
def measured(pytestconfig) -> dict[str, int]:
    """The bytes by case. Freed tensors return to the system at once, so that no case reuses the memory of an earlier one."""
    names = [name for name in CASES if "adapters" not in name or importlib.util.find_spec("peft")]
    names = [name for name in names if name not in MORE or pytestconfig.getoption("thorough")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "measured_steps.py")],
        input=json.dumps([CASES[name][0] for name in names]), capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(names, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the high-water mark cannot be set back")
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[needs_peft] * ("adapters" in name) + [pytest.mark.thorough] * (name in MORE)) for name in CASES
])  # fmt: skip
def test_memory_is_that_of_a_real_step_within_15_percent(name: str, measured: dict[str, int]):
    raw, largest = CASES[name]
    cpu = Hardware("CPU process", 1, 8 * GIB, 1e11)
    plan = TrainingPlan(build_settings(raw), training_cost, cpu, utilisation=0.5, text_tokens=TEXT_TOKENS)
    need = plan.estimate(plan.configured)
    assert max(need.parts, key=need.parts.get) == largest
    assert measured[name] > 64 * 2**20, "too small for a resident set to tell"
    assert need.step == pytest.approx(measured[name], rel=0.15)


# ---- figures by hand

LAYER = 2 * 3072 * 3072 + 2 * 3072 * 1024 + 3 * 3072 * 8192  # q and o, k and v, the MLP
PARAMETERS = 2 * 129_536 * 3072 + 28 * (LAYER + 2 * 3072 + 4 * 128) + 3072


def test_the_3b_recipe_by_hand():
    """A frame of 256 x 448 pixels has 32 rows of 56 codes and a newline; the model has 28 layers and 24 heads of 128 channels."""
    report = planned().report()
    assert report["parameters"] == report["trained"] == PARAMETERS == 3_614_630_912
    image, video = report["steps"]
    frame = 3 + 32 * 57 + 1
    assert (image["tokens_of_a_clip"], video["tokens_of_a_clip"]) == (160 + 5 + frame + 2, 160 + 5 + 7 * frame + 2)
    assert (image["clips"], image["micro_batch"], image["micro_batches"], video["clips"]) == (288, 6, 1, 48)
    assert (image["steps"], video["steps"]) == (208_333, 208_334)

    length, prefix = video["tokens_of_a_clip"], 165
    seen = prefix * (prefix + 1) // 2 + sum(frame * (prefix + k * frame) for k in range(1, 8)) + (length - 1) + length
    supervised = 7 * 32 * 56 * mean_mask_ratio(MaskingSettings(), 7)
    forward = 28 * (2 * LAYER * length + 2 * 2 * seen * 3072) + 2 * supervised * 3072 * 64_000
    assert video["flops"] == pytest.approx(48 * 3 * forward, rel=1e-9)
    assert video["seconds"] == pytest.approx(video["flops"] / (48 * 1e15 * 0.4), rel=1e-9)
    assert video["sent"] == pytest.approx((4 + 2 + 2) * PARAMETERS * 47 / 48)  # ZeRO 3: gradients, and the weights twice
    days = sum(kind["steps"] * kind["seconds"] for kind in (image, video)) / 86400
    assert report["total"]["days"] == pytest.approx(days)
    assert video["flops_computed_again"] == pytest.approx(48 * 28 * 2 * LAYER * length)


def test_the_states_of_zero_by_hand():
    """ZeRO paper (arXiv 1910.02054), section 3.1: 2 bytes of bf16 weights, 12 of fp32 master and moments, divided by 48."""
    ways = {way["name"]: way for way in planned("training.ema_decay=0.5").report()["memory"]}
    share = -(-PARAMETERS // 48)
    expected = {
        "ZeRO 1": (2 * PARAMETERS, 16 * share, 0), "ZeRO 2": (2 * PARAMETERS, 16 * share, 0), "ZeRO 3": (2 * share, 16 * share, 0),
        "ZeRO 2, optimizer on CPU": (2 * PARAMETERS, 0, 20 * share), "ZeRO 3, optimizer and weights on CPU": (0, 0, 22 * share),
    }  # fmt: skip
    for name, (weights, optimizer, host) in expected.items():
        way = ways[name]
        assert (way["parts"]["weights"], way["parts"]["optimizer"], way["host"]) == (weights, optimizer, host)
    assert ways["ZeRO 0"]["parts"]["optimizer"] == 12 * PARAMETERS
    assert {way["start"] for way in ways.values()} == {4 * PARAMETERS}
    assert [name for name, way in ways.items() if way["configured"]] == ["ZeRO 3"]
    assert all(max(way["parts"].values()) <= way["step"] <= sum(way["parts"].values()) for way in ways.values())


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7, 1.0])
def test_the_mean_mask_ratio_is_that_of_the_schedule(ratio: float):
    draws = torch.cos(torch.pi / 2 * (torch.arange(100_000) + 0.5) / 100_000).clamp(min=ratio)
    assert mean_mask_ratio(MaskingSettings(min_ratio=ratio), 7) == pytest.approx(float(draws.mean()), abs=1e-4)


@needs_peft
def test_flops_with_adapters_are_those_that_torch_counts():
    """Inputs of the first layer come from frozen embeddings and need no gradient; the bytes that torch saves less are added."""
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2}
    config = LumosConfig.preset("tiny", **sizes, num_attention_heads=4, num_key_value_heads=2)
    model = LumosForVideoGeneration(config)
    bare = parameter_count(model)
    add_adapters(model, Lora(4, 8.0, 0.0, list(LORA_TARGETS)))
    assert adapter_weights(config, 4, LORA_TARGETS) == parameter_count(model) - bare
    layout = SequenceLayout(3 * 24, tuple(Frame(start, 4, 4) for start in (0, 24, 48)))
    shape = (1, layout.length)
    rotary = model.rotary(torch.zeros(1, 3, layout.length, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool))
    attend = attention_for("segmented", [layout], layout.length, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        hidden = model.model(torch.ones(shape, dtype=torch.int64), rotary, attend)
        model.lm_head(hidden[0, :30], targets=torch.zeros(30, dtype=torch.int64)).sum().backward()
    first = 2 * layout.length * (128 * (128 + 64 + 64) + 3 * 4 * 128)
    adapters = adapter_weights(config, 4, LORA_TARGETS)
    assert counter.get_total_flops() + first == training_flops(config, layout, 30, adapters)


stages = st.builds(
    StageSettings, steps=st.integers(1, 30), image_share=st.floats(0, 1), batch_size=st.none() | st.integers(1, 3),
    image_batch_size=st.none() | st.integers(1, 3), first_frames=st.none() | st.just(5), short_share=st.floats(0, 1),
)  # fmt: skip


@hypothesis.settings(deadline=None)  # the first case of a busy machine may be slow
@given(stages=st.lists(stages, max_size=3), steps=st.integers(1, 60))
def test_the_steps_of_each_shape_are_counted(stages: list[StageSettings], steps: int):
    curriculum = Curriculum(stages, 4)
    shapes = [replace(curriculum(step), stage=0, number=0) for step in range(steps)]
    assert curriculum.counts(steps) == {shape: shapes.count(shape) for shape in shapes}
    assert set(shapes) <= curriculum.shapes


# ---- settings


def test_a_step_by_tokens_is_planned_in_clips():
    overrides = ("training.batch_size=null", "training.tokens_per_batch=1500000", "data.stages=[]", "training.micro_batch_size=1")
    (video,) = planned(*overrides).report()["steps"]
    assert video["clips"] == pytest.approx(1_500_000 / (7 * 32 * 56))
    assert (video["clips_of_a_process"], video["micro_batch"], video["micro_batches"]) == (3, 1, 3)
    with pytest.raises(UserError, match=r"tokens_per_batch 5000 is too few"):
        planned("training.batch_size=null", "training.tokens_per_batch=5000", "data.stages=[]")


def test_short_steps_are_planned_as_such():
    stage = "data.stages=[{{batch_size: 48, first_frames: 9, short_share: {}}}]"
    whole, short = planned(stage.format(0.25)).report()["steps"]
    assert [step["steps"] for step in (whole, short)] == [312_501, 104_166]
    assert [step["kind"] for step in (whole, short)] == ["video", "video, first 9 frames"]
    assert short["tokens"] < 0.5 * whole["tokens"]


def test_bytes_sent_follow_the_zero_stage():
    parts = "training.micro_batch_size=2"  # three for pictures
    for stage, volume in {0: 8, 1: 4 + 2, 2: 3 * 4 + 2, 3: 3 * (4 + 4)}.items():
        image, _ = planned(f"deepspeed.config=configs/deepspeed/zero{stage}.json", parts).report()["steps"]
        assert image["sent"] == pytest.approx(volume * PARAMETERS * 47 / 48)
    alone = planned("deepspeed.config=null", hardware=replace(H100, count=1))
    assert {kind["sent"] for kind in alone.report()["steps"]} == {0.0}


def test_what_settings_change_in_memory():
    plain, kept, small, full = (
        plan.estimate(plan.configured)
        for plan in (
            planned(), planned("training.activation_checkpointing=false"), planned("training.micro_batch_size=3"),
            planned("training.precision=fp32"),
        )
    )  # fmt: skip
    assert kept.parts["activations"] > 3 * plain.parts["activations"]
    assert small.step <= plain.step
    assert full.parts["weights"] == pytest.approx(2 * plain.parts["weights"], rel=1e-6)
    assert full.parts["activations"] > 1.5 * plain.parts["activations"]


@pytest.mark.slow
def test_the_plan_assumes_what_shipped_deepspeed_files_say():
    for file, sharding in SHIPPED.items():
        settings = load_settings("configs/lumos1/3b-stage2.yaml", [f"deepspeed.config={file}"])
        zero = deepspeed_options(settings, 2, torch.bfloat16)["zero_optimization"]
        plan = TrainingPlan(settings, training_cost, H100, utilisation=0.4)
        own = plan.configured.sharding
        assert replace(own, **{field: getattr(sharding, field) for field in plan.common}) == replace(
            sharding, bucket=own.bucket, live=own.live
        )
        assert own.bucket == zero.get("reduce_bucket_size", 5e8)
        if sharding.stage:
            assert own.bucket == sharding.bucket
        if sharding.stage == 3:
            assert own.live == sharding.live


@pytest.mark.parametrize("memory", [12, 16, 20, 24, 40, 80])
@pytest.mark.parametrize("recipe", ["3b-stage2", "1b-384p"])
def test_the_advised_run_fits_and_gets_no_further_advice(recipe: str, memory: int):
    hardware = replace(H100, memory=memory * GIB)
    plan = planned(recipe=recipe, hardware=hardware)
    best = plan.cheapest()
    if best is None:
        assert "Nothing fits" in plan.advice()
        assert all(plan.free(replace(way, micro_batch_size=1)) < 0 for way in plan.strategies())
        return
    changes = plan.changes(best)
    assert all(change in plan.advice() for change in changes)
    again = planned(*changes, recipe=recipe, hardware=hardware)
    assert again.free(again.configured) == plan.free(best) >= 0
    assert again.changes(again.cheapest()) == []


def test_nothing_is_allocated_for_a_plan():
    assert all(p.is_meta for p in meta_model(LumosConfig.preset("3b")).parameters())


# ---- the command

COMMAND = ["plan", "--config", "configs/lumos1/3b-stage2.yaml", "--gpus", "48"]


def test_the_command_prints_what_a_team_decides_on(capsys):
    assert main(COMMAND) == 0
    text = capsys.readouterr().out
    assert text.startswith("3b-stage2: 3,614,630,912 parameters\n48 x h100, 80 GiB and 989.4 TFLOP/s each; ")
    assert "40% of that (--utilisation)" in text
    for name in ("weights", "gradients", "optimizer", "activations", "logits", "ZeRO 0", "ZeRO 3 *", "on CPU", "days"):
        assert name in text
    assert "runs/3b-stage1/export, which is not there yet, has the shape of 3b" in text


def test_json_holds_the_same(capsys):
    assert main([*COMMAND, "--json", "--gpu", "h20", "--utilisation", "0.2", "training.max_steps=1000"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["hardware"] == {"name": "h20", "count": 48, "memory": 96 * GIB, "peak": 148e12}
    assert report["total"]["steps"] == 1000
    assert report["total"]["seconds"] == pytest.approx(report["total"]["flops"] / (48 * 148e12 * 0.2))
    for way in report["memory"]:
        assert way["fits"] == (max(way["step"], way["start"]) + RESERVED <= 96 * GIB)


@pytest.mark.parametrize("optimizer", ["muon", "adafactor"])
def test_whole_matrices_leave_out_what_divides_them(optimizer: str):
    choice = f"training.optimizer={optimizer}"
    plan = planned(choice, "deepspeed.config=configs/deepspeed/zero0.json")
    assert [strategy.sharding.name for strategy in plan.strategies()] == ["ZeRO 0"]
    alone = planned(choice, "deepspeed.config=null", "training.batch_size=1", "data.stages=[]", hardware=replace(H100, count=1))
    assert [strategy.sharding.name for strategy in alone.strategies()] == ["no DeepSpeed", "ZeRO 0"]


def test_rows_and_columns_of_the_3b_recipe_by_hand():
    """A matrix [m, n] has m + n values, a vector all of its own; the QK norms are stored as matrices of one row."""
    file = "deepspeed.config=configs/deepspeed/zero0.json"
    plain, factored = (planned(f"training.optimizer={optimizer}", file) for optimizer in ("adamw", "adafactor"))
    ends = 2 * (3072 + 3072) + 2 * (3072 + 1024) + 3 * (3072 + 8192)
    values = 2 * (129_536 + 3072) + 28 * (ends + 2 * 3072 + 4 * (128 + 1)) + 3072
    moments, factors = (
        plan.cost.memory_moments(plan.configured.sharding, 1, plan.groups[0].longest) for plan in (plain, factored)
    )
    assert moments["backward"]["optimizer"] == 8 * PARAMETERS
    assert factors["backward"]["optimizer"] == 4 * values
    assert factors["update"]["optimizer"] == 4 * values + 4 * 129_536 * 3072  # the update of one parameter at a time


def test_a_run_on_cpu_processes(capsys):
    tiny = ["plan", "--config", "configs/lumos1/tiny.yaml", "--gpus", "2", "training.device=cpu", "deepspeed.zero_stage=0"]
    assert main([*tiny, "--peak-tflops", "0.1", "--gpu-memory", "4"]) == 0
    text = capsys.readouterr().out
    assert "2 x CPU process, 4 GiB and 0.1 TFLOP/s each" in text
    assert "ZeRO 0 *" in text
    assert "ZeRO 1" not in text  # Muon takes whole matrices
    one = ["plan", "--config", "tiny", "--json"]
    assert main(one) == 0
    alone = capsys.readouterr().out
    assert main([*one, "--gpus", "1"]) == 0
    assert capsys.readouterr().out == alone
    assert main([*tiny, "--gpu", "h100"]) == 2
    assert "--gpu h100 has no effect with training.device=cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "give --config of a training, for example --config lumos1/3b-stage2 --gpus 48, or --generate for a clip"),
        (["plan", "--config", "none.yaml", "--gpus", "1"], "none.yaml"),
        ([*COMMAND[:-1], "0"], "--gpus 0 is not allowed"),
        ([*COMMAND[:-1], "36"], "is 48; it must be a multiple of the 36 processes"),
        ([*COMMAND, "--gpu", "h1000"], "--gpu h1000 is unknown, did you mean h100? allowed: 3090"),
        ([*COMMAND, "--gpu", "h100", "--gpu-memory", "80", "--peak-tflops", "900"], "--gpu h100 has no effect"),
        ([*COMMAND, "--gpu-memory", "-1"], "--gpu-memory -1.0 is not allowed"),
        ([*COMMAND, "--utilisation", "1.5"], "--utilisation 1.5 is not allowed"),
        ([*COMMAND, "--text-tokens", "-1"], "--text-tokens -1 is not allowed"),
        ([*COMMAND, "training.precision=fp32"], "give --peak-tflops"),
        ([*COMMAND, "data.size=null"], "data.size is null and no shards can be read in shards/256p"),
        ([*COMMAND, "data.size=100x100"], "height and width must be multiples of 32"),
        ([*COMMAND, "data.num_frames=24"], "1 + a multiple of 4"),
        ([*COMMAND, "model.preset=null"], "model.from: runs/3b-stage1/export is no model folder"),
        ([*COMMAND, "training.optimizer=muon"], "ZeRO 3 cuts them"),
        ([*COMMAND, "training.optimizer=adafactor"], "ZeRO 3 cuts them"),
        ([*COMMAND, "training.max_stepz=1"], "max_stepz"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_the_page_shows_what_the_command_prints(capsys):
    page = "".join((ROOT / "docs" / "train" / name).read_text() for name in ("planning.md", "recipes.md"))
    assert main(COMMAND) == 0
    assert capsys.readouterr().out in page
    for size in ("0.5b", "1b", "3b"):
        for stage in ("stage1", "stage2", "384p"):
            report = planned(recipe=f"{size}-{stage}", hardware=replace(H100, peak=989.4e12)).report()
            kinds, (way,) = report["steps"], [way for way in report["memory"] if way["configured"]]
            cells = (
                f"`{size}-{stage}`", f"{report['total']['steps']:,}", " / ".join(f"{kind['tokens'] / 1e6:.2g}" for kind in kinds),
                " / ".join(f"{kind['flops'] / 1e15:.2g}" for kind in kinds), f"{max(way['step'], way['start']) / GIB:.1f}",
                f"{report['total']['days']:.2g}", f"{max(kind['sent'] / kind['seconds'] for kind in kinds) / 1e9:.0f}",
            )  # fmt: skip
            assert f"| {' | '.join(cells)} |" in page


# ---- a clip

CLIP = ["plan", "--generate", "--peak-tflops", "0.1"]


@pytest.mark.parametrize(
    ("guidance", "frames", "options"),
    [(1.0, 1, {}), (1.0, 3, {}), (3.0, 1, {}), (3.0, 3, {}), (3.0, 4, {"later_steps": 2, "history_frames": 1}),
     (3.0, 3, {"guidance_interval": (0.0, 0.5)}), (1.0, 3, {"step_reuse": 2}), (3.0, 3, {"step_reuse": 3}),
     (3.0, 3, {"step_reuse": 3, "guidance_interval": (0.5, 1.0), "history_frames": 1})],
)  # fmt: skip
def test_the_flops_of_a_clip_are_those_that_torch_counts(model, config, guidance: float, frames: int, options: dict):
    """The plan leaves out work on a prefix other than its keys and values: attention to itself, and the rest of the last layer."""
    settings = GenerationSettings(num_inference_steps=3, guidance_scale=guidance, **options)
    clip = ClipDefaults(num_frames=4 * frames - 3, height=16, width=24, fps=8, target_size=None)
    plan = LumosClipCost(config, clip, settings, 7, torch.float32)
    prefixes = [torch.tensor(build_prefix(text, fps=8, duration=1, config=config)) for text in (list(range(300, 307)), None)]
    lengths = plan.case.prefix_lengths
    assert lengths == [len(prefix) for prefix in prefixes][: len(lengths)]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        made = generate_frames(
            model, prefixes[:1], prefixes[1:] if guidance > 1 else None, grid=(2, 3), new_frames=frames, settings=settings,
            generators=[torch.Generator()],
        )  # fmt: skip
        assert sum(1 for _ in made) == frames
    c, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    left_out = sum(2 * 2 * layers * c * n * n + 2 * n * (2 * c * c + 3 * c * f) for n in lengths)
    assert counter.get_total_flops() == plan.report(1e12, 0.5)["flops"]["total"] + left_out


def test_bytes_of_a_clip_are_those_of_the_tensors(model, config):
    clip = ClipDefaults(num_frames=9, height=16, width=24, fps=8, target_size=None)
    for options, rows in (
        ({"guidance_scale": 1.0}, 1), ({"guidance_scale": 3.0}, 2), ({"guidance_scale": 3.0, "image_guidance_scale": 3.0}, 2),
        ({"guidance_scale": 3.0, "image_guidance_scale": 1.0}, 2), ({"guidance_scale": 3.0, "image_guidance_scale": 2.0}, 3),
        ({"guidance_scale": 1.0, "image_guidance_scale": 2.0}, 3),
    ):  # fmt: skip
        settings = GenerationSettings(**options)
        alone = clip_cost(config, clip, settings, 7, torch.bfloat16)  # of text alone, which no image guides
        assert len(alone.case.prefix_lengths) == (1 if options["guidance_scale"] == 1 else 2)
        report = LumosClipCost(config, clip, settings, 7, torch.bfloat16).report(1e12, 0.5)
        cache = Cache(model.bfloat16(), rows, report["tokens"])
        assert report["bytes"]["cache"] == cache.keys.nbytes + cache.values.nbytes
        assert report["bytes"]["weights"] == sum(p.nbytes for p in model.parameters())


@pytest.mark.slow
def test_advice_is_the_largest_option_with_half_the_cache(config):
    clip = ClipDefaults(num_frames=33, height=64, width=96, fps=8, target_size=None)
    plan = LumosClipCost(config, clip, GenerationSettings(), 7, torch.float32)
    weights, cache = parameter_count(plan.case.model) * 4, plan.case.cache_bytes
    found = dict(lighter(plan, clips=4))
    assert found["--batch-size 2"] == weights + 2 * cache
    assert found["--dtype bfloat16"] == (weights + 4 * cache) / 2
    assert found["--num-frames 13"] <= weights + 2 * cache  # of 9 latent frames, 4 with the text need less than half, 5 more
    assert found["--history-frames 2"] == found["--num-frames 13"]
    assert found["--height 40 --width 64"] <= weights + 2 * cache
    assert len(found) == 5
    advice = out_of_memory_advice(config, clip, GenerationSettings(), 7, torch.float32, 4)
    assert "--num-frames 13 needs" in advice
    assert advice.endswith("`python -m lumos plan --generate` counts other settings")


def test_a_half_precision_picture_can_only_get_smaller(config):
    clip = ClipDefaults(num_frames=1, height=64, width=64, fps=1, target_size=None)
    (options,) = dict(lighter(LumosClipCost(config, clip, GenerationSettings(), 7, torch.bfloat16)))
    assert options == "--height 32 --width 32"  # 40 x 40 leave 46 of 88 tokens, with the text


@pytest.mark.slow
def test_a_clip_of_the_shipped_model(capsys):
    assert main([*CLIP, "--json", "--num-frames", "9", "--guidance-scale", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["latent_frames"], report["codes_of_a_frame"], report["rows"]) == (3, 64, 1)
    assert report["tokens"] == 16 + 5 + 3 * (4 + 8 * 9)
    assert report["steps"] == 12 + 2 * 6  # the shipped model's own later_steps
    assert main([*CLIP, "--json", "--num-frames", "33", "--later-steps", "6", "--history-frames", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["steps"], report["tokens"]) == (12 + 8 * 6, 16 + 5 + 4 * (4 + 8 * 9))
    assert report["seconds"] == pytest.approx(report["flops"]["total"] / (0.1e12 * 0.4))
    assert main([*CLIP, "--preset", "3b", "--dtype", "bfloat16"]) == 0
    text = capsys.readouterr().out
    assert "3b: 3,614,630,912 parameters, bfloat16 on cpu" in text
    assert "25 frames of 672x384 pixels: 7 latent frames of 4,032 codes" in text
    assert f"weights {2 * PARAMETERS / 2**20:,.1f}" in text


def test_options_without_effect_are_noted_in_the_plan(capsys):
    for options, note in (
        (["--num-frames", "1", "--later-steps", "3"], "later_steps=3 has no effect on a single new latent frame"),
        (["--num-inference-steps", "1", "--step-reuse", "2"], "step_reuse=2 has no effect on latent frames of one step"),
        (["--num-frames", "17", "--history-frames", "3"], "history_frames=3 has no effect on a clip of 5 latent frames"),
        (["--num-frames", "17", "--history-frames", "3", "--history-thinning"],
         "history_frames=3, history_thinning=True has no effect on a clip of 5 latent frames"),
        (["--num-frames", "21", "--history-frames", "3", "--history-thinning"],
         "history_thinning=True has no effect on a clip of 6 latent frames with history_frames 3"),
    ):
        assert main([*CLIP, *options]) == 0
        assert capsys.readouterr().err == f"note: {note}\n"


def test_the_peak_is_probed(capsys):
    assert main(["plan", "--generate", "--json", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["peak_from"], report["peak"] > 0) == ("measured", True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*CLIP, "--config", "configs/lumos1/tiny.yaml"], "--config has no effect on the plan of --generate"),
        ([*CLIP, "training.max_steps=3"], "training.max_steps=3 has no effect on the plan of --generate"),
        ([*COMMAND, "--num-frames", "5"], "--num-frames has no effect on the plan of a training"),
        ([*CLIP, "--model", "a", "--preset", "3b"], "give one of them"),
        ([*CLIP, "--model", "a"], "a is no model folder"),
        ([*CLIP, "--preset", "4b"], "unknown preset '4b'; known presets: tiny"),
        ([*CLIP, "--num-frames", "8"], "num_frames 8 is not allowed"),
        ([*CLIP, "--height", "30"], "height 30 is not a multiple of 16"),
        ([*CLIP, "--height", "0"], "height 0 is not allowed"),
        ([*CLIP, "--num-frames", "4001"], "this model was made for at most 8192"),
        ([*CLIP, "--text-tokens", "300"], "this model reads 256"),
        ([*CLIP, "--num-inference-steps", "0"], "num_inference_steps 0 is not allowed"),
        (["plan", "--generate", "--peak-tflops", "0"], "--peak-tflops 0.0 is not allowed"),
    ],
)
def test_mistakes_about_clips_are_one_line(arguments: list[str], message: str, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err

"""The cost of STIV: memory as autograd saves it, FLOPs as torch counts them, and plans of the published sizes."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lumos.benchmarks.roofline import counted_flops
from lumos.cli import main
from lumos.errors import UserError
from lumos.models.stiv import attention, fused
from lumos.models.stiv.activations import ClipTokens, activation_bytes, checkpointed_bytes
from lumos.models.stiv.attention import SAVED
from lumos.models.stiv.configuration import StivConfig
from lumos.models.stiv.cost import (
    StivClipCost,
    StivTrainingCost,
    clip_cost,
    clip_tokens,
    meta_model,
    model_of,
    out_of_memory_advice,
    training_cost,
)
from lumos.models.stiv.flops import block_flops
from lumos.models.stiv.modeling import StivForVideoGeneration
from lumos.models.stiv.passes import passes_of
from lumos.models.stiv.settings import StivOptions
from lumos.pipeline.defaults import ClipDefaults
from lumos.planning.gpus import GIB, Hardware
from lumos.planning.sharding import Sharding
from lumos.planning.training import TrainingPlan
from lumos.training.muon import orthogonal
from lumos.training.settings import build_settings, load_settings


def saved_bytes(model: nn.Module, half: bool, **inputs) -> int:
    """Return the bytes that autograd saves in a forward pass, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=half):
        model(**inputs).sample.square().mean()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", ["clips", "pictures", "given", "masked"])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_activations_are_what_autograd_saves(monkeypatch, half, kind, on_gpu):
    """On a CPU, operators that save fewer bytes run; on a GPU the plain forms run, which this test uses too."""
    if on_gpu:
        monkeypatch.setattr(fused, "DEVICES", set())
        monkeypatch.setattr(attention, "attention_dtype", lambda values: values.dtype)
    frames, side, words, batch = 1 if kind == "pictures" else 9, 8, 12, 4
    config = StivConfig(hidden_size=128, num_hidden_layers=5, latent_channels=4, text_width=128, text_layers=1,
                        temporal_attention=kind != "pictures")  # fmt: skip
    torch.manual_seed(0)
    model = StivForVideoGeneration(config).train()
    given = torch.zeros(batch, frames, dtype=torch.bool)
    given[:, 0] = kind == "given"
    found = saved_bytes(
        model, half, latents=torch.randn(batch, frames, 4, side, side), t=torch.rand(batch),
        text_ids=torch.randint(99, (batch, words)), given=given if kind == "given" else None,
        keep=torch.arange(8).expand(batch, -1) if kind == "masked" else None,
    )  # fmt: skip
    sharding = Sharding(None, half=half, on_gpu=on_gpu, checkpointing=False)
    tokens = ClipTokens((frames, side, side), (frames, 4, 4), words)
    planned = activation_bytes(config, 0.5 if kind == "masked" else 0.0, sharding, batch, tokens, kind == "given")
    if half:  # the copies of the weights, which the plan counts with the weights
        planned += 2 * sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    assert planned == pytest.approx(found, rel=0.06 if kind != "pictures" else 0.2)


def live_bytes() -> int:
    """Return the bytes of all tensors that Python holds."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu"]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("temporal", [True, False])
def test_checkpointing_saves_what_the_plan_says(saved, temporal):
    """Three more blocks save three times the bytes of one block."""
    d, frames, batch, held = 128, 4 if temporal else 1, 6, {}
    for layers in (2, 5):
        config = StivConfig(hidden_size=d, num_hidden_layers=layers, latent_channels=4, text_encoder="folder", text_width=d,
                            temporal_attention=temporal)  # fmt: skip
        model = StivForVideoGeneration(config).train()
        model.gradient_checkpointing_enable({"context_fn": SAVED[saved]})
        inputs = torch.randn(batch, frames, 4, 16, 16), torch.rand(batch), torch.randn(batch, 2, d), None, torch.randn(batch, d)
        before = live_bytes()
        loss = model(*inputs).sample.square().mean()
        held[layers] = live_bytes() - before
        del loss
    sharding = Sharding(None, half=False, on_gpu=False, checkpointing=True)
    planned = batch * frames * 64 * checkpointed_bytes(config, sharding, saved, config.parts_of(0))
    assert (held[5] - held[2]) / 3 == pytest.approx(planned, rel=0.03)


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the largest sum of bytes of the tensors that operators have returned and that still exist."""

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.known, self.held = {x.untyped_storage().data_ptr() for x in known}, Counter()
        self.now = self.peak = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for tensor in (x for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            storage = tensor.untyped_storage()
            if (key := (storage.data_ptr(), storage.nbytes()))[0] not in self.known:
                self.now += 0 if self.held[key] else key[1]
                self.held[key] += 1
                weakref.finalize(tensor, self.forget, key)
        self.peak = max(self.peak, self.now)
        return out

    def forget(self, key: tuple[int, int]) -> None:
        self.held[key] -= 1
        self.now -= 0 if self.held[key] else key[1]


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "half"), [(2, False), (2, True), (6, False)])
@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("saved", [None, *SAVED])
def test_a_step_needs_the_memory_of_the_plan(monkeypatch, saved, on_gpu, half, layers):
    """With few tokens a step needs most in the first block, where all gradients exist, with many in the last one."""
    if on_gpu:
        monkeypatch.setattr(fused, "DEVICES", set())
        monkeypatch.setattr(attention, "attention_dtype", lambda values: values.dtype)
    d, frames, side, words = 128, 8, 32 if layers == 2 else 8, 16
    settings = {"saved_outputs": saved, "training": {"activation_checkpointing": True}} if saved else {}
    raw = {"generator": "stiv", "model": {"preset": "stiv-nano"}, "data": {"height": 32, "width": 32, "num_frames": 4}}
    config = StivConfig(hidden_size=d, num_hidden_layers=layers, latent_channels=4, text_encoder="folder", text_width=d)
    model = StivForVideoGeneration(config).train()
    if saved:
        model.gradient_checkpointing_enable({"context_fn": SAVED[saved]})
    inputs = torch.randn(1, frames, 4, side, side), torch.rand(1), torch.randn(1, words, d), None, torch.randn(1, d)
    with Watch(known=model.parameters()) as watched:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(*inputs).sample.square().mean()
        loss.backward()
    cost = StivTrainingCost(config, build_settings(raw | settings), words)
    sharding = Sharding(None, half=half, on_gpu=on_gpu, checkpointing=saved is not None)
    moments = cost.memory_moments(sharding, 1, ClipTokens((frames, side, side), config.grid(frames, side, side), words))
    planned = max(moments[name]["gradients"] + moments[name]["activations"] for name in ("backward", "first"))
    copies = 2 * sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)) if half else 0
    assert planned + copies * (saved is None) == pytest.approx(watched.peak, rel=0.05 if layers == 2 else 0.12)


def test_muon_works_in_the_memory_of_the_plan():
    """Most of its matrices are square: those of attention."""
    raw = {"generator": "stiv", "model": {"preset": "stiv-nano"}, "training": {"optimizer": "muon"},
           "data": {"height": 32, "width": 32, "num_frames": 4}}  # fmt: skip
    cost = training_cost(build_settings(raw), 7)
    gradients = [torch.randn(128, 128) for _ in range(cost.stacked // 128**2)]
    with Watch() as watched:
        orthogonal(torch.stack(gradients))
    sharding = Sharding(None, half=False, on_gpu=False, checkpointing=False, optimizer="muon")
    moments = cost.memory_moments(sharding, 1, cost.sequence(4, 32, 32))
    assert moments["update"]["optimizer"] - moments["backward"]["optimizer"] == pytest.approx(watched.peak, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("more", [{}, {"mask_ratio": 0.5}])
def test_flops_that_are_computed_again_are_those_of_the_plan(saved, more):
    raw = {"generator": "stiv", "model": {"preset": "stiv-nano", "overrides": {"num_hidden_layers": 4}},
           "data": {"height": 64, "width": 64, "num_frames": 4}, "saved_outputs": saved,
           "training": {"activation_checkpointing": True}, **more}  # fmt: skip
    cost = training_cost(build_settings(raw), 7)
    model = StivForVideoGeneration(cost.config).train()
    keep = torch.arange(8)[None] if more else None
    x, t, ids = torch.randn(1, 4, 5, 8, 8), torch.rand(1), torch.zeros(1, 7, dtype=torch.int64)
    counted = {}
    for switch in (False, True):
        if switch:
            model.gradient_checkpointing_enable({"context_fn": SAVED[saved]})
        counted[switch] = counted_flops(
            lambda: model(x, t, text_ids=ids, keep=keep).sample.square().mean().backward(), gradients=True
        )
    again = counted[True] - counted[False]
    assert again == pytest.approx(cost.recomputed_flops(cost.sequence(4, 64, 64)), rel=0.03)


def test_saved_outputs_need_checkpointing():
    with pytest.raises(UserError, match=r"saved_outputs has no effect without training\.activation_checkpointing"):
        build_settings({"generator": "stiv", "model": {"preset": "stiv-nano"}, "saved_outputs": "products"})


def test_training_flops_are_three_forward_passes():
    raw = {"generator": "stiv", "model": {"preset": "stiv-nano"}, "data": {"height": 32, "width": 32, "num_frames": 4}}
    cost = training_cost(build_settings(raw), 7)
    sequence = cost.sequence(4, 32, 32)
    model = meta_model(cost.config)
    with FlopCounterMode(display=False) as counted:
        model(torch.empty(1, 4, 5, 4, 4, device="meta"), torch.empty(1, device="meta"),
              text_ids=torch.zeros(1, 7, dtype=torch.int64, device="meta"))  # fmt: skip
    assert cost.training_flops(sequence, 4) == pytest.approx(3 * counted.get_total_flops(), rel=0.02)
    assert cost.tokens(sequence) == 4 * 4 + 7
    assert cost.codes(sequence) == 4 * 16
    assert cost.supervised(sequence) == 4


def test_supervised_frames_follow_the_shares():
    raw = {"generator": "stiv", "model": {"preset": "stiv-nano"}, "data": {"height": 32, "width": 32, "num_frames": 8},
           "patterns": {"none": 1, "interpolation": 3}, "dropout": {"image": 0.1, "joint": 0.2}}  # fmt: skip
    cost = training_cost(build_settings(raw), 7)
    assert cost.supervised(cost.sequence(8, 32, 32)) == pytest.approx(8 - 0.9 * 0.8 * 0.75 * 4)
    assert cost.supervised(cost.sequence(1, 32, 32)) == 1


@pytest.mark.parametrize(("recipe", "parameters"), [("xl-256", 767_730_112), ("xxl-256", 1_834_427_200), ("m-512", 8_831_572_288)])
def test_published_recipes_have_their_plan(repo, monkeypatch, recipe, parameters):
    monkeypatch.chdir(repo)
    settings = load_settings(f"configs/stiv/{recipe}.yaml")
    plan = TrainingPlan(settings, training_cost, Hardware("h100", 64, 80 * GIB, 1e15), utilisation=0.4, text_tokens=77)
    report = plan.report()
    fewer = (8 - 6) * 2 * 2 * 2 * (2 * settings_width(recipe)) + 2 * 8  # latents of 6 channels instead of 8, patches of 2 x 2 x 2
    assert abs(report["parameters"] - parameters) <= fewer
    side = 32 if "256" in recipe else 64
    assert report["steps"][0]["tokens_of_a_clip"] == 10 * (side // 2) ** 2 + 77
    assert plan.free(plan.configured) > 0


def settings_width(recipe: str) -> int:
    return {"xl-256": 1152, "xxl-256": 1536, "m-512": 3072}[recipe]


def test_a_preset_makes_its_usual_clip_at_once():
    """As in the pipeline, a longer clip begins with keyframes."""
    config, options, clip = model_of(None, "stiv-xl")
    costs = [clip_cost(config, replace(clip, num_frames=n), options, 10, torch.float32) for n in (clip.num_frames, 380)]
    assert [len(cost.passes) for cost in costs] == [1, len(list(passes_of(380, (), clip.num_frames, None)))]
    assert costs[1].activation_bytes == costs[0].activation_bytes


def test_clip_cost_counts_calls_branches_and_passes():
    config, options, clip = *model_of(None, "stiv-tiny")[:2], ClipDefaults(17, 64, 64, 8, None)
    config = StivConfig(**config.to_dict() | {"trained_grid": {"time": 17, "rows": 4, "columns": 4}})

    def total(**changes) -> float:
        shape = ClipDefaults(changes.pop("num_frames", 17), 64, 64, 8, None)
        return StivClipCost(config, shape, options.changed(**changes), 10, torch.float32).report(1e12, 0.5)["flops"]["total"]

    assert total() == pytest.approx(2 * total(guidance_scale=1.0), rel=1e-3)
    assert total(solver="heun") == pytest.approx(2 * total(), rel=1e-3)
    assert total(num_inference_steps=25) == pytest.approx(total() / 2, rel=1e-3)
    assert total(guidance_interval=(0.0, 0.5)) == pytest.approx((50 + 26) / 100 * total(), rel=1e-3)  # k / 50 from 0 to 0.5
    assert total(num_frames=33) > 2 * total()
    assert clip_tokens(config, 17, clip.height, clip.width, 10).tokens == 17 * 16
    assert "--guidance-scale 1 needs" in out_of_memory_advice(config, clip, options, 10, torch.float32, clips=2)


@pytest.mark.parametrize("options", [
    {"num_inference_steps": 12, "guidance_interval": (0.0, 0.5), "shift": 3.0},
    {"num_inference_steps": 5, "guidance_interval": (0.3, 1.0), "solver": "heun", "block_reuse": 3},
    {"num_inference_steps": 4, "block_reuse": 3, "solver": "ab2", "num_frames": 9},
    {"num_inference_steps": 3, "image_guidance_scale": 1.5, "solver": "midpoint", "image": True},
])  # fmt: skip
def test_flops_of_a_clip_are_those_of_its_runs(pipe, frames, options):
    """The rows that the blocks see in the pipeline are those of the plan."""
    shape = ClipDefaults(options.pop("num_frames", 5), 16, 32, 8, None)
    given = {"image": frames[0]} if options.pop("image", False) else {}
    config, seen = pipe.model.config, []
    words = pipe.prompt_tokens("a red circle", shape)
    hooks = [
        block.register_forward_hook(lambda _, inputs, out, i=i: seen.append((i, *inputs[0].shape[:3])))
        for i, block in enumerate(pipe.model.blocks)
    ]
    pipe("a red circle", seed=1, num_frames=shape.num_frames, **given, **options)
    for hook in hooks:
        hook.remove()
    ran = sum(rows * block_flops(config, f, places, words, config.parts_of(i)) for i, rows, f, places in seen)
    plan = StivClipCost(config, shape, pipe.settings.changed(**options), words - 1, torch.float32)
    assert plan.report(1e12, 0.5)["flops"]["layers"] == ran
    assert plan.branches == max(rows for _, rows, *_ in seen)


def test_the_plan_of_a_clip_is_of_text_alone():
    config, options, shape = model_of(None, "stiv-nano")
    with_image = options.changed(image_guidance_scale=1.5)
    costs = [clip_cost(config, shape, chosen, 10, torch.float32).branches for chosen in (options, with_image)]
    assert costs == [2, 2]
    by_image = options.changed(guidance_scale=1.0, image_guidance_scale=1.5, guidance_interval=(0.0, 0.5))
    assert by_image.changed(guidance_scale=1.0) == by_image  # the image still guides, in this interval
    assert clip_cost(config, shape, by_image, 10, torch.float32).branches == 1


def test_a_plan_speaks_of_frames_and_pixels(capsys):
    shape = ["--num-frames", "8", "--height", "64", "--width", "64"]  # 8 is no 1 + a multiple of 4
    assert main(["plan", "--generate", "--peak-tflops", "0.1", "--preset", "stiv-xl", *shape]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Without loading and without decoding to pixels."
    assert main(["plan", "--help"]) == 0
    assert "frames of the clip; 1 makes a picture; Lumos-1 makes" in " ".join(capsys.readouterr().out.split())


def test_a_clip_that_the_pipeline_refuses_has_no_cost():
    config, options, _ = model_of(None, "stiv-tiny")
    with pytest.raises(UserError, match="height"):
        StivClipCost(config, ClipDefaults(17, 60, 64, 8, None), options, 10, torch.float32)
    plan = StivClipCost(config, ClipDefaults(17, 64, 64, 8, None), options, 10, torch.float32)
    with pytest.warns(UserWarning, match="keyframe_stride=4 has no effect on a clip that is made at once"):
        plan.warn_of_effects({"keyframe_stride": 4})
    with pytest.raises(UserError, match="a prompt of 256 tokens is too long"):
        StivClipCost(config, ClipDefaults(17, 64, 64, 8, None), StivOptions(), 256, torch.float32)

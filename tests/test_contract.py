"""Every registered generator fulfils the contract of generators, and so does a toy flow-matching generator."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy_generator
import toy_options
import yaml
from comfyui import execute, widgets
from micro_stiv import micro_pipeline
from page_jobs import job_and_call
from toy_generator import ToyConfig, ToyModel, ToyPipeline

import lumos
from lumos import VideoPipeline, registry
from lumos.cli import main
from lumos.data.curriculum import Curriculum
from lumos.demo.limits import Limits
from lumos.demo.schema import request_schema
from lumos.errors import UserError
from lumos.pipeline.options import SamplingOptions, add_flags, all_options
from lumos.pipeline.request import Request
from lumos.settings import setting
from lumos.training.loop import train
from lumos.training.settings import build_settings, load_settings
from lumos.video.io import read_video
from tokenizer import TextTokenizer, VideoTokenizer

MODELS = {
    "lumos1": {"model": {"preset": "tiny", "overrides": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 96,
        "vocab_size": 1024 + 64, "visual_token_count": 64,
    }}},
    "stiv": {"patterns": {"none": 1, "first": 1}, "model": {"preset": "stiv-nano", "overrides": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "text_width": 64, "text_layers": 1,
        "latent_channels": 3, "text_vocab_size": 600, "patch_size": 1,
    }}},
    "toy": {"model": {"preset": "toy-tiny"}, "width": 6},
}  # fmt: skip


@pytest.fixture(autouse=True)
def two_generators(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "PACKAGES", [*registry.PACKAGES, "toy_generator"])
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def toy_folder(micro_folder, tmp_path_factory) -> Path:
    """A model folder of the toy with the tokenizers of the micro model."""
    folder = tmp_path_factory.mktemp("toy") / "toy"
    torch.manual_seed(0)
    video = VideoTokenizer.from_pretrained(micro_folder)
    ToyPipeline(
        ToyModel(ToyConfig(video.config.embedding_dim)), TextTokenizer.from_pretrained(micro_folder), video,
        clip=toy_generator.ClipDefaults(5, 16, 24, 8, None),
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def stiv_folder(tmp_path_factory) -> Path:
    """A model folder of STIV of random weights, with clips of the size of the others."""
    folder = tmp_path_factory.mktemp("stiv") / "stiv"
    pipe = micro_pipeline(patch_size=1)
    pipe.clip = toy_generator.ClipDefaults(5, 16, 24, 8, None)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(params=list(MODELS))
def name(request) -> str:
    return request.param


@pytest.fixture
def folder(name, micro_folder, stiv_folder, toy_folder) -> Path:
    return {"lumos1": micro_folder, "stiv": stiv_folder, "toy": toy_folder}[name]


@pytest.fixture
def settings_of(name, micro_folder):
    """Settings of a run of two steps."""

    def make(out: Path, **training):
        return build_settings({
            "generator": name, **MODELS[name],
            "tokenizer": {kind: str(micro_folder / f"{kind}_tokenizer") for kind in ("video", "text")},
            "data": {"num_frames": 5, "height": 16, "width": 24, "workers": 0, "validation_clips": 2},
            "training": {"max_steps": 2, "batch_size": 2, "warmup_steps": 1, "lr": 1e-3, "log_every": 1, "eval_every": 2,
                         "save_every_steps": 1, "device": "cpu", "output_dir": str(out), **training},
            "logging": {"peak_tflops": 0.1},
        })  # fmt: skip

    return make


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line and "event" not in line]


def test_registry_names_parts_that_exist(name):
    generator = registry.generator(name)
    for part in ("config", "model", "pipeline", "task", "settings", "sampling"):
        assert inspect.isclass(generator.load(part)), part
    for part in ("cost", "benchmarks", "evaluations", "verbs"):
        for entry, place in getattr(generator, part).items():
            generator.load(part, entry)
            if not isinstance(place, str):
                registry.load(place.arguments)(argparse.ArgumentParser())
    assert generator.load("pipeline").generator == name


def test_unknown_generators_and_model_types_list_the_known(tmp_path):
    with pytest.raises(UserError, match=f"generator 'x' is unknown; allowed: {', '.join(registry.generators())}$"):
        registry.generator("x")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="has model_type 'llama', which no generator here has") as error:
        registry.generator_of(tmp_path)
    known = str(error.value).partition("; known: ")[2].split(", ")
    assert {"lumos (lumos1)", "chameleon (lumos1)", "toy (toy)"} <= set(known)
    assert len(known) == sum(len(generator.model_types) for generator in registry.generators().values())


@pytest.mark.parametrize("name", ["tokenizer-pictures", "lumos-tiny/video_tokenizer"])
def test_a_tokenizer_named_as_a_model_is_called_so(name, capsys):
    folder = str(Path(__file__).parents[1] / "checkpoints" / name)
    with pytest.raises(UserError, match=r"is a video tokenizer, not a model; .*evaluate tokenizer --tokenizer"):
        registry.generator_of(folder)
    for command in (["info", folder], ["info", folder, "--write-trained-on"]):
        assert main(command) == 2
        assert "is a video tokenizer, not a model" in capsys.readouterr().err


def test_public_names_and_recipes_follow_the_registry():
    assert {"ToyConfig", "ToyModel", "ToyPipeline", "VideoPipeline", "LumosConfig", "StivPipeline"} <= set(lumos.__all__)
    assert lumos.ToyPipeline is ToyPipeline
    del lumos.ToyPipeline  # the name is kept after its first use
    recipe = Path("configs", "toy", "own.yaml")
    recipe.parent.mkdir(parents=True)
    recipe.write_text("generator: toy\nmodel: {preset: toy-tiny}\n")
    assert (load_settings("own").generator, load_settings("toy/own").name) == ("toy", "own")


@pytest.mark.slow
def test_a_resumed_training_has_the_losses_of_a_whole_one(settings_of, tmp_path):
    whole = train(settings_of(tmp_path / "whole"))
    train(settings_of(tmp_path / "parts", max_steps=1, schedule="constant"))
    assert whole["steps"] == 2
    stopped = settings_of(tmp_path / "again", max_steps=2)
    train(stopped)
    for later in (tmp_path / "again" / "checkpoints").glob("step-00000002"):
        later.rename(tmp_path / "gone")
    train(stopped)
    assert losses(tmp_path / "again")[-1] == losses(tmp_path / "whole")[-1]


def test_an_export_generates_in_a_fresh_process(name, settings_of, tmp_path, forks):
    export = Path(train(settings_of(tmp_path / "run"))["export"])
    program = (
        "import sys, hashlib; sys.path[:0] = sys.argv[2:]\n"
        "from lumos import VideoPipeline, registry\n"
        "registry.PACKAGES.append('toy_generator')\n"
        "clip = VideoPipeline.from_pretrained(sys.argv[1], device='cpu')('a red circle', seed=3, num_inference_steps=1)\n"
        "print(hashlib.sha256(clip.frames.tobytes()).hexdigest(), clip.frames.shape)"
    )
    tests = Path(__file__).parent  # the folder above comes first: tests/tokenizer would hide the package tokenizer
    done = forks.run(["-c", program, export, tests.parent, tests])
    assert done.returncode == 0, done.stderr[-2000:]
    again = VideoPipeline.from_pretrained(export, device="cpu")("a red circle", seed=3, num_inference_steps=1)
    assert done.stdout.split()[0] == hashlib.sha256(again.frames.tobytes()).hexdigest()
    assert again.frames.shape == (1, 5, 16, 24, 3)


def test_a_saved_pipeline_makes_the_same_clip(folder, tmp_path):
    pipe = VideoPipeline.from_pretrained(folder, device="cpu")
    pipe.save_pretrained(tmp_path / "copy")
    copy = VideoPipeline.from_pretrained(tmp_path / "copy", device="cpu")
    assert np.array_equal(pipe("x", seed=1).frames, copy("x", seed=1).frames)


def test_a_clip_does_not_depend_on_its_batch(folder):
    pipe = VideoPipeline.from_pretrained(folder, device="cpu")
    alone, both = pipe("b", seed=5).frames[0], pipe(["a", "b"], seed=[4, 5]).frames[1]
    assert np.allclose(alone, both, atol=1 / 255)


def test_a_clip_does_not_depend_on_what_the_caller_set(folder):
    """A clip depends neither on torch's default dtype, device and precision, nor on random states, which stay as they are."""
    pipe = VideoPipeline.from_pretrained(folder, device="cpu")
    expected = pipe("a red circle", seed=3, num_inference_steps=1, output_type="uint8").frames
    again = pipe.reconstruct(expected[0])
    for dtype, device in ((torch.float64, None), (torch.bfloat16, "meta")):
        torch.manual_seed(int(1e6))
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)
        torch.set_float32_matmul_precision("medium")
        try:
            found = pipe("a red circle", seed=3, num_inference_steps=1, output_type="uint8").frames
            parts = list(pipe.stream("a red circle", seed=3, num_inference_steps=1))
            assert torch.get_default_dtype() == dtype
            assert torch.get_default_device().type == (device or "cpu")
            assert torch.get_float32_matmul_precision() == "medium"
            assert np.array_equal(pipe.reconstruct(expected[0]), again)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
            torch.set_float32_matmul_precision("highest")
        assert np.array_equal(found, expected)
        assert np.array_equal(np.concatenate([part[0] for part in parts]), expected[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(pipe("a red circle", seed=3, num_inference_steps=1, output_type="uint8").frames, expected)
        assert torch.is_autocast_enabled("cpu")
    with torch.device("meta"):
        pipe = VideoPipeline.from_pretrained(folder, device="cpu")
    assert np.array_equal(pipe("a red circle", seed=3, num_inference_steps=1, output_type="uint8").frames, expected)


def test_a_drawn_seed_does_not_come_from_the_caller(folder):
    pipe = VideoPipeline.from_pretrained(folder, device="cpu")
    seeds = []
    for _ in range(2):
        random.seed(1)
        torch.manual_seed(1)
        before = random.getstate(), torch.get_rng_state()
        seeds += pipe("x", num_inference_steps=1, num_frames=1, output_type="latent").seeds
        assert random.getstate() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])
    assert seeds[0] != seeds[1]


def test_a_pipeline_is_loaded_and_saved_without_bars_in_a_pipe(folder, tmp_path, capfd):
    VideoPipeline.from_pretrained(folder, device="cpu").save_pretrained(tmp_path / "copy")
    assert capfd.readouterr().err == ""


def test_all_64_bits_of_a_seed_count(folder):
    pipe = VideoPipeline.from_pretrained(folder, device="cpu")
    seeds = [3, 3 + 2**32, 3 + 2**63, 2**64 - 1]
    latents = pipe(["a red circle"] * 4, seed=seeds, num_inference_steps=1, output_type="latent").frames
    for i in range(4):
        for j in range(i):
            assert not torch.equal(latents[i], latents[j]), (seeds[i], seeds[j])
    with pytest.raises(UserError, match="seed 18446744073709551616 is not allowed"):
        pipe("a red circle", seed=2**64)


def test_a_stream_has_the_frames_of_a_call(folder):
    pipe = VideoPipeline.from_pretrained(folder, device="cpu")
    streamed = np.concatenate([part for (part,) in pipe.stream("a red circle", seed=2)])
    assert np.array_equal(streamed, pipe("a red circle", seed=2, output_type="uint8").frames[0])


def test_generate_and_lists_write_clips(folder, tmp_path):
    assert main(["generate", "--model", str(folder), "--prompt", "a red circle", "--seed", "1", "--output", "a.webp"]) == 0
    assert json.loads(Path("a.webp.json").read_text())["settings"]["num_frames"] == 5
    Path("list.txt").write_text("a red circle\na blue square\n")
    assert main(["generate", "--model", str(folder), "--prompts", "list.txt", "--output-dir", "clips"]) == 0
    assert len(list(Path("clips").glob("*.mp4"))) == 2
    assert read_video(next(iter(sorted(Path("clips").glob("*.mp4")))))[0].shape == (5, 16, 24, 3)


def test_a_demo_job_writes_the_clip_of_a_call(folder, tmp_path):
    job, made, called = job_and_call(folder, tmp_path)
    assert (job.state, job.progress, job.made) == ("done", 1, 5), job.error
    assert np.abs(made - called).max() <= 4


def test_a_comfyui_node_makes_the_clip_of_a_call(name, folder, nodes, tmp_path):
    shutil.copytree(folder, tmp_path / "models" / "lumos" / name)
    (pipe,) = execute(nodes, "LumosLoader", model=name, dtype="auto")
    inputs = widgets(nodes.NODE_CLASS_MAPPINGS["LumosTextToVideo"]) | {"prompt": "a red circle", "seed": 3, "num_frames": 5}
    images, fps = execute(nodes, "LumosTextToVideo", model=pipe, **inputs)
    called = VideoPipeline.from_pretrained(folder, device="cpu")("a red circle", seed=3).frames[0]
    assert (tuple(images.shape), fps) == ((5, 16, 24, 3), 8.0)
    assert np.abs(images.numpy() - called).max() < 1.5 / 255


def test_plan_counts_trainings_and_clips(name, folder, micro_folder, tmp_path, capsys):
    sections = {"generator": name, **MODELS[name], "tokenizer": {kind: str(micro_folder) for kind in ("video", "text")}}
    Path("run.yaml").write_text(yaml.safe_dump(sections))
    assert main(["plan", "--config", "run.yaml", "--gpus", "2", "--gpu", "a100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] > 0
    assert main(["plan", "--generate", "--model", str(folder), "--peak-tflops", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["flops"]["total"] > 0


def test_a_generator_may_have_no_guidance(monkeypatch, capsys):
    """The number of steps is the only sampling option that all generators have."""
    for module in (toy_options, toy_generator):
        monkeypatch.setattr(module, "ToyOptions", SamplingOptions)
    assert main(["plan", "--generate", "--preset", "toy-tiny", "--peak-tflops", "1"]) == 0
    assert "2 rows; 50 steps" in capsys.readouterr().out


def test_a_caption_is_cut_to_what_the_model_reads(name, settings_of, tmp_path, monkeypatch):
    """Training cuts captions that are too long for generation, and one warning says so."""
    if name == "toy":
        pytest.skip("the toy has no limit of its own")
    settings = settings_of(tmp_path)
    settings.model.overrides["max_prompt_tokens"] = 60
    task = registry.generator(name).load("task")(settings, torch.device("cpu"))
    shape = Curriculum(settings.data.stages, 2)(0)
    real = task.source.clips(0, shape, range(2))
    for caption in ("a red circle moves left and " * 30, "\u7ea2\u5706" * 300):
        long = [replace(clip, caption=caption, name=f"clip {i}") for i, clip in enumerate(real)]
        monkeypatch.setattr(task.source, "clips", lambda *_, long=long: long)
        task.caption_was_cut = False
        with pytest.warns(UserWarning, match=r"the caption of clip 0 has \d+ tokens, and the model reads at most \d+") as said:
            batch = task.prepare(0, shape, range(2), dropout=False)
        assert len(said) == 1
        lengths = batch.batch.lengths
        short = replace(real[0], caption="a red circle")
        monkeypatch.setattr(task.source, "clips", lambda *_, short=short: [short, short])
        assert 0 < lengths[0] - task.prepare(0, shape, range(2), dropout=False).batch.lengths[0] <= 60


@pytest.mark.slow
def test_bench_offers_the_benchmarks_of_all_generators(capsys):
    assert main(["bench", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(target in said for generator in registry.generators().values() for target in generator.benchmarks)
    assert main(["bench", "toy", "--toy-clips", "3", "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["settings"]["toy"] == {"clips": 3}


def test_a_prefix_only_generator_refuses_a_last_image(micro_folder, toy_folder):
    picture = np.zeros((16, 24, 3), np.uint8)
    with pytest.raises(UserError, match="last_image cannot be kept"):
        VideoPipeline.from_pretrained(micro_folder, device="cpu").resolve(Request.of("x", last_image=picture))
    resolved = VideoPipeline.from_pretrained(toy_folder, device="cpu").resolve(Request.of("x", image=picture, last_image=picture))
    assert list(resolved.given[0]) == [0, 4]


def test_options_of_another_generator_are_refused(micro_folder, capsys):
    assert main(["generate", "--model", str(micro_folder), "--prompt", "x", "--noise-scale", "2"]) == 2
    assert "noise_scale is no sampling option of lumos1, did you mean guidance_scale?" in capsys.readouterr().err


# ---- a new option is found in every table that is derived

@pytest.fixture
def swirl(monkeypatch):
    """The toy with four more options, each declared as one field."""

    @dataclass(frozen=True)
    class MoreOptions(toy_options.ToyOptions):
        swirl: float = setting(0.5, "how much the clip swirls", low=0, high=2, step=0.1, trade=True)
        mirror: bool = setting(False, "mirror every second frame")
        weave: str = setting("plain", "how the clip is woven", choices=("plain", "twill"))
        speckle: int = setting(0, "passes of speckle after the last step", low=0, high=9, cost=True)

    for module in (toy_options, toy_generator):
        monkeypatch.setattr(module, "ToyOptions", MoreOptions)
    monkeypatch.setattr(ToyPipeline, "sampling", MoreOptions)
    monkeypatch.setattr(toy_generator.ToySettings, "sampling", MoreOptions)
    ToyPipeline.__init_subclass__()
    return MoreOptions


def test_a_new_option_is_in_flags_lists_and_calls(swirl, toy_folder, capsys):
    from lumos.prompt_lists.rows import columns

    parser = argparse.ArgumentParser()
    add_flags(parser, all_options())
    assert parser.parse_args(["--swirl", "1.5"]).swirl == 1.5
    assert columns()["swirl"].parse("0.7") == 0.7
    assert "swirl" in inspect.signature(VideoPipeline.from_pretrained(toy_folder, device="cpu").__call__).parameters
    assert main(["generate", "--model", str(toy_folder), "--prompt", "x", "--swirl", "1.5", "--output", "s.webp"]) == 0
    assert json.loads(Path("s.webp.json").read_text())["settings"]["swirl"] == 1.5
    capsys.readouterr()
    assert main(["generate", "--model", str(toy_folder), "--prompt", "x", "--swirl", "3", "--output", "s.webp"]) == 2
    assert "swirl 3.0 is not allowed; give 0 to 2" in capsys.readouterr().err


def test_a_new_option_is_in_settings_of_a_training(swirl):
    raw = {"generator": "toy", "model": {"preset": "toy-tiny"}, "generation": {"swirl": 1.0}}
    assert build_settings(raw).generation == {"swirl": 1.0}
    with pytest.raises(UserError, match=r"swirl 9\.0 is not allowed"):
        build_settings({**raw, "generation": {"swirl": 9.0}})


def test_a_new_option_is_in_the_api_the_page_and_the_plan(swirl):
    pytest.importorskip("gradio", reason="the page needs the extra [demo]")
    from lumos.commands.plan import costly_options
    from lumos.demo.api import field_value
    from lumos.demo.page import request_of, sampling_control

    options, pipe = all_options(), SimpleNamespace(sampling=swirl, takes=())
    assert field_value("swirl", "0.7", pipe) == 0.7
    assert field_value("mirror", "True", pipe) is True
    assert field_value("weave", "twill", pipe) == "twill"
    with pytest.raises(UserError, match="mirror 'perhaps' is not allowed; give true or false"):
        field_value("mirror", "perhaps", pipe)
    slider = sampling_control(options["swirl"], 0.5, Limits())
    assert (slider.minimum, slider.maximum, slider.step, slider.value) == (0, 2, 0.1, 0.5)
    assert sampling_control(options["mirror"], True, Limits()).value is True
    names = sampling_control(options["weave"], "plain", Limits())
    assert ([name for name, _ in names.choices], names.value) == (["plain", "twill"], "plain")
    answers = {"prompt": "x", "negative_prompt": "", "given": None, "seed": "", "swirl": 1.5, "mirror": False, "weave": "twill"}
    defaults = {"swirl": 0.5, "mirror": False, "weave": "plain"}
    assert request_of(answers, defaults, pipe).options == {"swirl": 1.5, "weave": "twill"}
    assert {"swirl", "speckle"} <= costly_options().keys()
    assert {"num_inference_steps", "guidance_scale"} <= costly_options().keys()
    assert "noise_scale" not in costly_options()


def test_a_new_option_is_in_comfyui_and_the_http_schema(swirl, nodes, toy_folder):
    node = nodes.NODE_CLASS_MAPPINGS["LumosTextToVideo"]
    inputs = {name: found for group in node.INPUT_TYPES().values() for name, found in group.items()}
    kind, properties = inputs["swirl"]
    assert (kind, *(properties[name] for name in ("default", "min", "max", "step"))) == ("FLOAT", -1, -1, 2, 0.1)
    assert (inputs["mirror"][0], inputs["weave"][0]) == (["default", "true", "false"], ["default", "plain", "twill"])
    assert "speckle" not in inputs  # it has no step
    pipe = VideoPipeline.from_pretrained(toy_folder, device="cpu")
    called = []
    pipe.resolve = lambda request: called.append(request) or ToyPipeline.resolve(pipe, request)
    chosen = {**widgets(node), "prompt": "x", "num_frames": 5, "swirl": 1.5, "weave": "twill"}
    execute(nodes, "LumosTextToVideo", model=pipe, **chosen)
    assert {name: value for name, value in called[0].options.items() if value is not None} == {"swirl": 1.5, "weave": "twill"}
    fields = request_schema(pipe, Limits())["properties"]
    about = {"description": "how much the clip swirls", "minimum": 0, "maximum": 2, "default": 0.5}
    assert fields["swirl"] == {"type": ["number", "null"], **about}
    assert (fields["mirror"]["type"], fields["speckle"]["type"]) == (["boolean", "null"], ["integer", "null"])
    assert fields["weave"]["enum"] == ["plain", "twill", None]


def test_one_declaration_feeds_all_options(swirl):
    options = all_options()
    assert options["swirl"].slider == (0, 2, 0.1)
    assert {"history_mask_ratio", "noise_scale", "swirl"} <= options.keys()
    assert replace(swirl(), swirl=0.1).changed(swirl=None).swirl == 0.1

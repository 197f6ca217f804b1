"""The ComfyUI nodes against the published node interface, with stand-ins for the modules of the application."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import sys
import tomllib
from dataclasses import replace

import numpy as np
import pytest
import torch
from comfyui import Stopped, execute, widgets
from micro_stiv import micro_pipeline

from lumos import LumosPipeline, registry
from lumos.data.trained_on import TrainedOn, write_trained_on
from lumos.errors import UserError
from lumos.pipeline.options import all_options
from lumos.video.frames import on_white


@pytest.fixture
def comfy(comfy, tmp_path, micro_folder):
    """The application with one model in models/lumos."""
    shutil.copytree(micro_folder, tmp_path / "models" / "lumos" / "micro")
    return comfy


@pytest.fixture
def model(nodes):
    return execute(nodes, "LumosLoader", model="micro", dtype="auto")[0]


def test_the_published_interface(nodes):
    assert nodes.NODE_CLASS_MAPPINGS.keys() == nodes.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()
        assert set(inputs) <= {"required", "optional", "hidden"}
        for name, (kind, *options) in [item for group in inputs.values() for item in group.items()]:
            assert isinstance(kind, str | list), name
            assert len(options) <= 1
            if kind in ("INT", "FLOAT"):
                assert options[0]["min"] <= options[0]["default"] <= options[0]["max"]
        assert all(isinstance(kind, str) for kind in node.RETURN_TYPES)
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
        assert callable(getattr(node, node.FUNCTION))
        assert node.CATEGORY == "Lumos"
        json.dumps(inputs)
        accepted = inspect.signature(getattr(node, node.FUNCTION)).parameters
        assert any(p.kind is p.VAR_KEYWORD for p in accepted.values()) or accepted.keys() - {"self"} == inputs["required"].keys()


def test_text_to_video_with_previews(nodes, comfy, model, micro_folder):
    node = nodes.NODE_CLASS_MAPPINGS["LumosTextToVideo"]
    images, fps = execute(nodes, "LumosTextToVideo", model=model, **{**widgets(node), "prompt": "x", "seed": 3, "num_frames": 9})
    assert (images.dtype, images.device.type, tuple(images.shape), fps) == (torch.float32, "cpu", (9, 16, 24, 3), 8.0)
    assert 0 <= images.min() < images.max() <= 1
    alone = LumosPipeline.from_pretrained(micro_folder, device="cpu")("x", num_frames=9, seed=3).frames[0]
    assert np.abs(images.numpy() - alone).max() < 1.5 / 255
    assert [(at, total) for at, total, _ in comfy.seen] == [(i, 6) for i in range(1, 7)]
    previews = [preview for *_, preview in comfy.seen]
    assert [preview is None for preview in previews] == [True, False] * 3
    for number, (form, picture, side) in zip((0, 4, 8), [p for p in previews if p], strict=True):
        assert (form, side) == ("JPEG", 512)
        assert np.array_equal(np.asarray(picture), (images[number] * 255).round().byte().numpy())


@pytest.mark.parametrize("frames", [1, 5])
def test_a_picture_or_a_clip_to_begin_with(nodes, comfy, model, micro_folder, frames):
    given = torch.rand(frames, 16, 24, 4, generator=torch.Generator().manual_seed(0))  # with an alpha channel
    node = nodes.NODE_CLASS_MAPPINGS["LumosImageToVideo"]
    asked = {**widgets(node), "prompt": "x", "seed": 3, "num_frames": 9}
    images, _ = execute(nodes, "LumosImageToVideo", model=model, images=given, **asked)
    white = on_white((given * 255).round().byte().numpy())
    begin = {"image": white[0]} if frames == 1 else {"video": white}
    alone = LumosPipeline.from_pretrained(micro_folder, device="cpu")("x", num_frames=9, seed=3, **begin)
    assert alone.settings["num_given_frames"] == frames
    assert np.abs(images.numpy() - alone.frames[0]).max() < 1.5 / 255  # frames one by one or together: float rounding
    assert len(comfy.seen) == 2 * (3 - 1 - frames // 4)


@pytest.mark.slow
def test_settings_reach_the_model(nodes, model):
    node = nodes.NODE_CLASS_MAPPINGS["LumosTextToVideo"]
    base = {**widgets(node), "prompt": "x", "seed": 3, "num_inference_steps": 6, "num_frames": 17}
    plain, _ = execute(nodes, "LumosTextToVideo", model=model, **base)
    for other in ({"negative_prompt": "a red circle"}, {"num_inference_steps": 4}, {"guidance_scale": 20.0},
                  {"temperature": 50.0}, {"seed": 4}, {"history_mask_ratio": 0.0}):  # fmt: skip
        assert not torch.equal(plain, execute(nodes, "LumosTextToVideo", model=model, **{**base, **other})[0]), other
    still, fps = execute(nodes, "LumosTextToVideo", model=model, **{**base, "num_frames": 1, "width": 16, "height": 8})
    assert (tuple(still.shape), fps) == ((1, 8, 16, 3), 1.0)


def test_cancelling(nodes, comfy, model):
    comfy.stop_after = 3
    node = nodes.NODE_CLASS_MAPPINGS["LumosTextToVideo"]
    with pytest.raises(Stopped):
        execute(nodes, "LumosTextToVideo", model=model, **{**widgets(node), "prompt": "x", "num_frames": 17})
    assert len(comfy.seen) == 3


def test_mistakes_are_said(nodes, model):
    with pytest.raises(UserError, match="no model 'big' in models/lumos; found: micro"):
        execute(nodes, "LumosLoader", model="big", dtype="auto")
    node = nodes.NODE_CLASS_MAPPINGS["LumosTextToVideo"]
    with pytest.raises(UserError, match="num_frames 6 is not allowed"):
        execute(nodes, "LumosTextToVideo", model=model, **{**widgets(node), "prompt": "x", "num_frames": 6})


def test_dtype(nodes):
    assert execute(nodes, "LumosLoader", model="micro", dtype="bfloat16")[0].dtype == torch.bfloat16


OWN = {"CreateVideo": (["images", "fps"], ["VIDEO"]), "SaveVideo": (["video"], []), "LoadImage": ([], ["IMAGE", "MASK"])}


@pytest.mark.parametrize("name", ["text_to_video", "image_to_video"])
def test_sample_workflows_fit_the_nodes(nodes, repo, name):
    flow = json.loads((repo / "integrations/comfyui/example_workflows" / f"{name}.json").read_text())
    by_id = {node["id"]: node for node in flow["nodes"]}
    assert {node["type"] for node in by_id.values()} <= nodes.NODE_CLASS_MAPPINGS.keys() | OWN.keys()
    for link, source, out, target, slot, kind in flow["links"]:
        assert by_id[source]["outputs"][out]["type"] == kind
        assert link in by_id[source]["outputs"][out]["links"]
        assert (by_id[target]["inputs"][slot]["type"], by_id[target]["inputs"][slot]["link"]) == (kind, link)
    for node in by_id.values():
        if (cls := nodes.NODE_CLASS_MAPPINGS.get(node["type"])) is None:
            assert [i["name"] for i in node["inputs"]] == OWN[node["type"]][0]
            assert [o["name"] for o in node["outputs"]] == OWN[node["type"]][1]
            continue
        assert [o["type"] for o in node["outputs"]] == list(cls.RETURN_TYPES)
        inputs = {k: v for group in cls.INPUT_TYPES().values() for k, v in group.items()}
        typed = widgets(cls)
        assert [i["name"] for i in node["inputs"]] == [name for name in inputs if name not in typed]
        # The interface adds a widget of its own behind a seed: fixed, randomize, ...
        expected = [v for n, v in typed.items() for v in ([v, "randomize"] if n == "seed" else [v])]
        saved = node["widgets_values"]  # of an earlier version, if there are fewer: ComfyUI leaves the others at their defaults
        assert [type(v) for v in saved] == [type(v) for v in expected[: len(saved)]]


@pytest.mark.parametrize("name", ["LumosTextToVideo", "LumosImageToVideo"])
def test_new_options_stand_behind_saved_inputs(nodes, monkeypatch, name):
    node = nodes.NODE_CLASS_MAPPINGS[name]
    names = list(node.INPUT_TYPES()["optional"])
    options = {"new": replace(all_options()["solver"], name="new"), **all_options()}
    monkeypatch.setitem(node.INPUT_TYPES.__func__.__globals__, "all_options", lambda: options)
    assert list(node.INPUT_TYPES()["optional"]) == [*names, "new"]


def test_the_sample_request_runs(nodes, comfy, repo, monkeypatch):
    """Run the graph that curl posts as the application does, with stand-ins for the application's own two nodes."""
    graph = json.loads((repo / "integrations/comfyui/api/text_to_video.json").read_text())["prompt"]
    saved = []

    def value(given):
        return run(given[0])[given[1]] if isinstance(given, list) else given

    def run(key):
        kind, inputs = graph[key]["class_type"], {k: value(v) for k, v in graph[key]["inputs"].items()}
        if kind == "CreateVideo":
            return (inputs,)
        if kind == "SaveVideo":
            return saved.append(inputs["video"])
        cls = nodes.NODE_CLASS_MAPPINGS[kind]
        groups = cls.INPUT_TYPES()
        assert groups["required"].keys() <= inputs.keys() <= {name for group in groups.values() for name in group}
        return execute(nodes, kind, **inputs)

    graph["1"]["inputs"]["model"] = "micro"
    run("4")
    assert saved[0]["images"].shape == (5, 16, 24, 3)
    assert saved[0]["fps"] == 8.0


def test_sampling_inputs_are_the_options_of_all_generators(nodes, monkeypatch):
    """An option that a second generator declares with a step is an input, which is passed on only if it was changed."""
    monkeypatch.setattr(registry, "PACKAGES", [*registry.PACKAGES, "toy_generator"])
    node = nodes.NODE_CLASS_MAPPINGS["LumosTextToVideo"]
    shown = {name for name, option in all_options().items() if option.has_control}
    inputs = {name: value for group in node.INPUT_TYPES().values() for name, value in group.items()}
    assert {"noise_scale", "mask_given_frames", "solver"} <= shown <= inputs.keys()
    defaults = {name: inputs[name][1]["default"] for name in shown}
    made = sys.modules[node.__module__].pipeline_arguments
    assert all(made(negative_prompt="", seed=1, **defaults)[name] is None for name in shown)
    chosen = made(negative_prompt="", seed=1, **defaults | {"mask_given_frames": "false", "solver": "ab2"})
    assert (chosen["mask_given_frames"], chosen["solver"]) == (False, "ab2")


def test_the_image_may_guide_on_its_own(nodes, model, monkeypatch):
    node = nodes.NODE_CLASS_MAPPINGS["LumosImageToVideo"]
    optional = list(node.INPUT_TYPES()["optional"])
    assert optional[optional.index("views") + 1] == "image_guidance_scale"  # older saved workflows end before it
    asked = {**widgets(node), "prompt": "x", "seed": 3, "num_frames": 5, "guidance_scale": 2.0}
    assert asked["image_guidance_scale"] == -1
    seen, resolve = [], type(model).resolve
    monkeypatch.setattr(type(model), "resolve", lambda pipe, request: seen.append(resolve(pipe, request)) or seen[-1])
    for scale in (-1.0, 0.0, 2.5):
        execute(nodes, "LumosImageToVideo", model=model, images=torch.rand(1, 16, 24, 3), **asked | {"image_guidance_scale": scale})
    assert [resolved.sampling.image_guidance_scale for resolved in seen] == [None, 0.0, 2.5]


def test_the_image_node_makes_the_uses_of_stiv(nodes):
    pipe = micro_pipeline()
    clip = torch.rand(3, 16, 32, 3)
    node = nodes.NODE_CLASS_MAPPINGS["LumosImageToVideo"]
    usual = {name: value for name, value in widgets(node).items() if name not in ("model", "interpolate", "views")}
    usual |= {"num_inference_steps": 1, "seed": 1, "num_frames": 5}
    for images, uses, count in (
        (clip[:1], {"prompt": "x", "last_image": clip[1:2]}, 5), (clip, {"prompt": "", "interpolate": True}, 5),
        (clip[:1], {"prompt": "", "views": True}, 7), (clip[:1], {"prompt": "x", "interpolate": False, "views": False}, 5),
    ):  # fmt: skip
        images, _ = execute(nodes, "LumosImageToVideo", model=pipe, images=images, **usual | uses)
        assert images.shape == (count, 16, 32, 3)


def test_the_bar_never_goes_back_while_a_long_clip_is_made(nodes, comfy):
    """The second of three runs of the sampler makes keyframes, of which none is shown yet."""
    node = nodes.NODE_CLASS_MAPPINGS["LumosImageToVideo"]
    usual = {name: value for name, value in widgets(node).items() if name != "model"}
    usual |= {"prompt": "x", "num_inference_steps": 2, "seed": 1, "num_frames": 9}
    images, _ = execute(nodes, "LumosImageToVideo", model=micro_pipeline(), images=torch.rand(4, 16, 32, 3), **usual)
    assert images.shape == (9, 16, 32, 3)
    assert [at for at, *_ in comfy.seen] == [1, 2, 3, 5, 6]
    assert {total for _, total, _ in comfy.seen} == {6}


def test_the_image_node_refuses_uses_of_another_generator(nodes, model):
    inputs = widgets(nodes.NODE_CLASS_MAPPINGS["LumosImageToVideo"]) | {"prompt": "x", "views": True}
    with pytest.raises(UserError, match="views is not possible with models of the generator lumos1"):
        execute(nodes, "LumosImageToVideo", model=model, images=torch.rand(1, 16, 24, 3), **inputs)


def test_steps_and_bounds_of_frames(nodes, model):
    """The number of frames goes from 1 in steps of a latent frame; in workflows of earlier versions it is 0, the default."""
    for name in ("LumosTextToVideo", "LumosImageToVideo"):
        node = nodes.NODE_CLASS_MAPPINGS[name]
        kind, how = node.INPUT_TYPES()["required"]["num_frames"]
        assert (kind, how["min"], how["step"]) == ("INT", 1, model.temporal_compression)
        assert how["default"] % how["step"] == how["max"] % how["step"] == 1
        for value in (None, 0, how["min"], how["default"], how["max"]):
            assert node.VALIDATE_INPUTS(num_frames=value) is True
        for value in (-3, 2, 6, how["max"] + how["step"]):
            assert f"num_frames {value} is not possible; give 1 + a multiple of 4" in node.VALIDATE_INPUTS(num_frames=value)
    assert "for example 17" in node.VALIDATE_INPUTS(num_frames=18)
    fps = node.INPUT_TYPES()["required"]["fps"][1]
    assert (fps["min"], fps["max"]) == (0, 120)


@pytest.fixture
def adapter(comfy, tmp_path, micro_folder):
    """An adapter of the micro model in models/loras, with weights drawn at random."""
    peft = pytest.importorskip("peft", reason="adapters need the extra [lora]")
    from lumos import LumosForVideoGeneration
    from lumos.lora import Lora, _peft_config, fingerprints, sample, write_adapter

    network = LumosForVideoGeneration.from_pretrained(micro_folder)
    drawn = torch.Generator().manual_seed(0)
    lora = Lora(rank=2, alpha=4.0, dropout=0.0, targets=["q_proj", "down_proj"])
    base = {"folder": str(micro_folder), "sample": sample(network)}
    record = {"base": base, "tokenizers": fingerprints(micro_folder, micro_folder)}
    wrapped = peft.get_peft_model(network, _peft_config(lora))
    weights = {name.removeprefix("base_model.model."): torch.randn(p.shape, generator=drawn) * 0.2
               for name, p in wrapped.named_parameters() if "lora_" in name}  # fmt: skip
    places = sys.modules["folder_paths"]
    places.add_model_folder_path("loras", str(tmp_path / "models" / "loras"))
    folder = tmp_path / "models" / "loras" / "mine"
    folder.mkdir(parents=True)
    write_adapter(folder, weights, lora, str(micro_folder), record)
    (tmp_path / "models" / "loras" / "other.safetensors").touch()  # of another program
    return folder


def test_a_lora_changes_a_copy_of_the_model(nodes, model, adapter, micro_folder):
    node = nodes.NODE_CLASS_MAPPINGS["LumosLoraLoader"]
    assert node.INPUT_TYPES()["required"]["lora"][0] == ["mine"]
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    found = {strength: execute(nodes, "LumosLoraLoader", model=model, lora="mine", strength=strength)[0]
             for strength in (0.0, 0.5, 1.0)}  # fmt: skip
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())
    whole = LumosPipeline.from_pretrained(micro_folder, lora=adapter, device="cpu").model.state_dict()
    assert any(not torch.equal(whole[name], before[name]) for name in before)
    for name, tensor in found[0.5].model.state_dict().items():
        assert torch.equal(found[0.0].model.state_dict()[name], before[name])
        assert torch.allclose(found[1.0].model.state_dict()[name], whole[name], atol=1e-6)
        assert torch.allclose(tensor, (before[name] + whole[name]) / 2, atol=1e-6)
    clips = [execute(nodes, "LumosTextToVideo", model=pipe, **{**widgets(nodes.NODE_CLASS_MAPPINGS["LumosTextToVideo"]),
                                                              "prompt": "x", "seed": 1, "num_frames": 5})[0]
             for pipe in (model, found[0.0], found[1.0])]  # fmt: skip
    assert torch.equal(clips[0], clips[1])
    assert not torch.equal(clips[0], clips[2])


def test_mistakes_with_a_lora(nodes, model, adapter):
    with pytest.raises(UserError, match="there is no adapter 'none' in models/loras; found: mine"):
        execute(nodes, "LumosLoraLoader", model=model, lora="none", strength=1.0)


def test_loras_in_a_row_add_up_and_bring_their_words(nodes, model, adapter, micro_folder):
    model.trained_on = TrainedOn.of(["a red circle"])
    write_trained_on(adapter, TrainedOn.of(["a blue cat"]))
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    whole = LumosPipeline.from_pretrained(micro_folder, lora=adapter, device="cpu").model.state_dict()
    first = execute(nodes, "LumosLoraLoader", model=model, lora="mine", strength=0.25)[0]
    second = execute(nodes, "LumosLoraLoader", model=first, lora="mine", strength=0.5)[0]
    for pipe, strength in ((second, 0.75), (first, 0.25), (model, 0.0)):
        for name, tensor in pipe.model.state_dict().items():
            assert torch.allclose(tensor, before[name] + strength * (whole[name] - before[name]), atol=1e-6)
    assert (first.trained_on.note(["a blue circle"]), second.trained_on.note(["a blue circle"])) == (None, None)
    assert "blue" in model.trained_on.note(["a blue circle"])


def test_images_in_half_precision_are_taken(nodes, model):
    node = nodes.NODE_CLASS_MAPPINGS["LumosImageToVideo"]
    given = torch.rand(1, 16, 24, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    asked = {**widgets(node), "prompt": "x", "seed": 3, "num_frames": 5}
    half, exact = (execute(nodes, "LumosImageToVideo", model=model, images=images, **asked)[0] for images in (given, given.float()))
    assert torch.equal(half, exact)


def test_the_manager_can_read_what_the_nodes_are(repo):
    project = tomllib.loads((repo / "pyproject.toml").read_text())["project"]
    node = tomllib.loads((repo / "integrations/comfyui/pyproject.toml").read_text())
    assert node["tool"]["comfy"].keys() >= {"PublisherId", "DisplayName", "Icon"}
    assert (node["project"]["version"], node["project"]["requires-python"]) == (project["version"], project["requires-python"])
    (needed,) = node["project"]["dependencies"]
    name, extra = re.fullmatch(r"([\w-]+)\[(\w+)\]", needed).groups()
    assert (name, extra in project["optional-dependencies"]) == (project["name"], True)
    assert re.fullmatch(r"[a-z0-9-]+", node["project"]["name"])

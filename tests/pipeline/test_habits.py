"""Pipelines of both generators have the interface that users of diffusers expect."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from micro_stiv import micro_pipeline
from PIL import Image

from lumos import LumosPipeline, StivPipeline, VideoPipeline
from lumos.data.trained_on import TrainedOn
from lumos.errors import UserError
from lumos.lora import Lora, add_adapters, fingerprints, sample, write_adapter
from lumos.pipeline.adapters import Adapters
from lumos.pipeline.placement import pick_dtype
from lumos.pipeline.request import Request
from lumos.video.io import read_video

PROMPT = "a red circle moves left"


@pytest.fixture(scope="module")
def folders(micro_folder: Path, tmp_path_factory) -> dict[str, Path]:
    stiv = tmp_path_factory.mktemp("models") / "stiv"
    micro_pipeline().save_pretrained(stiv)
    return {"lumos1": micro_folder, "stiv": stiv}


@pytest.fixture(params=["lumos1", "stiv"])
def folder(request, folders) -> Path:
    return folders[request.param]


@pytest.fixture
def pipe(folder: Path) -> VideoPipeline:
    return VideoPipeline.from_pretrained(folder, device="cpu")


def clip(pipe: VideoPipeline) -> np.ndarray:
    return pipe(PROMPT, seed=1, output_type="uint8").frames[0]


def adapter(folder: Path, out: Path, seed: int) -> Path:
    """An adapter folder for the model of a folder, with random weights."""
    model = VideoPipeline.from_pretrained(folder, device="cpu").model
    targets = sorted({name.rpartition(".")[2] for name, part in model.named_modules()
                      if isinstance(part, torch.nn.Linear) and ("layers." in name or "blocks." in name)})  # fmt: skip
    lora = Lora(2, 8.0, 0.0, targets[:2])
    record = {"base": {"folder": str(folder), "sample": sample(model)}, "tokenizers": fingerprints(folder, folder)}
    add_adapters(model, lora)
    torch.manual_seed(seed)
    weights = {name: torch.randn_like(p) for name, p in model.named_parameters() if p.requires_grad}
    out.mkdir()
    write_adapter(out, weights, lora, str(folder), record)
    return out


def test_components_make_another_pipeline(pipe):
    other = type(pipe)(**pipe.components)
    assert all(part is other.components[name] for name, part in pipe.components.items())
    assert {"trained_on", "tokenizer_folders"} <= pipe.components.keys()
    assert (other.settings, other.clip) == (pipe.settings, pipe.clip)
    np.testing.assert_array_equal(clip(other), clip(pipe))


def test_repr_says_what_it_is(pipe):
    text = repr(pipe)
    assert type(pipe).__name__ in text
    assert "float32 on cpu" in text
    assert f"{pipe.clip.num_frames} frames of {pipe.clip.width} x {pipe.clip.height}" in text
    assert all(name in text for name in pipe.component_names)


def test_dtypes_by_name_and_by_the_name_of_diffusers(folder: Path):
    for given in ({"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}):
        assert VideoPipeline.from_pretrained(folder, device="cpu", **given).dtype == torch.bfloat16
    with pytest.raises(UserError, match="both dtype"):
        VideoPipeline.from_pretrained(folder, device="cpu", dtype="float32", torch_dtype="float32")


def test_places_and_dtypes_by_all_their_names(pipe):
    for given in (("float16",), ("cpu", "bfloat16"), (torch.float32,)):
        pipe.to(*given)
        assert str(pipe.dtype).endswith(str(given[-1]).removeprefix("torch."))
    assert pipe.to(dtype="bfloat16").dtype == torch.bfloat16
    for wrong in (torch.complex64, torch.int32, "complex64"):
        with pytest.raises(UserError, match="give one of float32, bfloat16, float16"):
            pipe.to(dtype=wrong)
    assert pipe.dtype == torch.bfloat16
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device 'cuda:0' is not available here; give cpu"):
            pipe.to(0)


def test_a_class_of_another_generator_says_which(folders):
    for cls, name, other in ((StivPipeline, "lumos1", "lumos1"), (LumosPipeline, "stiv", "stiv")):
        with pytest.raises(UserError, match=f"holds a model of the generator {other}; load it with VideoPipeline"):
            cls.from_pretrained(folders[name])


def test_unknown_arguments_of_loading_are_named(folder: Path):
    with pytest.raises(TypeError, match=r"'varient'; .*Pipeline\.from_pretrained takes folder, revision, .*local_files_only"):
        VideoPipeline.from_pretrained(folder, varient="fp16")
    with pytest.raises(TypeError, match=r"'cach_dir', did you mean cache_dir\?"):
        VideoPipeline.from_pretrained(folder, cach_dir="x")


def test_a_clip_to_continue_may_be_a_list_of_any_pictures(pipe):
    given = np.random.default_rng(0).integers(0, 256, (5, pipe.clip.height, pipe.clip.width, 3), dtype=np.uint8)
    whole = pipe.resolve(Request.of(PROMPT, video=given, num_frames=9)).given
    for frames in ([*given], [*torch.from_numpy(given).movedim(-1, 1)], [Image.fromarray(frame) for frame in given]):
        found = pipe.resolve(Request.of(PROMPT, video=frames, num_frames=9)).given
        assert all(np.array_equal(found[0][n], picture) for n, picture in whole[0].items())
        assert found[0].keys() == whole[0].keys()
    with pytest.raises(UserError, match="video are pictures of different sizes"):
        pipe.resolve(Request.of(PROMPT, video=[given[0], given[0, :8]], num_frames=9))


@pytest.mark.parametrize("given", ["floats", "int8", "nn", torch.int8, 3])
def test_other_dtypes_are_refused(given):
    with pytest.raises(UserError, match="give one of float32, bfloat16, float16"):
        pick_dtype(given, None, torch.device("cpu"))


def test_dtype_of_a_device():
    assert pick_dtype(None, None, torch.device("cpu")) == pick_dtype("auto", None, torch.device("cpu")) == torch.float32
    assert pick_dtype(None, None, torch.device("cuda")) == torch.bfloat16


@pytest.mark.slow
def test_adapters_are_loaded_scaled_and_unloaded(folder: Path, pipe, tmp_path: Path):
    pytest.importorskip("peft")
    before = {name: p.detach().clone() for name, p in pipe.model.named_parameters()}
    places = [adapter(folder, tmp_path / name, seed) for seed, name in enumerate("ab")]
    merged = [VideoPipeline.from_pretrained(folder, device="cpu", lora=place).model for place in places]

    def check(*scales: float) -> None:
        for name, parameter in pipe.model.named_parameters():
            differences = [scale * (model.get_parameter(name) - before[name]) for scale, model in zip(scales, merged, strict=True)]
            torch.testing.assert_close(parameter, before[name] + sum(differences), atol=1e-5, rtol=1e-5)

    pipe.load_lora_weights(places[0], "a")
    check(1, 0)
    assert any(not torch.equal(p, before[name]) for name, p in pipe.model.named_parameters())
    pipe.load_lora_weights(places[1])
    check(1, 1)
    assert pipe.get_active_adapters() == ["a", "default_1"]
    pipe.set_adapters(["a", "default_1"], [0.5, -2.0])
    check(0.5, -2)
    pipe.set_adapters("default_1", 0.25)
    check(0, 0.25)
    assert pipe.get_active_adapters() == ["default_1"]
    pipe.disable_lora()
    check(0, 0)
    assert pipe.get_active_adapters() == []
    pipe.enable_lora()
    check(0, 0.25)
    pipe.set_adapters(["a", "default_1"])
    pipe.delete_adapters("a")
    check(0, 1)
    pipe.load_lora_weights(places[0])
    check(1, 1)
    assert pipe.get_active_adapters() == ["default_1", "default_2"]
    pipe.unload_lora_weights()
    assert all(torch.equal(p, before[name]) for name, p in pipe.model.named_parameters())
    pipe.load_lora_weights(places[1], "again")
    check(0, 1)


def test_an_adapter_takes_its_words_with_it(pipe):
    pipe.trained_on = TrainedOn.of(["a red circle"])
    known = {"cats": TrainedOn.of(["a cat"]), "dogs": TrainedOn.of(["a dog"])}
    nothing = {name: {} for name in known}
    pipe._adapters = Adapters(nothing, dict.fromkeys(known, 1.0), trained_on=pipe.trained_on, learned_from=known)
    for words, name in (({"dog"}, "cats"), (set(), "dogs")):
        pipe.delete_adapters(name)
        assert pipe.trained_on.words == {"a", "red", "circle", *words}
    pipe.unload_lora_weights()
    assert pipe.trained_on.words == {"a", "red", "circle"}
    pipe.delete_adapters([])
    assert pipe.trained_on is not None


@pytest.mark.slow
def test_wrong_uses_of_adapters(folder: Path, pipe, tmp_path: Path):
    pytest.importorskip("peft")
    place = adapter(folder, tmp_path / "a", 0)
    with pytest.raises(UserError, match="no adapter 'x'; loaded: none"):
        pipe.set_adapters("x")
    pipe.load_lora_weights(place, "a")
    with pytest.raises(UserError, match="an adapter 'a' already"):
        pipe.load_lora_weights(place, "a")
    with pytest.raises(UserError, match="2 scales for 1 adapters"):
        pipe.set_adapters(["a"], [1.0, 2.0])
    for wrong in ("much", True, float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"holds {wrong!r}; give finite numbers"):
            pipe.set_adapters("a", wrong)
    with pytest.raises(UserError, match="no adapter 'b'; loaded: a"):
        pipe.delete_adapters(["a", "b"])
    with pytest.raises(UserError, match="from_pretrained"):
        type(pipe)(**{**pipe.components, "tokenizer_folders": None}).load_lora_weights(place)


def test_offload_moves_parts_there_and_back_and_changes_no_clip(pipe, monkeypatch):
    plain, moves = clip(pipe), []
    streamed = [part[0] for part in pipe.stream(PROMPT, seed=1)]
    usual = torch.nn.Module.to

    def moved(self: torch.nn.Module, *args, **named):
        moves.append((self, args))
        return usual(self, *args, **named)

    monkeypatch.setattr(torch.nn.Module, "to", moved)
    assert pipe.enable_model_cpu_offload(device="cpu") is pipe
    moves.clear()
    np.testing.assert_array_equal(clip(pipe), plain)
    there = [place for part, (place, *_) in moves if part is pipe.model]
    assert there == [torch.device("cpu"), "cpu"]  # to the working device, which is the CPU here, and back
    assert sum(part is pipe.video_tokenizer for part, _ in moves) == 4  # for encoding and for decoding
    np.testing.assert_array_equal(np.concatenate([part[0] for part in pipe.stream(PROMPT, seed=1)]), np.concatenate(streamed))
    with pytest.raises(UserError, match="CPU offload"):
        pipe.to("cpu")


def test_offload_needs_a_gpu(pipe):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="not available"):
        pipe.enable_model_cpu_offload()


def test_a_progress_bar_is_shown_if_it_is_asked_for(pipe, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    clip(pipe)
    assert sys.stderr.getvalue() == ""
    pipe.set_progress_bar_config(desc="mine")
    clip(pipe)
    assert "mine: 100%" in sys.stderr.getvalue()
    assert f"{pipe.num_timesteps}/{pipe.num_timesteps}" in sys.stderr.getvalue()
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(sys, "stderr", Terminal())
    clip(pipe)
    assert sys.stderr.getvalue() == ""


@pytest.mark.parametrize("output_type", ["np", "pil", "pt", "uint8"])
def test_results_save_and_show_themselves(pipe, tmp_path: Path, output_type: str):
    result = pipe([PROMPT, PROMPT], seed=1, output_type=output_type)
    first, second = pipe([PROMPT, PROMPT], seed=1, output_type="uint8").frames
    files = result.save(tmp_path / "x.webp")
    assert [file.name for file in files] == ["x-0.webp", "x-1.webp"]
    one = pipe(PROMPT, seed=1, output_type=output_type)
    (file,) = one.save(tmp_path / "one.mp4")
    frames, fps = read_video(file)
    assert (len(frames), fps) == (len(first), pipe.clip.fps)
    np.testing.assert_array_equal(result.clips()[1], second)
    html = result._repr_html_()
    assert html.count("data:image/webp;base64,") == 2
    assert "seed 2" in html


def test_latents_are_no_pictures(pipe, tmp_path: Path):
    result = pipe(PROMPT, seed=1, output_type="latent")
    with pytest.raises(UserError, match="latents"):
        result.save(tmp_path / "x.mp4")
    assert "<pre>" in result._repr_html_()

"""The command line: results, their records, and one line for every mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lumos import LumosPipeline
from lumos.cli import main, warnings_as_notes
from lumos.files import folder_sha256
from lumos.video.io import read_image, read_video, write_video


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def generate(micro_folder, capsys):
    """Runs `generate --model micro ...`; returns (exit code, stdout lines, stderr lines)."""

    def call(*args, model=micro_folder):
        code = main(["generate", "--model", str(model), *map(str, args)])
        out, err = capsys.readouterr()
        return code, out.splitlines(), [line for line in err.splitlines() if line.startswith("error")]

    return call


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_text_to_video_writes_a_clip_and_its_record(generate, in_empty_folder):
    code, out, err = generate("--prompt", "a red circle moves left", "--seed", 3)
    assert (code, err) == (0, [])
    path = "outputs/a-red-circle-moves-left-3.mp4"
    assert out[-1].startswith(f"{path}  seed 3  ")
    assert " s  peak memory " in out[-1]
    frames, fps = read_video(path)
    assert (frames.shape, fps) == ((5, 16, 24, 3), 8)
    record = json.loads((in_empty_folder / f"{path}.json").read_text())
    assert record["prompt"] == "a red circle moves left"
    assert record["seed"] == 3
    assert record["settings"]["num_inference_steps"] == 2
    assert {"lumos", "torch", "transformers", "python"} <= record["versions"].keys()
    assert record["seconds"]["total"] > 0
    assert record["peak_memory_mb"] > 0
    assert files(in_empty_folder) == [path, f"{path}.json"]


def test_a_default_name_taken_during_the_work_is_kept(generate, monkeypatch):
    from lumos import VideoPipeline

    taken, stream = Path("outputs/x-3.mp4"), VideoPipeline.stream_encoded

    def another_is_quicker(self, encoded, on_step):
        taken.parent.mkdir(exist_ok=True)
        taken.write_text("another's")
        return stream(self, encoded, on_step)

    monkeypatch.setattr(VideoPipeline, "stream_encoded", another_is_quicker)
    code, out, _ = generate("--prompt", "x", "--seed", 3)
    assert (code, taken.read_text()) == (0, "another's")
    assert out[-1].startswith("outputs/x-3-2.mp4  seed 3")
    assert json.loads(Path("outputs/x-3-2.mp4.json").read_text())["output"] == "outputs/x-3-2.mp4"


def test_a_record_is_enough_to_make_the_clip_again(generate):
    generate("--prompt", "x", "--output", "a.webp")
    record = json.loads(Path("a.webp.json").read_text())
    settings = record["settings"]
    generate("--prompt", record["prompt"], "--seed", record["seed"], "--num-inference-steps", settings["num_inference_steps"],
             "--guidance-scale", settings["guidance_scale"], "--output", "b.webp")  # fmt: skip
    assert np.array_equal(read_video("a.webp")[0], read_video("b.webp")[0])


def test_settings_that_trade_are_taken_and_recorded(generate):
    trades = ["--guidance-interval", 0, 0.5, "--confidence-threshold", 0.9, "--later-steps", 1, "--step-reuse", 2,
              "--history-frames", 2, "--history-thinning"]  # fmt: skip
    assert generate("--prompt", "x", "--num-frames", 21, *trades, "--output", "a.webp")[0] == 0
    settings = json.loads(Path("a.webp.json").read_text())["settings"]
    assert settings["guidance_interval"] == [0.0, 0.5]
    names = ("confidence_threshold", "later_steps", "step_reuse", "history_frames", "history_thinning")
    assert [settings[name] for name in names] == [0.9, 1, 2, 2, True]
    code, _, err = generate("--prompt", "x", "--guidance-interval", 0.6, 0.9, "--output", "b.webp")
    assert (code, len(err)) == (2, 1)
    assert "holds none of 2 steps" in err[0]


@pytest.mark.parametrize("suffix", ["mp4", "gif", "webp"])
def test_output_formats(generate, suffix):
    assert generate("--prompt", "x", "--output", f"sub/out.{suffix}")[0] == 0
    assert read_video(f"sub/out.{suffix}")[0].shape == (5, 16, 24, 3)


def test_pictures(generate, in_empty_folder):
    assert generate("--prompt", "x", "--num-frames", 1, "--output", "picture.png")[0] == 0
    assert read_image("picture.png").shape == (16, 24, 3)
    assert generate("--prompt", "x", "--output", "frames.png")[0] == 0
    assert files(in_empty_folder / "frames") == [f"{i:05d}.png" for i in range(5)]
    assert Path("frames.png.json").exists()


def test_a_model_of_pictures_makes_pngs(micro_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(micro_folder, "pictures")
    defaults = json.loads(Path("pictures/pipeline.json").read_text())
    Path("pictures/pipeline.json").write_text(json.dumps({**defaults, "num_frames": 1}))
    assert main(["generate", "--model", "pictures", "--prompt", "x", "--seed", "1"]) == 0
    assert read_image("outputs/x-1.png").shape == (16, 24, 3)


def test_image_and_video_inputs(generate):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save("photo.png")
    code, _, _ = generate("--prompt", "x", "--image", "photo.png", "--output", "i.webp")
    assert code == 0
    write_video("clip.mp4", np.random.default_rng(0).integers(0, 255, (20, 32, 48, 3), dtype=np.uint8), 8)
    code, _, _ = generate("--prompt", "x", "--video", "clip.mp4", "--num-frames", 9, "--output", "v.webp")
    assert code == 0
    assert len(read_video("v.webp")[0]) == 9
    assert json.loads(Path("v.webp.json").read_text())["settings"]["num_given_frames"] == 5


def huge_picture():
    Image.new("1", (10_000, 10_000)).save("huge.png")
    return "--image", "huge.png"


def corrupt_clip():
    Path("broken.mp4").write_bytes(os.urandom(5000))
    return "--video", "broken.mp4"


def text_as_picture():
    Path("notes.png").write_text("no picture")
    return "--image", "notes.png"


def picture_as_output():
    Image.new("RGB", (24, 16)).save("photo.webp")
    return "--image", "photo.webp", "--output", "photo.webp"


def a_frame_of_the_folder():
    write_video("frames.png", np.zeros((5, 16, 24, 3), np.uint8), 8)
    return "--image", "frames/00004.png", "--output", "frames.png"


def picture_as_preview():
    return *picture_as_output()[:2], "--preview", "photo.webp"


@pytest.mark.parametrize(
    ("make_args", "message"),
    [
        (huge_picture, "10000x10000"),
        (corrupt_clip, "broken.mp4"),
        (text_as_picture, "notes.png"),
        (lambda: ("--prompt", ""), "the prompt is empty"),
        (lambda: ("--prompt", "word " * 5000), "reads at most 256"),
        (lambda: ("--num-frames", "16"), "for example 13 or 17"),
        (lambda: ("--height", "65"), "height 65 is not a multiple of 8"),
        (lambda: ("--output", "clip.avi"), "use one of .mp4, .gif, .webp, .png"),
        (lambda: ("--seed", "-4"), "seed -4 is not allowed"),
        (lambda: ("--image", "nowhere.png"), "nowhere.png"),
        (lambda: ("--guidance-scale", "0"), "guidance_scale 0.0 is not allowed"),
        (lambda: ("--device", "gpu"), "device 'gpu' is unknown"),
        (lambda: ("--fps", "0"), "fps 0 is not allowed"),
        (lambda: ("--output", "result.gif", "--fps", "60"), "(gif: 50)"),
        (lambda: ("--model", "nowhere"), "nowhere"),
        (lambda: ("--last-image", "photo.png"), "last_image cannot be kept"),
        (lambda: ("--prompt", "x", "--prompt", "y"), "2 prompts are given and none of their prompt_frames"),
        (lambda: ("--prompt", "x", "--prompt", "y", "--prompt-frames", "9"), "2 prompts are given and 1 of their prompt_frames"),
        (lambda: ("--prompt", "x", "--prompt", "y", "--prompt-frames", "9", "0"), "each prompt needs at least one frame"),
        (lambda: ("--prompt", "x", "--prompt", "y", "--prompt-frames", "9", "8", "--num-frames", "5"), "17 frames, but num_frames"),
        (lambda: ("--prompt", "x", "--prompt", "y", "--prompt-frames", "8", "9"), "prompt_frames [8, 9] is not allowed"),
        (lambda: ("--preview", "p.png"), "name a .mp4, .gif or .webp file"),
        (lambda: ("--preview", "sub/../result.mp4"), "or another of its files"),
        (lambda: ("--preview", "p.gif", "--fps", "60"), "(gif: 50)"),
        (picture_as_preview, "photo.webp is or holds an input of this run"),
        (picture_as_output, "photo.webp is or holds an input of this run"),
        (a_frame_of_the_folder, "frames is or holds an input of this run"),
        (lambda: ("--model", ""), "has no config.json"),
        (lambda: ("--output", ""), "the suffix '' is unknown"),
        (lambda: ("--preview", "p.mp4", "--num-frames", "1", "--output", "a.png"), "no effect on a picture"),
        (lambda: ("--batch-size", "3"), "--batch-size has no effect on a single clip"),
        (lambda: ("--output-dir", "out"), "--output-dir has no effect on a single clip"),
        (lambda: ("--shard", "1/2"), "--shard has no effect on a single clip"),
    ],
)
def test_a_mistake_is_one_line_exit_code_2_and_no_file(generate, in_empty_folder, make_args, message):
    args = make_args()
    before = files(in_empty_folder)
    prompt = () if "--prompt" in args else ("--prompt", "x")
    code, _, err = generate(*prompt, "--output", "result.mp4", *args)
    assert code == 2
    assert len(err) == 1
    assert message in err[0]
    assert files(in_empty_folder) == before


def test_a_folder_without_weights(generate, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in generate("--prompt", "x", model=tmp_path / "empty")[2][0]


def test_no_write_permission_is_said_before_the_model_loads(generate, in_empty_folder):
    (in_empty_folder / "file").write_text("")
    code, _, err = generate("--prompt", "x", "--output", "file/out.mp4", model="nowhere")
    assert code == 2
    assert "file" in err[0]
    assert "nowhere" not in err[0]


def test_a_full_disk_fails_with_exit_code_1_and_leaves_nothing(generate, in_empty_folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    code, _, err = generate("--prompt", "x", "--output", "out.mp4")
    assert code == 1
    assert "No space left" in err[0]
    assert files(in_empty_folder) == []


@pytest.mark.parametrize("args", [[], ["paint"], ["generate"], ["generate", "--prompt", "x", "--stepz", "3"], ["train"]])
def test_usage_errors(args, capsys):
    assert main(args) == 2


def test_an_option_without_effect_is_one_line(micro_folder, capsys):
    call = ["--prompt", "x", "--seed", 1, "--num-given-frames", 5, "--history-frames", 1, "--output", "a.mp4"]
    with warnings.catch_warnings(action="always"):
        assert main(["generate", "--model", str(micro_folder), *map(str, call)]) == 0
    notes = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if line.startswith("note")]
    assert notes == ["note: num_given_frames=5 has no effect on a clip without video",
                     "note: history_frames=1 has no effect on a clip of 2 latent frames"]  # fmt: skip


def test_warnings_of_libraries_stay_as_they_are(capsys):
    with pytest.warns(UserWarning, match="somewhere else"), warnings_as_notes():
        warnings.warn("somewhere else", stacklevel=1)
    assert capsys.readouterr().err == ""


def test_a_wrong_option_is_one_line(capsys):
    assert main(["generate", "--prompt", "x", "--num-frames", "abc"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_options_without_effect_or_out_of_range(capsys, micro_folder):
    text = ["train-text-tokenizer", "--out", "t"]
    assert main([*text, "--captions", "x.txt", "--worlds", "3"]) == 2
    assert main([*text, "--reserved", "-5"]) == 2
    judge = ["evaluate", "prompts", "--model", str(micro_folder)]
    for wrong in (["--count", "0"], ["--batch-size", "0"], ["--reference", "truth", "--top-k", "3"], ["--kinds", "three"],
                  ["--mask-given-frames"], ["--image-to-video", "--reference", "truth"], ["--num-frames", "6"]):  # fmt: skip
        assert main([*judge, *wrong]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--kinds", "one", "three"], "prompt kind 'three' is unknown"),
        (["--kinds", "one", "one"], "kind 'one' is named twice"),
        (["--kinds", "two_ways", "--num-frames", "1"], "'two_ways' is about motions"),
        (["--kinds", "one", "sprites"], "the picture of the sprite"),
        (["--seed", "-1"], "--seed -1 is not allowed"),
        (["--temperature", "-1"], "temperature -1"),
        (["--animation", "a.mp4"], "a.mp4 cannot be animated"),
        (["--sheet", "a.jpg"], "a.jpg must end in .png"),
        (["--sheet", "a.png", "--output", "./a.png"], "a.png and ./a.png are one file"),
        (["--sheet-clips", "3"], "--sheet-clips has no effect without --sheet or --animation"),
        (["--reference", "truth", "--temperature", "0"], "--temperature has no effect with --reference truth"),
        (["--reference", "truth", "--batch-size", "3"], "--batch-size has no effect with --reference truth"),
    ],
)
def test_wrong_prompt_options_are_refused_before_any_clip(
    micro_folder, no_sprite_pictures, in_empty_folder, capsys, wrong, message
):
    assert main(["evaluate", "prompts", "--model", str(micro_folder), "--count", "1000000", *wrong]) == 2
    said = capsys.readouterr()
    assert message in said.err.splitlines()[-1]
    assert not said.out
    assert not list(Path().iterdir())


def test_prompts_with_their_first_frame_and_longer(micro_folder, tmp_path, capsys):
    file = tmp_path / "r.json"
    options = ["--model", str(micro_folder), "--count", "2", "--num-frames", "9", "--image-to-video", "--output", str(file)]
    assert main(["evaluate", "prompts", *options]) == 0
    written = json.loads(file.read_text())
    assert (written["num_frames"], written["image_to_video"]) == (9, True)
    assert [written[side] for side in ("height", "width")] == [16, 24]
    assert written["model_sha256"] == {"model": folder_sha256(micro_folder)}
    assert written["shares"]["one"]["first_frame"] == 1.0
    assert {"last_frame", "steady"} <= written["clips"]["one"][0].keys()


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"), MemoryError()])
def test_out_of_memory_is_one_line_with_settings_that_need_less(generate, monkeypatch, in_empty_folder, error):
    def full(*_):
        raise error

    monkeypatch.setattr("lumos.models.lumos1.pipeline.generate_frames", lambda *a, **k: full())
    code, _, err = generate("--prompt", "x", "--num-frames", 33, "--output", "x.mp4")
    assert (code, len(err)) == (1, 1)
    assert f"out of memory ({str(error) or 'MemoryError'}); weights" in err[0]
    for options in ("--dtype bfloat16", "--history-frames 2", "--num-frames 13"):
        assert f"{options} needs " in err[0]
    assert files(in_empty_folder) == []


def test_out_of_memory_while_loading_is_one_line(generate, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("lumos.models.lumos1.pipeline.LumosForVideoGeneration.from_pretrained", full)
    code, _, err = generate("--prompt", "x", "--output", "x.mp4")
    assert (code, len(err)) == (1, 1)
    assert "--device-map auto leaves layers in host memory" in err[0]


def test_prompts_over_time(generate):
    times = ["--prompt", "x", "--prompt", "the digit 7 moves up", "--prompt-frames", 9, 8]
    assert generate(*times, "--seed", 1, "--output", "a.webp")[0] == 0
    frames = read_video("a.webp")[0]
    assert len(frames) == 17
    record = json.loads(Path("a.webp.json").read_text())
    assert (record["prompt"], record["later_prompts"]) == ("x", [[9, "the digit 7 moves up"]])
    generate("--prompt", "x", "--num-frames", 17, "--seed", 1, "--output", "b.webp")
    plain = read_video("b.webp")[0]
    assert np.array_equal(frames[:9], plain[:9])
    assert not np.array_equal(frames[9:], plain[9:])


def test_a_preview_grows_and_is_whole_at_any_time(generate, monkeypatch):
    seen = []
    decoder = LumosPipeline.decoder

    def watched(self):
        push = decoder(self)

        def pushed(codes):
            seen.append(len(read_video("p.mp4")[0]) if Path("p.mp4").exists() else 0)
            return push(codes)

        return pushed

    monkeypatch.setattr(LumosPipeline, "decoder", watched)
    assert generate("--prompt", "x", "--num-frames", 13, "--preview", "p.mp4", "--output", "a.mp4", "--seed", 1)[0] == 0
    assert seen == [0, 1, 5, 9]
    assert np.array_equal(read_video("p.mp4")[0], read_video("a.mp4")[0])


@pytest.mark.slow
def test_ten_times_the_training_length_is_written_as_it_is_made(micro_folder, generate, monkeypatch, tmp_path):
    """A frame is freed when later ones are written. The model, made for five latent frames, makes fifty."""
    pipe = LumosPipeline.from_pretrained(micro_folder, device="cpu")
    pipe.model.config.max_position_embeddings = 200
    pipe.save_pretrained(tmp_path / "short")
    made, alive = [], []
    decoder = LumosPipeline.decoder

    def watched(self):
        push = decoder(self)

        def pushed(codes):
            frames = push(codes)
            made.append(weakref.ref(frames))
            alive.append(sum(reference() is not None for reference in made))
            return frames

        return pushed

    monkeypatch.setattr(LumosPipeline, "decoder", watched)
    options = ["--num-frames", 197, "--num-inference-steps", 1, "--output", "long.mp4"]
    code, _, err = generate("--prompt", "x", *options, model=tmp_path / "short")
    assert code == 2
    assert "bound what a frame sees with history_frames" in err[0]
    assert generate("--prompt", "x", *options, "--history-frames", 3, model=tmp_path / "short")[0] == 0
    assert len(read_video("long.mp4")[0]) == 197
    assert len(made) == 50
    assert max(alive) <= 3


def test_help_lists_every_verb(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for verb in ("generate", "train", "train-tokenizer", "train-text-tokenizer", "evaluate", "bench"):
        assert verb in out
        assert main([verb, "--help"]) == 0


def test_evaluate_offers_every_measurement(repo, capsys):
    from lumos.commands.evaluate import measurements

    stems = {path.stem for path in (repo / "lumos/commands").glob("evaluate_*.py")}
    assert {f"evaluate_{name.replace('-', '_')}" for name in measurements()} == stems
    assert main(["evaluate", "--help"]) == 0
    out = capsys.readouterr().out
    for name in measurements():
        assert f"{name} " in out
        assert main(["evaluate", name, "--help"]) == 0
        assert f"lumos evaluate {name} " in capsys.readouterr().out
    for wrong in ([], ["nothing"]):
        assert main(["evaluate", *wrong]) == 2
        assert "prompts" in capsys.readouterr().err


def test_unknown_config_keys(repo, capsys):
    assert main(["train", "--config", str(repo / "configs/lumos1/tiny.yaml"), "training.max_stepz=3"]) == 2
    assert "max_stepz" in capsys.readouterr().err
    assert main(["train-tokenizer", "--config", str(repo / "configs/tokenizer/tiny.yaml"), "stepz=3"]) == 2
    assert "stepz" in capsys.readouterr().err
    assert main(["train", "--config", "nowhere.yaml"]) == 2


def test_text_tokenizer_is_trained_from_a_file(capsys, in_empty_folder):
    (in_empty_folder / "captions.txt").write_text("a red circle moves left\na blue square grows\n" * 50)
    assert main(["train-text-tokenizer", "--captions", "captions.txt", "--vocab-size", "560", "--out", "t"]) == 0
    assert files(in_empty_folder / "t") == ["tokenizer.model"]
    assert main(["train-text-tokenizer", "--captions", "nowhere.txt", "--out", "t2"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_a_signal_in_the_middle_leaves_no_file(micro_folder, repo, in_empty_folder, forks, number, code):
    bars = "import runpy, sys, lumos.progress as bars; bars.SECONDS_BETWEEN_LINES = 0; "
    program = bars + "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    process = forks.start(
        ["-c", program, repo / "generate.py", "--model", micro_folder, "--prompt", "x", "--num-frames", 257,
         "--num-inference-steps", 1000, "--output", "out.mp4"],
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while "part " not in process.stderr and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(60) == code, process.stderr[-500:]
    assert ("error: interrupted" in process.stderr) == (number == signal.SIGINT)
    assert "Traceback" not in process.stderr
    assert files(in_empty_folder) == []

"""The bench at tiny sizes, through the command line: its form, its checks, its memory figures. No times are judged."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import lumos.models.lumos1.benchmarks.attention as attention_bench
from lumos import LumosConfig, LumosForVideoGeneration, LumosPipeline, device_peak
from lumos.benchmarks import isolated, roofline
from lumos.benchmarks.measure import Bench, interleaved, largest_difference
from lumos.cli import main
from lumos.compression import benchmark as compression_bench
from lumos.data.synthetic.sampling import captions
from lumos.errors import RunError
from lumos.models.lumos1.attention import dense_mask
from lumos.models.lumos1.settings import GenerationSettings
from lumos.pipeline.defaults import ClipDefaults
from tokenizer import TextTokenizer, VideoTokenizer, VideoTokenizerConfig

KEYS = ["target", "hardware", "versions", "settings", "measured", "ratios"]
TINY_ATTENTION = ["--lengths", "1024", "--frame-tokens", "100", "--heads", "1", "--head-dim", "8"]
TINY_LOSS = ["--positions", "600", "--hidden-size", "8", "--vocab-size", "6000", "--visual-codes", "3000", "--chunk-size", "50"]
TINY_TRAIN = [
    "--tokens", "600", "--frame-height", "64", "--frame-width", "64", "--channels", "64", "--layers", "1",
    "--text-ids", "9100", "--codes", "3000",
]  # fmt: skip
COMMON = ["--threads", "1", "--repetitions", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model folder of random weights with as few tokens and layers as possible."""
    folder = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    model = LumosForVideoGeneration(LumosConfig.preset(
        "tiny", hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=2024, visual_token_count=1000,
    ))  # fmt: skip
    video = VideoTokenizer(VideoTokenizerConfig(
        channels=8, channels_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), z_channels=4, embedding_dim=4, levels=(8, 5, 5, 5)
    ))  # fmt: skip
    text_folder = folder / "text_tokenizer"
    symbols = [f"<special{i}>" for i in range(1, 255)]
    TextTokenizer.train(captions(0, 200), 900, reserved_symbols=symbols).save_pretrained(text_folder)
    text = TextTokenizer.from_pretrained(text_folder)
    clip = ClipDefaults(num_frames=5, height=32, width=32, fps=8, target_size=None)
    pipe_settings = GenerationSettings(num_inference_steps=2)
    LumosPipeline(model, text, video, pipe_settings, clip).save_pretrained(folder / "model")
    config = model.config.to_dict() | {"num_hidden_layers": 4}
    LumosPipeline(LumosForVideoGeneration(LumosConfig(**config)), text, video, pipe_settings, clip).save_pretrained(folder / "deep")
    return folder / "model"


@pytest.fixture(scope="module", autouse=True)
def _short_products():
    """Measure matrix products for milliseconds only, because no test judges their speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_peak, "matrix_peak_gflops", partial(device_peak.matrix_peak_gflops, seconds=0.01, size=128))
        patch.setattr(roofline, "PRODUCT_SECONDS", 0.001)
        yield


def forked(forks, command, *, input, env, **options):
    return forks.run(command[1:], input=input, env=env)


@pytest.fixture(scope="module")
def everything(model_folder, forks):
    """Run `bench all` and return its stdout, the parsed last line of it, and the parsed file that it wrote.

    Processes that measure memory are forked from one that has imported everything.
    The process that makes clips is started as a user starts it.
    """

    def run(command, *, input, env, **options):
        if json.loads(input)["function"] == "make_clips":
            return subprocess.run(command, input=input, env=env, **options)
        return forked(forks, command, input=input, env=env)

    out, file = io.StringIO(), model_folder.parent / "result.json"
    threads = torch.get_num_threads()
    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr(isolated, "subprocess", SimpleNamespace(run=run))
        shapes = ["--model", str(model_folder), "--shapes", "shipped", "small"]
        deep = ["--teacher", str(model_folder.parent / "deep"), "--keep", "2", "--clips", "2"]
        sizes = [*TINY_ATTENTION, *TINY_LOSS, *TINY_TRAIN, "--sizes", "micro", *deep]
        code = main(["bench", "all", *COMMON, *sizes, *shapes, "--output", str(file)])
    assert code == 0
    assert torch.get_num_threads() == threads
    return out.getvalue(), json.loads(out.getvalue().splitlines()[-1]), json.loads(file.read_text())


@pytest.fixture
def no_memory(monkeypatch):
    """Leave out the processes that measure memory."""
    monkeypatch.setattr(attention_bench, "run_isolated", lambda *args, **kwargs: 1)


def test_the_last_line_and_the_file_hold_the_whole_result(everything):
    out, result, written = everything
    assert result == written
    assert list(result) == KEYS
    assert result["target"] == "all"
    assert {"cpu", "cores", "memory_gb", "gpu", "torch"} == set(result["hardware"])
    assert {"python", "torch", "lumos"} <= set(result["versions"])
    assert result["settings"]["threads"] == 1
    assert result["measured"]["matrix_product_gflops"]["float32"] > 0
    for part in ("settings", "measured", "ratios"):
        assert {"attention", "loss", "train", "generate", "stiv", "compress"} <= set(result[part])
    for table in ("attention:", "loss:", "train:", "generate:", "stiv:", "compress:"):
        assert any(line.startswith(table) for line in out.splitlines())


def test_scores_and_distillation_stand_beside_plain_forms(everything):
    _, result, _ = everything
    measured, ratios = result["measured"]["compress"], result["ratios"]["compress"]
    assert measured["scoring"]["layers"] == 4
    scoring = measured["scoring"]
    assert ratios["scoring"]["scores_over_forwards_time"] == pytest.approx(
        scoring["seconds"] / scoring["seconds_of_forwards"], rel=1e-2
    )
    assert scoring["seconds_per_layer"] == pytest.approx(scoring["seconds"] / 4, rel=1e-2)
    steps = measured["steps"]
    assert list(steps) == [*compression_bench.FORMS, "scores"]
    for form in compression_bench.FORMS:
        expected = steps[form]["seconds"] / steps["training"]["seconds"]
        assert ratios["steps"][f"{form}_over_training_time"] == pytest.approx(expected, rel=1e-2)
        assert steps[form]["extra_memory_mb"] > 0
    assert steps["all"]["extra_memory_mb"] > steps["training"]["extra_memory_mb"]
    assert steps["scores"].keys() == {"seconds", "extra_memory_mb"}
    assert result["settings"]["compress"]["keep"] == 2


@pytest.mark.slow
def test_a_form_of_a_step_computes_its_losses_only(model_folder, tmp_path):
    """Compares with the settings of the form: teacher and critic exist only if a loss needs them."""
    teacher = str(model_folder.parent / "deep")
    settings = compression_bench.CompressionBenchmarkSettings(teacher, 2, 1, ("steps",))
    with compression_bench.student_of(settings) as student:
        for form, off in compression_bench.FORMS.items():
            task = compression_bench.task_of(student, teacher, 1, "cpu", "float32", off)
            assert (task.teacher is None) == (form == "training")
            assert (task.build_auxiliary() is None) == (form.partition(",")[0] not in ("mca", "all"))
            assert bool(task.kept) == (form not in ("training", "kd", "mca"))
            assert task.teacher is None or (next(task.teacher.parameters()).dtype == torch.bfloat16) == ("bf16" in form)


def test_attention_memory_and_ratios(everything):
    """The dense form holds a mask of one byte a pair and its fp32 copy; the segmented form holds neither."""
    _, result, _ = everything
    (row,), (of,) = result["measured"]["attention"], result["ratios"]["attention"]
    assert (row["length"], row["frames"], row["text_tokens"]) == (1024, 10, 24)
    for mode in ("forward", "training"):
        ours, dense = row[mode]["segmented"], row[mode]["dense"]
        assert dense["extra_memory_mb"] > 4.5 > 2 > ours["extra_memory_mb"]
        assert of[mode]["dense_over_segmented_time"] == pytest.approx(dense["seconds"] / ours["seconds"], rel=1e-2)
        assert row[mode]["max_difference"] < 1e-5


def test_loss_memory_and_ratios(everything):
    """Full logits of 600 positions over 6,000 rows are 13.7 MB, a chunk of 50 over 3,000 is 0.6 MB."""
    _, result, _ = everything
    (row,), (of,) = result["measured"]["loss"], result["ratios"]["loss"]
    assert row["full"]["extra_memory_mb"] > 13 > row["chunked"]["extra_memory_mb"]
    assert row["visual"]["extra_memory_mb"] > 6.5
    assert of["full_over_chunked_memory"] > of["visual_over_chunked_memory"] > 1
    assert row["gradients_mb"] == pytest.approx(6600 * 8 * 4 / 2**20, rel=1e-3)


def test_training_memory_and_ratios(everything):
    """The published form holds logits of 600 positions over 12,100 rows, 28 MB, and their gradient.

    Forms with activation checkpointing are compared with each other, and so are forms without it.
    """
    out, result, _ = everything
    made, of = result["measured"]["train"], result["ratios"]["train"]
    assert (made["frames"], made["text_tokens"]) == (7, 61)
    assert 0 < made["supervised"] < 7 * 64
    ours, published = made["lumos"], made["published"]
    assert ours["weights_mb"] == published["weights_mb"]
    assert published["extra_memory_beyond_gradients_mb"] > 29 > ours["extra_memory_beyond_gradients_mb"]
    assert made["max_difference"] < 1e-4
    assert of["published_over_lumos_memory"] > of["lumos_over_llama_memory"]
    for way in ("", "_without_checkpointing"):
        seconds = [made[f"{form}{way}"]["seconds"] for form in ("published", "lumos")]
        assert of[f"published_over_lumos_time{way}"] == pytest.approx(seconds[0] / seconds[1], rel=1e-2)
    assert result["settings"]["train"]["forms"]["published"] == "published method, written plainly"
    assert "published method, written plainly, without checkpointing" in out
    assert of["lumos_over_llama_time"] == pytest.approx(ours["seconds"] / made["llama"]["seconds"], rel=1e-2)


def test_generation_figures(everything):
    _, result, _ = everything
    made, settings = result["measured"]["generate"], result["settings"]["generate"]
    assert (made["frames"], len(made["all_clip_seconds"])) == (5, 2)
    assert min(made["start_seconds"], made["load_seconds"], made["clip_seconds"]) > 0
    assert made["peak_memory_mb"] > 50
    assert settings["generation"]["num_inference_steps"] == 2


def test_generation_is_compared_with_the_baseline(everything):
    """The shapes are too small to change a process's peak for sure, so the test only asks for a value of the memory."""
    _, result, _ = everything
    rows, ratios = result["measured"]["generate"]["shapes"], result["ratios"]["generate"]["shapes"]
    assert [row["shape"] for row in rows] == [of["shape"] for of in ratios] == ["shipped", "small"]
    for row, of in zip(rows, ratios, strict=True):
        assert row["logits_max_difference"] < 1e-4
        assert of["published_over_lumos_time"] == pytest.approx(row["published"]["seconds"] / row["lumos"]["seconds"], rel=1e-2)
        assert row["share_of_bound"] == pytest.approx(row["bound_seconds"] / row["lumos"]["seconds"], rel=1e-2)
        assert row["gflops_that_must_be_done"] == pytest.approx(sum(p["gflops"] for p in row["products"].values()), rel=1e-2)
        assert {"products", "attention", "no operation"} <= set(row["shares_of_time"])
    assert all(row[form]["extra_memory_mb"] >= 0 for row in rows for form in ("published", "lumos"))


def test_stiv_memory_and_ratios(everything):
    _, result, _ = everything
    made, of = (result[part]["stiv"]["training"] for part in ("measured", "ratios"))
    assert [row["max_difference"] < 1e-4 for row in result["measured"]["stiv"]["sampling"]] == [True]
    assert made["max_difference"] < 1e-4
    assert made["plain"]["extra_memory_mb"] > 0
    assert of["products_over_plain_time"] == pytest.approx(made["products"]["seconds"] / made["plain"]["seconds"], rel=1e-2)


def test_bench_of_one_target_has_the_same_form(no_memory, capsys):
    assert main(["bench", "attention", "--json", *COMMON, *TINY_ATTENTION, "--forward-only"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result) == KEYS
    assert result["target"] == "attention"
    (row,) = result["measured"]["attention"]
    assert "forward" in row
    assert "training" not in row


def test_a_wrong_form_is_not_reported(no_memory, monkeypatch, capsys):
    """A segmented form that breaks the causal rule ends the bench before it prints a result."""
    right = attention_bench.attention_for

    def wrong(implementation, layouts, length, device):
        attend = right(implementation, layouts, length, device)
        return attend if implementation == "dense" else lambda layer, q, k, v: attend(layer, q, k, v) * 1.01

    monkeypatch.setattr(attention_bench, "attention_for", wrong)
    assert main(["bench", "attention", *COMMON, *TINY_ATTENTION, "--forward-only"]) == 1
    printed = capsys.readouterr()
    assert "dense and segmented differ by" in printed.err
    assert "ratios" not in printed.out


@pytest.mark.parametrize("bad", [1.001, float("nan")])
def test_every_result_of_every_form_is_compared(bad):
    bench = Bench("cpu", "float32", threads=1, repetitions=1, peak_gflops={})
    forms = {"a": lambda: (torch.ones(3), torch.ones(2)), "b": lambda: (torch.ones(3), torch.tensor([1.0, bad]))}
    with pytest.raises(RunError, match="b and a differ"):
        interleaved(forms, bench, "test")


def test_largest_difference_is_relative_to_the_largest_element():
    assert largest_difference([torch.tensor([100.0, 1.0])], [torch.tensor([100.0, 2.0])]) == pytest.approx(0.01)
    assert largest_difference([torch.zeros(2)], [torch.zeros(2)]) == 0


@pytest.mark.parametrize(("length", "frame_tokens"), [(64, 20), (60, 20), (23, 6)])
def test_allowed_pairs_are_those_of_the_dense_mask(length, frame_tokens):
    layout = attention_bench.layout_of(length, frame_tokens)
    assert layout.frames[-1].end == length
    assert all(f.end - f.start == frame_tokens for f in layout.frames)
    assert attention_bench.allowed_pairs(layout) == int(dense_mask([layout], length).sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nothing"], "invalid choice: 'nothing'"),
        ([], "TARGET"),
        (["attention", "--lengths", "50"], "holds no frame"),
        (["attention", "--lengths", "40000000"], "the mask of dense attention at --lengths 40000000 needs"),
        (["attention", "--frame-tokens", "5"], "at least 6"),
        (["attention", "--positions", "50"], "unrecognized arguments"),
        (["attention", "--threads", "0"], "--threads 0 is not allowed"),
        (["attention", "--device", "nowhere"], "nowhere"),
        (["loss", "--visual-codes", "70", "--vocab-size", "60"], "do not fit"),
        (["loss", "--positions", "0"], "--positions 0"),
        (["generate", "--model", "no-such-folder"], "no model in no-such-folder"),
        (["generate", "--shapes", "huge"], "invalid choice: 'huge'"),
        (["generate", "--shapes", "small", "--guidance-interval", "0.4", "0.6"], "holds none of 3 steps"),
        (["train", "--codes", "16000000"], "the published form at --tokens 8192 --layers 8 --codes 16000000 needs"),
        (["train", "--tokens", "50"], "holds no frame"),
        (["stiv", "--sizes", "huge"], "invalid choice: 'huge'"),
        (["stiv", "--parts"], "--parts"),
        (["train", "--text-ids", "2000"], "--text-ids 2000 --codes 64000 --channels 512: sep token has id 8710"),
        (["train", "--channels", "100"], "multiple of 64"),
        (["all", *TINY_TRAIN, "--model", "no-such-folder"], "no model in no-such-folder"),
    ],
)
def test_mistakes_are_told_before_anything_runs(options, message, capsys):
    assert main(["bench", *options]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_a_damaged_model_is_one_line(tmp_path, capsys, forks, monkeypatch):
    monkeypatch.setattr(isolated, "subprocess", SimpleNamespace(run=partial(forked, forks)))
    (tmp_path / "config.json").write_text("{")
    assert main(["bench", "generate", *COMMON, "--model", str(tmp_path)]) in (1, 2)
    assert capsys.readouterr().err.count("\n") == 1

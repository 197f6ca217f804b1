"""A pruned folder has the predicted size and FLOPs, and loads like the folder that it was made from."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from small_networks import codes, lumos_folder, stiv_folder, tokenizer
from torch.utils.flop_counter import FlopCounterMode

from lumos import LumosForVideoGeneration, StivForVideoGeneration, VideoPipeline
from lumos.compression.networks import DecoderNetwork, GeneratorNetwork, copy_others, network_of, written_counts
from lumos.compression.plans import Plan
from lumos.compression.pruning import predict, prune
from lumos.compression.record import kept_blocks
from lumos.errors import RunError, UserError
from lumos.training.loop import train
from lumos.training.settings import build_settings
from tokenizer import VideoTokenizer

REMOVED = {"lumos": ["1", "2"], "stiv": ["1", "2.temporal", "3.mlp"], "decoder": ["mid", "up.1.0", "idle"]}
SMALLER = {"lumos": {"intermediate_size": 50}, "stiv": {"mlp_ratio": 2}, "decoder": {"decoder_channels": 6}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    lumos = lumos_folder(place / "lumos")
    return {"lumos": lumos, "stiv": stiv_folder(place / "stiv"), "decoder": lumos}


@pytest.fixture(params=["lumos", "stiv", "decoder"])
def kind(request):
    return request.param


def network(folders, kind):
    return network_of(folders[kind], "decoder" if kind == "decoder" else None)


def plan_of(network, remove, **more) -> Plan:
    return Plan("file", network.part, "", tuple(remove), sha256=network.sha256, **more)


def clip(folder) -> torch.Tensor:
    pipe = VideoPipeline.from_pretrained(folder, device="cpu")
    return torch.from_numpy(pipe("a red circle moves left", seed=3, output_type="uint8").frames[0])


@pytest.mark.parametrize("narrow", [False, True])
def test_what_is_written_is_what_was_predicted(folders, kind, narrow, tmp_path):
    parent = network(folders, kind)
    plan = plan_of(parent, REMOVED[kind], sizes=SMALLER[kind] if narrow else {})
    predicted = predict(parent, plan)
    record = prune(parent, plan, tmp_path / "small")
    made = parent.written_at(tmp_path / "small")
    loaded = made.load()
    assert sum(p.numel() for p in loaded.parameters()) == predicted.after["parameters"]
    assert written_counts(made.place) == (predicted.after["parameters"], predicted.after["weight_bytes"])
    assert made.costs(loaded, 1e12) == {name: value for name, value in predicted.after.items() if name != "units"}
    assert predicted.after["flops"] < predicted.before["flops"]
    assert predicted.after["seconds"] == pytest.approx(predicted.after["flops"] / 0.4e12)
    if not narrow:
        assert predicted.before["parameters"] - predicted.owned == predicted.after["parameters"]
    assert json.loads((made.place / "compression.json").read_text()) == json.loads(json.dumps(record))
    assert record["sha256"] == parent.sha256 != made.sha256
    assert record["kept"] == {"lumos": [0, 3], "stiv": [0, 2, 3],
                              "decoder": ["up.1.1", "up.1.upsample", "up.0.0", "up.0.1"]}[kind]  # fmt: skip
    assert record["plan"]["remove"] == REMOVED[kind]
    for when, costs in (("before", predicted.before), ("after", predicted.after)):  # the command prints seconds of its own machine
        assert costs == {**record[when], "seconds": costs["seconds"]}
        assert "seconds" not in record[when]


def test_a_small_model_makes_the_clip_of_a_parent_that_skips(folders, kind, tmp_path):
    """Compares clips of the whole pipeline, which uses the key-value cache."""
    parent = network(folders, kind)
    prune(parent, plan_of(parent, REMOVED[kind]), tmp_path / "small")
    pipe = VideoPipeline.from_pretrained(folders[kind], device="cpu")
    model = pipe.video_tokenizer if kind == "decoder" else pipe.model
    with model.skipping(REMOVED[kind]):
        wanted = torch.from_numpy(pipe("a red circle moves left", seed=3, output_type="uint8").frames[0])
    assert clip(tmp_path / "small").equal(wanted)
    assert not torch.from_numpy(pipe("a red circle moves left", seed=3, output_type="uint8").frames[0]).equal(wanted)


def test_shapes_are_known_without_reading_weights(folders, kind, monkeypatch):
    found = network(folders, kind)
    whole, dtype = found.load(), found.dtype
    shapes = {name: tensor.shape for name, tensor in whole.state_dict().items()}

    def refuse(*args, **options):
        raise AssertionError("weights are read")

    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr("tokenizer.loading.load_file", refuse)
    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.from_pretrained", refuse)
    on_meta = found.on_meta()
    assert {name: tensor.shape for name, tensor in on_meta.state_dict().items()} == shapes
    assert all(tensor.is_meta for tensor in on_meta.state_dict().values())
    ours, theirs = (model.config.to_dict() for model in (on_meta, whole))
    assert {**ours, "_name_or_path": ""} == {**theirs, "_name_or_path": ""}
    assert found.dtype == dtype


LOADS = """
import sys
from pathlib import Path
import torch
from lumos import LumosForVideoGeneration, StivForVideoGeneration, VideoPipeline
from tokenizer import VideoTokenizer
for name, kind in (("lumos", LumosForVideoGeneration), ("stiv", StivForVideoGeneration), ("decoder", VideoTokenizer)):
    folder = Path(sys.argv[1]) / name
    print(sum(p.numel() for p in kind.from_pretrained(folder).parameters()))
    VideoPipeline.from_pretrained(folder, device="cpu")("a red circle", seed=0)
"""


def test_small_models_load_in_a_fresh_process(folders, forks, tmp_path):
    counts = []
    for kind in REMOVED:
        parent = network(folders, kind)
        record = prune(parent, plan_of(parent, REMOVED[kind]), tmp_path / kind)
        counts.append(record["after"]["parameters"])
    done = forks.run(["-c", LOADS, tmp_path])
    assert done.returncode == 0, done.stderr
    assert [int(line) for line in done.stdout.split()] == counts


def test_flops_and_cache_bytes_are_those_that_run(folders, tmp_path):
    parent = network(folders, "lumos")
    predicted = predict(parent, plan_of(parent, ["1", "3"]))
    assert predicted.after["kv_bytes"] * 2 == predicted.before["kv_bytes"]
    flops = []
    for removed in ([], ["1", "3"]):
        with FlopCounterMode(display=False) as counter, torch.device("meta"):
            model = parent.on_meta().without(removed)
            model.model.layers[0].mlp(torch.empty(1, 7, 64, device="meta"))
        flops.append(len(model.model.layers) * counter.get_total_flops())
    assert flops[0] == 2 * flops[1]
    decoding = network(folders, "decoder")
    small = decoding.load().without(["mid"])
    pixels = {}
    for name, model in (("whole", decoding.load()), ("small", small)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.decode(codes(frames=2))
        pixels[name] = counter.get_total_flops()
    before, after = (decoding.flops(model)[0] for model in (decoding.load(), small))
    assert before - after == pytest.approx(pixels["whole"] - pixels["small"], rel=0.02)  # a CPU counts attention otherwise


def test_everything_else_of_a_folder_is_copied(folders, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(folders["lumos"], source)
    for name in ("README.md", "compression.json", ".git", "training.json"):
        (source / name).write_text("{}")
    record = prune(network_of(source), plan_of(network_of(source), ["1"]), tmp_path / "small")
    assert {path.name for path in (tmp_path / "small").iterdir()} == {
        "config.json", "model.safetensors", "compression.json", "pipeline.json", "training.json", "text_tokenizer",
        "video_tokenizer",
    }  # fmt: skip
    assert record["earlier"] == {}
    for part in ("text_tokenizer/tokenizer.model", "video_tokenizer/model.safetensors", "pipeline.json"):
        assert (tmp_path / "small" / part).read_bytes() == (source / part).read_bytes()


def test_pruning_twice_keeps_both_records(folders, tmp_path):
    first = network(folders, "lumos")
    prune(first, plan_of(first, ["1"]), tmp_path / "one")
    second = network_of(tmp_path / "one")
    record = prune(second, plan_of(second, ["1"]), tmp_path / "two")
    assert record["sha256"] == second.sha256
    assert record["earlier"]["sha256"] == first.sha256
    model = LumosForVideoGeneration.from_pretrained(folders["lumos"]).without(["1", "2"])
    again = LumosForVideoGeneration.from_pretrained(tmp_path / "two")
    assert all(a.equal(b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    for teacher, kept in ((first.sha256, [0, 3]), (second.sha256, [0, 2]), ("ab" * 32, [0, 2])):
        assert kept_blocks(str(tmp_path / "two"), [], 2, 4, teacher) == kept


def test_half_precision_stays(folders, tmp_path):
    source = tmp_path / "half"
    shutil.copytree(folders["lumos"], source)
    LumosForVideoGeneration.from_pretrained(source, dtype=torch.float16).save_pretrained(source)
    VideoTokenizer.from_pretrained(source).to(torch.bfloat16).save_pretrained(source / "video_tokenizer")
    for part, removed, dtype in (("model", ["1"], torch.float16), ("decoder", ["mid"], torch.bfloat16)):
        parent = network_of(source, part)
        record = prune(parent, plan_of(parent, removed), tmp_path / part)
        made = network_of(tmp_path / part, part)
        assert made.dtype == dtype
        assert record["after"]["weight_bytes"] == 2 * record["after"]["parameters"]


@pytest.mark.slow
def test_scratch_has_new_weights_in_the_same_shapes(folders, kind, tmp_path):
    parent = network(folders, kind)
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        prune(parent, plan_of(parent, REMOVED[kind], new=True, seed=seed), tmp_path / name)
    a, b, c = (parent.written_at(tmp_path / name).load().state_dict() for name in "abc")
    copied = parent.load().without(REMOVED[kind]).state_dict()
    assert {name: tensor.shape for name, tensor in a.items()} == {name: tensor.shape for name, tensor in copied.items()}
    assert all(a[name].equal(b[name]) for name in a)
    changed = {name for name in a if not a[name].equal(c[name])}
    assert changed
    if kind == "decoder":
        assert all(name.startswith("decoder.") for name in changed)
        assert VideoTokenizer.from_pretrained(tmp_path / "a").encode(torch.zeros(1, 3, 1, 16, 24)).equal(
            VideoTokenizer.from_pretrained(folders[kind]).encode(torch.zeros(1, 3, 1, 16, 24))
        )


def test_a_tokenizer_alone_is_made_smaller(tmp_path):
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    parent = network_of(tmp_path / "tokenizer")
    assert isinstance(parent, DecoderNetwork)
    record = prune(parent, plan_of(parent, ["mid"]), tmp_path / "small")
    assert record["part"] == "decoder"
    small = VideoTokenizer.from_pretrained(tmp_path / "small")
    assert small.decode(codes()).equal(tokenizer().without(["mid"]).decode(codes()))


# ---- what follows: training, adapters, int8


@pytest.fixture
def settings_of(tmp_path):
    def make(folder, out, kind, **sections):
        size = {"lumos": {"height": 16, "width": 24}, "stiv": {"height": 16, "width": 32}}[kind]
        training = {"max_steps": 4, "batch_size": 2, "warmup_steps": 1, "lr": 1e-3, "log_every": 1, "save_every_steps": 2,
                    "keep_last": 9, "device": "cpu", "output_dir": str(out)}  # fmt: skip
        return build_settings({
            "generator": {"lumos": "lumos1", "stiv": "stiv"}[kind], "model": {"from": str(folder)},
            "data": {"num_frames": 5, "workers": 0, **size}, "training": {**training, **sections.pop("training", {})},
            "logging": {"peak_tflops": 0.1}, **sections,
        })  # fmt: skip

    return make


def losses(out) -> list[float]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line and "event" not in line]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lumos", "stiv"])
def test_a_small_model_is_trained_resumed_and_exported(folders, settings_of, kind, tmp_path):
    parent = network(folders, kind)
    prune(parent, plan_of(parent, REMOVED[kind]), tmp_path / "small")
    train(settings_of(tmp_path / "small", tmp_path / "whole", kind))
    train(settings_of(tmp_path / "small", tmp_path / "parts", kind))
    shutil.rmtree(tmp_path / "parts" / "export")
    shutil.rmtree(max((tmp_path / "parts" / "checkpoints").glob("step-*")))
    train(settings_of(tmp_path / "small", tmp_path / "parts", kind))
    assert losses(tmp_path / "parts")[-2:] == losses(tmp_path / "whole")[-2:]
    model = {"lumos": LumosForVideoGeneration, "stiv": StivForVideoGeneration}[kind]
    ours, theirs = (model.from_pretrained(tmp_path / out / "export").state_dict() for out in ("parts", "whole"))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert clip(tmp_path / "parts" / "export").shape == (5, *clip(tmp_path / "small").shape[1:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lumos", "stiv"])
def test_a_small_model_takes_adapters(folders, settings_of, kind, tmp_path):
    pytest.importorskip("peft")
    parent = network(folders, kind)
    prune(parent, plan_of(parent, REMOVED[kind]), tmp_path / "small")
    train(settings_of(tmp_path / "small", tmp_path / "run", kind, lora={"rank": 2}, training={"max_steps": 2}))
    pipe = VideoPipeline.from_pretrained(tmp_path / "small", lora=tmp_path / "run" / "export", device="cpu")
    assert pipe("a red circle", seed=0, output_type="uint8").frames[0].shape[0] == 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lumos", "stiv"])
def test_a_small_model_takes_int8(folders, kind, tmp_path):
    pytest.importorskip("torchao")
    parent = network(folders, kind)
    prune(parent, plan_of(parent, REMOVED[kind]), tmp_path / "small")
    pipe = VideoPipeline.from_pretrained(tmp_path / "small", int8=True, device="cpu")
    assert pipe("a red circle", seed=0, output_type="uint8").frames[0].shape[0] == 5


# ---- faults


def test_an_output_that_exists_is_refused(folders, tmp_path):
    parent = network(folders, "lumos")
    with pytest.raises(UserError, match="exists already"):
        prune(parent, plan_of(parent, ["1"]), tmp_path)


def test_units_that_do_not_fit_leave_nothing(folders, kind, tmp_path):
    parent = network(folders, kind)
    with pytest.raises(UserError, match="there is no unit 'x'"):
        prune(parent, plan_of(parent, ["x"]), tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_weights_that_are_not_the_predicted_ones_are_not_kept(folders, monkeypatch, tmp_path):
    parent = network(folders, "lumos")

    def write_the_parent(self, network, folder):
        copy_others(self.folder, folder, re.compile("nothing"))

    monkeypatch.setattr(GeneratorNetwork, "write", write_the_parent)
    with pytest.raises(RunError, match=r"the written network has .* was predicted; nothing is written"):
        prune(parent, plan_of(parent, ["1"]), tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_what_may_go_wrong_is_said(folders):
    parent = network(folders, "lumos")
    assert predict(parent, plan_of(parent, ["1"])).warnings == ()
    assert "0, an end of the network, goes" in predict(parent, plan_of(parent, ["0"])).warnings[0]
    assert "0 and 3, the ends of the network, go: " in predict(parent, plan_of(parent, ["0", "3"])).warnings[-1]
    decoding = network(folders, "decoder")
    share, *rest = predict(decoding, plan_of(decoding, ["mid", "up.1.0", "up.1.1"])).warnings or [""]
    assert rest == []
    assert share == "" or "of the parameters go: recovery may not be possible" in share

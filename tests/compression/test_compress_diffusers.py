"""`compress diffusers`: what is printed, what is written, and what is refused."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from pages import blocks, verbs
from safetensors.torch import load_file, save_file
from tiny_diffusers import MODELSCOPE, SVD, loaded, output, saved

from lumos.cli import main
from lumos.compression import diffusers_folder, unets
from lumos.compression.diffusers_folder import STEM, write_pruned
from lumos.compression.diffusers_models import SUPPORTED, load, plan_folder
from lumos.compression.record import RECORD
from lumos.errors import RunError

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.slow
WAN = "WanTransformer3DModel"
PAGE = "docs/compression-diffusers.md"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"svd": saved(root / "svd", SVD), "wan": saved(root / "wan", WAN)}


@pytest.fixture
def wan(made, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(made["wan"], tmp_path / "wan")


def compress(model, *options: object) -> int:
    return main(["compress", "diffusers", "--model", str(model), *map(str, options)])


def test_what_is_printed_and_written(made, tmp_path, capsys):
    out = tmp_path / "made" / "small"
    assert compress(made["svd"], "--plan", "vdmini", "--out", out) == 0
    said, err = (text.splitlines() for text in capsys.readouterr())
    record = json.loads((out / RECORD).read_text())
    row = dict(re.match(r"(\S+) +(.*)", line).groups() for line in said if not line.startswith(str(out)))
    assert row["down_blocks.0.0"].endswith("kept")
    assert row["down_blocks.0.1"].endswith("0  removed")
    assert row["down_blocks.2.sampler"].endswith("0  removed")
    counts = record["parameters"]
    assert f"{counts['before']:,}  {counts['after']:,}  " in row["parameters"]
    warned = [line for line in err if line.startswith("note: stock diffusers cannot load the result")]
    assert len(warned) == 1
    name = "lumos.compression.unets.PrunedUNetSpatioTemporalConditionModel"
    assert said[-1] == f"{out}  is written; load it with {name}.from_pretrained"
    assert sorted(path.name for path in out.iterdir()) == [RECORD, "config.json", f"{STEM}.safetensors"]
    assert [path.name for path in out.parent.iterdir()] == ["small"]


def test_the_warning_comes_before_writing(made, tmp_path, capsys, monkeypatch):
    def fails(*_):
        raise RunError("the disk is full")

    monkeypatch.setattr(diffusers_folder, "_write_weights", fails)
    assert compress(made["svd"], "--plan", "B", "--out", tmp_path / "small") == 1
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("note: stock diffusers cannot load")
    assert last == "error: the disk is full"
    assert list(tmp_path.iterdir()) == []


def test_stock_plans_say_nothing_and_name_the_stock_class(made, tmp_path, capsys):
    assert compress(made["wan"], "--plan", "spaced", "--keep", 4, "--out", tmp_path / "small") == 0
    said = capsys.readouterr().out
    assert "note:" not in said
    assert f"load it with diffusers.{WAN}.from_pretrained" in said


def test_a_dry_run_prints_the_same_table_and_writes_nothing(made, tmp_path, capsys):
    assert compress(made["svd"], "--plan", "B-mid", "--out", tmp_path / "small") == 0
    whole = capsys.readouterr().out.splitlines()
    config_alone = tmp_path / "config-alone"
    config_alone.mkdir()
    shutil.copy(made["svd"] / "config.json", config_alone)
    assert compress(config_alone, "--plan", "B-mid", "--dry-run") == 0
    assert capsys.readouterr().out.splitlines() == whole[:-1]
    assert compress(config_alone, "--plan", "B-mid", "--dry-run", "--out", tmp_path / "other") == 0
    assert not (tmp_path / "other").exists()


def test_json_names_units_sizes_and_the_class(made, tmp_path, capsys):
    out = tmp_path / "small"
    assert compress(made["svd"], "--plan", "vdmini", "--out", out, "--json") == 0
    said = capsys.readouterr()
    found, counts = json.loads(said.out), json.loads((out / RECORD).read_text())["parameters"]
    assert found["units"]["down_blocks.0.1"]["after"] == 0 < found["units"]["down_blocks.0.1"]["before"]
    assert [found[when]["parameters"] for when in ("before", "after")] == [counts["before"], counts["after"]]
    assert found["class"] == "lumos.compression.unets.PrunedUNetSpatioTemporalConditionModel"
    assert (found["parent"], found["plan"], found["out"], len(found["notes"])) == (str(made["svd"]), "vdmini", str(out), 1)
    assert "down_blocks.0.1" in said.err
    assert compress(made["svd"], "--plan", "vdmini", "--dry-run", "--json", "--quiet") == 0
    said = capsys.readouterr()
    assert (json.loads(said.out), said.err) == ({**found, "out": None}, "")


def test_risky_plans_are_noted(made, tmp_path, capsys, caplog):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps([f"blocks.{i}" for i in range(5)]))
    assert compress(made["wan"], "--plan", plan, "--dry-run") == 0
    assert "more than half of the parameters" in caplog.text
    assert "blocks.0 is at an end of its list" in caplog.text
    plan.write_text(json.dumps(["down_blocks.1.0"]))
    capsys.readouterr()
    assert compress(made["svd"], "--plan", plan, "--dry-run") == 0
    assert re.search(r"down_blocks\.1\.0 .*reduced to its shortcut", capsys.readouterr().out)
    assert "down_blocks.1.0 cannot be removed" in caplog.text


# ---- weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shards_in_and_out_and_dtypes_stay(tmp_path, dtype):
    folder = saved(tmp_path / "whole", WAN)
    model = diffusers.WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    stored = list((tmp_path / "shards").glob("*.safetensors"))
    assert len(stored) > 3
    pruning = plan_folder(tmp_path / "shards", "deep", [3])
    record = write_pruned(tmp_path / "shards", pruning, tmp_path / "out", shard_bytes=15_000)
    written = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / f"{STEM}.safetensors.index.json").read_text())
    assert [path.name for path in written] == [f"{STEM}-{i + 1:05}-of-{len(written):05}.safetensors" for i in range(len(written))]
    assert len(written) > 2
    theirs = {key: tensor for path in stored for key, tensor in load_file(path).items()}
    for path in written:
        tensors = load_file(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 15_000 or len(tensors) == 1
        for key, tensor in tensors.items():
            assert index["weight_map"][key] == path.name
            parent = theirs[pruning.tensors[key]]
            assert tensor.dtype == parent.dtype
            assert torch.equal(tensor, parent)
    assert set(record["parent"]["sha256"]) == {"config.json", *(path.name for path in stored)}
    student = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "out")
    assert student.config.num_layers == 3


def test_one_file_and_shards_hold_the_same(tmp_path, made):
    pruning = plan_folder(made["svd"], "vdmini")
    write_pruned(made["svd"], pruning, tmp_path / "one")
    write_pruned(made["svd"], pruning, tmp_path / "shards", shard_bytes=4_000_000)
    assert not (tmp_path / "one" / f"{STEM}.safetensors.index.json").exists()
    assert torch.equal(output(loaded(tmp_path / "one"), SVD), output(loaded(tmp_path / "shards"), SVD))


def test_variants_are_read_by_name(wan, tmp_path, capsys):
    (wan / f"{STEM}.safetensors").rename(wan / f"{STEM}.fp16.safetensors")
    assert compress(wan, "--plan", "deep", "--keep", 3, "--out", tmp_path / "small") == 2
    assert f"give --variant for one of {STEM}.fp16.safetensors" in capsys.readouterr().err
    assert compress(wan, "--plan", "deep", "--keep", 3, "--out", tmp_path / "small", "--variant", "fp16") == 0
    assert (tmp_path / "small" / f"{STEM}.safetensors").is_file()


def test_pickled_weights_are_refused(wan, tmp_path, capsys):
    (wan / f"{STEM}.safetensors").rename(wan / f"{STEM}.bin")
    assert compress(wan, "--plan", "deep", "--keep", 3, "--out", tmp_path / "small") == 2
    said = capsys.readouterr().err
    assert ".bin only, which is not opened because it can run code" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "small").exists()


def test_damaged_weights(wan, tmp_path, capsys):
    file, options = wan / f"{STEM}.safetensors", ("--plan", "deep", "--keep", 3, "--out", tmp_path / "small")
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}  # not mapped to the file that is cut
    file.write_bytes(file.read_bytes()[:2000])
    assert compress(wan, *options) == 1
    assert f"cannot read {file}" in capsys.readouterr().err
    save_file({key: tensor for key, tensor in tensors.items() if key != "blocks.5.ffn.net.2.bias"}, file)
    assert compress(wan, *options) == 1
    assert "lack blocks.5.ffn.net.2.bias (for blocks.2.ffn.net.2.bias)" in capsys.readouterr().err
    save_file(tensors | {"proj_out.bias": torch.zeros(3)}, file)
    assert compress(wan, *options) == 1
    assert "proj_out.bias of" in capsys.readouterr().err
    file.unlink()
    assert compress(wan, *options) == 2
    assert "has no weights" in capsys.readouterr().err
    (wan / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": {"proj_out.bias": "shard-1.safetensors"}}))
    assert compress(wan, *options) == 2
    assert "lacks the shard shard-1.safetensors" in capsys.readouterr().err
    (wan / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": {"proj_out.bias": "../other/x.safetensors"}}))
    assert compress(wan, *options) == 1
    assert "does not say in which file" in capsys.readouterr().err
    save_file({"proj_out.bias": tensors["proj_out.bias"]}, file := wan / "shard-1.safetensors")
    (wan / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "shard-1.safetensors")}))
    assert compress(wan, *options) == 1
    assert f"cannot read {file}" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"wan"}


# ---- what is refused


def test_a_folder_with_content_is_not_touched(made, tmp_path, capsys):
    out = tmp_path / "small"
    out.mkdir()
    options = (made["wan"], "--plan", "deep", "--keep", 3, "--out", out)
    assert compress(*options) == 0  # it was empty
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert compress(*options) == 2
    assert "exists already and is not empty" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "file").touch()
    assert compress(made["wan"], "--plan", "deep", "--keep", 3, "--out", tmp_path / "file") == 2
    assert "is no folder" in capsys.readouterr().err


def test_another_class_is_refused_with_those_that_are_supported(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    assert compress(tmp_path, "--plan", "vdmini", "--dry-run") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(name in said for name in SUPPORTED)
    assert "'UNet2DConditionModel', which cannot be pruned" in said


@pytest.mark.parametrize(("content", "said"), [
    ("[]", "holds no model of diffusers; supported: UNetSpatioTemporalConditionModel"),
    ('{"model_type": "lumos"}', "holds no model of diffusers; supported"),
    ("{", "not valid JSON"),
    ('{"_class_name": ["WanTransformer3DModel"]}', "which cannot be pruned"),
    ('{"_class_name": "WanTransformer3DModel", "num_layers": "many"}', "no WanTransformer3DModel can be made"),
    ('{"_class_name": "WanTransformer3DModel", "quantization_config": {}}', "holds quantized weights"),
    (None, "has no config.json"),
])  # fmt: skip
def test_other_configs_are_refused(tmp_path, capsys, content, said):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert compress(tmp_path, "--plan", "spaced", "--keep", 2, "--dry-run") == 2
    assert said in capsys.readouterr().err


def test_a_whole_pipeline_is_refused(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text("{}")
    assert compress(tmp_path, "--plan", "vdmini", "--dry-run") == 2
    assert f"give the folder of its network, as in {tmp_path / 'unet'}" in capsys.readouterr().err


@pytest.mark.parametrize(("model", "options", "said"), [
    ("svd", ["--plan", "spaced"], "plan 'spaced' is unknown and no file; UNetSpatioTemporalConditionModel takes vdmini"),
    ("wan", ["--plan", "vdmini"], "WanTransformer3DModel takes spaced, shallow, deep, or a JSON file"),
    ("svd", ["--plan", "vdmini", "--keep", "3"], "--keep has no effect"),
    ("wan", ["--plan", "deep", "--keep", "0"], "--keep 0 is not allowed"),
])  # fmt: skip
def test_options_that_do_not_fit(made, capsys, model, options, said):
    assert compress(made[model], *options, "--dry-run") == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("plan", "said"), [
    ("[]", "is not a plan"),
    ('{"keep": ["blocks.1"]}', "is not a plan"),
    ("[1]", "is not a plan"),
    ('{"class": "CogVideoXTransformer3DModel", "remove": ["blocks.1"]}', "is a plan for 'CogVideoXTransformer3DModel'"),
    ('["transformer_blocks.1"]', "removes 'transformer_blocks.1', which this model does not have"),
])  # fmt: skip
def test_plans_that_are_refused(made, tmp_path, capsys, plan, said):
    (tmp_path / "plan.json").write_text(plan)
    assert compress(made["wan"], "--plan", tmp_path / "plan.json", "--dry-run") == 2
    assert said in capsys.readouterr().err


def test_out_is_needed(made, capsys):
    assert compress(made["wan"], "--plan", "deep", "--keep", 3) == 2
    assert "give --out FOLDER, or --dry-run" in capsys.readouterr().err


def test_without_diffusers(made, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert compress(made["wan"], "--plan", "deep", "--keep", 3, "--dry-run") == 2
    assert "pip install 'lumos-video[diffusers]'" in capsys.readouterr().err


# ---- the page


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A working folder with tiny models where the page has its own."""
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "FOLDER" / "unet", SVD)
    saved(tmp_path / "FOLDER" / "transformer", "HunyuanVideoTransformer3DModel")
    return tmp_path


def test_the_commands_of_the_page(folders, capsys):
    (folders / "plan.json").write_text(blocks(PAGE, "json")[0])
    for command in verbs(PAGE):
        if "--keep" in command:
            at = command.index("--keep")
            command[at + 1 : at + 3] = ["3", "4"]
        assert main(command) == 0, (command, capsys.readouterr().err)
    assert (folders / "FOLDER2" / "config.json").is_file()


def test_the_python_of_the_page(folders):
    from tiny_diffusers import FRAMES, inputs

    plan = plan_folder(folders / "FOLDER" / "unet", "vdmini")
    write_pruned(folders / "FOLDER" / "unet", plan, folders / "FOLDER2")
    loading, recovery = blocks(PAGE, "python")
    names = {"steps": [(inputs(SVD), output(load("FOLDER2"), SVD))], "num_frames": FRAMES}
    exec(loading.partition("pipe = ")[0], names)
    exec(recovery, names)
    assert load("FOLDER3").config["_class_name"] == "PrunedUNetSpatioTemporalConditionModel"


def test_the_page_names_every_plan_and_class():
    from pages import ROOT

    from lumos.compression import transformers

    text = (ROOT / PAGE).read_text()
    for name in (*unets.PLANS, *transformers.PLANS, *unets.KINDS, *transformers.CLASSES):
        assert f"`{name}`" in text, name


def test_modelscope_by_the_command(tmp_path):
    folder = saved(tmp_path / "unet", MODELSCOPE)
    assert compress(folder, "--plan", "vdmini-mid", "--out", tmp_path / "small") == 0
    assert loaded(tmp_path / "small").config["mid_block"] == "whole"


def test_a_pruned_unet_in_the_pipeline_of_its_parent(made, tmp_path):
    """The pipeline of the parent can be opened with another U-Net, as the page says."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    vision = CLIPVisionConfig(hidden_size=16, projection_dim=16, num_hidden_layers=1, num_attention_heads=2, image_size=32,
                              intermediate_size=16, patch_size=16)  # fmt: skip
    decoder = diffusers.AutoencoderKLTemporalDecoder(block_out_channels=[32, 32], down_block_types=["DownEncoderBlock2D"] * 2)
    diffusers.StableVideoDiffusionPipeline(
        vae=decoder, image_encoder=CLIPVisionModelWithProjection(vision), unet=loaded(made["svd"]),
        scheduler=diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", use_karras_sigmas=True),
        feature_extractor=CLIPImageProcessor(crop_size=32, size=32),
    ).save_pretrained(tmp_path / "whole")  # fmt: skip
    write_pruned(tmp_path / "whole" / "unet", plan_folder(tmp_path / "whole" / "unet", "vdmini"), tmp_path / "small")
    unet = unets.PrunedUNetSpatioTemporalConditionModel.from_pretrained(tmp_path / "small")
    pipe = diffusers.StableVideoDiffusionPipeline.from_pretrained(tmp_path / "whole", unet=unet)
    assert pipe.unet is unet
    pipe.set_progress_bar_config(disable=True)
    clip = pipe(torch.rand(1, 3, 32, 32), height=32, width=32, num_frames=2, num_inference_steps=1, output_type="pt").frames
    assert clip.shape == (1, 2, 3, 32, 32)
    assert clip.isfinite().all()

"""Files in the layout of the release (random weights, published ids) are converted to one folder, which makes an mp4."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import released_layout as layout
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lumos import LumosConfig, LumosForVideoGeneration, LumosPipeline
from lumos.cli import main
from lumos.errors import RunError, UserError
from lumos.models.lumos1 import released as released_module
from lumos.models.lumos1.released import convert
from lumos.video.io import read_video
from tokenizer import VideoTokenizer, VideoTokenizerConfig


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    layout.write_release(folder)
    return folder


@pytest.fixture
def copy(release, tmp_path):
    """A copy of the release that a test may damage."""
    return shutil.copytree(release, tmp_path / "release")


@pytest.fixture(scope="module")
def whole(release, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "model"
    convert(release / layout.DECODER, release / layout.COSMOS, out, shard_bytes=20_000_000)
    return out


def weights(folder):
    return {k: v for file in folder.glob("model*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.slow
def test_sharded_bf16_files_to_mp4(release, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(list((release / layout.DECODER).glob("model-0*.safetensors"))) > 2
    assert main(["convert", "--lumos", str(release / layout.DECODER), "--cosmos", str(release / layout.COSMOS), "--out", "m"]) == 0
    assert "bfloat16, defaults video-256p" in capsys.readouterr().out
    assert main(["generate", "--model", "m", "--prompt", "a red circle moves", "--num-frames", "5", "--num-inference-steps", "2",
                 "--height", "32", "--width", "64", "--dtype", "bfloat16", "--output", "out.mp4"]) == 0  # fmt: skip
    frames, fps = read_video(tmp_path / "out.mp4")
    assert (frames.shape, fps) == ((5, 32, 64, 3), 12)
    record = json.loads((tmp_path / "out.mp4.json").read_text())
    assert (record["settings"]["guidance_scale"], record["dtype"]) == (15.0, "bfloat16")


@pytest.mark.slow
def test_weights_and_number_formats_are_kept(release, whole):
    before, after = weights(release / layout.DECODER), weights(whole)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) and after[k].dtype == torch.bfloat16 for k in before)
    tokenizer = load_file(whole / "video_tokenizer" / "model.safetensors")
    assert {t.dtype for t in tokenizer.values()} == {torch.bfloat16}
    config = LumosConfig.from_pretrained(whole)
    assert (config.model_type, config.rope_theta, config.dtype) == ("lumos", 500000.0, torch.bfloat16)
    record = json.loads((whole / "conversion.json").read_text())
    assert record["parameters"] == sum(t.numel() for t in before.values())


@pytest.mark.slow
def test_one_folder_gives_the_clips_of_the_three(release, whole):
    call = {"num_frames": 5, "height": 32, "width": 64, "num_inference_steps": 2, "seed": 1, "fps": 8}
    apart = LumosPipeline.from_pretrained(
        release / layout.DECODER, video_tokenizer=release / layout.VIDEO_TOKENIZER, text_tokenizer=release / layout.TEXT_TOKENIZER,
        device="cpu",
    )  # fmt: skip
    together = LumosPipeline.from_pretrained(whole, device="cpu")
    assert np.array_equal(apart("a red circle", **call).frames[0], together("a red circle", **call).frames[0])
    assert (together.clip.height, together.clip.width, together.clip.target_size) == (256, 448, 352)


@pytest.mark.slow
def test_no_more_than_a_shard_is_in_memory(release, tmp_path, monkeypatch):
    written = []

    def recorded(tensors, *args, **kwargs):
        written.append(sum(t.nbytes for t in tensors.values()))
        save_file(tensors, *args, **kwargs)

    monkeypatch.setattr(released_module, "save_file", recorded)
    convert(release / layout.DECODER, release / layout.COSMOS, tmp_path / "m", shard_bytes=17_000_000)
    largest = 129_536 * 64 * 2
    assert len(written) == 2
    assert max(written) <= 17_000_000 >= largest
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(written)
    for key, name in index["weight_map"].items():
        with safe_open(tmp_path / "m" / name, framework="pt") as opened:
            assert key in opened.keys()  # noqa: SIM118
    LumosForVideoGeneration.from_pretrained(tmp_path / "m")


@pytest.mark.slow
def test_dtype_wrapped_names_flat_norms_and_vq_weights(copy, tmp_path):
    for file in (copy / layout.DECODER).glob("*.safetensors*"):
        if file.suffix == ".json":
            file.unlink()
    tensors = weights(copy / layout.DECODER)
    for file in (copy / layout.DECODER).glob("*.safetensors"):
        file.unlink()
    wrapped = {k.replace("layers.0.", "layers.0._fsdp_wrapped_module."): v for k, v in tensors.items()}
    wrapped = {k: v[0] if "q_norm" in k else v for k, v in wrapped.items()} | {"model.vqmodel.x": torch.zeros(2)}
    save_file(wrapped, copy / layout.DECODER / "model.safetensors", metadata={"format": "pt"})
    made = convert(copy / layout.DECODER, copy / layout.COSMOS, tmp_path / "m", dtype=torch.float32, defaults="image-256p")
    after = weights(tmp_path / "m")
    assert {t.dtype for t in after.values()} == {torch.float32}
    assert all(torch.equal(tensors[k].float(), after[k]) for k in tensors)
    assert tensors.keys() == after.keys()
    assert made["dtype"] == "float32"
    assert json.loads((tmp_path / "m" / "pipeline.json").read_text())["guidance_scale"] == 16.0
    assert VideoTokenizer.from_pretrained(tmp_path / "m").num_codes == 64_000


def change_weights(folder, change):
    file = sorted((folder / layout.DECODER).glob("*.safetensors"))[-1]
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def change_config(folder, **values):
    path = folder / layout.DECODER / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def lost_shard(folder):
    sorted((folder / layout.DECODER).glob("*.safetensors"))[0].unlink()


def lost_tensor(folder):
    change_weights(folder, lambda t: dict(list(t.items())[1:]))


def other_sizes(folder):
    change_config(folder, intermediate_size=128)


def cut_shard(folder):
    file = sorted((folder / layout.DECODER).glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:500])


def quantized(folder):
    change_weights(folder, lambda t: {k: v.to(torch.int8) for k, v in t.items()})


def other_ids(folder):
    def shifted(vocab):
        vocab = dict(vocab)
        vocab["<reserved08999>"], vocab["<reserved08998>"] = vocab["<reserved08998>"], vocab["<reserved08999>"]
        return vocab

    layout.write_text_tokenizer(folder / layout.TEXT_TOKENIZER, shifted)


def llama_tokenizer(folder):
    layout.write_text_tokenizer(folder / layout.TEXT_TOKENIZER, lambda v: {k: i for k, i in v.items() if "reserved" not in k})


def no_text_tokenizer(folder):
    (folder / layout.TEXT_TOKENIZER).unlink()


def no_video_tokenizer(folder):
    (folder / layout.VIDEO_TOKENIZER / "decoder.jit").unlink()


def two_video_tokenizers(folder):
    (folder / layout.VIDEO_TOKENIZER).rename(folder / layout.COSMOS / "a")
    shutil.copytree(folder / layout.COSMOS / "a", folder / layout.COSMOS / "b")


def narrow_codes(folder):
    sizes = {"channels": 8, "num_res_blocks": 1, "embedding_dim": 3, "levels": (4, 4, 4)}
    layout.write_video_tokenizer(folder / layout.VIDEO_TOKENIZER, VideoTokenizerConfig(**sizes), torch.float32)


def other_video_sizes(folder):
    (folder / layout.VIDEO_TOKENIZER / "config.json").unlink()


def nothing(folder):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "options", "error", "message"),
    [
        (lost_shard, {}, UserError, "lacks 1 of its .* weight shards"),
        (lost_tensor, {}, UserError, "lacks the tensors"),
        (other_sizes, {}, UserError, r"has shape .*, config\.json asks for"),
        (cut_shard, {}, UserError, "is damaged or no safetensors file"),
        (quantized, {}, UserError, "is stored as I8; a released checkpoint has BF16"),
        (other_ids, {}, UserError, "no Lumos-1 text tokenizer: <reserved08999> must be id 9003, it has 9002"),
        (llama_tokenizer, {}, UserError, "<reserved08706> must be id 8710, it does not have it"),
        (no_text_tokenizer, {}, UserError, r"no text_tokenizer\.json in .*--text-tokenizer"),
        (no_video_tokenizer, {}, UserError, "no video tokenizer in .* or its subfolders"),
        (two_video_tokenizers, {}, UserError, "holds several video tokenizers"),
        (narrow_codes, {}, UserError, "expects codes 64000, the video tokenizer has 64"),
        (other_video_sizes, {}, UserError, "do not fit its config.json"),
        (nothing, {"defaults": "8k"}, UserError, "allowed: image-256p, video-256p, video-384p"),
        (nothing, {"text_tokenizer": "nowhere.json"}, UserError, "no file or folder nowhere.json"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(copy, tmp_path, damage, options, error, message):
    damage(copy)
    with pytest.raises(error, match=message):
        convert(copy / layout.DECODER, copy / layout.COSMOS, tmp_path / "m", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["release"]


@pytest.mark.slow
def test_values_that_overflow_leave_nothing_behind(copy, tmp_path):
    change_weights(copy, lambda t: {k: torch.full_like(v, 1e30) for k, v in t.items()})
    with pytest.raises(RunError, match=r"not finite as torch\.float16"):
        convert(copy / layout.DECODER, copy / layout.COSMOS, tmp_path / "m", dtype=torch.float16)
    assert [p.name for p in tmp_path.iterdir()] == ["release"]


@pytest.mark.slow
def test_a_full_disk_and_a_folder_that_exists(release, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="exists already"):
        convert(release / layout.DECODER, release / layout.COSMOS, tmp_path)
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(UserError, match=r"needs \d+ MB, .* has 0 MB free"):
        convert(release / layout.DECODER, release / layout.COSMOS, tmp_path / "m")


@pytest.mark.slow
def test_conversion_takes_a_tokenizer_folder_or_a_named_file(release, tmp_path):
    made = convert(release / layout.DECODER, release / layout.VIDEO_TOKENIZER, tmp_path / "a")
    assert made["text_tokenizer"].endswith("cosmos/tokenizer/text_tokenizer.json")
    moved = shutil.copy(release / layout.TEXT_TOKENIZER, tmp_path / "words.json")
    made = convert(release / layout.DECODER, release / layout.COSMOS, tmp_path / "b", text_tokenizer=moved)
    assert made["text_tokenizer"] == str(moved)

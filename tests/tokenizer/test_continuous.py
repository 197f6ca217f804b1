"""Continuous tokenizers give the numbers of the published networks, have their layouts, and refuse calls for codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from archives import write_published
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from lumos.errors import UserError
from tokenizer import StreamDecoder, StreamEncoder, VideoTokenizer, VideoTokenizerConfig, loading

FOLDERS = ("cosmos_cv", "cosmos_cv8", "cosmos_ci", "cosmos_cv_360p", "cosmos_cv_vae")
PARAMETERS = {
    "CV4x8x8": (280, 90_176_448, {"name": "CV", "decoder_channels_mult": [2, 4]}),
    "CV8x8x8": (322, 112_472_512, {"name": "CV", "temporal_compression": 8}),
    "CV8x16x16": (322, 112_472_512, {"name": "CV", "temporal_compression": 8, "spatial_compression": 16}),
    "CI8x8": (198, 76_789_472, {"name": "CI", "spatial_compression": 8}),
    "CI16x16": (202, 81_509_088, {"name": "CI"}),
    "CV4x8x8-360p": (318, 110_208_816, {"name": "CV", "patch_size": 2, "unused_samplers": False}),
    "CV8x8x8-720p": (310, 105_653_696, {"name": "CV", "temporal_compression": 8, "unused_samplers": False}),
    "CI8x8-360p": (202, 81_384_636, {"name": "CI", "spatial_compression": 8, "patch_size": 2}),
    "CI16x16-360p": (206, 84_334_524, {"name": "CI", "patch_size": 2}),
}
"""Numbers of state tensors and parameters, and settings, of the published networks."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread, because threads would wait longer than they compute on tensors of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(golden) -> dict[str, VideoTokenizer]:
    return {name: VideoTokenizer.from_pretrained(golden / name) for name in FOLDERS}


def read_io(folder: Path) -> dict[str, torch.Tensor]:
    """Return the golden tensors, with a frame axis added to those of the published picture network."""
    found = {name: tensor.float() for name, tensor in load_file(folder / "io.safetensors").items()}
    found = {name: tensor.unsqueeze(2) if tensor.dim() == 4 else tensor for name, tensor in found.items()}
    return {"video": found.pop("image"), **found} if "image" in found else found


def sampled(model: VideoTokenizer, io: dict[str, torch.Tensor]) -> torch.Tensor:
    if "noise" not in io:
        return model.encode(io["video"])
    mean, log_variance = model.encode_moments(io["video"])
    return mean + torch.exp(log_variance / 2) * io["noise"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
@torch.inference_mode()
def test_numbers_are_those_of_the_published_network(golden, models, name):
    model, io = models[name], read_io(golden / name)
    latent = sampled(model, io)
    assert model.is_continuous
    assert model.num_codes == 0
    assert latent.shape == io["latent"].shape == (1, model.value_channels, *io["latent"].shape[2:])
    assert_close(latent, io["latent"], rtol=0, atol=1e-4)
    assert_close(model.decode(io["latent"]), io["reconstruction"], rtol=0, atol=2e-4)
    assert_close(model.decode(latent), io["reconstruction"], rtol=0, atol=3e-4)


@pytest.mark.slow
@torch.inference_mode()
def test_moments_of_a_vae_are_the_published_ones(golden, models):
    model, io = models["cosmos_cv_vae"], read_io(golden / "cosmos_cv_vae")
    mean, log_variance = model.encode_moments(io["video"])
    assert_close(mean, io["mean"], rtol=0, atol=1e-4)
    assert_close(log_variance, io["logvar"], rtol=0, atol=1e-4)
    assert torch.equal(model.encode(io["video"]), mean)
    with pytest.raises(ValueError, match="no log variance"):
        models["cosmos_cv"].encode_moments(io["video"])


@torch.inference_mode()
def test_log_variance_of_a_vae_is_clamped(golden):
    model = VideoTokenizer.from_pretrained(golden / "cosmos_cv_vae")
    model.quant_conv.conv3d.bias += 100
    assert model.encode_moments(torch.zeros(1, 3, 1, 16, 16))[1].max() == 20
    model.quant_conv.conv3d.bias -= 300
    assert model.encode_moments(torch.zeros(1, 3, 1, 16, 16))[1].min() == -30


@pytest.mark.parametrize("name", ["cosmos_cv", "cosmos_cv8"])
@torch.inference_mode()
def test_a_picture_is_a_clip_of_one_frame(golden, models, name):
    model, io = models[name], read_io(golden / name)
    picture = model.encode(io["video"][:, :, :1])
    assert_close(picture, io["frame_latent"], rtol=0, atol=1e-4)
    assert_close(model.decode(io["frame_latent"]), io["frame_reconstruction"], rtol=0, atol=2e-4)
    frames = model.encode_frames(io["video"][:, :, :3])
    assert frames.shape == (1, model.value_channels, 3, *picture.shape[3:])
    for t in range(3):
        assert_close(frames[:, :, t : t + 1], model.encode(io["video"][:, :, t : t + 1]), rtol=0, atol=1e-5)
    assert_close(model.decode_frames(frames)[:, :, 2:], model.decode(frames[:, :, 2:]), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_the_picture_network_takes_frames_one_by_one(models):
    model = models["cosmos_ci"]
    clip = torch.rand(2, 3, 3, 16, 24) * 2 - 1
    latents = model.encode(clip)
    assert latents.shape == (2, 4, 3, 2, 3)
    assert model.temporal_compression == 1
    assert_close(latents[:, :, 1:2], model.encode(clip[:, :, 1:2]), rtol=0, atol=1e-5)
    assert_close(model.decode(latents)[:, :, 2:], model.decode(latents[:, :, 2:]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FOLDERS)
@torch.inference_mode()
def test_chunks_give_the_numbers_of_the_whole_clip(golden, models, name):
    model, io = models[name], read_io(golden / name)
    video = io["video"][:, :, : 1 + 2 * model.temporal_compression]
    encoder, decoder = StreamEncoder(model), StreamDecoder(model)
    latents = torch.cat([encoder.push(chunk) for chunk in video.split(3, dim=2)], dim=2)
    encoder.finish()
    assert_close(latents, model.encode(video), rtol=0, atol=1e-5)
    frames = torch.cat([decoder.push(chunk) for chunk in latents.split(2, dim=2)], dim=2)
    assert_close(frames, model.decode(latents), rtol=0, atol=1e-5)
    again = torch.cat(list(model.decode_stream([latents[:, :, :1], latents[:, :, 1:]])), dim=2)
    assert torch.equal(again, frames)
    assert torch.equal(torch.cat(list(model.encode_stream([video])), dim=2), latents)


@pytest.mark.parametrize("name", ["cosmos_cv", "cosmos_cv8", "cosmos_ci"])
def test_full_size_layout_follows_from_the_keys(golden, name):
    layout = json.loads((golden / name / "full_size_layout.json").read_text())
    small = loading.read_config(golden / name)
    full = {"name": small.name, "spatial_compression": 8, "temporal_compression": small.temporal_compression}
    config = loading.fitted(VideoTokenizerConfig.from_dict(full), {key: tuple(shape) for key, shape in layout.items()})
    with torch.device("meta"):
        state = VideoTokenizer(config).state_dict()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == layout


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes_have_the_published_counts(name):
    tensors, parameters, settings = PARAMETERS[name]
    with torch.device("meta"):
        model = VideoTokenizer(VideoTokenizerConfig.from_dict(settings))
    assert (len(model.state_dict()), sum(p.numel() for p in model.parameters())) == (tensors, parameters)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_folder_name_and_keys_tell_the_network(tmp_path, name):
    folder = tmp_path / f"Cosmos-Tokenize1-{name}"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["CausalTokenizer"]}')
    expected = VideoTokenizerConfig.from_dict(PARAMETERS[name][2])
    with torch.device("meta"):
        state = VideoTokenizer(expected).state_dict()
    assert loading.fitted(loading.read_config(folder), {key: tuple(tensor.shape) for key, tensor in state.items()}) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parts"),
    [("cosmos_cv", ("encoder", "decoder")), ("cosmos_ci", ("encoder", "decoder")), ("cosmos_cv_360p", ("autoencoder",))],
)
def test_archives_give_the_same_network(golden, models, tmp_path, name, parts):
    model = models[name]
    shutil.copy(golden / name / "config.json", tmp_path)
    write_published(model, tmp_path, parts)
    state = VideoTokenizer.from_pretrained(tmp_path).state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in state.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_a_saved_tokenizer_is_the_same(golden, models, tmp_path, name):
    model = models[name]
    model.save_pretrained(tmp_path)
    again = VideoTokenizer.from_pretrained(tmp_path)
    assert again.config == model.config == VideoTokenizerConfig.from_dict(json.loads((tmp_path / "config.json").read_text()))
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    published = json.loads((golden / name / "config.json").read_text())
    written = json.loads((tmp_path / "config.json").read_text())
    assert published == {key: value for key, value in written.items() if key in published}


@pytest.mark.parametrize(
    ("name", "key"),
    [("cosmos_cv", "decoder.up.0.block.0.conv1.0.conv3d.weight"), ("cosmos_cv", "encoder.down.1.downsample.conv1.conv3d.weight"),
     ("cosmos_cv_360p", "encoder.down.0.downsample.conv2.conv3d.weight"), ("cosmos_ci", "encoder.mid.attn_1.q.weight")],
)  # fmt: skip
def test_a_missing_weight_is_named(golden, tmp_path, name, key):
    shutil.copy(golden / name / "config.json", tmp_path)
    tensors = load_file(golden / name / "model.safetensors")
    del tensors[key]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="missing"):
        VideoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "CV", "levels": [8, 8]}, "unknown video tokenizer setting levels"),
        ({"name": "DV", "latent_channels": 16}, "unknown video tokenizer setting latent_channels"),
        ({"name": "CV", "latent_channels": -1}, "latent_channels"),
        ({"name": "CV", "latent_channels": 1.5}, "latent_channels"),
        ({"name": "CV", "formulation": "GAN"}, "'AE' or 'VAE'"),
        ({"name": "CV", "formulation": ["AE"]}, "'AE' or 'VAE'"),
        ({"name": "CV", "formulation": "VAE"}, "z_factor 1 is not possible"),
        ({"name": "CV", "z_factor": 2}, "z_factor 2 is not possible"),
        ({"name": "CV", "encoder": "Default"}, "FACTORIZED"),
        ({"name": "CI", "encoder": "FACTORIZED"}, "Default"),
        ({"name": "CI", "channels": 48}, "multiples of 32"),
        ({"name": "CI", "temporal_compression": 4}, "temporal_compression 4"),
        ({"name": "CI", "patch_method": "rearrange"}, "patch_method"),
        ({"name": "CI", "resolution": 128}, "attn_resolutions"),
        ({"name": "CI", "spatial_compression": 64}, "reaches 32"),
        ({"name": "XV"}, "'DV', 'CV' or 'CI'"),
        ({"name": ["CV"]}, "'DV', 'CV' or 'CI'"),
        ({"name": "CV", "decoder_channels_mult": []}, "decoder_channels_mult"),
        ({"name": "CV", "decoder_channels_mult": [2]}, "decoder with 1 levels"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        VideoTokenizerConfig.from_dict(settings)


def test_latents_of_a_wrong_shape_are_refused(models):
    for wrong in (torch.zeros(1, 4, 3, 4), torch.zeros(1, 5, 1, 2, 2), torch.zeros(1, 4, 1, 2, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="latents must be floats of the shape"):
            models["cosmos_cv"].decode(wrong)
        with pytest.raises(ValueError, match="latents must be floats of the shape"):
            list(models["cosmos_cv"].decode_stream([wrong]))

"""VideoTokenizer: shapes of every compression, causality, loading of the published forms, errors that help."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from lumos.errors import RunError
from tokenizer import VideoTokenizer, VideoTokenizerConfig
from tokenizer.configuration import Sampling

TINY = {"channels": 4, "channels_mult": [1, 2], "num_res_blocks": 1, "levels": [5, 4], "embedding_dim": 2, "z_channels": 4}


def tiny(seed: int = 0, **changes) -> VideoTokenizer:
    torch.manual_seed(seed)
    model = VideoTokenizer(VideoTokenizerConfig.from_dict(TINY | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def clip(frames: int = 9, height: int = 16, width: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


COMPRESSIONS = [
    # patch, temporal, spatial, levels of the network
    (4, 4, 8, 2),
    (4, 4, 8, 3),
    (4, 8, 8, 3),
    (4, 8, 16, 3),
    (4, 4, 4, 1),
    (2, 4, 8, 3),
    (2, 2, 4, 2),
    (2, 4, 4, 3),
    (1, 2, 4, 3),
    (1, 1, 2, 2),
]


@pytest.mark.parametrize(("patch", "temporal", "spatial", "num_levels"), COMPRESSIONS)
@torch.inference_mode()
def test_shapes_of_every_compression(patch, temporal, spatial, num_levels):
    model = tiny(patch_size=patch, temporal_compression=temporal, spatial_compression=spatial, channels_mult=[1] * num_levels)
    video = clip(1 + 2 * temporal, 2 * spatial, 3 * spatial)
    codes = model.encode(video)
    assert codes.shape == (1, 3, 2, 3)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() <= codes.max() < model.num_codes == 20
    assert model.decode(codes).shape == video.shape


@pytest.mark.parametrize(("patch", "temporal", "spatial", "num_levels"), COMPRESSIONS)
@torch.inference_mode()
def test_later_frames_change_nothing_earlier(patch, temporal, spatial, num_levels):
    model = tiny(patch_size=patch, temporal_compression=temporal, spatial_compression=spatial, channels_mult=[1] * num_levels)
    video = clip(1 + 3 * temporal, 2 * spatial, 2 * spatial)
    latent = model.encode_latent(video)
    for kept in range(3):
        changed = video.clone()
        changed[:, :, 1 + kept * temporal :] = -changed[:, :, 1 + kept * temporal :]
        other = model.encode_latent(changed)
        torch.testing.assert_close(other[:, :, : kept + 1], latent[:, :, : kept + 1], rtol=0, atol=1e-5)
        assert (other[:, :, kept + 1] - latent[:, :, kept + 1]).abs().max() > 1e-4
        shorter = model.encode_latent(video[:, :, : 1 + kept * temporal])
        torch.testing.assert_close(shorter, latent[:, :, : kept + 1], rtol=0, atol=1e-5)
    codes = model.quantize(latent)[1]
    whole = model.decode(codes)
    for kept in range(1, 4):
        frames = 1 + (kept - 1) * temporal
        torch.testing.assert_close(model.decode(codes[:, :kept]), whole[:, :, :frames], rtol=0, atol=1e-4)


@torch.inference_mode()
def test_a_picture_is_the_first_frame_of_a_clip():
    model = tiny()
    video = clip(17, 32, 32)
    assert torch.equal(model.encode(video[:, :, :1]), model.encode(video)[:, :1])


@torch.inference_mode()
def test_samples_of_a_batch_are_independent():
    model = tiny()
    videos = torch.cat([clip(seed=0), clip(seed=1)])
    together = model.encode_latent(videos)
    torch.testing.assert_close(together[1:], model.encode_latent(videos[1:]), rtol=0, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(frames=st.integers(1, 14), height=st.integers(1, 40), width=st.integers(1, 40))
def test_sizes_that_do_not_divide_are_refused(frames, height, width):
    model = tiny()
    video = torch.zeros(1, 3, frames, height, width)
    if frames % 4 == 1 and height % 8 == 0 and width % 8 == 0:
        assert model.encode(video).shape == (1, (frames + 3) // 4, height // 8, width // 8)
    else:
        with pytest.raises(ValueError, match=r"num_frames must be 1 \+ 4|multiples of 8"):
            model.encode(video)


@pytest.mark.parametrize("codes", [torch.full((1, 1, 2, 2), 20), torch.zeros(2, 2, dtype=torch.long)])
def test_invalid_codes_are_refused(codes):
    with pytest.raises(ValueError, match="codes must"):
        tiny().decode(codes)


def test_the_published_samplers():
    published = VideoTokenizerConfig()
    neither, space = Sampling(False, False), Sampling(True, False)
    assert published.downsamplers() == [space, neither]
    assert published.upsamplers() == [neither, space]
    assert not any(published.attention_levels())
    other = VideoTokenizerConfig(patch_size=2)
    both = Sampling(True, True)
    assert other.downsamplers() == [both, space]
    assert other.upsamplers() == [both, space]


def test_attention_between_residual_blocks_where_asked():
    model = tiny(resolution=64, attn_resolutions=[8])
    keys = set(model.state_dict())
    assert "encoder.down.1.attn.0.1.q.conv3d.weight" in keys
    assert "decoder.up.1.attn.1.0.proj_out.conv3d.bias" in keys
    assert not any(key.startswith("encoder.down.0.attn") for key in keys)
    assert model.decode(model.encode(clip())).shape == clip().shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chanels": 8}, "unknown video tokenizer setting chanels: known are"),
        ({"levels": [8, 5, 1], "embedding_dim": 3}, "levels"),
        ({"embedding_dim": 3}, "embedding_dim 3 is not possible: allowed is 2"),
        ({"patch_size": 3}, "patch_size 3 is not possible"),
        ({"patch_method": "dct"}, "haar or rearrange"),
        ({"spatial_compression": 64}, "spatial_compression 64 is not possible: the encoder with 2 levels"),
        ({"temporal_compression": 2}, "the patches' side \\(4\\) or more"),
        ({"spatial_compression": 12}, "a power of two"),
        ({"quantizer": "VQ"}, "'FSQ'"),
        ({"num_groups": 8}, "num_groups 8 is not possible: allowed is 1"),
        ({"pointwise_ends": "no"}, "pointwise_ends 'no' is not possible: allowed is true or false"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        VideoTokenizerConfig.from_dict(TINY | changes)


def assert_same_weights(model: VideoTokenizer, other: VideoTokenizer) -> None:
    expected = model.state_dict()
    found = other.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("place", [".", "video_tokenizer"])
def test_save_and_load(tmp_path, place):
    model = tiny()
    model.save_pretrained(tmp_path / place)
    loaded = VideoTokenizer.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert_same_weights(model, loaded)
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]


@torch.inference_mode()
def test_pointwise_ends_are_saved_and_loaded(tmp_path):
    model, usual = tiny(pointwise_ends=True), tiny()
    model.save_pretrained(tmp_path)
    loaded = VideoTokenizer.from_pretrained(tmp_path)
    assert loaded.config.pointwise_ends
    assert_same_weights(model, loaded)
    assert torch.equal(loaded.encode(clip()), model.encode(clip()))
    changed = {
        name.removesuffix(".weight")
        for name in model.state_dict().keys() ^ usual.state_dict().keys()
        if name.endswith(".weight")
    }
    assert changed == {f"{end}{at}.conv3d" for end in ("encoder.conv_in", "decoder.conv_out") for at in ("", ".0", ".1")}
    assert model.encoder.conv_in.conv3d.weight.shape == (4, 3 * 4**3, 1, 1, 1)
    assert model.decoder.conv_out.conv3d.weight.shape == (3 * 4**3, 4, 1, 1, 1)


@pytest.mark.slow
@torch.inference_mode()
def test_a_folder_from_before_pointwise_ends_loads_as_it_did(tmp_path):
    for name, model in (("usual", tiny()), ("pointwise", tiny(pointwise_ends=True))):
        model.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        del config["pointwise_ends"]
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    loaded = VideoTokenizer.from_pretrained(tmp_path / "usual")
    assert loaded.config == tiny().config
    assert torch.equal(loaded.encode(clip()), tiny().encode(clip()))
    with pytest.raises(ValueError, match=r"do not fit its config\.json"):
        VideoTokenizer.from_pretrained(tmp_path / "pointwise")


def test_half_precision_folders_compute_in_float32_unless_asked(tmp_path):
    model = tiny().half()
    model.save_pretrained(tmp_path)
    assert {p.dtype for p in VideoTokenizer.from_pretrained(tmp_path).parameters()} == {torch.float32}
    assert {p.dtype for p in VideoTokenizer.from_pretrained(tmp_path, dtype=torch.float16).parameters()} == {torch.float16}
    assert_same_weights(model.float(), VideoTokenizer.from_pretrained(tmp_path))


class Archive(nn.Module):
    """Return a module, ready to be scripted, whose state dict is the given tensors under their dotted names."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for key, tensor in tensors.items():
            module: nn.Module = self
            *path, last = key.split(".")
            for name in path:
                if name not in module._modules:
                    module.add_module(name, Inner())
                module = module._modules[name]
            module.register_buffer(last, tensor.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Inner(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def write_archive(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    torch.jit.save(torch.jit.trace(Archive(tensors), torch.zeros(1)), str(path))


def parts_of(model: VideoTokenizer) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return tensors in the layout of encoder.jit and decoder.jit, with the constants of the published files."""
    tensors = model.state_dict()
    encoder = {k: v for k, v in tensors.items() if k.startswith(("encoder.", "quant_conv."))}
    decoder = {k: v for k, v in tensors.items() if k.startswith(("decoder.", "post_quant_conv."))}
    encoder |= {"quantizer._basis": torch.ones(2), "encoder.patcher3d.wavelets": torch.ones(2)}
    decoder |= {"inv_quant._levels": torch.ones(2), "decoder.unpatcher3d._arange": torch.ones(2)}
    return encoder, decoder


def write_config(folder: Path, model: VideoTokenizer) -> None:
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))


@pytest.mark.slow
def test_load_encoder_and_decoder_archives(tmp_path):
    model = tiny()
    write_config(tmp_path, model)
    encoder, decoder = parts_of(model)
    write_archive(tmp_path / "encoder.jit", encoder)
    write_archive(tmp_path / "decoder.jit", decoder)
    loaded = VideoTokenizer.from_pretrained(tmp_path)
    assert_same_weights(model, loaded)
    assert torch.equal(loaded.encode(clip()), model.encode(clip()))


@pytest.mark.slow
def test_load_the_whole_archive(tmp_path):
    model = tiny()
    write_config(tmp_path, model)
    encoder, decoder = parts_of(model)
    write_archive(tmp_path / "autoencoder.jit", encoder | decoder)
    assert_same_weights(model, VideoTokenizer.from_pretrained(tmp_path))


def test_load_safetensors_of_any_name(tmp_path):
    model = tiny()
    write_config(tmp_path, model)
    encoder, decoder = parts_of(model)
    save_file(encoder, tmp_path / "encoder.safetensors")
    save_file(decoder, tmp_path / "decoder.safetensors")
    assert_same_weights(model, VideoTokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("folder_name", "expected"),
    [("Cosmos-Tokenizer-DV4x8x8", (4, 8)), ("Cosmos-0.1-Tokenizer-DV8x16x16", (8, 16)), ("any", (4, 8))],
)
def test_a_folder_without_sizes_is_the_published_network(tmp_path, monkeypatch, folder_name, expected):
    folder = tmp_path / folder_name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["CosmosTokenizer"]}))
    write_archive(folder / "autoencoder.jit", {"encoder.x": torch.ones(1)})
    seen: list[VideoTokenizerConfig] = []
    start = VideoTokenizer.__init__
    monkeypatch.setattr(VideoTokenizer, "__init__", lambda self, config: (seen.append(config), start(self, config))[1])
    with pytest.raises(ValueError, match=r"32[12] missing"):
        VideoTokenizer.from_pretrained(folder)
    assert (seen[0].temporal_compression, seen[0].spatial_compression) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("encoder.conv_in.0.conv3d.bias"), "1 missing \\(first: encoder.conv_in.0.conv3d.bias\\)"),
        (lambda t: t.update({"encoder.extra": torch.ones(1)}), "1 unexpected \\(first: encoder.extra\\)"),
        (lambda t: t.update({"quant_conv.conv3d.bias": torch.ones(7)}), "1 of another shape \\(first: quant_conv.conv3d.bias\\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, message):
    model = tiny()
    write_config(tmp_path, model)
    tensors = dict(model.state_dict())
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        VideoTokenizer.from_pretrained(tmp_path)


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder"):
        VideoTokenizer.from_pretrained(tmp_path / "nothing")
    write_archive(tmp_path / "encoder.jit", {"encoder.x": torch.ones(1)})
    with pytest.raises(FileNotFoundError, match=r"no video tokenizer in .* encoder.jit and decoder.jit"):
        VideoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "autoencoder.jit"])
def test_damaged_weights(tmp_path, name):
    write_config(tmp_path, tiny())
    (tmp_path / name).write_bytes(b"\x40\0\0\0\0\0\0\0not weights")
    with pytest.raises(RunError, match=rf"cannot read the video tokenizer's weights in .*{name}"):
        VideoTokenizer.from_pretrained(tmp_path)


def test_damaged_config(tmp_path):
    tiny().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config\.json"):
        VideoTokenizer.from_pretrained(tmp_path)


def test_loading_draws_no_weights(micro_folder, monkeypatch):
    """Loading does not draw random weights, which takes longer than loading a small tokenizer."""
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda *args, **named: pytest.fail("a weight was drawn"))
    VideoTokenizer.from_pretrained(micro_folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_encodes_and_decodes_on_a_cpu(micro_folder, dtype):
    whole = VideoTokenizer.from_pretrained(micro_folder)
    half = VideoTokenizer.from_pretrained(micro_folder).to(dtype)
    video = torch.rand(1, 3, 5, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        codes = whole.encode(video)
        assert (half.encode(video.to(dtype)) == codes).float().mean() > 0.5
        assert half.encode_frames(video.to(dtype)).shape == (1, 5, 2, 3)
        assert (half.decode(codes).float() - whole.decode(codes)).abs().mean() < 0.05

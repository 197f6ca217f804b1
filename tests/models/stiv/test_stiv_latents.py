"""Latent spaces: encoding and decoding, statistics, streams, and refused combinations."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumos.errors import NotFinite, NotFound, RunError, UserError
from lumos.models.stiv import latents as under_test
from lumos.models.stiv.configuration import LATENTS, PATTERNS, StivConfig
from lumos.models.stiv.latents import LatentSpace, allows_pattern, check_combination, load_autoencoder, measure_statistics
from lumos.video.frames import from_uint8, to_uint8
from tokenizer import VideoTokenizer

MEAN, STD = [0.1, -0.2, 0.3], [0.5, 2.0, 1.0]


@pytest.fixture(scope="module")
def coded(micro_folder) -> VideoTokenizer:
    return VideoTokenizer.from_pretrained(micro_folder)


@pytest.fixture(scope="module")
def continuous(golden) -> VideoTokenizer:
    return VideoTokenizer.from_pretrained(golden / "cosmos_cv")


@pytest.fixture(scope="module")
def autoencoder():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sides = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return diffusers.AutoencoderKL(block_out_channels=(4, 8), latent_channels=2, norm_num_groups=2, sample_size=16, **sides)


@pytest.fixture(params=LATENTS)
def space(request, coded, continuous) -> LatentSpace:
    """A latent space of each kind, whose mean and std are not 0 and 1."""
    if request.param == "autoencoder":
        network = request.getfixturevalue("autoencoder")
    else:
        network = coded if request.param in ("per_frame", "causal") else continuous
    channels = LatentSpace(network, request.param).channels
    return LatentSpace(network, request.param, np.linspace(-0.3, 0.4, channels).tolist(), np.linspace(0.5, 2, channels).tolist())


def clip(frames: int = 5, batch: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (batch, frames, 16, 24, 3), dtype=np.uint8)


def differ_by_rounding(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.abs(a.astype(int) - b).max() <= 1


@pytest.mark.slow
def test_each_kind_encodes_and_decodes_clips(space):
    frames = clip()
    found = space.encode(frames)
    grid = [side // space.spatial_compression for side in (16, 24)]
    assert found.shape == (2, space.latents_of(5), space.channels, *grid)
    assert found.dtype == torch.float32
    assert torch.allclose(found, space.encode(from_uint8(frames)))
    back = space.decode(found)
    assert back.shape == frames.shape
    assert back.dtype == np.uint8
    assert space.latents_of(5) == (2 if space.is_causal else 5)


def test_latents_are_normalised_network_outputs(space):
    video = from_uint8(clip())
    raw = LatentSpace(space.network, space.latents).encode(video)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (space.mean, space.std))
    assert torch.allclose(space.encode(video), (raw - mean) / std, atol=1e-6)
    again = LatentSpace(space.network, space.latents).normalised(space.mean, space.std)
    assert torch.equal(again.encode(video), space.encode(video))
    assert differ_by_rounding(space.decode(space.encode(video)), LatentSpace(space.network, space.latents).decode(raw))


def test_frames_alone_are_frames_of_a_clip_without_causality(space):
    frames = clip()
    whole, alone = space.encode(frames), space.encode(frames[:, 3:4])
    if space.is_causal:
        assert torch.allclose(whole[:, :1], space.encode(frames[:, :1]), atol=1e-4)
    else:
        assert torch.allclose(whole[:, 3:4], alone, atol=1e-4)


@torch.inference_mode()
def test_the_networks_give_the_numbers(coded, continuous, autoencoder):
    video = from_uint8(clip())
    causal = coded.values(coded.encode(video)).transpose(1, 2)
    assert torch.equal(LatentSpace(coded, "causal").encode(video), causal)
    single = coded.values(coded.encode(video[:, :, 2:3])).transpose(1, 2)
    assert torch.equal(LatentSpace(coded, "per_frame").encode(video)[:, 2:3], single)
    assert torch.allclose(LatentSpace(continuous, "continuous").encode(video), continuous.encode(video).transpose(1, 2))
    found = LatentSpace(autoencoder, "autoencoder").encode(video)
    assert torch.allclose(found[:, 2], autoencoder.encode(video[:, :, 2]).latent_dist.mean, atol=1e-5)
    expected = to_uint8(autoencoder.decode(found[:, 2]).sample.unsqueeze(2))
    assert differ_by_rounding(LatentSpace(autoencoder, "autoencoder").decode(found)[:, 2:3], expected)


@pytest.mark.parametrize("kind", ["per_frame", "causal"])
def test_stored_codes_are_the_latents_of_their_frames(coded, kind):
    space, video = LatentSpace(coded, kind, MEAN, STD), from_uint8(clip())
    codes = coded.encode(video) if kind == "causal" else coded.encode_frames(video)
    assert torch.equal(space.from_codes(codes), space.encode(video))
    assert torch.equal(space.from_codes(codes.numpy().astype(np.uint16)), space.encode(video))
    with pytest.raises(ValueError, match=r"codes must lie in 0\.\.63"):
        space.from_codes(codes + 64)
    with pytest.raises(ValueError, match="codes must have the shape"):
        space.from_codes(codes[0])


def test_latents_that_are_no_values_of_codes_refuse_codes(continuous):
    with pytest.raises(UserError, match="continuous latents are not made from codes"):
        LatentSpace(continuous, "continuous").from_codes(np.zeros((1, 2, 2, 3), dtype=np.uint16))


@pytest.mark.parametrize("kind", ["per_frame", "causal"])
def test_results_are_rounded_to_the_nearest_code(coded, kind):
    space = LatentSpace(coded, kind, MEAN, STD)
    codes = torch.randint(0, 64, (1, 3, 2, 3), generator=torch.Generator().manual_seed(0))
    exact = space.from_codes(codes)
    expected = space.decode(exact)
    noise = torch.rand(exact.shape, generator=torch.Generator().manual_seed(1)) - 0.5
    std = torch.tensor(STD).view(-1, 1, 1)
    assert np.array_equal(space.decode(exact + 0.48 * noise / std), expected)  # values of 4 levels are 0.5 apart
    assert not np.array_equal(space.decode(exact + 4 * noise / std), expected)
    video = coded.decode(codes) if kind == "causal" else coded.decode_frames(codes)
    assert differ_by_rounding(expected, to_uint8(video))


@settings(max_examples=40, derandomize=True)
@given(levels=st.lists(st.integers(2, 9), min_size=1, max_size=4), seed=st.integers(0, 10**6))
def test_nearest_codes_are_those_of_least_distance(levels, seed):
    from tokenizer.fsq import FiniteScalarQuantizer, code_count

    quantizer, draws = FiniteScalarQuantizer(levels), torch.Generator().manual_seed(seed)
    every = torch.arange(code_count(levels)).view(1, -1, 1, 1)
    values = quantizer.values(every, torch.float64)
    assert torch.equal(quantizer.nearest(values), every)
    wanted = torch.randn(1, len(levels), 5, 1, 1, generator=draws, dtype=torch.float64)
    distances = (wanted[:, :, :, None] - values[:, :, None]).square().sum(1)
    assert torch.equal(quantizer.nearest(wanted).flatten(), distances.argmin(2).flatten())


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_stream_of_latents_gives_the_whole_clip(space, cut):
    frames = clip(9, batch=1)
    found = space.encode(frames)
    push = space.decoder()
    parts = [push(part) for part in found[0].split(cut)]
    assert differ_by_rounding(np.concatenate(parts), space.decode(found)[0])
    assert space.latents_of(len(parts[0])) == cut


def test_the_network_sees_a_few_latent_frames_at_a_time(coded, monkeypatch):
    sizes = []

    def watched(decode):
        def call(self, latents, *past):
            sizes.append(latents.shape[-3])
            return decode(self, latents, *past)

        return call

    for name in ("decode_frames", "decode_latent"):
        monkeypatch.setattr(VideoTokenizer, name, watched(getattr(VideoTokenizer, name)))
    for kind in ("per_frame", "causal"):
        space = LatentSpace(coded, kind)
        assert space.latents_of(space.decode(torch.zeros(1, 40, 3, 1, 1)).shape[1]) == 40
    assert max(sizes) == under_test.PIECE


def test_statistics_are_those_of_all_latents_together():
    draws = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 5, 0]).view(3, 1, 1)
    parts = [1000 + torch.randn(n, t, 3, 2, 2, generator=draws) * scale for n, t in ((1, 2), (3, 1), (0, 1), (2, 5))]
    values = torch.cat([part.movedim(2, 0).flatten(1) for part in parts], dim=1).double()
    mean, std = measure_statistics(iter(parts))
    assert mean == pytest.approx(values.mean(1).tolist(), rel=1e-12)
    assert std == pytest.approx([*values.std(1, correction=0).tolist()[:2], 1.0], rel=1e-9)
    json.dumps([mean, std])


def test_measured_statistics_normalise(space):
    raw, video = LatentSpace(space.network, space.latents), from_uint8(clip())
    measured = raw.normalised(*measure_statistics([raw.encode(video)]))
    values = measured.encode(video).movedim(2, 0).flatten(1)
    assert values.mean(1).abs().max() < 1e-5
    std = values.std(1, correction=0)
    assert ((std - 1).abs() < 1e-4).logical_or(std == 0).all()  # codes of random weights have channels that never vary


def test_statistics_of_nothing_or_of_nan_are_errors():
    with pytest.raises(UserError, match="no latents to measure"):
        measure_statistics([])
    with pytest.raises(UserError, match="no latents to measure"):
        measure_statistics([torch.zeros(0, 2, 3, 1, 1)])
    with pytest.raises(NotFinite):
        measure_statistics([torch.full((1, 1, 3, 1, 1), torch.nan)])


def test_patterns_that_give_later_frames_need_single_frames():
    refused = {(kind, p) for kind in LATENTS for p in PATTERNS if not allows_pattern(kind, p)}
    assert refused == {(kind, p) for kind in ("causal", "continuous") for p in ("ends", "interpolation", "views")}
    check_combination("per_frame", temporal_patch_size=2, patterns=PATTERNS)
    check_combination("causal", patterns=["none", "first", "prediction"])
    for wrong in ({"temporal_patch_size": 2}, {"patterns": ["none", "ends"]}, {"patterns": ["interpolation"]}):
        with pytest.raises(ValueError, match="does not work with causal latents"):
            check_combination("causal", **wrong)
    for what, arguments in (("latents", ("codes", "first")), ("pattern", ("causal", "last")), ("latents", (["causal"], "first"))):
        with pytest.raises(UserError, match=f"{what} .* is unknown; allowed"):
            allows_pattern(*arguments)


def test_counts_that_do_not_exist_are_refused(space):
    for wrong in (0, -3, *((2, 4, 6) if space.is_causal else ())):
        with pytest.raises(UserError, match="num_frames"):
            space.latents_of(wrong)
    assert [space.latents_of(n) for n in (1, 5, 9)] == ([1, 2, 3] if space.is_causal else [1, 5, 9])


@pytest.mark.parametrize(
    "frames",
    [torch.zeros(3, 5, 16, 24), torch.zeros(1, 3, 5, 16, 23), torch.zeros(1, 3, 0, 16, 24), torch.zeros(0, 3, 5, 16, 24),
     torch.zeros(1, 4, 5, 16, 24), torch.zeros(1, 3, 5, 16, 24, dtype=torch.uint8), np.zeros((1, 5, 16, 24, 4), np.uint8),
     np.zeros((1, 5, 0, 24, 3), np.uint8)],
    ids=lambda frames: str(tuple(frames.shape)),
)  # fmt: skip
def test_frames_that_cannot_be_encoded_are_refused(space, frames):
    with pytest.raises(UserError):
        space.encode(frames)


def test_latents_that_cannot_be_decoded_are_refused(space):
    c = space.channels
    for wrong in (torch.zeros(1, c, 2, 3), torch.zeros(1, 2, c + 1, 2, 3), torch.zeros(0, 2, c, 2, 3), torch.zeros(1, 0, c, 2, 3)):
        with pytest.raises(UserError, match="cannot be decoded"):
            space.decode(wrong)
    for value in (torch.nan, torch.inf):
        with pytest.raises(NotFinite):
            space.decode(torch.full((1, 1, c, 2, 3), value))


def test_weights_of_nan_are_an_error_where_frames_are_read(coded, continuous, tmp_path):
    for network, kind in ((coded, "per_frame"), (coded, "causal"), (continuous, "continuous")):
        network.save_pretrained(tmp_path)
        broken = VideoTokenizer.from_pretrained(tmp_path)
        broken.quant_conv.conv3d.bias.fill_(torch.nan)
        with pytest.raises(NotFinite):
            LatentSpace(broken, kind).encode(clip())


def test_a_network_of_another_kind_is_refused(coded, continuous, autoencoder, golden):
    pictures = VideoTokenizer.from_pretrained(golden / "cosmos_ci")
    for network, allowed in ((coded, {"per_frame", "causal"}), (continuous, {"continuous", "continuous_per_frame"}),
                             (pictures, {"continuous_per_frame"}), (autoencoder, {"autoencoder"})):  # fmt: skip
        for kind in LATENTS:
            if kind not in allowed:
                with pytest.raises(UserError, match=r"cannot be made by .* allowed with it"):
                    LatentSpace(network, kind)
    assert LatentSpace(pictures, "continuous_per_frame").encode(clip()).shape == (2, 5, 4, 2, 3)


@pytest.mark.parametrize(
    "wrong", [{"mean": [0.0, 1.0]}, {"std": [1.0, 1.0, 0.0]}, {"std": [1.0, -1.0, 1.0]}, {"mean": [0.0, float("nan"), 0.0]}]
)
def test_a_mean_or_std_without_meaning_is_refused(coded, wrong):
    with pytest.raises(UserError, match="is not allowed; give null, or 3 finite numbers"):
        LatentSpace(coded, "causal", **wrong)


def test_a_saved_network_is_loaded_from_the_model_folder(space, tmp_path):
    space.save_pretrained(tmp_path)
    again = LatentSpace.from_pretrained(tmp_path, space.latents, space.mean, space.std)
    assert torch.equal(again.encode(clip()), space.encode(clip()))
    options = {"latents": space.latents, "latent_channels": space.channels, "hidden_size": 64, "num_hidden_layers": 2,
               "text_width": 64, "spatial_compression": space.spatial_compression}  # fmt: skip
    config = StivConfig(**options, latent_mean=space.mean, latent_std=space.std)
    assert torch.equal(LatentSpace.from_config(tmp_path, config).encode(clip()), space.encode(clip()))
    assert LatentSpace.from_pretrained(tmp_path, space.latents, dtype=torch.float64).encode(clip()).dtype == torch.float32
    with pytest.raises(UserError, match="expects spatial_compression 16"):
        LatentSpace.from_config(tmp_path, StivConfig(**{**options, "spatial_compression": 16}))
    other = StivConfig(**{**options, "latent_channels": space.channels + 1})
    with pytest.raises(UserError, match=f"expects latent_channels {space.channels + 1}"):
        LatentSpace.from_config(tmp_path, other)


def test_an_autoencoder_folder_of_diffusers_is_loaded(autoencoder, tmp_path):
    autoencoder.save_pretrained(tmp_path / "vae")
    expected = LatentSpace(autoencoder, "autoencoder").encode(clip())
    for folder in (tmp_path, tmp_path / "vae"):
        assert torch.equal(LatentSpace.from_pretrained(folder, "autoencoder").encode(clip()), expected)


def test_damaged_and_foreign_autoencoder_folders_are_errors(autoencoder, tmp_path):
    with pytest.raises(NotFound, match="no image autoencoder"):
        load_autoencoder(tmp_path)
    autoencoder.save_pretrained(tmp_path)
    weights, config = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    whole, settings_ = weights.read_bytes(), json.loads(config.read_text())
    for data in (whole[: len(whole) // 2], b""):
        weights.write_bytes(data)
        with pytest.raises(RunError, match="cannot read the image autoencoder"):
            load_autoencoder(tmp_path)
    weights.write_bytes(whole)
    config.write_text(json.dumps(settings_ | {"layers_per_block": 2}))
    with pytest.raises(RunError, match="do not fit its config"):
        load_autoencoder(tmp_path)
    config.write_text(json.dumps(settings_ | {"latent_channels": 3}))
    with pytest.raises(RunError):
        load_autoencoder(tmp_path)
    for other in ({"_class_name": "AutoencoderTiny"}, {}, []):
        config.write_text(json.dumps(other))
        with pytest.raises(UserError, match="not an AutoencoderKL"):
            load_autoencoder(tmp_path)
    config.write_text("{")
    with pytest.raises(UserError):
        load_autoencoder(tmp_path)


def test_pickled_weights_of_an_autoencoder_are_not_read(autoencoder, tmp_path):
    autoencoder.save_pretrained(tmp_path, safe_serialization=False)
    assert list(tmp_path.glob("*.bin"))
    with pytest.raises(RunError, match="cannot read the image autoencoder"):
        load_autoencoder(tmp_path)


def test_without_diffusers_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"pip install 'lumos-video\[diffusers\]'"):
        LatentSpace.from_pretrained(tmp_path, "autoencoder")


def test_a_tokenizer_folder_of_another_kind_is_refused(golden, tmp_path):
    shutil.copytree(golden / "cosmos_cv", tmp_path / "model" / "video_tokenizer")
    for folder in (golden / "cosmos_cv", tmp_path / "model"):
        with pytest.raises(UserError, match="has continuous latents; allowed with it: continuous, continuous_per_frame"):
            LatentSpace.from_pretrained(folder)
    with pytest.raises(NotFound):
        LatentSpace.from_pretrained(Path(tmp_path / "nothing"))

"""A clip in chunks gives the codes and frames of the whole clip, in memory that does not grow with its length."""

from __future__ import annotations

import dataclasses
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumos.training.video_task import video_tokenizer_sha256
from lumos.video.io import write_video
from tokenizer import StreamDecoder, StreamEncoder, VideoTokenizer, VideoTokenizerConfig
from tokenizer.fingerprint import tokenizer_facts
from tokenizer.layers import TemporalAttention
from tokenizer.video import PIECE

ROOT = Path(__file__).parents[2]
FOLDERS = {"shipped": ROOT / "checkpoints/lumos-tiny", "published": ROOT / "tests/golden/cosmos"}
EXAMPLES = {"max_examples": 8, "deadline": None, "derandomize": True}

OTHERS = {
    # samplers in time, attention between residual blocks, other patches, other ends
    "samplers": {"patch_size": 2, "spatial_compression": 8, "channels_mult": [1, 1, 1], "attn_resolutions": [256, 128]},
    "legacy": {"patch_size": 2, "spatial_compression": 4, "channels_mult": [1, 1], "legacy_mode": True},
    "eight": {"temporal_compression": 8, "spatial_compression": 16, "channels_mult": [1, 1, 1], "patch_method": "rearrange"},
    "points": {"channels_mult": [1, 2], "pointwise_ends": True},
    "frames": {"patch_size": 1, "temporal_compression": 1, "spatial_compression": 2, "channels_mult": [1, 1]},
}


def with_window(model: VideoTokenizer, window: int | None) -> VideoTokenizer:
    """Return a tokenizer of the same weights with another attention_window."""
    other = VideoTokenizer(dataclasses.replace(model.config, attention_window=window)).eval().requires_grad_(False)
    other.load_state_dict(model.state_dict())
    return other


def make(name: str, window: int | None) -> VideoTokenizer:
    if name in FOLDERS:
        return with_window(VideoTokenizer.from_pretrained(FOLDERS[name]), window)
    torch.manual_seed(0)
    sizes = {"channels": 4, "num_res_blocks": 1, "levels": [5, 4], "embedding_dim": 2, "z_channels": 4, "resolution": 512}
    model = VideoTokenizer(VideoTokenizerConfig.from_dict({**sizes, **OTHERS[name], "attention_window": window}))
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, int | None], VideoTokenizer]:
    return {(name, window): make(name, window) for name in (*FOLDERS, *OTHERS) for window in (None, 3)}


def clip(frames: int, side: int = 16, seed: int = 0, batch: int = 1) -> torch.Tensor:
    """Return noise that changes smoothly: neighbouring frames are similar, but all differ; [B, 3, T, side, side]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, frames // 3 + 2, side // 4, side // 4, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(frames, side, side), mode="trilinear")


def cut(data, total: int, dim: int, whole: torch.Tensor) -> list[torch.Tensor]:
    """Split the tensor into chunks at random places; two cuts in one place give an empty chunk."""
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=6)))
    return list(whole.tensor_split(cuts, dim=dim))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "window"), [
    pytest.param(name, window, marks=[pytest.mark.thorough] * (number % 2 == (window is None)))
    for number, name in enumerate((*FOLDERS, *OTHERS)) for window in (None, 3)
])  # fmt: skip
@settings(**EXAMPLES)
@given(data=st.data(), latent=st.integers(1, PIECE + 3))
@torch.inference_mode()
def test_every_way_of_cutting_gives_the_whole_clip(models, name, window, data, latent):
    model = models[name, window]
    side = 2 * model.spatial_compression
    video = clip(1 + model.temporal_compression * (latent - 1), side, seed=latent, batch=2)
    whole = model.quantize(model.encode_latent(video))[1]
    encoder = StreamEncoder(model)
    streamed = torch.cat([encoder.push(chunk) for chunk in cut(data, video.shape[2], 2, video)], dim=1)
    encoder.finish()
    assert torch.equal(streamed, whole)
    assert torch.equal(model.encode(video), whole)

    frames = model.decode_latent(model.values(whole))
    decoder = StreamDecoder(model)
    streamed = torch.cat([decoder.push(chunk) for chunk in cut(data, latent, 1, whole)], dim=2)
    torch.testing.assert_close(streamed, frames, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.decode(whole), frames, rtol=0, atol=1e-4)


@pytest.mark.slow
@torch.inference_mode()
def test_how_a_clip_is_cut_does_not_change_one_bit(models):
    model = models["shipped", None]
    codes = model.encode(clip(33, 4 * model.spatial_compression))
    decoder = StreamDecoder(model)
    one_by_one = torch.cat(list(model.decode_stream([codes])), dim=2)
    assert torch.equal(torch.cat([decoder.push(chunk) for chunk in codes.split(4, dim=1)], dim=2), one_by_one)


@torch.inference_mode()
def test_iterators_give_each_latent_frame_when_it_is_whole(models):
    model = models["shipped", None]
    video = clip(13, 2 * model.spatial_compression)
    taken = 0

    def one_frame_at_a_time():
        nonlocal taken
        for frame in video.split(1, dim=2):
            taken += 1
            yield frame

    seen = []
    for codes in model.encode_stream(one_frame_at_a_time()):
        assert codes.shape == (1, 1, 2, 2)
        seen.append(taken)
    assert seen == [1, 5, 9, 13]
    lengths = [frames.shape[2] for frames in model.decode_stream([model.encode(video)])]
    assert lengths == [1, 4, 4, 4]


@torch.inference_mode()
def test_streams_of_one_model_are_independent(models):
    model = models["published", None]
    clips = [clip(9, seed=1), clip(9, seed=2)]
    encoders = [StreamEncoder(model), StreamEncoder(model)]
    codes = [[], []]
    for start in range(0, 9, 3):
        for found, encoder, video in zip(codes, encoders, clips, strict=True):
            found.append(encoder.push(video[:, :, start : start + 3]))
    for found, video in zip(codes, clips, strict=True):
        assert torch.equal(torch.cat(found, dim=1), model.encode(video))


def cache_sizes(model: VideoTokenizer, latent: int) -> tuple[list[int], list[int]]:
    """Return the bytes that an encoder and a decoder hold after each latent frame."""
    encoder, decoder, sizes = StreamEncoder(model), StreamDecoder(model), ([], [])
    step = model.temporal_compression
    for chunk in clip(1 + step * (latent - 1), 2 * model.spatial_compression).split([1] + [step] * (latent - 1), dim=2):
        decoder.push(encoder.push(chunk))
        sizes[0].append(encoder.cache_bytes)
        sizes[1].append(decoder.cache_bytes)
    return sizes


@pytest.mark.parametrize("name", list(FOLDERS))
@torch.inference_mode()
def test_with_a_window_the_cache_stops_growing(models, name):
    for sizes in cache_sizes(models[name, 3], 12):
        assert sizes[0] < sizes[1]
        assert len(set(sizes[1:])) == 1


@pytest.mark.parametrize("name", list(FOLDERS))
@torch.inference_mode()
def test_without_a_window_the_cache_grows_by_keys_and_values(models, name):
    model = models[name, None]
    channels = model.config.channels * model.config.channels_mult[-1]
    for part, sizes in zip((model.encoder, model.decoder), cache_sizes(model, 12), strict=True):
        attentions = sum(isinstance(module, TemporalAttention) for module in part.modules())
        assert attentions > 0
        assert {b - a for a, b in pairwise(sizes)} == {attentions * 2 * 4 * channels * 2 * 2}  # 2 x 2 places, float32


@torch.inference_mode()
def test_a_window_is_the_whole_past_until_the_clip_is_longer(models):
    whole, window = models["published", None], models["published", 3]
    video = clip(13)
    latents = whole.encode_latent(video), window.encode_latent(video)
    torch.testing.assert_close(latents[1][:, :, :3], latents[0][:, :, :3], rtol=0, atol=1e-5)
    assert (latents[1][:, :, 3] - latents[0][:, :, 3]).abs().max() > 1e-4


@torch.inference_mode()
def test_whole_clips_are_worked_through_in_pieces(models):
    model = models["shipped", 3]
    lengths = []
    hooks = [
        part.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[2]))
        for part in (model.encoder, model.decoder)
    ]
    codes = model.encode(clip(1 + 4 * (3 * PIECE)))
    assert lengths == [PIECE, PIECE, PIECE, 1]
    model.decode(codes)
    assert lengths[4:] == [PIECE, PIECE, PIECE, 1]
    for hook in hooks:
        hook.remove()


MEASURE = """
import dataclasses, sys, torch
from lumos.runtime import peak_memory_bytes
from tokenizer import VideoTokenizer

model = VideoTokenizer(dataclasses.replace(VideoTokenizer.from_pretrained(sys.argv[1]).config, attention_window=5)).eval()
cpu = torch.device("cpu")

def stream(frames):
    generator = torch.Generator().manual_seed(0)
    chunks = (torch.rand(1, 3, 1, 32, 32, generator=generator) * 2 - 1 for _ in range(frames))
    return sum(video.shape[2] for video in model.decode_stream(model.encode_stream(chunks)))

with torch.inference_mode():
    assert stream(41) == 41
    before = peak_memory_bytes(cpu)
    assert stream(1001) == 1001
    print(peak_memory_bytes(cpu) - before)
    video = torch.rand(1, 3, 1001, 32, 32)
    before = peak_memory_bytes(cpu)
    assert model.decode(model.encode(video)).shape == video.shape
    print(peak_memory_bytes(cpu) - before)
"""


def test_a_thousand_frames_need_no_more_memory_than_forty(forks):
    done = forks.run(["-c", MEASURE, FOLDERS["shipped"]])
    assert done.returncode == 0, done.stderr[-2000:]
    streamed, whole = map(int, done.stdout.split())
    clip_bytes = 1001 * 3 * 32 * 32 * 4
    assert streamed < clip_bytes / 4
    assert whole < 4 * clip_bytes  # the frames twice and a piece; one forward of all frames needs 7 times the clip


@pytest.mark.slow
def test_the_example_of_the_documentation(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/tokenizer/streaming.md").read_text(), re.DOTALL)
    (example,) = (block for block in blocks if "import av" in block)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    write_video(tmp_path / "clip.mp4", np.random.default_rng(0).integers(0, 255, (11, 48, 64, 3), dtype=np.uint8), 8)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert capsys.readouterr().out.splitlines() == ["(128, 128, 3)"] * 9  # frames 10 and 11 fill no latent frame


@pytest.mark.parametrize("window", [0, -1, 2.5, True])
def test_invalid_windows_are_refused(window):
    with pytest.raises(ValueError, match="attention_window"):
        VideoTokenizerConfig(attention_window=window)


def test_the_window_is_saved_and_belongs_to_the_tokenizer(models, tmp_path):
    model, other = models["shipped", None], models["shipped", 3]
    other.save_pretrained(tmp_path)
    assert VideoTokenizer.from_pretrained(tmp_path).config.attention_window == 3
    assert "attention_window" not in model.config.to_dict()
    assert tokenizer_facts(model)["fingerprint"] != tokenizer_facts(other)["fingerprint"]
    assert video_tokenizer_sha256(model) != video_tokenizer_sha256(other)


@torch.inference_mode()
def test_what_cannot_be_streamed(models):
    model = models["shipped", None]
    with pytest.raises(ValueError, match=r"num_frames must be 1 \+ 4 \* k, got 7; use 5 or 9"):
        list(model.encode_stream([clip(7)]))
    with pytest.raises(ValueError, match="num_frames must be 1"):
        list(model.encode_stream([]))
    with pytest.raises(ValueError, match="multiples of 16"):
        StreamEncoder(model).push(torch.zeros(1, 3, 1, 24, 32))
    encoder = StreamEncoder(model)
    encoder.push(clip(2, 32))
    with pytest.raises(ValueError, match=r"\(1, 32, 32\) and now are \(1, 48, 48\)"):
        encoder.push(clip(1, 48))
    decoder = StreamDecoder(model)
    decoder.push(torch.zeros(1, 1, 2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"same batch, height and width"):
        decoder.push(torch.zeros(2, 1, 2, 2, dtype=torch.long))
    for wrong in (torch.zeros(1, 2, 2, dtype=torch.long), torch.full((1, 1, 2, 2), model.num_codes)):
        with pytest.raises(ValueError, match="codes must"):
            StreamDecoder(model).push(wrong)

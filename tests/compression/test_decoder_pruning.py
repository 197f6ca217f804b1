"""Smaller decoders of the video tokenizer keep the codes, equal the decoder with skipped units, and stay causal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import codes, tokenizer

from lumos.errors import UserError
from tokenizer import VideoTokenizer, VideoTokenizerConfig
from tokenizer.fingerprint import tokenizer_facts
from tokenizer.resizing import same_codes

UNITS = ["mid", "up.1.0", "up.1.1", "up.0.1", "idle"]


@pytest.fixture(scope="module")
def whole() -> VideoTokenizer:
    return tokenizer()


def test_the_units_of_a_decoder(whole):
    assert list(whole.units()) == UNITS[:-1]
    assert list(whole.units("idle")) == ["idle"]
    assert list(whole.stages()) == ["mid", "up.1.0", "up.1.1", "up.1.upsample", "up.0.0", "up.0.1"]
    assert len(whole.decoder.up[1].attn) == 2
    assert any(".attn.0." in name for name in whole.units()["up.1.0"])
    with pytest.raises(UserError, match="units 'layer' are unknown; allowed: block, idle"):
        whole.units("layer")


def test_published_counts():
    """Section 3 of the specification: the decoder of DV4x8x8."""
    with torch.device("meta"):
        model = VideoTokenizer(VideoTokenizerConfig())
    weights = {name: p.numel() for name, p in model.named_parameters()}
    owned = {name: sum(weights[p] for p in names) for kind in model.unit_kinds for name, names in model.units(kind).items()}
    unused_of_the_other_sampler = 786_944  # up.2 does not double time, and owns a convolution for it
    assert owned == {
        "mid": 14_694_400, **{f"up.{i}.{j}": 6_295_552 for i in (2, 1) for j in range(3)}, "up.0.1": 1_574_912,
        "up.0.2": 1_574_912, "idle": 3_409_408 + unused_of_the_other_sampler,
    }  # fmt: skip
    assert model.named_plans() == {"shallow": ("mid", "up.0.1", "up.0.2")}

    def size(made: VideoTokenizer) -> int:
        return sum(p.numel() for p in made.decoder.parameters())

    assert size(model) == 66_147_968
    assert size(model) - size(model.without(model.named_plans()["shallow"])) == 17_844_224
    assert size(model) - size(model.without(["idle"])) == owned["idle"]


@pytest.mark.slow
@given(names=st.sets(st.sampled_from(UNITS)))
@settings(max_examples=16)
def test_a_smaller_decoder_is_the_one_that_skips(whole, names):
    small = whole.without(names)
    with whole.skipping(names):
        assert small.decode(codes()).equal(whole.decode(codes()))
    lost = sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in small.parameters())
    weights = {name: p.numel() for name, p in whole.named_parameters()}
    units = whole.units() | whole.units("idle")
    assert lost == sum(weights[p] for name in names for p in units[name])
    again = small.without(list(small.units()))  # what is left can be removed too
    everything = [*whole.units(), *(names & {"idle"})]
    with whole.skipping(everything):
        assert again.decode(codes()).equal(whole.decode(codes()))


def test_dropping_the_idle_sampler_changes_nothing(whole):
    small = whole.without(["idle"])
    assert small.decode(codes()).equal(whole.decode(codes()))
    assert small.units("idle") == {}
    with pytest.raises(UserError, match="there is no unit 'idle'"):
        small.without(["idle"])


@pytest.mark.parametrize("smaller", [["mid", "up.1.1"], ["idle", "up.0.1"], []])
def test_the_codes_are_those_of_the_parent(whole, smaller):
    video = torch.rand(1, 3, 9, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    small = whole.without(smaller) if smaller else whole.narrowed({"decoder_channels": 5})
    assert small.encode(video).equal(whole.encode(video))
    assert tokenizer_facts(small) == tokenizer_facts(whole)
    assert same_codes(small, whole)
    other = small.without(["up.1.0"])
    changed = {name: tensor + name.startswith("quant_conv") for name, tensor in other.state_dict().items()}
    other.load_state_dict(changed, assign=True)
    assert tokenizer_facts(other)["fingerprint"] != tokenizer_facts(whole)["fingerprint"]


@pytest.mark.parametrize("smaller", [["mid", "up.1.0", "idle"], ["up.1.0", "up.1.1", "up.0.1"], None])
def test_a_chunked_decode_is_the_whole_one_and_causal(whole, smaller):
    small = whole.without(smaller) if smaller else whole.narrowed({"decoder_channels": 5})
    clip = codes(frames=4)
    found = small.decode(clip)
    chunks = torch.cat(list(small.decode_stream([clip[:, :1], clip[:, 1:3], clip[:, 3:]])), dim=2)
    assert torch.allclose(chunks, found, atol=1e-5)
    assert torch.allclose(small.decode(clip[:, :2]), found[:, :, :5], atol=1e-5)


@pytest.mark.parametrize("names", [["mid"], ["up.1.0", "idle"], ["up.1.0", "up.1.1", "up.0.1", "mid", "idle"]])
def test_a_smaller_tokenizer_is_saved_and_read(whole, tmp_path, names):
    small = whole.without(names)
    small.save_pretrained(tmp_path)
    again = VideoTokenizer.from_pretrained(tmp_path)
    assert again.config == small.config
    assert again.decode(codes()).equal(small.decode(codes()))
    assert tokenizer_facts(again) == tokenizer_facts(whole)
    assert {"decoder_mid", "decoder_num_res_blocks", "codes_of"}.isdisjoint(whole.config.to_dict())


def test_a_continuous_tokenizer_becomes_smaller(tmp_path):
    sizes = {"name": "CV", "quantizer": "", "embedding_dim": 0, "levels": (), "latent_channels": 4, "formulation": "AE"}
    model = tokenizer(**sizes)
    small = model.without(["mid", "up.1.0", "up.1.1", *model.units("idle")])
    small.save_pretrained(tmp_path)
    again = VideoTokenizer.from_pretrained(tmp_path)
    latents = torch.randn(1, 4, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    assert again.decode(latents).equal(small.decode(latents))


def test_a_narrower_decoder_is_saved_and_read(whole, tmp_path):
    small = whole.without(["up.1.1"]).narrowed({"decoder_channels": 5})
    assert small.decoder.conv_out[0].conv3d.weight.shape[1] == 5
    assert small.decoder.up[1].block[0].conv1[0].conv3d.weight.shape[:2] == (10, 10)
    small.save_pretrained(tmp_path)
    again = VideoTokenizer.from_pretrained(tmp_path)
    assert again.decode(codes()).equal(small.decode(codes()))
    assert again.width == {"decoder_channels": 5}


def kept_channels(whole: VideoTokenizer, small: VideoTokenizer) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Return {layer: channels of the whole layer that it writes} and {layer: those that it reads}, found by unique values."""
    ours, theirs, written, read = small.decoder.state_dict(), whole.decoder.state_dict(), {}, {}
    for name in (name for name in ours if name.endswith(".bias")):
        layer, weight = name.removesuffix(".conv3d.bias").removesuffix(".norm.bias"), name.removesuffix("bias") + "weight"
        here = written if "conv3d" in name else read
        here[layer] = [theirs[name].tolist().index(value) for value in ours[name].tolist()]
        stays = theirs[weight][here[layer]]
        if here is written:
            row = stays[0].flatten(1)[:, 0].tolist()
            read[layer] = [row.index(value) for value in ours[weight][0].flatten(1)[:, 0].tolist()]
            stays = stays[:, read[layer]]
        assert ours[weight].equal(stays), name
    return written, read


def test_layers_of_a_narrower_decoder_keep_the_same_channels(whole):
    """All layers that write or read one stream keep the same of its channels: those of the largest norm over all writers."""
    full = whole.without(["idle"])
    written, read = kept_channels(full, full.narrowed({"decoder_channels": 5}))
    state = full.decoder.state_dict()

    def check(count: int, writers: list[str], readers: list[str]) -> None:
        norms = sum(state[f"{name}.conv3d.weight"].flatten(1).square().sum(1) for name in writers)
        wanted = sorted(norms.argsort()[-count:].tolist())
        assert {name: written[name] for name in writers} == dict.fromkeys(writers, wanted)
        assert {name: read.pop(name) for name in readers} == dict.fromkeys(readers, wanted)

    high = ["mid.block_1", "mid.block_2", "up.1.block.0", "up.1.block.1"]
    pairs = [f"{name}.{i}" for name in ("mid.attn_1", "up.1.attn.0", "up.1.attn.1") for i in (0, 1)]
    for block in [*high, "up.0.block.0", "up.0.block.1"]:
        count = 10 if block in high else 5
        check(count, [f"{block}.conv1.0"], [f"{block}.conv1.1"])
        check(count, [f"{block}.conv1.1"], [f"{block}.norm2", f"{block}.conv2.0"])
        check(count, [f"{block}.conv2.0"], [f"{block}.conv2.1"])
    for part in pairs:
        check(10, [f"{part}.q", f"{part}.k"], [])
        check(10, [f"{part}.v"], [f"{part}.proj_out"])
    check(
        10, ["conv_in.1", *(f"{name}.conv2.1" for name in high), *(f"{name}.proj_out" for name in pairs), "up.1.upsample.conv2"],
        [*(f"{name}.{layer}" for name in high for layer in ("norm1", "conv1.0")), "up.1.upsample.conv2", "up.1.upsample.conv3",
         *(f"{name}.{layer}" for name in pairs for layer in ("norm", "q", "k", "v"))],
    )  # fmt: skip
    check(10, ["up.1.upsample.conv3"], [f"up.0.block.0.{layer}" for layer in ("norm1", "conv1.0", "nin_shortcut")])
    check(5, ["up.0.block.0.nin_shortcut", "up.0.block.0.conv2.1", "up.0.block.1.conv2.1"],
          ["up.0.block.1.norm1", "up.0.block.1.conv1.0", "norm_out", "conv_out.0"])  # fmt: skip
    check(10, ["conv_in.0"], ["conv_in.1"])
    assert read.pop("conv_in.0") == list(range(state["conv_in.0.conv3d.weight"].shape[1]))
    assert written["conv_out.1"] == list(range(len(state["conv_out.1.conv3d.bias"])))
    assert read.keys() == {"conv_out.1"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_num_res_blocks": [0, 2]}, "decoder_num_res_blocks .* is not possible: .* at least .1, 0."),
        ({"decoder_num_res_blocks": [1]}, "decoder_num_res_blocks"),
        ({"decoder_num_res_blocks": [1, 3]}, "a whole number up to 2 for each level"),
        ({"decoder_num_res_blocks": [True, 1]}, "decoder_num_res_blocks"),
        ({"decoder_mid": 0}, "decoder_mid 0 is not possible: allowed is true or false"),
        ({"decoder_channels": 9}, "decoder_channels 9 is not possible: .* from 1 to channels 8"),
        ({"codes_of": ["x"]}, "codes_of"),
    ],
)
def test_impossible_decoders_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        tokenizer(**changes)


def test_unknown_units_of_a_decoder(whole):
    for call in (whole.without, lambda names: whole.skipping(names).__enter__()):
        with pytest.raises(UserError, match=r"there is no unit 'up\.0\.0'; the decoder has mid, up\.1\.0"):
            call(["up.0.0"])

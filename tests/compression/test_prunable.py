"""A skipped unit is an identity, and a network without a unit is the network that skips it, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_networks import clip_ids, codes, decoder, tokenizer, transformer, velocity
from torch.utils.flop_counter import FlopCounterMode

from lumos.compression.plans import spaced
from lumos.errors import UserError
from lumos.models.lumos1.cache import Cache, PrefixCache
from lumos.models.lumos1.engine import DecodingEngine
from lumos.models.lumos1.flops import layer_flops_per_token
from lumos.models.lumos1.modeling import LumosForVideoGeneration
from lumos.models.lumos1.sequence import build_frames, build_prefix
from lumos.models.stiv.block_reuse import BlockReuse
from lumos.models.stiv.configuration import StivConfig
from lumos.models.stiv.flops import forward_flops
from lumos.models.stiv.modeling import Micro, StivForVideoGeneration
from tokenizer.narrowing import strongest


@pytest.fixture(scope="module")
def lumos():
    return decoder()


@pytest.fixture(scope="module")
def stiv():
    return transformer()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def logits(model) -> torch.Tensor:
    return model(clip_ids(model)).logits


def generated(model, prefix_cache: PrefixCache | None = None) -> torch.Tensor:
    """Logits of two frames through the cache: a step of the first, and a step of the second that commits the first."""
    engine, config = DecodingEngine(model), model.config
    prefixes = [torch.tensor(build_prefix(text, fps=8, duration=1, config=config)) for text in ([300, 301], None)]
    draws = torch.Generator().manual_seed(4)
    frames = build_frames(torch.randint(-1, 64, (2, 2, 3), generator=draws), config)
    engine.prefill(prefixes, 64, prefix_cache)
    first = engine.denoise(frames[:1].expand(2, -1))
    second = engine.denoise(frames[1:].expand(2, -1), committing=frames[:1].expand(2, -1))
    return torch.cat([first, second])


# ---- skipping


@pytest.mark.parametrize("name", ["0", "1", "3"])
def test_the_stream_passes_a_skipped_layer(lumos, name):
    """The stream before a skipped layer equals the stream behind it, and nothing else in the model changes."""
    streams = {}
    handles = [layer.register_forward_hook(lambda _, args, out, i=i: streams.update({i: (args[0], out)}))
               for i, layer in enumerate(lumos.model.layers)]  # fmt: skip
    with lumos.skipping([name]):
        skipped = logits(lumos)
    for handle in handles:
        handle.remove()
    index = int(name)
    assert streams.keys() == {0, 1, 2, 3} - {index}
    if 0 < index < 3:
        assert streams[index + 1][0].equal(streams[index - 1][1])
    assert not skipped.equal(logits(lumos))


def test_a_skipped_part_adds_nothing(lumos):
    x = torch.randn(1, 5, 64)
    layer, rotary = lumos.model.layers[1], lumos.rotary(torch.arange(5).expand(1, 3, -1), torch.zeros(1, 5, dtype=torch.bool))

    def attend(layer, q, k, v):
        return q

    whole = layer(x, rotary, attend)
    attended = x + layer.self_attn(layer.input_layernorm(x), rotary, attend)
    with lumos.skipping(["1.mlp"]):
        assert layer(x, rotary, attend).equal(attended)
    with lumos.skipping(["1.attention"]):
        assert layer(x, rotary, attend).equal(x + layer.mlp(layer.post_attention_layernorm(x)))
    assert layer(x, rotary, attend).equal(whole)


def test_skipping_nothing_changes_nothing(lumos, stiv):
    for run, model in ((logits, lumos), (generated, lumos), (velocity, stiv)):
        plain = run(model)
        with model.skipping([]):
            assert run(model).equal(plain)
        with model.skipping(["1"]):
            assert not run(model).equal(plain)
        assert run(model).equal(plain)


def test_skipping_can_be_nested(lumos):
    with lumos.skipping(["1", "2.mlp"]):
        both = logits(lumos)
    with lumos.skipping(["1"]):
        with lumos.skipping(["2.mlp"]):
            assert logits(lumos).equal(both)
        assert not logits(lumos).equal(both)


def test_all_layers_can_be_skipped(lumos):
    with lumos.skipping(["0", "1", "2", "3"]):
        at = torch.tensor([[1, 4], [0, 2]])
        ids = clip_ids(lumos)
        hidden = lumos.hidden_states(ids)[0]
        embedded = lumos.model.norm(lumos.model.embed_tokens(ids))
        assert hidden.equal(embedded)
        assert lumos.model(ids, None, None, at).equal(embedded.gather(1, at[..., None].expand(-1, -1, 64)))


def test_a_cached_prefix_is_that_of_the_skipped_layers(lumos):
    """A cached prefix of all layers is not used in a run that skips layers, and the other way round."""
    shared = PrefixCache()
    plain = generated(lumos, shared)
    with lumos.skipping(["2"]):
        skipped = generated(lumos)
        assert generated(lumos, shared).equal(skipped)
    assert generated(lumos, shared).equal(plain)


# ---- removal


@pytest.mark.parametrize("names", [["1"], ["0"], ["3"], ["0", "2"], ["1", "2", "3"]])
def test_a_smaller_decoder_is_the_one_that_skips(lumos, names):
    small = lumos.without(names)
    assert [layer.self_attn.layer for layer in small.model.layers] == list(range(4 - len(names)))
    assert small.config.num_hidden_layers == 4 - len(names)
    with lumos.skipping(names):
        assert logits(small).equal(logits(lumos))
        assert generated(small).equal(generated(lumos))
    assert lumos.config.num_hidden_layers == 4


STIV_UNITS = [f"{i}{part}" for i in range(4) for part in ("", ".temporal", ".cross", ".mlp")]


@pytest.mark.slow
@given(names=st.sets(st.sampled_from(STIV_UNITS), max_size=6), keep=st.booleans())
def test_a_smaller_transformer_is_the_one_that_skips(stiv, names, keep):
    if {"0", "1", "2", "3"} <= names:
        return
    more = {"keep": torch.tensor([[0, 2, 5], [1, 3, 4]])} if keep and "3" not in names and "2" not in names else {}
    with torch.no_grad():
        small = stiv.without(names)
        with stiv.skipping(names):
            assert velocity(small, **more).equal(velocity(stiv, **more))
    assert sum(p.numel() for n, p in small.named_parameters() if "text_encoder" not in n) == small.config.num_parameters


def test_a_smaller_transformer_with_given_frames_and_reuse(stiv):
    names = ["1", "2.temporal"]
    small, given_frames = stiv.without(names), torch.tensor([[True, False, False, False]] * 2)
    found = []
    for model, skipped in ((small, []), (stiv, names)):
        reuse = BlockReuse(every=2)
        with model.skipping(skipped):
            found.append([velocity(model, given=given_frames, reuse=reuse) for _ in range(2)])
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


def test_removed_parts_own_no_parameters_and_are_numbered_anew(stiv):
    small = stiv.without(["0", "2.temporal", "3.mlp"])
    assert small.config.without == ["1.temporal", "2.mlp"]
    assert small.units("temporal").keys() == {"0.temporal", "2.temporal"}
    assert not [name for name in small.state_dict() if name.startswith(("blocks.1.temporal", "blocks.2.mlp"))]
    again = small.without(["0"])
    assert again.config.without == ["0.temporal", "1.mlp"]
    both = ["0", "1", "2.temporal", "3.mlp"]
    with stiv.skipping(both):
        assert velocity(again).equal(velocity(stiv))


def test_last_blocks_that_see_all_places_stay_the_same_ones(stiv):
    assert stiv.config.unmasked_layers == 2
    assert stiv.without(["3"]).config.unmasked_layers == 1
    assert stiv.without(["0"]).config.unmasked_layers == 2
    assert stiv.without(["2", "3"]).config.unmasked_layers == 1  # there is always one


def test_a_complete_config_does_not_name_the_field(stiv):
    assert "without" not in stiv.config.to_dict()
    assert "without" not in stiv.without(["1.mlp"]).without(["1"]).config.to_dict()
    assert stiv.without(["1.mlp"]).config.to_dict()["without"] == ["1.mlp"]


@pytest.mark.parametrize("wrong", [["4.mlp"], ["1.spatial"], ["1"], "1.mlp", ["1.mlp", "1.mlp"], [1], ["01.mlp"]])
def test_impossible_missing_parts_are_refused(wrong):
    with pytest.raises(ValueError, match=r"without .* is not allowed; give null, or different parts such as 3\.temporal"):
        StivConfig.preset("nano", without=wrong)
    with pytest.raises(ValueError, match="has no effect without temporal_attention"):
        StivConfig.preset("nano", without=["1.temporal"], temporal_attention=False)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["9"], "there is no unit '9'; the network has 0, 1"),
        (["0.x"], "there is no unit '0.x'"),
        (["0", "1", "2", "3"], "all layers would be removed; keep at least one"),
    ],
)
def test_units_that_are_not_there(lumos, stiv, names, message):
    for model in (lumos, stiv):
        with pytest.raises(UserError, match=message):
            model.without(names)
    with pytest.raises(UserError, match="there is no unit 'x'"), lumos.skipping(["x"]):
        pass


def test_parts_without_a_place_in_the_config_are_only_skipped(lumos, stiv):
    for model, name in ((lumos, "1.mlp"), (lumos, "1.attention"), (stiv, "1.spatial")):
        with pytest.raises(UserError, match=f"unit {name} can be skipped, but not removed"):
            model.without([name])
        with pytest.raises(UserError, match="units 'x' are unknown; allowed: "):
            model.units("x")


# ---- counts


def test_flops_and_cache_of_smaller_decoders():
    for kept in (1, 2, 4):
        model = decoder(num_hidden_layers=4)
        small = model.without([str(i) for i in range(4) if i not in spaced(4, kept)]) if kept < 4 else model
        cache = Cache(small, 1, 10)
        assert cache.keys.nbytes + cache.values.nbytes == 10 * small.kv_bytes_per_token()
        assert small.kv_bytes_per_token() * 4 == model.kv_bytes_per_token() * kept
        assert layer_flops_per_token(small.config, 7) * 4 == layer_flops_per_token(model.config, 7) * kept


def test_published_counts():
    """Section 3 of the specification: the shipped model and the published ones."""
    for preset, kept, parameters, dtype, before, after in (
        ("tiny", 6, 11_079_616, torch.float32, 20_480, 15_360), ("1b", 12, 1_260_442_624, torch.bfloat16, 32_768, 24_576),
        ("3b", 20, 2_809_271_296, torch.bfloat16, 114_688, 81_920),
    ):  # fmt: skip
        with torch.device("meta"):
            model = LumosForVideoGeneration(type(decoder().config).preset(preset)).to(dtype)
        count = model.config.num_hidden_layers
        small = model.without([str(i) for i in range(count) if i not in spaced(count, kept)])
        assert sum(p.numel() for p in small.parameters()) == small.config.num_parameters == parameters
        assert (model.kv_bytes_per_token(), small.kv_bytes_per_token()) == (before, after)
    with torch.device("meta"):
        model = StivForVideoGeneration(StivConfig.preset("stiv-tiny", latent_channels=5))
    weights = dict(model.named_parameters())
    owned = {kind: sum(weights[name].numel() for name in next(iter(model.units(kind).values()))) for kind in ("block", "temporal")}
    assert owned == {"block": 1_317_248, "temporal": 263_552}
    with torch.device("meta"):
        model = StivForVideoGeneration(StivConfig.preset("stiv-xl"))
    assert sum(p.numel() for p in model.parameters()) == 767_730_112
    small = model.without([str(i) for i in range(28) if i not in spaced(28, 20)])
    assert sum(p.numel() for p in small.parameters()) == 555_169_216
    assert len(model.units("temporal")) == 28


@pytest.mark.parametrize("names", [["1"], ["1.temporal"], ["0.cross", "2.mlp"], ["0", "3.temporal", "3.cross"]])
def test_flops_of_smaller_transformers_are_those_that_run(stiv, names):
    with torch.device("meta"):
        small, meta = StivForVideoGeneration(stiv.without(names).config), torch.empty
        conditions = Micro(meta(1, 2), meta(1, 2), meta(1), meta(1))
        with FlopCounterMode(display=False) as counter:
            small(meta(1, 4, 3, 4, 6), meta(1), meta(1, 5, 64), None, meta(1, 64), micro=conditions)
    assert counter.get_total_flops() == forward_flops(small.config, *small.config.grid(4, 4, 6), text_tokens=5)


# ---- narrower


def test_a_narrower_decoder_lacks_its_weakest_channels(lumos):
    small = lumos.narrowed({"intermediate_size": 60})
    masked = decoder()
    for layer, narrow in zip(masked.model.layers, small.model.layers, strict=True):
        mlp = layer.mlp
        norm = mlp.gate_proj.weight.square().sum(1) + mlp.up_proj.weight.square().sum(1) + mlp.down_proj.weight.square().sum(0)
        weakest = norm.argsort()[:36]
        mlp.down_proj.weight[:, weakest] = 0
        assert narrow.mlp.gate_proj.weight.shape == (60, 64)
    assert small.config.intermediate_size == 60
    assert torch.allclose(logits(small), logits(masked), atol=1e-5)


def test_narrower_transformer(stiv):
    small = stiv.without(["1.mlp"]).narrowed({"mlp_ratio": 3})
    assert (small.config.mlp_ratio, small.config.without) == (3, ["1.mlp"])
    assert small.blocks[0].mlp.up_proj.weight.shape == (192, 64)
    assert velocity(small).isfinite().all()


def test_strongest_channels_by_plain_loops():
    draws = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 3, 2, generator=draws), torch.randn(4, 6, generator=draws)
    norms = [sum(float(v) ** 2 for v in a[i].flatten()) + sum(float(v) ** 2 for v in b[:, i]) for i in range(6)]
    wanted = sorted(sorted(range(6), key=lambda i: -norms[i])[:4])
    assert strongest([(a, 0), (b, 1)], 4).tolist() == wanted


@pytest.mark.parametrize("model", [decoder, tokenizer], ids=["decoder", "tokenizer"])
def test_sizes_that_are_not_smaller_are_refused(model):
    made = model()
    ((name, width),) = made.width.items()
    for size in (0, width, -1, 1.5, True):
        with pytest.raises(UserError, match=f"{name} .* is not allowed; give a whole number from 1 to {width - 1}"):
            made.narrowed({name: size})
    with pytest.raises(UserError, match=f"size 'depth' cannot be made smaller; allowed: {name}"):
        made.narrowed({"depth": 1})
    assert codes().shape == (1, 3, 2, 3)

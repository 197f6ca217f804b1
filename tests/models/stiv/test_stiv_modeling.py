from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import noop_context_fn
from torch.utils.flop_counter import FlopCounterMode

from lumos.errors import UserError
from lumos.models.stiv import attention
from lumos.models.stiv.attention import StivAttention
from lumos.models.stiv.block_reuse import BlockReuse
from lumos.models.stiv.configuration import HEAD_DIM, StivConfig
from lumos.models.stiv.flops import block_flops, forward_flops
from lumos.models.stiv.modeling import Micro, StivForVideoGeneration, patches, unpatched
from lumos.models.stiv.rope import apply_rotary, rotary, spatial_angles, temporal_angles

T = torch.tensor([0.3, 0.8])


def clip(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- start, counts, FLOPs


@pytest.mark.parametrize("zero_gain", [False, True])
def test_a_fresh_model_gives_zero_and_every_weight_moves(micro_stiv_config, zero_gain):
    torch.manual_seed(0)
    model = StivForVideoGeneration(micro_stiv_config()).train()
    if zero_gain:
        for block in model.blocks:
            torch.nn.init.zeros_(block.temporal_gain)
    ids, keep = torch.randint(0, 32, (2, 6)), torch.stack([torch.arange(2), torch.arange(1, 3)])
    x, target = clip(2, 4, 3, 4, 4), clip(2, 4, 3, 4, 4, seed=6)
    assert model(x * 1e3, T, text_ids=ids).sample.eq(0).all()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        model.zero_grad()
        (model(x, T, text_ids=ids, keep=keep).sample - target).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad.isfinite().all()
                parameter.sub_(1e-3 * parameter.grad.sign())  # a step as large as Adam's first one
    assert [name for name, p in model.named_parameters() if p.equal(before[name])] == []


def test_weights_start_as_the_reference_says(micro_stiv_config):
    model = StivForVideoGeneration(micro_stiv_config(hidden_size=128))
    start = dict(model.named_parameters())
    zero = {name for name, p in start.items() if p.eq(0).all() and not name.endswith("bias")}
    blocks = {f"blocks.{i}.{part}" for i in range(3) for part in ("table", "cross.o_proj.weight")}
    assert zero == blocks | {"modulation.weight", "final_modulation.weight", "patch_out.weight"}
    assert all(p.eq(0).all() for name, p in start.items() if name.endswith("bias"))
    assert all(p.eq(1).all() for name, p in start.items() if name.endswith(("norm.weight", "temporal_gain")))
    for name, p in start.items():
        if name.startswith("conditions.") and name.endswith(("0.weight", "2.weight")):
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
    assert start["blocks.0.spatial.q_proj.weight"].abs().max() <= (6 / 256) ** 0.5  # Xavier uniform


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pictures", "video"),
    [("xl", 618_855_840, 767_730_112), ("xxl", 1_475_419_168, 1_834_427_200), ("m", 7_094_221_344, 8_831_572_288)],
)
def test_published_sizes_have_the_published_counts(name, pictures, video):
    for count, temporal in ((pictures, False), (video, True)):
        config = StivConfig.preset(name, temporal_attention=temporal)
        with torch.device("meta"):
            model = StivForVideoGeneration(config)
        assert sum(p.numel() for p in model.parameters()) == count == config.num_parameters


@pytest.mark.parametrize(
    ("name", "pictures", "video"), [("nano", 1.56, 1.82), ("tiny", 9.95, 12.05), ("small", 31.5, 38.6), ("base", 124.3, 152.7)]
)
def test_our_sizes_have_the_counts_of_the_reference(name, pictures, video):
    for count, temporal in ((pictures, False), (video, True)):
        config = StivConfig.preset(name, temporal_attention=temporal)
        with torch.device("meta"):
            model = StivForVideoGeneration(config)
        stack = sum(p.numel() for key, p in model.named_parameters() if not key.startswith("text_encoder."))
        assert stack == config.num_parameters == pytest.approx(count * 1e6, rel=2.5e-3)  # the reference rounds


@pytest.mark.parametrize("temporal", [False, True])
def test_flops_of_a_block_are_those_of_the_formula(temporal):
    config = StivConfig.preset("xl", temporal_attention=temporal)
    t, s, m, d = 10 if temporal else 1, 256, 77, 1152
    n, weights, keys = t * s, 20 if temporal else 16, s + m + (t if temporal else 0)
    assert block_flops(config, t, s, m) == 2 * n * (weights - 2) * d * d + 2 * m * 2 * d * d + 4 * n * d * keys


def test_flops_know_causal_attention_and_dropped_places(micro_stiv_config):
    free, causal, d = micro_stiv_config(), micro_stiv_config(causal_in_time=True), 64
    assert block_flops(free, 5, 6, 7) - block_flops(causal, 5, 6, 7) == 4 * 30 * d * (5 - 3)
    masked, whole = (forward_flops(free, 5, 2, 3, 7, dropped) for dropped in (0.5, 0.0))
    embedded = 2 * 5 * 3 * free.patch_channels * d  # of the dropped places
    assert whole - masked == block_flops(free, 5, 6, 7) - block_flops(free, 5, 3, 7) + embedded


@pytest.mark.parametrize("more", [{}, {"temporal_attention": False}, {"temporal_patch_size": 2}])
def test_counted_flops_are_those_that_run(micro_stiv_config, stiv_text, more):
    config = micro_stiv_config(**more)
    text = stiv_text(1)
    with torch.device("meta"):
        model, meta = StivForVideoGeneration(config), torch.empty
        frames = 1 if "temporal_attention" in more else 4
        x, states = meta(1, frames, 3, 8, 12), meta(1, 5, 64)
        with FlopCounterMode(display=False) as counter:
            model(x, meta(1), states, None, meta(1, 64), micro=Micro(meta(1, 2), meta(1, 2), meta(1), meta(1)))
    assert text.states.shape == states.shape
    assert counter.get_total_flops() == forward_flops(config, *config.grid(frames, 8, 12), text_tokens=5)


# ---- attention and positions


@settings(max_examples=25)
@given(frames=st.integers(1, 4), rows=st.integers(1, 3), columns=st.integers(1, 3), causal=st.booleans(), seed=st.integers(0, 99))
def test_factorised_attention_is_dense_attention_with_a_mask(frames, rows, columns, causal, seed):
    torch.manual_seed(seed)
    unit, s = StivAttention(128).double(), rows * columns
    x = torch.randn(2, frames, s, 128, dtype=torch.float64)
    places = spatial_angles(rows, columns, 1.0, 0.5, HEAD_DIM, x.device)
    times = temporal_angles(frames, 1.0, HEAD_DIM, x.device)
    frame, place = torch.arange(frames).repeat_interleave(s), torch.arange(s).repeat(frames)
    in_frame = unit(x, rotary=rotary(places, x.dtype))
    assert torch.allclose(in_frame.flatten(1, 2), dense(unit, x, places[place], frame[:, None] == frame), atol=1e-10, rtol=0)
    in_place = unit(x.transpose(1, 2), rotary=rotary(times, x.dtype), causal=causal).transpose(1, 2)
    mask = (place[:, None] == place) & ((frame[:, None] >= frame) if causal else True)
    assert torch.allclose(in_place.flatten(1, 2), dense(unit, x, times[frame], mask), atol=1e-10, rtol=0)


def dense(unit: StivAttention, x: torch.Tensor, angles: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention over all tokens of a clip at once, with a mask [L, L], written plainly."""
    x = x.flatten(1, 2)

    def head_norm(y, weight):
        return y / (y.square().mean(-1, keepdim=True) + attention.EPS).sqrt() * weight

    def turned(y):
        a, b = y.chunk(2, dim=-1)
        cos, sin = angles.cos().to(y.dtype)[:, None], angles.sin().to(y.dtype)[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    q, k, v = (proj(x).unflatten(-1, (-1, HEAD_DIM)) for proj in (unit.q_proj, unit.k_proj, unit.v_proj))
    q, k = turned(head_norm(q, unit.q_norm.weight)), turned(head_norm(k, unit.k_norm.weight))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 8
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return unit.o_proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


@pytest.mark.parametrize("axis", ["rows", "columns", "time"])
def test_attention_depends_on_differences_of_positions_only(axis):
    torch.manual_seed(0)
    unit, grid = StivAttention(64).double(), {"time": 3, "rows": 2, "columns": 3}
    x = torch.randn(1, 6 if axis != "time" else 3, 64, dtype=torch.float64)

    def out(offset: float) -> torch.Tensor:
        if axis == "time":
            turns = temporal_angles(grid["time"] + 7, 1.0, HEAD_DIM, x.device)[int(offset) : int(offset) + 3]
        else:
            whole = spatial_angles(9, 10, 1.0, 1.0, HEAD_DIM, x.device).unflatten(0, (9, 10))
            row, column = (int(offset) if axis == name else 0 for name in ("rows", "columns"))
            turns = whole[row : row + 2, column : column + 3].flatten(0, 1)
        return unit(x, rotary=rotary(turns, x.dtype))

    assert torch.allclose(out(0), out(7), atol=1e-6)
    assert not torch.allclose(out(0), unit(x), atol=1e-3)


def test_a_position_scale_of_one_half_puts_place_2k_where_k_was():
    device = torch.device("cpu")
    assert temporal_angles(8, 0.5, HEAD_DIM, device)[::2].equal(temporal_angles(4, 1.0, HEAD_DIM, device))
    halved = spatial_angles(4, 6, 0.5, 0.5, HEAD_DIM, device).unflatten(0, (4, 6))[::2, ::2]
    assert halved.flatten(0, 1).equal(spatial_angles(2, 3, 1.0, 1.0, HEAD_DIM, device))


def test_rotary_positions_keep_norms_and_start_as_identity():
    x = torch.randn(3, 5, 2, HEAD_DIM)
    tables = rotary(temporal_angles(5, 1.0, HEAD_DIM, x.device), x.dtype)
    turned = apply_rotary(x, tables)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    assert turned[:, 0].equal(x[:, 0])


# ---- the whole model


@pytest.mark.parametrize("size", [1, 2])
def test_patches_are_put_together_again(micro_stiv_config, size):
    config = micro_stiv_config(temporal_patch_size=size)
    x = clip(2, 4, 3, 4, 6)
    assert patches(x, config).shape == (2, 4 // size, 6, config.patch_channels)
    assert unpatched(patches(x, config), 2, config).equal(x)


def test_clips_of_a_batch_do_not_see_each_other(micro_stiv, stiv_text):
    model, text, x = micro_stiv(), stiv_text(3), clip(3, 4, 3, 4, 4)
    t, given, order = torch.tensor([0.1, 0.5, 0.9]), torch.eye(3, 4).bool(), torch.tensor([2, 0, 1])
    whole = model(x, t, *text, given=given).sample
    permuted = model(x[order], t[order], *text.rows(order), given=given[order]).sample
    assert torch.allclose(permuted, whole[order], atol=1e-5)
    alone = model(x[1:2], t[1:2], text.states[1:2, :4], None, text.pooled[1:2], given=given[1:2]).sample
    assert torch.allclose(alone, whole[1:2], atol=1e-5)


def test_given_time_matters_only_with_given_frames(micro_stiv, stiv_text):
    clean, same, text, x = micro_stiv(), micro_stiv(given_time="same"), stiv_text(2), clip(2, 4, 3, 4, 4)
    none, first = torch.zeros(2, 4, dtype=torch.bool), torch.tensor([[True, False, False, False]] * 2)
    assert torch.allclose(clean(x, T, *text, given=none).sample, same(x, T, *text, given=none).sample, atol=1e-6)
    assert torch.allclose(clean(x, T, *text, given=none).sample, clean(x, T, *text).sample, atol=1e-6)
    assert not torch.allclose(clean(x, T, *text, given=first).sample, same(x, T, *text, given=first).sample, atol=1e-3)
    of_clip = clean(x, T, *text, given=first, given_time=T).sample  # the given frames have the clip's own time
    assert torch.allclose(of_clip, same(x, T, *text, given=first).sample, atol=1e-6)


def test_a_token_of_two_frames_is_given_only_if_both_are(micro_stiv, stiv_text):
    model, text, x = micro_stiv(temporal_patch_size=2), stiv_text(2), clip(2, 4, 3, 4, 4)
    one = torch.tensor([[True, False, False, False]] * 2)
    two = torch.tensor([[True, True, False, False]] * 2)
    none = model(x, T, *text).sample
    assert torch.allclose(model(x, T, *text, given=one).sample, none, atol=1e-5)
    assert not torch.allclose(model(x, T, *text, given=two).sample, none, atol=1e-3)


def test_causal_in_time_sees_no_later_frame(micro_stiv, stiv_text):
    text, x = stiv_text(2), clip(2, 4, 3, 4, 4)
    later = torch.cat([x[:, :2], x[:, 2:] + 1], dim=1)
    causal, free = (micro_stiv(causal_in_time=switch) for switch in (True, False))
    assert torch.allclose(causal(x, T, *text).sample[:, :2], causal(later, T, *text).sample[:, :2], atol=1e-6)
    assert not torch.allclose(free(x, T, *text).sample[:, :2], free(later, T, *text).sample[:, :2], atol=1e-3)


def test_padded_text_has_no_effect_and_micro_conditions_have(micro_stiv, stiv_text):
    model, text, x = micro_stiv(), stiv_text(2), clip(2, 4, 3, 4, 4)
    states = torch.where(text.mask[..., None], text.states, 1e3)
    usual = Micro.default(model.config, 2, 4, 4, 4)
    whole = model(x, T, *text).sample
    assert torch.allclose(model(x, T, states, text.mask, text.pooled, micro=usual).sample, whole, atol=1e-6)
    assert usual.original_size.tolist() == [[32, 32]] * 2
    for name in ("original_size", "crop", "stride", "num_frames"):
        changed = Micro(**{**vars(usual), name: getattr(usual, name) + 100})
        assert not torch.allclose(model(x, T, *text, micro=changed).sample, whole, atol=1e-4), name


def test_half_precision_stays_near_single_precision(micro_stiv, stiv_text):
    model, text, x = micro_stiv(), stiv_text(2), clip(2, 4, 3, 4, 4)
    single = model(x, T, *text).sample
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x, T, *text).sample
    half = model.to(torch.bfloat16)(x, T, *text).sample
    for found in (mixed, half):
        assert found.dtype == torch.float32
        assert (found - single).norm() < 0.05 * single.norm()


def test_tokens_stay_in_single_precision_under_autocast(micro_stiv, stiv_text):
    model, seen = micro_stiv(), []
    model.blocks[1].register_forward_hook(lambda block, inputs, out: seen.extend([inputs[0].dtype, out.dtype]))
    model.blocks[1].mlp.up_proj.register_forward_hook(lambda layer, inputs, out: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(clip(2, 4, 3, 4, 4), T, *stiv_text(2))
    assert seen == [torch.bfloat16, torch.float32, torch.float32]


def test_bfloat16_training_on_a_cpu_attends_in_float32(micro_stiv, stiv_text):
    model, text, x, dtypes = micro_stiv(), stiv_text(2), clip(2, 4, 3, 4, 4), set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.name() in attention.KERNELS:
                dtypes.add(args[0].dtype)
            return op(*args, **(kwargs or {}))

    plain = model(x, T, *text).sample
    with torch.autocast("cpu", torch.bfloat16), Watch():
        found = model(x, T, *text).sample
        assert dtypes == {torch.float32}
        with torch.no_grad():
            model(x, T, *text)
    assert dtypes == {torch.float32, torch.bfloat16}
    assert (found - plain).norm() < 0.05 * plain.norm()


def test_wrong_sizes_and_missing_text_are_refused(micro_stiv, stiv_text):
    model, text = micro_stiv(temporal_patch_size=2), stiv_text(2)
    for shape in ((2, 4, 3, 5, 4), (2, 4, 3, 4, 7), (2, 3, 3, 4, 4)):
        with pytest.raises(UserError, match="no multiple of the patch of 2"):
            model(clip(*shape), T, *text)
    with pytest.raises(ValueError, match="text is missing"):
        model(clip(2, 4, 3, 4, 4), T)


# ---- dropped places


def test_keeping_all_places_is_the_unmasked_model(micro_stiv, stiv_text):
    model, text, x = micro_stiv(), stiv_text(2), clip(2, 4, 3, 4, 6)
    keep = torch.arange(6).expand(2, -1)
    assert torch.allclose(model(x, T, *text, keep=keep).sample, model(x, T, *text).sample, atol=1e-6)


def test_main_blocks_see_no_dropped_place(micro_stiv, stiv_text):
    model, text, x = micro_stiv(num_hidden_layers=4), stiv_text(2), clip(2, 4, 3, 4, 6)
    keep = torch.tensor([[0, 2, 5], [1, 3, 4]])
    places = torch.zeros(2, 6, dtype=torch.bool).scatter(1, keep, True).unflatten(1, (2, 3))
    kept = places.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None, None]
    seen = []
    model.blocks[1].register_forward_hook(lambda block, inputs, out: seen.append(out))
    found = [model(given, T, *text, keep=keep).sample for given in (x, torch.where(kept, x, x + 9))]
    assert seen[0].shape == (2, 4, 3, 64)
    assert seen[0].equal(seen[1])
    assert found[0].equal(found[1])
    assert not torch.allclose(found[0], model(torch.where(kept, x + 1, x), T, *text, keep=keep).sample, atol=1e-3)


# ---- checkpointing and reuse


@pytest.mark.parametrize("how", [None, {"context_fn": noop_context_fn}])
def test_checkpointing_gives_the_same_gradients(micro_stiv, stiv_text, how):
    text, x = stiv_text(2), clip(2, 4, 3, 4, 4)
    gradients = []
    for switch in (False, True):
        model = micro_stiv().train()
        if switch:
            model.gradient_checkpointing_enable(how)
        model(x, T, *text).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])


def test_checkpointing_recomputes_no_self_attention(micro_stiv, stiv_text):
    model, text, x, names = micro_stiv().train(), stiv_text(2), clip(2, 4, 3, 4, 4), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.name() in attention.KERNELS:
                names.append(args[0].shape[-2] == args[1].shape[-2])
            return op(*args, **(kwargs or {}))

    counts = {}
    for how in (None, {"context_fn": noop_context_fn}):
        model.gradient_checkpointing_enable(how)
        names.clear()
        with Watch():
            model(x, T, *text).sample.square().mean().backward()
        counts[how is None] = sum(names)
    assert counts == {True: 6, False: 12}  # two self-attentions in each of three blocks


def test_reuse_repeats_what_the_middle_blocks_added(micro_stiv, stiv_text):
    model, text, x = micro_stiv(num_hidden_layers=4), stiv_text(2), clip(2, 4, 3, 4, 4)
    runs = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: runs.append(i))
    reuse = BlockReuse(every=3)
    with torch.no_grad():
        full = model(x, T, *text).sample
        runs.clear()
        found = [model(x, T, *text, reuse=reuse).sample for _ in range(4)]
        assert runs == [0, 1, 2, 3, 0, 3, 0, 3, 0, 1, 2, 3]
        model(x[:1], T[:1], *text.rows([0]), reuse=reuse)  # another batch shape computes all blocks
        assert runs[-4:] == [0, 1, 2, 3]
    assert all(torch.allclose(one, full, atol=1e-5) for one in found)


# ---- configuration


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"latents": "codes"}, "latents 'codes' is unknown; allowed: per_frame, causal"),
        ({"latents": "causal", "temporal_patch_size": 2}, "temporal_patch_size 2 does not work with causal latents"),
        ({"latents": "causal", "patterns": ["interpolation"]}, "needs latents of single frames"),
        ({"hidden_size": 100}, "hidden_size 100 is not 64 x num_attention_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0 is not allowed"),
        ({"hidden_size": "wide"}, "hidden_size 'wide' is not allowed"),
        ({"position_scale": {"rows": 1}}, "position_scale"),
        ({"position_scale": {"rows": 1, "columns": float("nan"), "time": 1}}, "position_scale"),
        ({"latent_std": [1.0, 0.0, 1.0]}, "latent_std"),
        ({"latent_mean": [float("inf")] * 3}, "latent_mean"),
        ({"latent_mean": [0.0]}, "latent_mean"),
        ({"patterns": ["middle"]}, "patterns"),
        ({"given_time": None}, "given_time None is unknown"),
        ({"temporal_attention": 1}, "temporal_attention 1 is not allowed"),
        ({"temporal_attention": False, "causal_in_time": True}, "causal_in_time has no effect"),
        ({"hidden_sizes": 64}, "did you mean 'hidden_size'"),
        ({"text_width": 100}, "text_width 100 is no multiple of 64"),
    ],
)  # fmt: skip
def test_a_wrong_config_is_refused_with_what_is_allowed(micro_stiv_config, wrong, message):
    with pytest.raises(ValueError, match=message):
        micro_stiv_config(**wrong)
    with pytest.raises(ValueError, match="unknown preset 'huge'"):
        StivConfig.preset("huge")


def test_a_config_survives_saving(micro_stiv_config, tmp_path):
    grid = {"time": 4, "rows": 2, "columns": 2}
    config = micro_stiv_config(latent_mean=[0.1, 0.2, 0.3], patterns=["none", "first"], trained_grid=grid)
    config.save_pretrained(tmp_path)
    assert StivConfig.from_pretrained(tmp_path).to_dict() == StivConfig(**config.to_dict()).to_dict()


def test_a_gelu_and_a_silu_stand_where_the_reference_has_them(micro_stiv):
    model = micro_stiv()
    mlp, x = model.blocks[0].mlp, torch.randn(2, 64)
    assert torch.allclose(mlp(x), mlp.down_proj(F.gelu(mlp.up_proj(x), approximate="tanh")))
    assert isinstance(model.conditions.time[1], torch.nn.SiLU)

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given as over
from hypothesis import settings
from hypothesis import strategies as st

from lumos.errors import UserError
from lumos.models.stiv import flow, guidance
from lumos.models.stiv.guidance import FULL, IMAGE_ONLY, NULL, Guidance, guided_field, joint, renormalised, separate
from lumos.models.stiv.patterns import given_frames, given_mask
from lumos.models.stiv.settings import StivOptions
from lumos.models.stiv.solvers import SOLVERS, call_times, solve

SHAPE = (2, 6, 3, 4, 4)  # [B, T, C, h, w]


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(seed))


def toy_velocity(x: torch.Tensor, t: float, branches) -> torch.Tensor:
    """A nonlinear velocity in which text, image and the other frames have an effect."""
    text = torch.tensor([0.7 if branch.text else -0.2 for branch in branches]).repeat_interleave(len(x) // len(branches))
    image = torch.tensor([0.3 if branch.image else 0.0 for branch in branches]).repeat_interleave(len(x) // len(branches))
    return torch.tanh(x + x.mean(1, keepdim=True)) * (1 + t) + (text + image).view(-1, 1, 1, 1, 1)


class Counted:
    """A velocity that counts its calls and records the branches and inputs of each."""

    def __init__(self):
        self.branches, self.inputs = [], []

    def __call__(self, x, t, branches):
        self.branches.append(tuple(branches))
        self.inputs.append(x)
        return toy_velocity(x, t, branches)


# ---- solvers


def gaussian(x: torch.Tensor, t: float) -> torch.Tensor:
    """The exact velocity from N(0, 1) to N(1.5, 0.5^2)."""
    mu, s = 1.5, 0.5
    return mu + (t * s**2 - (1 - t)) * (x - t * mu) / (t**2 * s**2 + (1 - t) ** 2)


@pytest.mark.parametrize(
    ("solver", "errors", "order"),
    [
        ("euler", (2.716e-2, 1.373e-2, 6.906e-3), 1),
        ("heun", (2.520e-4, 6.584e-5, 1.681e-5), 2),
        ("ab2", (7.610e-4, 1.811e-4, 4.410e-5), 2),
        ("midpoint", (4.269e-6, 5.341e-7, 6.678e-8), 2),
    ],
)
def test_solvers_have_their_order_on_gaussian_data(solver, errors, order):
    start = torch.tensor([-1.2], dtype=torch.float64)
    found = [float((solve(gaussian, start, flow.time_grid(n), solver) - 0.9).abs()) for n in (32, 64, 128)]
    assert found == pytest.approx(errors, rel=1e-3)
    assert all(math.log2(a / b) >= order - 0.1 for a, b in pairwise(found))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_one_step_integrates_a_constant_velocity(solver, shift):
    x, v = drawn(1).double(), drawn(2).double()
    for steps in (1, 2, 7):
        calls, told = [], []

        def constant(x, t, calls=calls):
            calls.append(t)
            return v

        grid = flow.time_grid(steps, shift)
        found = solve(constant, x, grid, solver, lambda *step, told=told: told.append(step[0]))
        assert torch.allclose(found, x + v, atol=1e-12)
        assert calls == pytest.approx(call_times(solver, grid))
        assert told == list(range(steps))


def test_ab2_keeps_its_order_on_a_grid_that_is_not_uniform():
    def field(x, t):
        return math.cos(5 * t) - x * x

    start = torch.tensor([0.5], dtype=torch.float64)
    exact = solve(field, start, flow.time_grid(4000), "midpoint")
    found = [float((solve(field, start, flow.time_grid(n, 3.0), "ab2") - exact).abs()) for n in (32, 64, 128)]
    assert all(math.log2(a / b) > 1.9 for a, b in pairwise(found))


@pytest.mark.parametrize("solver", ["midpoint", "heun", "ab2"])
def test_a_velocity_linear_in_time_is_integrated_exactly(solver):
    x, v = drawn(1).double(), drawn(2).double()
    found = solve(lambda x, t: 2 * t * v, x, flow.time_grid(5, 3.0), solver)  # the steps differ in size
    assert torch.allclose(found, x + v, atol=1e-12)


def test_an_unknown_solver_is_refused():
    with pytest.raises(ValueError, match="solver 'rk4' is unknown; allowed: euler, midpoint, heun, ab2"):
        solve(gaussian, drawn(1), [0.0, 1.0], "rk4")


@over(steps=st.integers(1, 200), shift=st.floats(0.05, 20))
def test_a_grid_ascends_from_zero_to_one_exactly(steps, shift):
    grid = flow.time_grid(steps, shift)
    assert len(grid) == steps + 1
    assert grid[0] == 0
    assert grid[-1] == 1
    assert all(a < b for a, b in pairwise(grid))


@pytest.mark.parametrize("shift", [0.01, 100])
def test_times_differ_at_the_ends_of_the_allowed_shifts(shift):
    steps = StivOptions(num_inference_steps=1000, shift=shift).num_inference_steps
    times = torch.tensor(flow.time_grid(steps, shift))  # float32, as the network is told them
    assert (times.diff() > 0).all()


def test_a_shift_with_times_that_fall_together_is_refused():
    with pytest.raises(UserError, match=r"shift 1e-30 is not allowed; give 0\.01 to 100"):
        StivOptions(shift=1e-30)


# ---- guidance


def test_joint_is_separate_with_equal_scales():
    full, image, null = drawn(1), drawn(2), drawn(3)
    for scale in (0.5, 1.0, 1.5, 7.5):
        difference = joint(full, null, scale) - separate(full, image, null, scale, scale)
        assert difference.norm() < 1e-6 * scale * full.norm()
    assert joint(full, null, 1.0).equal(full)
    text_only = separate(full, image, null, 4.0, 1.0)
    assert torch.allclose(text_only, image + 4 * (full - image), atol=1e-5)
    assert torch.allclose(separate(full, image, null + 5, 4.0, 1.0), text_only, atol=1e-5)


@settings(max_examples=30)
@over(scale=st.sampled_from([1, 1.5, 7.5]), image_scale=st.sampled_from([None, 0, 1, 1.5, 7.5]))
def test_branches_that_have_no_weight_do_not_run(scale, image_scale):
    chosen, predictions = Guidance(scale, image_scale), {FULL: drawn(1), IMAGE_ONLY: drawn(2), NULL: drawn(3)}
    branches = chosen.branches(0.5)
    found = chosen.combined(branches, [predictions[branch] for branch in branches])
    wanted = separate(*predictions.values(), scale, scale if image_scale is None else image_scale)
    assert torch.allclose(found, wanted, atol=1e-4)
    assert branches[0] == FULL
    s_i = scale if image_scale is None else image_scale
    assert len(branches) == 1 + (s_i != scale) + (s_i != 1)


def test_scale_one_is_the_conditional_prediction_in_one_branch():
    noise, counted = drawn(1), Counted()
    field = guided_field(counted, Guidance(1.0), noise)
    assert field(noise, 0.4).equal(toy_velocity(noise, 0.4, (FULL,)))
    assert counted.branches == [(FULL,)]


def test_guidance_stands_in_its_interval_only():
    counted = Counted()
    guidance.sample(counted, drawn(1), flow.time_grid(4), "euler", Guidance(3.0, interval=(0.25, 0.5)))
    assert [len(branches) for branches in counted.branches] == [1, 2, 2, 1]


@settings(max_examples=30)
@over(axis=st.sampled_from(["sample", "frame", "token"]), seed=st.integers(0, 50), some=st.booleans())
def test_renormalisation_gives_the_norm_of_the_conditional(axis, seed, some):
    full, guided, given = drawn(seed), 3 * drawn(seed + 1), given_mask([{0}, {0, 3}], 6) if some else None
    found = renormalised(guided, full, axis, given, (1, 2, 2))
    left = 1.0 if given is None else (~given)[:, :, None, None, None]

    def parts(x):
        x = x * left
        if axis == "token":
            return x.unflatten(3, (2, 2)).unflatten(5, (2, 2)).permute(0, 1, 3, 5, 2, 4, 6).flatten(4)
        return x.flatten(1) if axis == "sample" else x.flatten(2)

    assert torch.allclose(parts(found).norm(dim=-1), parts(full).norm(dim=-1), rtol=1e-4, atol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(parts(found), parts(guided), dim=-1)
    kept = parts(full).norm(dim=-1) > 0
    assert torch.allclose(cosine[kept], torch.ones_like(cosine[kept]), atol=1e-5)
    assert (renormalised(full, full, axis, given) * left).equal(full * left)
    if given is not None:  # given frames have no part in the norm
        frames = given[:, :, None, None, None]
        other = renormalised(torch.where(frames, 1e3, guided), torch.where(frames, -7.0, full), axis, given)
        assert torch.where(frames, 0, other).equal(torch.where(frames, 0, found))


def test_a_token_of_two_frames_has_one_norm():
    full, guided = drawn(1), drawn(2)
    found = renormalised(guided, full, "token", None, (2, 2, 2))
    cut = [x.unflatten(1, (3, 2)).unflatten(4, (2, 2)).unflatten(6, (2, 2)).square().sum(dim=(2, 3, 5, 7)) for x in (found, full)]
    assert torch.allclose(*cut, rtol=1e-4)
    assert renormalised(guided, full, "off").equal(guided)
    assert renormalised(torch.zeros_like(full), full, "sample").isfinite().all()


# ---- given frames


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("null_image", guidance.NULL_IMAGES)
def test_given_latents_leave_bitwise_as_they_came(solver, null_image):
    noise, values = drawn(1), drawn(2)
    values[:, 0, 0, 0, 0] = -0.0
    for pattern in ("first", "prediction", "ends", "interpolation"):
        for scale, image_scale in ((1.0, None), (7.5, None), (7.5, 1.5)):
            given = given_mask([given_frames(pattern, 6)] * 2, 6)
            hidden = torch.where(given[:, :, None, None, None], values, math.nan)
            chosen = Guidance(scale, image_scale, null_image=null_image, given_noise=0.2)
            seen = []
            found = guidance.sample(
                toy_velocity, noise, flow.time_grid(3), solver, chosen, hidden, given, lambda _, x, seen=seen: seen.append(x)
            )
            for x in (found, *seen):
                assert x[given].view(torch.int32).equal(values[given].view(torch.int32))
            assert found.isfinite().all()


def test_a_clip_of_given_frames_only_needs_no_call():
    counted, values = Counted(), drawn(2)
    found = guidance.sample(counted, drawn(1), flow.time_grid(3), "heun", Guidance(), values, torch.ones(2, 6, dtype=torch.bool))
    assert found.equal(values)
    assert counted.branches == []


def test_null_images_start_alike_and_renoise_ends_at_the_image():
    noise, values, state = drawn(1), drawn(2), drawn(1)  # "own" starts as the noise
    renoise, own, constant = (guidance.null_latents(kind, state, values, noise, 0.0) for kind in ("renoise", "own", "noise"))
    assert renoise.equal(noise)
    assert own.equal(noise)
    assert constant.equal(noise)
    assert guidance.null_latents("renoise", state, values, noise, 1.0).equal(values)
    assert guidance.null_latents("zeros", state, values, noise, 0.5).eq(0).all()


def test_each_branch_sees_its_own_given_frames():
    noise, values, counted = drawn(1), drawn(2), Counted()
    given = given_mask([{0}, set()], 6)
    x = drawn(3)
    guided_field(counted, Guidance(2.0, 1.5, given_noise=0.25), noise, values, given)(x, 0.5)
    full, image, null = counted.inputs[0].chunk(3)
    assert counted.branches == [(FULL, IMAGE_ONLY, NULL)]
    assert full.equal(image)
    assert full[0, 0].equal(0.75 * values[0, 0] + 0.25 * noise[0, 0])
    assert torch.allclose(null[0, 0], 0.5 * values[0, 0] + 0.5 * noise[0, 0])
    assert full[:, 1:].equal(x[:, 1:])
    assert full[1].equal(x[1])
    assert null[1].equal(x[1])


def test_predictions_for_given_frames_change_no_other_frame():
    """The network's output for given frames is not supervised, so it has no part in the norms."""
    noise, values, given = drawn(1), drawn(2), given_mask([{0}, {0, 5}], 6)

    def wild(x, t, branches):
        found = toy_velocity(x, t, branches)
        scale = torch.tensor([1e3 if branch.text else -1e2 for branch in branches]).repeat_interleave(2)
        return torch.where(given.repeat(len(branches), 1)[:, :, None, None, None], scale[:, None, None, None, None], found)

    for renorm in ("sample", "frame", "token", "off"):
        chosen = Guidance(3.0, renorm=renorm)
        usual, other = (guided_field(f, chosen, noise, values, given)(noise, 0.5) for f in (toy_velocity, wild))
        assert other.equal(usual)
        norms = [x[~given].norm() for x in (usual, toy_velocity(flow.replaced(noise, values, given), 0.5, (FULL,)))]
        assert torch.isclose(*norms, rtol=1e-4) == (renorm != "off")


def test_own_null_frames_are_what_the_null_branch_alone_makes():
    noise, values, given = drawn(1), drawn(2), given_mask([{0}] * 2, 6)
    x = noise
    field = guided_field(toy_velocity, Guidance(3.0, null_image="own"), noise, values, given)
    for t in (0.0, 0.5):
        null = toy_velocity(x, t, (NULL,))
        slope = field(x, t)
        assert torch.allclose(slope[:, 0], null[:, 0])
        x = x + 0.5 * slope
    still = guided_field(toy_velocity, Guidance(3.0), noise, values, given)(x, 0.5)
    assert still[:, 0].eq(0).all()


def test_longer_clips_and_other_batches_begin_with_equal_noise():
    def noise(seeds, frames):
        return flow.drawn_noise([torch.Generator().manual_seed(seed) for seed in seeds], frames, 3, 4, 4)

    whole = noise([1, 2], 6)
    assert whole.shape == SHAPE
    assert whole.dtype == torch.float32
    assert noise([2], 3)[0].equal(whole[1, :3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"renorm": "clip"}, "guidance_renorm 'clip' is unknown; allowed: off, sample, frame, token"),
        ({"null_image": "mean"}, "null_image 'mean' is unknown"),
        ({"interval": (0.5, 0.5)}, "guidance_interval"),
        ({"interval": (0.0, math.nan)}, "guidance_interval"),
        ({"given_noise": 1.0}, "given_noise 1.0 is not allowed"),
        ({"null_image": "own", "interval": (0.0, 0.5)}, "null_image own needs guidance at every step"),
    ],
)  # fmt: skip
def test_wrong_guidance_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        Guidance(**options)


def test_an_image_scale_without_an_image_is_refused():
    for given in (None, torch.zeros(2, 6, dtype=torch.bool)):
        with pytest.raises(UserError, match=r"image_guidance_scale 1\.5 needs a given frame"):
            guidance.sample(toy_velocity, drawn(1), [0.0, 1.0], "euler", Guidance(7.5, 1.5), drawn(2), given)


# ---- flow and loss


def test_the_path_goes_from_noise_to_data_at_its_velocity():
    data, noise = drawn(1), drawn(2)
    t = torch.tensor([0.0, 1.0])
    assert flow.interpolated(data, noise, t)[0].equal(noise[0])
    assert flow.interpolated(data, noise, t)[1].equal(data[1])
    early, late = (flow.interpolated(data, noise, torch.full((2,), at)) for at in (0.25, 0.75))
    assert torch.allclose(early + 0.5 * flow.target_velocity(data, noise), late, atol=1e-6)
    by_frame = flow.interpolated(data, noise, torch.full((2, 6), 0.25))
    assert by_frame.equal(early)


@settings(max_examples=20)
@over(distribution=st.sampled_from(flow.TIME_DISTRIBUTIONS), shift=st.floats(0.2, 5), seed=st.integers(0, 1000))
def test_times_are_drawn_from_the_clips_own_generator(distribution, shift, seed):
    def times(seeds):
        return flow.drawn_times([torch.Generator().manual_seed(s) for s in seeds], distribution, shift=shift)

    many = times([seed, seed + 1, seed + 2])
    assert times([seed + 1])[0] == many[1]
    assert ((many >= 0) & (many <= 1)).all()


def test_time_distributions_have_their_means():
    generators = [torch.Generator().manual_seed(i) for i in range(4000)]
    uniform = flow.drawn_times(generators)
    assert abs(uniform.mean() - 0.5) < 4 * (1 / 12 / 4000) ** 0.5
    normal = flow.drawn_times(generators, "logit_normal", 0.5, 0.8).logit()
    assert abs(normal.mean() - 0.5) < 4 * 0.8 / 4000**0.5
    assert abs(normal.std() - 0.8) < 0.05
    assert flow.shifted(torch.tensor([0.0, 0.2, 0.5, 1.0]), 3.0).tolist() == pytest.approx([0, 1 / 13, 0.25, 1])
    with pytest.raises(ValueError, match="time distribution 'beta' is unknown; allowed: uniform, logit_normal"):
        flow.drawn_times(generators, "beta")


def test_targets_of_given_frames_may_be_nan():
    prediction, target, given = drawn(1).requires_grad_(), drawn(2), given_mask([{0}, {0, 5}], 6)
    hidden = torch.where(given[:, :, None, None, None], math.nan, target)
    losses = flow.frame_losses(prediction, hidden, given)
    flow.flow_loss(losses, given).backward()
    assert losses.isfinite().all()
    assert prediction.grad.isfinite().all()
    assert prediction.grad[given].eq(0).all()
    assert torch.allclose(losses[~given], flow.frame_losses(prediction, target)[~given])


def test_the_scale_of_the_loss_does_not_depend_on_the_pattern():
    target, nothing = drawn(2), torch.zeros(2, 6, dtype=torch.bool)
    for given in (None, nothing, given_mask([{0}, {0, 2, 4}], 6), given_mask([set(range(6)), {1}], 6)):
        losses = flow.frame_losses(target + 0.5, target, given)
        assert flow.flow_loss(losses, given) == pytest.approx(0.25)
    error = flow.frame_losses(drawn(1), target)
    assert flow.frame_losses(drawn(1), target, nothing).equal(error)
    assert flow.flow_loss(error, nothing) == flow.flow_loss(error) == pytest.approx(float((drawn(1) - target).square().mean()))
    everything = ~nothing
    assert flow.flow_loss(flow.frame_losses(drawn(1), target, everything), everything) == 0


def test_the_masked_loss_is_of_kept_values_and_the_input():
    prediction, target, noisy, given = drawn(1), drawn(2), drawn(3), given_mask([{0}, set()], 6)
    keep = torch.tensor([[0, 3], [1, 2]])
    kept = flow.kept_values(keep, 2, 2, 2)
    assert kept.shape == (2, 1, 1, 4, 4)
    assert kept[0, 0, 0].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    for weight in (0.0, 0.1):
        found = flow.masked_frame_losses(prediction, target, noisy, kept, given, weight)
        for b in range(2):
            for frame in range(6):
                at = kept[b, 0].expand(3, -1, -1)
                p, v, x = (part[b, frame] for part in (prediction, target, noisy))
                wanted = (p - v)[at].square().mean() + weight * (p - x)[~at].square().mean()
                assert found[b, frame] == pytest.approx(0 if given[b, frame] else float(wanted), rel=1e-5)
    everything = flow.kept_values(torch.arange(4).expand(2, -1), 2, 2, 2)
    assert torch.allclose(flow.masked_frame_losses(prediction, target, noisy, everything, given),
                          flow.frame_losses(prediction, target, given))  # fmt: skip

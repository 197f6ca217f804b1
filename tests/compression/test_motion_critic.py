"""The motion loss for diffusers models in the user's own training loop."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from tiny_diffusers import COUNTS, FRAMES, MODELSCOPE, SVD, TRANSFORMERS, UNETS, inputs, loaded, make, saved

from lumos.compression.diffusers_folder import write_pruned
from lumos.compression.diffusers_models import plan_folder
from lumos.compression.motion import MotionCritic
from lumos.compression.noising import Objective, with_noise
from lumos.compression.recovery import compare, taps
from lumos.errors import UserError
from lumos.training.adversarial import critic_losses

pytest.importorskip("diffusers")
pytestmark = pytest.mark.slow
WAN = "WanTransformer3DModel"
SCHEDULE = torch.linspace(0.999, 0.005, 1000)


def objective(name: str) -> Objective | None:
    kinds = {MODELSCOPE: "epsilon", "CogVideoXTransformer3DModel": "v_prediction"}
    return Objective(kinds[name], kept=SCHEDULE) if name in kinds else None


def critic(name: str, teacher, **options) -> MotionCritic:
    return MotionCritic(teacher, objective(name), width=16, warmup=0, **options)


def teacher_of(name: str):
    return make(name).requires_grad_(False)


def changed(x: torch.Tensor) -> torch.Tensor:
    return (x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))).requires_grad_()


@contextmanager
def calls_of(model, names):
    """Within the block, collect the names of the modules that ran."""
    ran, handles = [], []
    for name in names:
        handles.append(model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name)))
    yield ran
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", [*UNETS, *TRANSFORMERS])
def test_gradients_of_each_class_go_where_they_belong(name, tmp_path):
    """Test 7: the loss of the student has gradients for the student only, and a step of the critic changes the heads only."""
    folder = saved(tmp_path / "teacher", name)
    keep = () if name in UNETS else [3] * len(COUNTS[name])
    write_pruned(folder, plan_folder(folder, "vdmini" if name in UNETS else "spaced", keep), tmp_path / "student")
    teacher, student = loaded(folder).requires_grad_(False), loaded(tmp_path / "student").train()
    judge, before = critic(name, teacher), {key: value.clone() for key, value in teacher.state_dict().items()}
    found = compare(student, teacher, taps(tmp_path / "student"), inputs(name), FRAMES)
    loss = judge.loss(inputs(name), found.prediction, found.target)
    loss.backward()
    assert sum(float(p.grad.abs().sum()) for p in student.parameters() if p.grad is not None) > 0
    assert all(p.grad is None for model in (teacher, judge.heads) for p in model.parameters())
    heads = [p.detach().clone() for p in judge.heads.parameters()]
    of_student = [None if p.grad is None else p.grad.clone() for p in student.parameters()]
    scores = judge.step()
    assert -scores["fake"] == pytest.approx(float(loss), abs=1e-6)
    assert any(not torch.equal(a, b) for a, b in zip(heads, judge.heads.parameters(), strict=True))
    assert all(a is None or torch.equal(a, p.grad) for a, p in zip(of_student, student.parameters(), strict=True))
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_the_loss_is_that_of_its_parts():
    """Compares with a whole pass of the teacher on the predicted clip with new noise."""
    teacher, given = teacher_of(WAN), inputs(WAN)
    judge, target = critic(WAN, teacher, taps=2), teacher(**given, return_dict=False)[0]
    prediction, draws = changed(target), torch.Generator().manual_seed(0)
    loss = judge.loss(given, prediction, target)
    left = 1 / (1 + torch.exp(-1.0 + torch.randn(2, generator=draws)))
    noise, flow = torch.randn(target.shape, generator=draws), Objective("flow")
    seen = []
    for made in (prediction.detach(), target):
        share = (given["timestep"] / 1000)[:, None, None, None, None]
        x = with_noise(given["hidden_states"] - share * made, noise, flow.near(left))
        with torch.no_grad():
            hooks = [teacher.blocks[i].register_forward_hook(lambda m, a, out: seen.append(out)) for i in (1, 2)]
            teacher(**{**given, "hidden_states": x, "timestep": 1000 * (1 - left)})
            for hook in hooks:
                hook.remove()
    maps = [x.unflatten(1, (FRAMES, 4, 4)) for x in seen]
    with torch.no_grad():
        fake, real = (judge.heads(part, left, given["encoder_hidden_states"].mean(1)) for part in (maps[:2], maps[2:]))
    assert judge.blocks == ["blocks.1", "blocks.2"]
    torch.testing.assert_close(loss, -fake.mean())
    scores = judge.step()
    assert (scores["real"], scores["fake"]) == pytest.approx((float(real.mean()), float(fake.mean())), abs=1e-5)
    assert critic_losses(real, fake).isfinite().all()


@pytest.mark.parametrize(("name", "later"), [(WAN, ["blocks.3", "blocks.5"]), (SVD, ["mid_block", "up_blocks.0"])])
def test_the_teacher_runs_up_to_the_last_head(name, later):
    teacher = teacher_of(name)
    target = teacher(**inputs(name), return_dict=False)[0]
    judge = critic(name, teacher)
    with calls_of(teacher, [judge.blocks[-1], *later]) as ran:
        judge.loss(inputs(name), changed(target), target)
    assert ran == [judge.blocks[-1]] * 2


def test_the_heads_learn_before_their_loss_counts():
    teacher = teacher_of(WAN)
    target = teacher(**inputs(WAN), return_dict=False)[0]
    judge, losses = MotionCritic(teacher, width=16, warmup=2), []
    for _ in range(3):
        loss = judge.loss(inputs(WAN), changed(target), target)
        losses.append((float(loss) != 0, loss.requires_grad))
        judge.step()
    assert losses == [(False, False), (False, False), (True, True)]


def test_a_resumed_critic_goes_on_with_the_same_losses(tmp_path):
    teacher = teacher_of(WAN)
    target = teacher(**inputs(WAN), return_dict=False)[0]

    def steps(judge, count):
        found = []
        for _ in range(count):
            found.append(float(judge.loss(inputs(WAN), changed(target), target)))
            found += judge.step().values()
        return found

    whole, first = critic(WAN, teacher), critic(WAN, teacher)
    expected = steps(whole, 4)
    found = steps(first, 2)
    second = critic(WAN, teacher, seed=9)
    second.load_state_dict(first.state_dict())
    assert found + steps(second, 2) == expected


def test_what_a_critic_cannot_do_is_said():
    other = torch.nn.Linear(2, 2)
    other.config = {}
    with pytest.raises(UserError, match=r"a motion critic reads .*WanTransformer3DModel.*, not Linear"):
        MotionCritic(other)
    with pytest.raises(UserError, match=r"UNet3DConditionModel needs the schedule of its noise: give Objective\('epsilon'"):
        MotionCritic(teacher_of(MODELSCOPE))
    teacher = teacher_of(WAN)
    judge = critic(WAN, teacher)
    with pytest.raises(UserError, match=r"MotionCritic\.step follows MotionCritic\.loss"):
        judge.step()
    target = teacher(**inputs(WAN), return_dict=False)[0]
    before = [p.detach().clone() for p in judge.heads.parameters()]
    judge.loss(inputs(WAN), changed(target) * float("nan"), target)
    with pytest.raises(UserError, match="not finite"):
        judge.step()
    assert all(torch.equal(a, b) for a, b in zip(before, judge.heads.parameters(), strict=True))


def test_new_heads_leave_the_users_draws_alone():
    teacher = teacher_of(WAN)
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    critic(WAN, teacher)
    assert torch.equal(torch.randn(4), expected)

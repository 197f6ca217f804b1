"""The task of distillation: its losses against plain forms, where gradients go, and what is left out."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from lumos.compression.distillation import DistillationTask, make_task
from lumos.compression.losses import icd, motion_by_clip
from lumos.data.curriculum import StepShape
from lumos.data.seeding import VALIDATION_STEP
from lumos.errors import UserError
from lumos.models.lumos1.sequence import code_mask
from lumos.models.stiv.losses import inputs_by_size
from lumos.training.adversarial import generator_losses

CPU = torch.device("cpu")
VIDEO = StepShape("video", 4)
GENERATORS = ("lumos1", "stiv")


@pytest.fixture
def task(distilling):
    return lambda *given, **sections: make_task(distilling(*given, **sections), CPU)


def only(**weights: float) -> dict[str, float]:
    """Return a section `distill` with these losses only."""
    return {"task": 0.0, "kd": 0.0, "icd": 0.0, "mca": 0.0, **weights}


def batch_of(made: DistillationTask, step: int = 0, shape: StepShape = VIDEO) -> dict:
    return made.batch(step, shape, range(shape.batch_size)).whole


def teacher_logits(made: DistillationTask, model, micro) -> torch.Tensor:
    """Logits over the visual codes at masked positions, [N, codes], in full."""
    hidden, _ = model.hidden_states(micro["input_ids"])
    return model.lm_head(hidden[micro["targets"] != -100], visual_only=True)


def hidden_of(model, stack, run) -> list[torch.Tensor]:
    """Return the output of each block of a network."""
    found, hooks = [], []
    for block in stack:
        hooks.append(block.register_forward_hook(lambda module, args, output: found.append(output)))
    run(model)
    for hook in hooks:
        hook.remove()
    return found


# ---- the parts against plain forms

def test_task_and_output_losses_of_the_decoder(task):
    made = task(distill={**only(task=0.1, kd=1.0)})
    model, micro = made.build_model(), batch_of(made)
    total, places = made.losses(model, micro)
    targets = micro["targets"][micro["targets"] != -100]
    q, p = (F.log_softmax(teacher_logits(made, net, micro), 1) for net in (model, made.teacher))
    expected = 0.1 * F.nll_loss(q, targets, reduction="none") + (p.exp() * (p - q)).sum(1)
    assert torch.allclose(total, expected, atol=1e-5)
    plain, plain_places = made.inner.losses(model, micro)
    assert made.step_values()["task_loss"] == pytest.approx((plain.sum().item(), len(plain)), rel=1e-5)
    assert all(torch.equal(places[name], plain_places[name]) for name in plain_places)


def test_task_and_output_losses_of_the_transformer(task):
    made = task("stiv", distill=only(task=0.1, kd=1.0), patterns={"first": 1.0}, dropout={"image": 0.3})
    model, micro = made.build_model(), batch_of(made)
    total, places = made.losses(model, micro)
    (inputs,) = inputs_by_size(micro)
    assert not inputs.supervised.all()
    ours, theirs = inputs.velocity(model), inputs.velocity(made.teacher)
    plain, plain_places = made.inner.losses(model, micro)
    expected = 0.1 * plain + (ours - theirs).square().mean((2, 3, 4))[inputs.supervised]
    assert torch.allclose(total, expected, atol=1e-5)
    assert all(torch.equal(places[name], plain_places[name]) for name in plain_places)


def plain_content_losses(made: DistillationTask, model, micro, generator: str, layers: list[int]) -> torch.Tensor:
    """`icd` of each clip alone, [B], of features that are cut out of the streams clip by clip."""
    found = []
    for i in range(4):
        features = []
        for net, numbers in ((model, layers), (made.teacher, [made.kept[i] for i in layers])):
            if generator == "lumos1":
                ids, layout = micro["input_ids"][i : i + 1], micro["layouts"][i]
                streams = hidden_of(net, net.model.layers, lambda net: net.hidden_states(ids))  # noqa: B023
                at = code_mask([layout], ids.shape[1])[0]
                features.append([streams[n][0, at].view(1, len(layout.frames), -1, 64) for n in numbers])
            else:
                (inputs,) = inputs_by_size(micro)
                streams = hidden_of(net, net.blocks, inputs.velocity)
                features.append([streams[n][i : i + 1] for n in numbers])
        found.append(icd(*features, made.settings.k, made.settings.icd_raw))
    return torch.stack(found)


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize(("layers", "numbers"), [("all", [0, 1]), ("last", [1])])
def test_content_losses_compare_a_layer_with_its_origin(task, generator, layers, numbers):
    made = task(generator, distill=only(icd=2.0, icd_layers=layers))
    model, micro = made.build_model(), batch_of(made)
    assert made.kept == [0, 3]
    total, _ = made.losses(model, micro)
    expected = plain_content_losses(made, model, micro, generator, numbers)
    clips = made.kind.forward(model, micro, []).clips
    assert torch.allclose(total, 2.0 * expected[clips], atol=1e-5)
    values = made.step_values()
    assert values["icd_loss"] == pytest.approx((expected.sum().item(), 4), rel=1e-4)
    assert expected.min() > 0.01


@pytest.mark.parametrize("generator", GENERATORS)
def test_motion_losses_without_a_critic(task, generator):
    made = task(generator, distill={**only(mca=0.5, motion="difference")})
    assert made.build_auxiliary() is None
    model, micro = made.build_model(), batch_of(made)
    total, _ = made.losses(model, micro)
    ours, theirs = (made.kind.forward(net, micro, taps) for net, taps in ((model, [0, 1]), (made.teacher, [0, 3])))
    (ours_features,), (theirs_features,) = ours.features, theirs.features
    expected = motion_by_clip(*([x.flatten(2, 3) for x in side.blocks] for side in (ours_features, theirs_features)))
    assert torch.allclose(total, 0.5 * expected[ours.clips], atol=1e-6)
    assert made.step_values()["mca_loss"][1] == 4


def test_pictures_have_content_but_no_motion(task):
    made = task(distill=only(task=1.0, icd=0.1, mca=0.5, motion="difference"))
    model = made.build_model()
    total, _ = made.losses(model, batch_of(made, shape=StepShape("image", 4)))
    values = made.step_values()
    assert values["mca_loss"] == (0.0, 4)
    assert values["icd_loss"][0] > 0
    total.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# ---- what the critic sees

def test_critic_of_the_decoder_sees_embeddings_and_a_new_mask(task):
    made = task(distill=only(task=1.0, mca=0.1))
    model, micro = made.build_model(), batch_of(made)
    made.build_auxiliary()
    total, _ = made.losses(model, micro)
    config, table = made.teacher.config, made.teacher.model.embed_tokens.weight
    codes = slice(config.visual_token_start, config.visual_token_start + config.visual_token_count)
    scores = []
    for i in range(4):
        ids, layout, targets = micro["input_ids"][i], micro["layouts"][i], micro["targets"][i]
        hidden, _ = model.hidden_states(ids[None])
        p = model.lm_head(hidden[0], visual_only=True).softmax(-1)
        x = table[ids].clone()
        for at in range(len(ids)):
            in_frame = next((f for f in layout.frames if f.content_start <= at < f.end - 1), None)
            if in_frame is None:
                continue
            is_newline = (at - in_frame.content_start) % (in_frame.cols + 1) == in_frame.cols
            if micro["critic_mask"][i, at]:
                x[at] = table[config.mask_token_id]
            elif is_newline:
                x[at] = table[config.newline_token_id]
            elif targets[at] != -100:
                x[at] = p[at] @ table[codes]
        stop = made.taps[-1] + 1
        streams = []

        def run(net, x=x, ids=ids, stop=stop):
            embed = net.model.embed_tokens.register_forward_hook(lambda *_: x[None])
            net.hidden_states(ids[None])
            embed.remove()

        streams = hidden_of(made.teacher, made.teacher.model.layers[:stop], run)
        at = code_mask([layout], len(ids))[0]
        first = layout.frames[0]
        blocks = [streams[tap][0, at].view(1, len(layout.frames), first.rows, first.cols, -1) for tap in made.taps]
        pooled = streams[-1][:, : first.start].mean(1)
        scores.append(made.critic(blocks, micro["critic_level"][i : i + 1], pooled))
    expected = generator_losses(torch.cat(scores))
    clips = made.kind.forward(model, micro, []).clips
    plain, _ = made.inner.losses(model, micro)
    assert torch.allclose(total, plain + 0.1 * expected[clips], atol=1e-5)
    fake = micro["distill_kept"][0][1]
    assert not fake[0].requires_grad


def test_critic_of_the_transformer_sees_a_renoised_result(task):
    given = {"patterns": {"first": 1.0}, "dropout": {"image": 0.3}, "given_noise": 0.3}
    made = task("stiv", distill=only(task=1.0, mca=0.1, generator="log"), **given)
    model, micro = made.build_model(), batch_of(made)
    made.build_auxiliary()
    total, _ = made.losses(model, micro)
    (inputs,) = inputs_by_size(micro)
    assert inputs.conditions["given"] is not None
    t = inputs.times[:, None, None, None, None]
    given, left = inputs.conditions["given"][..., None, None, None], micro["critic_level"][:, None, None, None, None]
    result = inputs.noisy + (1 - t) * inputs.velocity(model)
    noise = torch.stack(micro["critic_noise"])
    x = torch.where(given, inputs.seen, left * result + (1 - left) * noise)
    streams = hidden_of(made.teacher, made.teacher.blocks, lambda net: net(x, micro["critic_level"], **inputs.conditions))
    blocks = [streams[tap].unflatten(2, made.kind.task.config.grid(1, *x.shape[3:])[1:]) for tap in made.taps]
    pooled = made.teacher.encode_text(micro["text_ids"], micro["text_mask"]).pooled
    expected = generator_losses(made.critic(blocks, micro["critic_level"], pooled), "log")
    clips = made.kind.forward(model, micro, []).clips
    plain, _ = made.inner.losses(model, micro)
    assert torch.allclose(total, plain + 0.1 * expected[clips], atol=1e-5)


@pytest.mark.parametrize("generator", GENERATORS)
def test_draws_are_functions_of_step_and_position(task, generator):
    made = task(generator)
    whole, other = made.batch(3, VIDEO, range(4)), made.batch(4, VIDEO, range(4))
    part = made.batch(3, VIDEO, range(1, 4, 2))
    assert torch.equal(whole.tensors["critic_level"][1::2], part.tensors["critic_level"])
    assert not torch.equal(whole.tensors["critic_level"], other.tensors["critic_level"])
    assert ((whole.tensors["critic_level"] > 0) & (whole.tensors["critic_level"] <= 1)).all()
    name = "critic_mask" if generator == "lumos1" else "critic_noise"
    ours, theirs = (b.whole[name] for b in (whole, part))
    for i in range(2):
        size = min(len(ours[2 * i + 1]), len(theirs[i]))  # rows are padded to the longest of a batch
        assert torch.equal(ours[2 * i + 1][:size], theirs[i][:size])
    assert "critic_level" not in task(generator, distill={"mca": 0}).batch(3, VIDEO, range(4)).tensors


def together(first: dict, second: dict, pad: int) -> dict:
    """Join two micro-batches to one."""
    fills, merged = {"input_ids": pad, "targets": -100}, {}
    for name, x in first.items():
        y = second[name]
        if isinstance(x, list):
            merged[name] = x + y
            continue
        if x.dim() > 1:
            size = max(x.shape[1], y.shape[1])
            x, y = (F.pad(part, (0, size - part.shape[1]), value=fills.get(name, 0)) for part in (x, y))
        merged[name] = torch.cat([x, y])
    return merged


@pytest.mark.parametrize("generator", GENERATORS)
def test_clips_of_different_sizes_do_not_mix(task, generator):
    made = task(generator, distill={"icd": 1.0, "mca": 1.0})
    model = made.build_model()
    made.build_auxiliary()
    parts = [batch_of(made, shape=shape) for shape in (VIDEO, StepShape("image", 3))]
    merged = together(*parts, pad=getattr(made.inner.config, "pad_token_id", 0))
    expected = torch.cat([made.losses(model, part)[0] for part in parts])
    assert torch.allclose(made.losses(model, merged)[0], expected, atol=1e-4)
    critic = made.critic
    assert torch.allclose(
        made.auxiliary_losses(model, critic, merged),
        torch.cat([made.auxiliary_losses(model, critic, part) for part in parts]), atol=1e-4,
    )  # fmt: skip


# ---- gradients

def gradients(module: torch.nn.Module) -> dict[str, float]:
    return {name: 0.0 if p.grad is None else p.grad.abs().max().item() for name, p in module.named_parameters()}


@pytest.mark.parametrize("generator", GENERATORS)
def test_the_adversarial_loss_reaches_the_student_only(task, generator):
    made = task(generator, distill=only(mca=1.0))
    model, critic = made.build_model(), made.build_auxiliary()
    before = {name: x.clone() for name, x in made.teacher.state_dict().items()}
    for parameter in critic.parameters():
        parameter.requires_grad_(False)  # as the loop does
    micro = batch_of(made)
    made.losses(model, micro)[0].sum().backward()
    assert all(p.grad is None for p in (*made.teacher.parameters(), *critic.parameters()))
    assert max(gradients(model).values()) > 0
    for parameter in critic.parameters():
        parameter.requires_grad_(True)
    model.zero_grad(set_to_none=True)
    losses = made.auxiliary_losses(model, critic, micro)
    assert losses.shape == (4,)
    losses.sum().backward()
    assert all(p.grad is None for p in (*made.teacher.parameters(), *model.parameters()))
    # The gradients of real and fake clips for the bias of a score cancel out.
    assert min(value for name, value in gradients(critic).items() if not name.endswith("score.bias")) > 0
    assert all(torch.equal(x, before[name]) for name, x in made.teacher.state_dict().items())


@pytest.mark.parametrize("generator", GENERATORS)
def test_content_losses_end_at_the_last_compared_layer(task, generator, monkeypatch):
    made = task(generator, distill=only(icd=1.0))
    monkeypatch.setattr(type(made.settings), "layers", lambda settings, count: [0])
    model = made.build_model()
    with torch.no_grad():  # the first layer is still that of the teacher
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made.losses(model, batch_of(made))[0].sum().backward()
    found = gradients(model)
    stack = "model.layers" if generator == "lumos1" else "blocks"
    assert max(value for name, value in found.items() if name.startswith(f"{stack}.0.")) > 0
    behind = [name for name in found if name.startswith((f"{stack}.1.", "lm_head", "model.norm", "patch_out", "final_modulation"))]
    assert behind
    assert max(found[name] for name in behind) == 0


@pytest.mark.parametrize("generator", GENERATORS)
def test_gradients_do_not_depend_on_micro_batches(task, generator):
    made = task(generator, distill={"icd": 1.0, "mca": 1.0})
    model = made.build_model()
    made.build_auxiliary()
    found = []
    for size in (None, 3, 1):
        model.zero_grad(set_to_none=True)
        batch = made.batch(1, VIDEO, range(4))
        for micro in batch.micro_batches(size):
            (made.losses(model, micro)[0].sum() / batch.supervised).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-5)


# ---- what is left out

@pytest.mark.parametrize("generator", GENERATORS)
def test_losses_that_are_off_cost_nothing(task, generator, monkeypatch):
    made = task(generator, distill=only(task=1.0, teacher=None))
    assert made.teacher is None
    assert made.build_auxiliary() is None
    model = made.build_model()
    batch = made.batch(0, VIDEO, range(4))
    assert not [name for name in batch.whole if name.startswith("critic")]
    plain, _ = made.inner.losses(model, batch.whole)
    assert torch.equal(made.losses(model, batch.whole)[0], plain)
    assert made.step_values() == {
        "task_loss": pytest.approx((plain.sum().item(), len(plain))), **dict.fromkeys(
            ("kd_loss", "icd_loss", "mca_loss", "critic_real", "critic_fake"), (0.0, 0.0)
        )
    }  # fmt: skip
    with pytest.warns(UserWarning, match="teacher, because kd, icd and mca are 0"):
        assert task(generator, distill=only(task=1.0)).teacher is None
    made = task(generator, distill=only(task=1.0, icd=1.0))
    made.build_model()
    calls = []
    forward = made.kind.forward

    def counted(net, micro, taps):
        calls.append((net is made.teacher, len(taps)))
        return forward(net, micro, taps)

    monkeypatch.setattr(made.kind, "forward", counted)
    made.losses(model, batch_of(made, step=0))
    assert sorted(calls) == [(False, 2), (True, 2)]
    calls.clear()
    made.losses(model, batch_of(made, step=4))  # icd has fallen to 0
    assert calls == [(False, 0)]


def test_content_weight_falls_and_the_critic_warms_up(task):
    made = task(distill={"icd": 0.2, "mca": 0.3, "critic_warmup": 2}, training={"max_steps": 4})
    assert [made.weights(step) for step in range(5)] == [
        (0.2, 0, 0), (pytest.approx(0.15), 0, 0), (0.1, 0.3, 0), (pytest.approx(0.05), 0.3, 0), (0.0, 0.3, 0)
    ]  # fmt: skip
    made = task(distill={"icd_decay": False, "motion": "difference", "critic_warmup": 200})
    assert made.weights(3) == (0.1, 0.1, 0)


def test_a_rare_penalty_has_the_weight_of_all(task):
    made = task(distill=only(mca=1.0, gamma=0.5, gamma_interval=3))
    assert [made.weights(step).gamma for step in range(5)] == [1.5, 0, 0, 1.5, 0]
    model, critic = made.build_model(), made.build_auxiliary()
    plain = task(distill=only(mca=1.0))
    plain.build_auxiliary()
    found = {}
    for step in (1, 3):
        for each in (made, plain):
            micro = batch_of(each, step=step)
            each.losses(model, micro)
            found[step, each is made] = each.auxiliary_losses(model, critic, micro)
    assert torch.equal(found[1, True], found[1, False])
    assert (found[3, True] > found[3, False]).all()


@pytest.mark.parametrize("generator", GENERATORS)
def test_the_teacher_has_a_number_format_of_its_own(task, generator):
    """A teacher in bfloat16 gives the same losses up to rounding, and gradients of the student stay in float32."""
    found = []
    for precision in ("bf16", None):
        made = task(generator, distill={"teacher_precision": precision, "critic_warmup": 0})
        assert next(made.teacher.parameters()).dtype == (torch.bfloat16 if precision else torch.float32)
        model = made.build_model()
        made.build_auxiliary()
        losses, _ = made.losses(model, batch_of(made))
        losses.sum().backward()
        found.append([losses.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        assert {x.dtype for x in found[-1]} == {torch.float32}
    assert len(found[0]) == len(found[1])
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0.05, atol=0.05)
    assert not torch.equal(found[0][0], found[1][0])


def test_older_runs_had_none_of_the_new_settings(task):
    made = task()
    found, added = made.resume_fingerprint(), made.fingerprint_defaults()
    assert added["distill.teacher_precision"] is None
    assert added["distill.gamma_interval"] == 1
    assert found == found | {name: value for name, value in added.items() if name.startswith("distill.")}


def test_a_warming_critic_learns_without_the_student(task):
    made, plain = (task(distill={"critic_warmup": 10, **more}) for more in ({}, {"mca": 0}))
    model, critic = made.build_model(), made.build_auxiliary()
    micro = batch_of(made)
    assert torch.equal(made.losses(model, micro)[0], plain.losses(model, batch_of(plain))[0])
    assert made.step_values()["mca_loss"] == (0.0, 0.0)
    made.auxiliary_losses(model, critic, micro).sum().backward()
    assert max(gradients(critic).values()) > 0
    assert made.step_values()["critic_fake"][1] == 4


@pytest.mark.parametrize("generator", GENERATORS)
def test_validation_uses_the_losses_of_the_training_itself(task, generator):
    made = task(generator)
    model = made.build_model().eval()
    made.build_auxiliary()
    batch = made.batch(VALIDATION_STEP, StepShape("video", 3), range(3), dropout=False)
    with torch.no_grad():
        assert torch.equal(made.losses(model, batch.whole)[0], made.inner.losses(model, batch.whole)[0])
    assert made.step_values()["task_loss"] == (0.0, 0.0)


@pytest.mark.parametrize("generator", GENERATORS)
def test_an_idle_micro_batch_has_no_losses_but_keeps_step(task, generator):
    made = task(generator)
    model, critic = made.build_model(), made.build_auxiliary()
    *_, idle = made.batch(0, VIDEO, range(3)).micro_batches(1, share=4)
    losses, _ = made.losses(model, idle)
    assert len(losses) == 0
    losses.sum().backward()
    found = made.auxiliary_losses(model, critic, idle)
    assert found.shape == (0,)
    found.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in critic.parameters())


# ---- settings that cannot be

def test_one_warning_names_all_settings_without_effect(distilling):
    with pytest.warns(UserWarning, match="without effect") as found:
        distilling(distill={"icd": 0, "icd_raw": True, "icd_k": 3, "mca": 0, "gamma": 1.0})
    (said,) = [str(w.message) for w in found if "without effect" in str(w.message)]
    for why in ("icd_raw, because icd is 0", "icd_k, because no features", "distill.gamma", "no critic is trained"):
        assert why in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distilling(distill={"gamma": 1.0, "gamma_interval": 4, "icd_layers": 2})
        distilling(distill={"icd_raw": True, "icd_k": 3, "motion": "difference"})
    with pytest.warns(UserWarning, match=r"distill\.icd_k, because icd_raw counts all features"):
        distilling(distill={"icd_raw": True, "icd_k": 3})
    with pytest.warns(UserWarning, match=r"distill\.gamma_interval, because gamma is 0"):
        distilling(distill={"gamma_interval": 4})


@pytest.mark.parametrize(("section", "message"), [
    ({"teacher": None}, "distill.teacher is missing"),
    ({"task": 0, "kd": 0, "icd": 0, "mca": 0}, "all 0, so there is nothing to learn"),
    ({"icd_layers": "first"}, "distill.icd_layers is 'first'; allowed: all, last"),
    ({"icd_layers": 0}, "distill.icd_layers is 0"),
    ({"critic_width": 20}, "must be a multiple of 8"),
    ({"motion": "none"}, "distill.motion is 'none'; allowed: adversarial, difference"),
    ({"lambda": 1}, "unknown key distill.lambda"),
])  # fmt: skip
def test_settings_that_cannot_be(distilling, section, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        distilling(distill=section)


def test_infinite_k_is_null(distilling):
    assert distilling(distill={"icd_k": None}).distill.k == math.inf


def test_stage_three_cannot_be(distilling):
    with pytest.raises(UserError, match=r"ZeRO 3 cuts.*set deepspeed\.zero_stage=2"):
        distilling(deepspeed={"zero_stage": 3})


def test_settings_survive_their_plain_form(distilling):
    from lumos.compression.settings import build_settings

    settings = distilling(distill={"icd_layers": 2})
    assert build_settings(settings.to_dict()) == settings

"""Features and losses for the recovery of pruned diffusers models."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_diffusers import COUNTS, FRAMES, MODELSCOPE, SVD, TRANSFORMERS, UNETS, inputs, loaded, make, output, saved

from lumos.compression import recovery
from lumos.compression.diffusers_folder import write_pruned
from lumos.compression.diffusers_models import plan_folder
from lumos.compression.losses import icd, velocity_kd
from lumos.compression.record import RECORD
from lumos.compression.recovery import by_frame, compare, features, taps
from lumos.errors import RunError, UserError

pytest.importorskip("diffusers")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A function from a name to (teacher, folder of the student), which the first call makes."""
    made = {}

    def pair(name: str):
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            folder = saved(root / "teacher", name)
            keep = () if name in UNETS else [3] * len(COUNTS[name])
            write_pruned(folder, plan_folder(folder, "vdmini" if name in UNETS else "spaced", keep), root / "student")
            made[name] = loaded(folder).requires_grad_(False).eval(), root / "student"
        return made[name]

    return pair


@pytest.mark.parametrize(("name", "last"), [(SVD, "attentions"), (MODELSCOPE, "temp_attentions")])
def test_the_taps_of_vdmini(pairs, name, last):
    """Section 7 pairs D.0, D.1, the last attention of D.2, and U.1 to U.3 of the teacher with U'.0 to U'.2."""
    assert taps(pairs(name)[1]) == [
        ("down_blocks.0", "down_blocks.0"), ("down_blocks.1", "down_blocks.1"),
        (f"down_blocks.2.{last}.1", f"down_blocks.2.{last}.1"),
        ("up_blocks.0", "up_blocks.1"), ("up_blocks.1", "up_blocks.2"), ("up_blocks.2", "up_blocks.3"),
    ]  # fmt: skip


def test_the_taps_of_a_transformer(pairs):
    folder = pairs("WanTransformer3DModel")[1]  # 6 blocks, of which 0, 3 and 5 are kept
    assert taps(folder) == [("blocks.0", "blocks.0"), ("blocks.1", "blocks.3"), ("blocks.2", "blocks.5")]
    assert taps(folder, "last") == [("blocks.2", "blocks.5")]
    assert taps(folder, 2) == [("blocks.0", "blocks.0"), ("blocks.2", "blocks.5")]
    for layers in ("first", 0, -1, True, 1.5):
        with pytest.raises(UserError, match=r"layers is .*; allowed: all, last, or a whole number"):
            taps(folder, layers)


def test_taps_of_a_damaged_record(tmp_path):
    (tmp_path / RECORD).write_text(json.dumps({"taps": [["a"]]}))
    with pytest.raises(RunError, match="names no modules"):
        taps(tmp_path)
    with pytest.raises(RunError, match="is missing"):
        taps(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [*UNETS, *TRANSFORMERS])
def test_features_are_clips_by_frames_by_places_by_channels(pairs, name):
    teacher, folder = pairs(name)
    student = loaded(folder)
    own, theirs = zip(*taps(folder), strict=True)
    with features(student, own, FRAMES) as s, features(teacher, theirs, FRAMES) as h:
        output(student, name)
        output(teacher, name)
    assert [s[x].shape for x in own] == [h[x].shape for x in theirs]
    assert all(x.ndim == 4 and x.shape[:2] == (2, FRAMES) for x in s.values())
    assert list(s) == list(own)
    output(student, name)  # the hooks are gone
    before = {key: id(value) for key, value in s.items()}
    output(student, name)
    assert before == {key: id(value) for key, value in s.items()}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_features_before_the_first_cut_are_the_teachers(pairs, name):
    teacher, folder = pairs(name)
    own, theirs = taps(folder)[0]
    student = loaded(folder)
    with features(student, [own], FRAMES) as s, features(teacher, [theirs], FRAMES) as h:
        output(student, name)
        output(teacher, name)
    assert torch.equal(s[own], h[theirs])


def test_by_frame_puts_each_place_where_it_belongs():
    maps = torch.arange(2 * 3 * 4 * 5 * 6).view(6, 4, 5, 6)  # two clips of three frames, four channels
    found = by_frame(maps, 3)
    assert found[1, 2, 7, 3] == maps[1 * 3 + 2, 3, 7 // 6, 7 % 6]
    tokens = torch.arange(2 * 12 * 4).view(2, 12, 4)
    assert by_frame(tokens, 3)[1, 2, 3, 1] == tokens[1, 2 * 4 + 3, 1]
    for frames in (0, 4):
        with pytest.raises(UserError, match="does not divide the 6 frames"):
            by_frame(maps, frames)
    with pytest.raises(UserError, match="does not divide the 12 places"):
        by_frame(tokens, 5)


@pytest.mark.parametrize("name", [SVD, "WanTransformer3DModel"])
def test_compare_gives_the_losses_of_features_and_predictions(pairs, name):
    teacher, folder = pairs(name)
    student, names = loaded(folder), taps(folder)
    found = compare(student, teacher, names, inputs(name), FRAMES)
    own, theirs = zip(*names, strict=True)
    with features(student, own, FRAMES) as s, features(teacher, theirs, FRAMES) as h:
        predictions = output(student, name), output(teacher, name)
    by_name = [s[x] for x in own], [h[x] for x in theirs]
    assert torch.equal(found.prediction, predictions[0])
    assert torch.equal(found.kd, velocity_kd(*predictions))
    assert torch.equal(found.icd, icd(*by_name, raw=name == SVD))
    assert found.icd != icd(*by_name, raw=name != SVD)
    assert torch.equal(compare(student, teacher, names, inputs(name), FRAMES, raw=False, k=1.0).icd, icd(*by_name, k=1.0))


@pytest.mark.parametrize("name", [SVD, "HunyuanVideoTransformer3DModel"])
def test_a_model_compared_with_an_equal_one_has_no_distance(pairs, name):
    """Test 5: ICD and its gradient are 0 when the student equals the teacher.

    A U-Net whose weights need gradients rounds differently, so its losses are exactly 0 only if they need none, like the teacher's.
    """
    teacher, student = pairs(name)[0], make(name)
    names = [(x, x) for x in (["down_blocks.0", "up_blocks.3"] if name == SVD else ["transformer_blocks.1"])]
    found = compare(student.requires_grad_(False), teacher, names, inputs(name), FRAMES)
    assert (found.kd.item(), found.icd.item()) == (0, 0)
    found = compare(student.requires_grad_(True), teacher, names, inputs(name), FRAMES)
    (found.kd + found.icd).backward()
    rounding = name == SVD
    assert max(found.kd.item(), found.icd.item()) <= 1e-9 * rounding
    assert all(p.grad is None or p.grad.abs().max() <= 1e-5 * rounding for p in student.parameters())


@pytest.mark.parametrize("name", [SVD, "WanTransformer3DModel"])
def test_icd_reaches_nothing_behind_the_last_compared_unit(pairs, name):
    """Test 7: the student has gradients up to the last tap only, and the teacher has none."""
    teacher, folder = pairs(name)
    student, names = loaded(folder), taps(folder)[:2]
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    compare(student, teacher, names, inputs(name), FRAMES, kd=False).icd.backward()
    reached = {key for key, parameter in student.named_parameters() if parameter.grad is not None}
    last = "down_blocks.1." if name == SVD else "blocks.1."
    behind = ("down_blocks.2.", "up_blocks.", "conv_out.", "conv_norm_out.") if name == SVD else ("blocks.2.", "proj_out.")
    assert any(key.startswith(last) for key in reached)
    assert not any(key.startswith(behind) for key in reached)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_no_loss_is_no_call_of_the_teacher(pairs):
    name = "WanTransformer3DModel"
    teacher, folder = pairs(name)
    student, calls = loaded(folder), []
    hook = teacher.register_forward_hook(lambda *_: calls.append(1))
    found = compare(student, teacher, taps(folder), inputs(name), FRAMES, kd=False, icd=False)
    assert (found.kd, found.icd, calls) == (None, None, [])
    assert compare(student, teacher, [], inputs(name), FRAMES, icd=False).kd > 0
    assert calls == [1]
    hook.remove()


def test_features_that_nobody_compares_are_not_recorded(pairs, monkeypatch):
    name = "WanTransformer3DModel"
    teacher, folder = pairs(name)
    student, recorded = loaded(folder), []
    monkeypatch.setattr(recovery, "by_frame", lambda output, frames: recorded.append(output))
    compare(student, teacher, taps(folder), inputs(name), FRAMES, icd=False)
    assert recorded == []


def test_a_teacher_that_is_the_student(pairs):
    teacher, folder = pairs("WanTransformer3DModel")
    with pytest.raises(UserError, match="the teacher is the student"):
        compare(teacher, teacher, taps(folder), inputs("WanTransformer3DModel"), FRAMES)


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "CogVideoXTransformer3DModel"])
def test_a_few_steps_bring_the_student_nearer(pairs, name):
    teacher, folder = pairs(name)
    student, names = loaded(folder).train(), taps(folder)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    seen = []
    for _ in range(15):
        found = compare(student, teacher, names, inputs(name), FRAMES)
        optimizer.zero_grad()
        (found.kd + 0.1 * found.icd).backward()
        optimizer.step()
        seen.append((found.kd.item(), found.icd.item()))
    assert seen[-1][0] < 0.7 * seen[0][0]
    assert seen[-1][1] < seen[0][1]


def test_icd_has_equal_gradients_with_checkpointing(pairs):
    teacher, folder = pairs("WanTransformer3DModel")
    found = []
    for checkpointing in (False, True):
        student = loaded(folder).train()
        if checkpointing:
            student.enable_gradient_checkpointing()
        compare(student, teacher, taps(folder), inputs("WanTransformer3DModel"), FRAMES, kd=False).icd.backward()
        found.append({key: parameter.grad for key, parameter in student.named_parameters() if parameter.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient)

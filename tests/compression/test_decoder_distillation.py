"""Recovery of a smaller decoder of the video tokenizer: what the losses are, that the codes stay, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_networks import lumos_folder, tokenizer

from lumos import LumosPipeline
from lumos.commands import compress_distill
from lumos.compression.decoder_distillation import DecoderDistillationTask, DecoderDistillSettings, distill_decoder
from lumos.compression.networks import DecoderNetwork, network_of
from lumos.compression.plans import Plan
from lumos.compression.pruning import prune
from lumos.data.curriculum import StepShape
from lumos.errors import UserError
from lumos.training import loop
from lumos.training.tokenizer.settings import TokenizerTrainingSettings, loop_settings
from lumos.training.tokenizer.task import TokenizerTask, foreground_weight
from lumos.video.frames import from_uint8
from tokenizer import VideoTokenizer
from tokenizer.fingerprint import tokenizer_facts

SMALL = {
    "height": 16, "width": 24, "num_frames": 5, "batch_size": 2, "pictures_per_batch": 1, "share_worlds": 1.0,
    "validation_clips": 2, "warmup_steps": 1, "log_every": 1, "validate_every": 100, "steps": 4, "lr": 3e-3,
    "export_dtype": "float32", "device": "cpu",
}  # fmt: skip
REMOVED = ("mid", "up.0.1")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """The folder of a model, and of the one whose decoder has no middle and no block next to the pixels."""
    root = tmp_path_factory.mktemp("decoder")
    whole = lumos_folder(root / "whole")
    network = network_of(whole, "decoder")
    prune(network, Plan("file", "decoder", "block", REMOVED, sha256=network.sha256), root / "small")
    return whole, root / "small"


def settings(folders: tuple[Path, Path], output_dir: Path, **changes) -> DecoderDistillSettings:
    whole, small = folders
    asked = {"start_from": str(small), "teacher": str(whole), "output_dir": str(output_dir)}
    return DecoderDistillSettings.from_dict(SMALL | asked | changes)


def task_of(*args, **changes) -> DecoderDistillationTask:
    return DecoderDistillationTask(loop_settings(settings(*args, **changes)), torch.device("cpu"))


def micro(task: TokenizerTask) -> dict:
    return task.batch(0, StepShape("video", 3), range(3)).whole


@pytest.mark.slow
@pytest.mark.parametrize(("kd", "icd"), [(1.0, 0.0), (0.0, 0.5), (0.7, 0.3)])
def test_losses_are_those_of_the_training_plus_distances(folders, tmp_path, kd, icd):
    """Compares with a plain form that calls each decoder level by level, on the codes of the whole tokenizer."""
    task = task_of(folders, tmp_path, kd=kd, icd=icd)
    model, teacher = task.build_model(), VideoTokenizer.from_pretrained(folders[0] / "video_tokenizer").float()
    batch = micro(task)
    found, _ = task.losses(model, batch)
    plain_settings = TokenizerTrainingSettings.from_dict(SMALL | {"model": model.config.to_dict()})
    usual, _ = TokenizerTask(loop_settings(plain_settings), torch.device("cpu")).losses(model, batch)
    expected = []
    for i, frames in enumerate(batch["frames"]):
        video = from_uint8(frames[None])
        values = teacher.values(teacher.encode(video))
        weights = foreground_weight(video, batch["is_world"][i : i + 1], task.settings.foreground_weight)
        distance = (weights * (model.decode_latent(values) - teacher.decode_latent(values)).abs()).mean()
        errors = []
        for s, h in zip(behind_levels(model, values), behind_levels(teacher, values), strict=True):
            for t in range(s.shape[2]):
                a, b = s[0, :, t], h[0, :, t]
                inside = (a.abs() <= 2 * a.std(correction=0)) & (b.abs() <= 2 * b.std(correction=0))
                errors.append((inside * (a - b) ** 2).sum() / (inside * b**2).sum())
        each = len(errors) // 2  # two levels, each with its own frames
        content = (sum(errors[:each]) / each + sum(errors[each:]) / each) / 2
        expected.append(usual[i] + batch["weights"][i] * (kd * distance + icd * content))
    torch.testing.assert_close(found, torch.stack(expected).detach(), rtol=2e-4, atol=1e-5, check_dtype=False)
    values = task.step_values()
    assert values["task_loss"][1] == 3
    assert [name for name in ("kd_loss", "icd_loss") if values[name][1]] == ["kd_loss"] * (kd > 0) + ["icd_loss"] * (icd > 0)
    found.sum().backward()
    assert all(p.grad is None for name, p in model.named_parameters() if name.startswith(("encoder.", "quant_conv.")))
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.decoder.parameters())
    assert all(p.grad is None for p in task.teacher.parameters())


@torch.no_grad()
def behind_levels(model: VideoTokenizer, values: torch.Tensor) -> list[torch.Tensor]:
    """The streams behind the levels of a decoder, in the order of its list of levels."""
    decoder, past, found = model.decoder, None, {}
    h = decoder.conv_in(model.post_quant_conv(values), past)
    if hasattr(decoder, "mid"):
        h = decoder.mid(h, past)
    for i in reversed(range(len(decoder.up))):
        h = decoder.up[i](h, past)
        found[i] = h
        if hasattr(decoder.up[i], "upsample"):
            h = decoder.up[i].upsample(h, past)
    return [found[i] for i in sorted(found)]


@pytest.mark.slow
def test_a_student_comes_nearer_keeps_codes_and_resumes(folders, tmp_path, monkeypatch):
    whole, small = folders
    made = distill_decoder(settings(folders, tmp_path / "whole", steps=20, lr=1e-2))
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    kd = [line["kd_loss"] for line in lines if "kd_loss" in line]
    assert len(kd) == 20
    assert sum(kd[-5:]) < 0.7 * sum(kd[:5])
    recovered = VideoTokenizer.from_pretrained(made["export"])
    start, teacher = (VideoTokenizer.from_pretrained(folder / "video_tokenizer") for folder in (small, whole))
    assert recovered.config == start.config
    assert tokenizer_facts(recovered) == tokenizer_facts(teacher)
    video = from_uint8(torch.randint(0, 256, (1, 5, 16, 24, 3), dtype=torch.uint8))
    assert recovered.encode(video).equal(teacher.encode(video))
    record = json.loads((Path(made["export"]) / "compression.json").read_text())
    assert record["plan"]["remove"] == list(REMOVED)
    assert record["recovery"]["teacher_sha256"] == DecoderNetwork(whole).sha256
    assert record["losses"]["kd_loss"] > 0
    pipe = LumosPipeline.from_pretrained(tmp_path / "whole" / "export")
    assert all(x.equal(recovered.state_dict()[name]) for name, x in pipe.video_tokenizer.state_dict().items())

    stepped = loop.Run._train_step

    def stop(run, batch, *args):
        return (True, stepped(run, batch, *args)[1]) if run.step == 7 else stepped(run, batch, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_train_step", stop)
        assert distill_decoder(settings(folders, tmp_path / "killed", steps=20, lr=1e-2))["steps"] == 8
    again = distill_decoder(settings(folders, tmp_path / "killed", steps=20, lr=1e-2))
    resumed = VideoTokenizer.from_pretrained(again["export"]).state_dict()
    assert all(x.equal(resumed[name]) for name, x in recovered.state_dict().items())


@pytest.mark.slow
def test_a_tokenizer_alone_from_the_command(folders, tmp_path, capsys):
    """start_from and teacher may be folders of tokenizers. Only the pixels of a narrower decoder are compared."""
    whole, small = (folder / "video_tokenizer" for folder in folders)
    config = tmp_path / "recipe.yaml"
    asked = SMALL | {"start_from": str(small), "teacher": str(whole), "output_dir": str(tmp_path / "run"), "steps": 2}
    config.write_text(json.dumps(asked))
    args = type("Args", (), {"config": str(config), "overrides": ["kd=0.5"]})
    compress_distill.run(args)
    assert VideoTokenizer.from_pretrained(tmp_path / "run" / "video_tokenizer").config.decoder_mid is False
    assert not (tmp_path / "run" / "export").exists()
    narrow = tmp_path / "narrow"
    VideoTokenizer.from_pretrained(whole).narrowed({"decoder_channels": 4}).save_pretrained(narrow)
    with pytest.raises(UserError, match=r"have \[4, 8\] channels.*set icd=0"):
        task_of((whole, narrow), tmp_path / "narrow-run")
    task = task_of((whole, narrow), tmp_path / "narrow-run", icd=0)
    assert task.losses(task.build_model(), micro(task))[0].isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": None}, "teacher None is not possible: allowed is the folder of the tokenizer"),
        ({"train_encoder": True}, "train_encoder True is not possible: allowed is false"),
        ({"kd": 0, "icd": 0}, "kd 0.* is not possible: allowed is above 0 with icd 0"),
        ({"start_from": "nowhere"}, "nowhere"),
        ({"kd": -1}, "kd"),
    ],
)
def test_settings_that_cannot_be(folders, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        settings(folders, tmp_path, **changes)


def test_teachers_that_cannot_teach(folders, tmp_path):
    with pytest.raises(UserError, match=r"has the weights of the student"):
        task_of(folders, tmp_path, teacher=str(folders[1]))
    other = tokenizer()
    other.encoder.conv_in[0].conv3d.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"teacher .*other has other codes than start_from"):
        task_of(folders, tmp_path, teacher=str(tmp_path / "other"))
    with pytest.raises(UserError, match="nowhere"):
        task_of(folders, tmp_path, teacher="nowhere")

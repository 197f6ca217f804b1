"""`compress distill` of models of diffusers on a folder of latents and text states, on tiny random models of each class."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_diffusers import COUNTS, MODELSCOPE, SVD, TRANSFORMERS, UNETS, saved

from lumos.commands import compress_distill
from lumos.compression.diffusers_folder import write_pruned
from lumos.compression.diffusers_models import load, plan_folder
from lumos.compression.latent_distillation import distill_latents, make_latent_task
from lumos.compression.latent_folder import RANKS, LatentFolder
from lumos.compression.latent_settings import LatentDistillationSettings, build_latent_settings
from lumos.compression.latent_task import LatentTask
from lumos.compression.noising import OBJECTIVES
from lumos.compression.recipes import read_recipe
from lumos.compression.recovery import compare, taps
from lumos.data.curriculum import StepShape
from lumos.errors import NotFound, RunError, UserError
from lumos.training import loop
from lumos.training.adversarial import critic_losses

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
WAN, LTX, COG, HUNYUAN = ("WanTransformer3DModel", "LTXVideoTransformer3DModel", "CogVideoXTransformer3DModel",
                          "HunyuanVideoTransformer3DModel")  # fmt: skip


def write_latents(folder: Path, name: str, count: int = 5) -> Path:
    """A folder of clips of 3 latent frames of 8 x 8 (4 x 4 for LTX) for a class; one clip is shorter."""
    folder.mkdir()
    draws = torch.Generator().manual_seed(5)
    channels, side = (8, 4) if name == LTX else (4, 8)
    for i in range(count):
        frames = 2 if i == 1 else 3
        clip = {"latents": torch.randn(channels, frames, side, side, generator=draws),
                "text": torch.randn(1 if name == SVD else 5, 16, generator=draws)}  # fmt: skip
        if name == SVD:
            clip |= {"condition": torch.randn(4, frames, side, side, generator=draws), "inputs.added_time_ids": torch.ones(3)}
        if name == HUNYUAN:
            clip["inputs.pooled_projections"] = torch.randn(8, generator=draws)
        save_file(clip, folder / f"{i}.safetensors")
    inputs = {"guidance": 6000.0} if name == HUNYUAN else {}
    (folder / "latents.json").write_text(json.dumps({"format": 1, "inputs": inputs}))
    return folder


@pytest.fixture(scope="module", autouse=True)
def counted_once():
    """Count the FLOPs of a whole and of a part of one network of each class, for all tests: a count takes a second or two."""
    count, found = LatentTask.flops, {}

    def flops(task: LatentTask, config: dict, clip: dict, blocks: Sequence[str] = ()) -> float:
        key = (config["_class_name"].removeprefix("Pruned"), bool(blocks))
        if key not in found:
            found[key] = count(task, config, clip, blocks)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentTask, "flops", flops)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function from a name to the folders (teacher, student, latents), which the first call makes."""
    found: dict[str, tuple[Path, Path, Path]] = {}

    def folders(name: str) -> tuple[Path, Path, Path]:
        if name not in found:
            root = tmp_path_factory.mktemp(name)
            teacher = saved(root / "teacher", name)
            keep = () if name in UNETS else [3] * len(COUNTS[name])
            plan = {SVD: "vdmini-mid", MODELSCOPE: "vdmini"}.get(name, "spaced")
            write_pruned(teacher, plan_folder(teacher, plan, keep), root / "student")
            diffusers.DDPMScheduler(beta_schedule="scaled_linear").save_pretrained(root / "scheduler")
            found[name] = teacher, root / "student", write_latents(root / "latents", name)
        return found[name]

    return folders


def settings(made, name: str, run: Path, **sections: Any) -> LatentDistillationSettings:
    teacher, student, latents = made(name)
    raw: dict[str, Any] = {
        "generator": "diffusers", "model": {"from": str(student)}, "data": {"path": str(latents), "workers": 0},
        "distill": {"teacher": str(teacher), "critic_warmup": 0, "critic_width": 16, "critic_taps": 2},
        "training": {"max_steps": 4, "batch_size": 2, "lr": 1e-3, "warmup_steps": 0, "log_every": 1, "device": "cpu",
                     "output_dir": str(run)},
        "logging": {"peak_tflops": 0.1},
    }  # fmt: skip
    for section, values in sections.items():
        raw[section] = raw.get(section, {}) | values
    if not raw["distill"].get("mca", 1) or raw["distill"].get("motion") == "difference":
        raw["distill"] = {key: value for key, value in raw["distill"].items() if not key.startswith("critic")}
    return build_latent_settings(raw)


def lines(run: Path) -> list[dict]:
    return [line for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "kd_loss" in line]


@pytest.mark.parametrize("name", [*UNETS, *TRANSFORMERS])
def test_losses_are_those_of_the_library_call(made, tmp_path, name):
    """Prediction, kd and icd of each clip are those of `recovery.compare` with the clip alone."""
    asked = settings(made, name, tmp_path, distill={"mca": 0, "task": 0.5, "kd": 0.7, "icd": 0.3, "icd_decay": False})
    task = make_latent_task(asked, CPU)
    student = task.build_model().eval()
    micro = task.batch(0, StepShape("video", 5), range(5)).whole
    found, _ = task.losses(student, micro)
    inner, pairs = task.inner, taps(made(name)[1])
    assert len({clip["latents"].shape for clip in micro["clips"]}) == 2
    for i in range(5):
        part = {**micro, "clips": [micro["clips"][i]], "noise": [micro["noise"][i]], "levels": micro["levels"][i : i + 1]}
        (group,) = inner.groups(part)
        x = torch.cat([group.noisy, group.tensors["condition"]], 1) if name == SVD else group.noisy
        arguments = inner.calls.arguments(x, group.level.time, group.tensors["text"], group.inputs)
        plain = compare(student, task.teacher, pairs, arguments, group.clean.shape[2])
        prediction = inner.calls.as_clips(plain.prediction, group.clean.shape)
        own = (prediction - inner.objective.target(group.clean, group.noise, group.level)).square().mean()
        torch.testing.assert_close(found[i], 0.5 * own + 0.7 * plain.kd + 0.3 * plain.icd, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert all(p.grad is None for p in task.teacher.parameters())
    assert task.batch(0, StepShape("video", 5), range(5)).flops > 0


@pytest.mark.parametrize("name", [*UNETS, *TRANSFORMERS])
def test_motion_loss_reaches_the_student_and_the_critic_learns(made, tmp_path, name):
    task = make_latent_task(settings(made, name, tmp_path, distill={"task": 0, "kd": 0, "icd": 0, "mca": 1.0}), CPU)
    student, critic = task.build_model(), task.build_auxiliary()
    for parameter in critic.parameters():
        parameter.requires_grad_(False)  # as in the loop
    micro = task.batch(0, StepShape("video", 3), range(3)).whole
    losses, _ = task.losses(student, micro)
    losses.sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())
    assert all(p.grad is None for p in [*task.teacher.parameters(), *critic.parameters()])
    assert len(task.taps) == (len(task.kind.teacher_calls.blocks()) if name in UNETS else 2)
    kept = micro["distill_kept"]
    by_hand = torch.cat([
        critic_losses(critic(theirs, level, pooled), critic(ours, level, pooled)) for theirs, ours, level, pooled in kept
    ])
    found = task.auxiliary_losses(student, critic, dict(micro))
    assert torch.equal(found, by_hand)
    assert len(found) == 3


@pytest.mark.parametrize("name", [SVD, WAN])
def test_a_run_resumes_and_stock_diffusers_loads_its_result(made, tmp_path, name, monkeypatch):
    distill = {"kd": 1.0, "icd": 0.1, "mca": 0.1}
    changes = {"distill": distill, "training": {"max_steps": 2, "ema_decay": 0.5}}
    whole = distill_latents(settings(made, name, tmp_path / "whole", **changes))
    stock = getattr(diffusers, name)
    model = stock.from_pretrained(whole["export"])
    before = load(made(name)[1]).state_dict()
    assert any(not torch.equal(x, before[key]) for key, x in model.state_dict().items())
    record = json.loads((Path(whole["export"]) / "compression.json").read_text())
    assert record["recovery"]["teacher_sha256"]
    assert taps(whole["export"]) == taps(made(name)[1])

    stepped = loop.Run._train_step

    def stop(run, batch, *args):
        found = stepped(run, batch, *args)
        return (True, found[1]) if run.step == 1 else found

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_train_step", stop)
        assert distill_latents(settings(made, name, tmp_path / "killed", **changes))["steps"] == 1
    again = distill_latents(settings(made, name, tmp_path / "killed", **changes))
    resumed = stock.from_pretrained(again["export"]).state_dict()
    assert all(torch.equal(x, resumed[key]) for key, x in model.state_dict().items())
    wanted = ("loss", "kd_loss", "icd_loss", "auxiliary_loss")
    assert [[line[key] for key in wanted] for line in lines(tmp_path / "whole")] == [
        [line[key] for key in wanted] for line in lines(tmp_path / "killed")
    ]


def test_a_student_comes_nearer_to_its_teacher(made, tmp_path):
    asked = settings(made, WAN, tmp_path, distill={"mca": 0}, training={"max_steps": 30, "lr": 5e-3, "batch_size": 4})
    distill_latents(asked)
    kd = [line["kd_loss"] for line in lines(tmp_path)]
    assert sum(kd[-5:]) < 0.7 * sum(kd[:5])


def test_the_command_reads_a_recipe(made, tmp_path):
    teacher, student, latents = made(MODELSCOPE)
    config = tmp_path / "recipe.yaml"
    config.write_text(json.dumps({
        "generator": "diffusers", "model": {"from": str(student)}, "data": {"path": str(latents), "validation_path": str(latents)},
        "distill": {"teacher": str(teacher), "motion": "difference"},
        "training": {"max_steps": 1, "batch_size": 2, "warmup_steps": 0, "eval_every": 1, "device": "cpu",
                     "output_dir": str(tmp_path / "run")},
    }))  # fmt: skip
    args = type("Args", (), {"config": str(config), "overrides": ["training.export_dtype=float16"]})
    compress_distill.run(args)
    (file,) = (tmp_path / "run" / "export").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    assert load(tmp_path / "run" / "export").config["_class_name"] == "PrunedUNet3DConditionModel"
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len([line for line in log if "val_loss_video" in line]) == 1


def test_the_page(tmp_path):
    """The settings of the page are allowed, and it names every tensor of a clip."""
    from pages import ROOT, blocks

    page = "docs/compression-latents.md"
    config = tmp_path / "recover.yaml"
    config.write_text(blocks(page, "yaml")[0])
    found, train = read_recipe(config)
    assert (found.name, train, found.distill.mca) == ("recover", distill_latents, 0.1)
    assert all(f"`{name}`" in (ROOT / page).read_text() for name in (*RANKS, *OBJECTIVES))


def test_the_order_of_clips_is_a_pure_function_of_the_seed(made):
    folder = made(WAN)[2]
    one, other = LatentFolder(folder, 1), LatentFolder(folder, 1)
    order = [one.at(i) for i in range(15)]
    assert [other.at(i) for i in reversed(range(15))] == order[::-1]
    assert all(sorted(order[i : i + 5]) == list(range(5)) for i in (0, 5, 10))
    assert order != [LatentFolder(folder, 2).at(i) for i in range(15)]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"height": 32}}, r"data\.height has no effect on a model of diffusers"),
        ({"lora": {"rank": 4}}, r"lora\.rank has no effect"),
        ({"noise": {"objective": "edm", "shift": 2}}, r"noise\.shift has no effect with noise\.objective=edm"),
        ({"training": {"eval_every": 5}}, r"data\.validation_path and training\.eval_every go together"),
        ({"distill": {"kept": [0]}}, r"distill\.kept has no effect"),
        ({"distill": {"teacher": None}}, r"distill\.teacher is missing"),
        ({"data": {"path": None}}, r"set model\.from .* and data\.path"),
        ({"training": {"compile": True}}, r"training\.compile has no effect"),
        ({"deepspeed": {"zero_stage": 3}}, "ZeRO 3"),
    ],
)
def test_settings_that_cannot_be(made, tmp_path, sections, message):
    with pytest.raises(UserError, match=message):
        settings(made, WAN, tmp_path, **sections)


def test_settings_survive_their_plain_form(made, tmp_path):
    """Settings that are null may be overridden too, such as noise.objective."""
    found = settings(made, WAN, tmp_path)
    assert build_latent_settings(found.to_dict()) == found


def test_teachers_and_folders_that_do_not_fit(made, tmp_path):
    def task(**sections: Any) -> LatentTask:
        return make_latent_task(settings(made, WAN, tmp_path / "run", **sections), CPU)

    with pytest.raises(UserError, match="is the student itself"):
        task(distill={"teacher": str(made(WAN)[1])})
    with pytest.raises(UserError, match="is a CogVideoXTransformer3DModel, the student a WanTransformer3DModel"):
        task(distill={"teacher": str(made(COG)[0])})
    five = tmp_path / "five"  # blocks; another model than the parent, which has six
    write_pruned(made(WAN)[0], plan_folder(made(WAN)[0], "spaced", [5]), five)
    with pytest.raises(UserError, match=r"has \d+ parameters, and the model that the student was pruned from has \d+, so their"):
        task(distill={"teacher": str(five)})
    assert task(distill={"teacher": str(five), "icd": 0}).kept == []
    with pytest.raises(UserError, match="the network reads 4 channels"):
        task(data={"path": str(made(SVD)[2])})
    with pytest.raises(UserError, match=r"the network has no argument guidance; allowed under inputs: encoder_hidden_states_im"):
        task(data={"path": str(made(HUNYUAN)[2])})
    with pytest.raises(UserError, match="the network needs pooled_projections"):
        make_latent_task(settings(made, HUNYUAN, tmp_path / "run", data={"path": str(made(WAN)[2])}), CPU)
    with pytest.raises(NotFound, match="there is no folder"):
        task(data={"path": str(tmp_path / "nowhere")})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"latents": (4, 3, 8, 8)}, "has no tensor text"),
        ({"latents": (4, 3, 8), "text": (5, 16)}, r"latents has the shape \[4, 3, 8\]; it must have 4 axes"),
        ({"latents": (4, 3, 8, 8), "text": (5, 16), "x": (1,)}, "has a tensor 'x'; allowed: latents, text, condition and inputs"),
        ({"latents": (4, 3, 8, 8), "text": (5, 16), "condition": (4, 1, 8, 8)}, "all but the channels must be equal"),
    ],
)
def test_clips_that_cannot_be(tmp_path, tensors, message):
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "a.safetensors")
    (tmp_path / "latents.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match=message):
        LatentFolder(tmp_path, 0)


def test_damaged_folders(made, tmp_path):
    (tmp_path / "latents.json").write_text('{"format": 2}')
    with pytest.raises(UserError, match="it must be an object such as"):
        LatentFolder(tmp_path, 0)
    (tmp_path / "latents.json").write_text('{"format": 1, "inputs": {"guidance": "x"}}')
    with pytest.raises(UserError, match="it must be an object of numbers"):
        LatentFolder(tmp_path, 0)
    (tmp_path / "latents.json").write_text('{"format": 1}')
    with pytest.raises(NotFound, match=r"has no \.safetensors files"):
        LatentFolder(tmp_path, 0)
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        LatentFolder(tmp_path, 0)
    folder = write_latents(tmp_path / "latents", WAN, 2)
    source = LatentFolder(folder, 0)
    (folder / "0.safetensors").write_bytes(b"nothing")
    with pytest.raises(RunError, match="cannot be read"):
        source.read(0)

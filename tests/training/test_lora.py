"""Fine-tuning by adapters: training, resuming, export, merging, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from forks import Forks
from ranks import Ranks, Runs
from run_log import read_log
from safetensors.torch import load_file, save_file

from lumos import LumosForVideoGeneration, LumosPipeline
from lumos.cli import main
from lumos.data.curriculum import StepShape
from lumos.data.synthetic.sampling import captions
from lumos.errors import UserError
from lumos.lora import fingerprints, merge_adapter
from lumos.models.lumos1.training import ArdfTask
from lumos.training.loop import train
from lumos.training.settings import TrainingSettings
from lumos.video.io import contact_sheet, read_image
from tokenizer import TextTokenizer

CPU = torch.device("cpu")
LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="session")
def base(runs: Runs) -> Path:
    """A model folder with its tokenizers."""
    return runs.whole("plain") / "export"


@pytest.fixture
def tuning(base: Path, micro_settings):
    """Settings of a run that adapts `base`."""

    def make(lora: dict | None = None, **sections: dict) -> TrainingSettings:
        own = {"model": {"from": str(base)}, "tokenizer": {"video": None, "text": None}, "lora": LORA | (lora or {})}
        return micro_settings(**own, **sections)

    return make


@pytest.fixture(scope="session")
def adapter(runs: Runs, base: Path) -> Path:
    """The export of a run with adapters."""
    settings = runs.make(runs.folder / "adapter")
    settings.model.preset, settings.model.overrides, settings.model.from_ = None, {}, str(base)
    settings.lora.rank, settings.lora.alpha = 4, 8.0
    return Path(train(settings)["export"])


def clip(folder: Path, **options) -> np.ndarray:
    pipe = LumosPipeline.from_pretrained(folder, **options)
    return pipe("a red circle", num_frames=5, height=32, width=32, num_inference_steps=3, guidance_scale=2.0, seed=1,
                output_type="uint8").frames[0]  # fmt: skip


def test_only_adapters_are_trained_and_begin_as_nothing(tuning, base: Path):
    task = ArdfTask(tuning({"targets": ["q_proj", "down_proj"]}), CPU)
    model, plain = task.build_model(), LumosForVideoGeneration.from_pretrained(base).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parts = {name.split(".")[-4] for name in trained}
    assert parts == {"q_proj", "down_proj"}
    assert len(trained) == 2 * 2 * 2  # layers, projections, A and B
    assert all(4 in p.shape for p in trained.values())
    micro = task.batch(0, StepShape("video", 2), range(2)).tensors
    assert torch.equal(task.losses(model, micro)[0], task.losses(plain, micro)[0])


def test_lora_learns_resumes_bitwise_and_keeps_the_base_frozen(tuning, base: Path, tmp_path: Path):
    before = load_file(base / "model.safetensors")
    training = {"max_steps": 12, "ema_decay": 0.5, "save_every_steps": 5, "schedule": "constant"}
    options = {"data": {"scenes": 2}, "training": training}
    whole = tuning({"dropout": 0.1}, **options)
    train(whole)
    losses = read_log(whole.output_dir)
    assert losses[12] < losses[1]
    parts = tuning({"dropout": 0.1}, **options)
    parts.training.output_dir, parts.training.max_steps = str(tmp_path / "parts"), 7
    train(parts)
    parts.training.max_steps = 12
    train(parts)
    assert read_log(parts.output_dir) == losses
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(base / "model.safetensors").items())
    (stored,) = (whole.output_dir / "checkpoints" / "step-00000012").glob("rank-*")
    assert all("lora_" in key for key in load_file(stored) if "/" in key)


def test_samples_show_the_base_with_the_adapters(adapter: Path, base: Path, tmp_path: Path):
    shown = read_image(adapter.parent / "samples" / "step-00000005" / "sheet.png")
    for lora, same in ((adapter, True), (None, False)):
        pipe = LumosPipeline.from_pretrained(base, lora=lora)
        frames = pipe("a red circle", seed=0, num_inference_steps=2, output_type="uint8").frames
        assert np.array_equal(shown, read_image(contact_sheet(frames, ["a red circle"], tmp_path / "again.png"))) == same


@pytest.mark.parametrize("engine", ["zero3", pytest.param("zero2", marks=pytest.mark.thorough)])
def test_two_processes_train_the_same_adapters(runs: Runs, ranks: Ranks, adapter: Path, base: Path, engine: str):
    def settings(name: str) -> TrainingSettings:
        made = runs.make(runs.folder / f"adapter-{engine}{name}")
        made.model.preset, made.model.overrides, made.model.from_ = None, {}, str(base)
        made.lora.rank, made.lora.alpha = 4, 8.0
        return made

    whole, broken = settings(""), settings("-broken")
    ranks.finish(whole, engine)
    for key in ("loss", "grad_norm", "val_loss_video_ema"):
        assert read_log(whole.output_dir, key) == pytest.approx(read_log(adapter.parent, key), abs=1e-4)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (whole.output_dir / "export", adapter))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] - theirs[name]).abs().mean() < 1e-4 for name in ours)
    ranks.train(broken, engine, 2, {1: [["kill_after_step", 3]]})
    ranks.finish(broken, engine)
    assert read_log(broken.output_dir) == read_log(whole.output_dir)


def test_the_export_is_a_peft_folder_that_says_how_it_was_made(adapter: Path, base: Path):
    files = ["adapter_config.json", "adapter_model.safetensors", "lumos_adapter.json", "trained_on.json"]
    assert sorted(p.name for p in adapter.iterdir()) == files
    record = json.loads((adapter / "lumos_adapter.json").read_text())
    assert (record["steps"], record["averaged"], record["base"]["folder"]) == (5, True, str(base))
    assert record["settings"]["lora"]["rank"] == 4
    model = LumosForVideoGeneration.from_pretrained(base).eval()
    merged = merge_adapter(LumosForVideoGeneration.from_pretrained(base), adapter, fingerprints(base, base)).eval()
    wrapped = peft.PeftModel.from_pretrained(model, adapter)
    ids = torch.randint(8, 200, (1, 7))
    assert torch.allclose(wrapped(input_ids=ids).logits, merged(ids).logits, atol=1e-5)
    weights = load_file(adapter / "adapter_model.safetensors")
    name = "layers.0.self_attn.q_proj"
    a, b = (weights[f"base_model.model.model.{name}.lora_{x}.weight"] for x in "AB")
    assert float(b.abs().max()) > 0
    before = load_file(base / "model.safetensors")[f"model.{name}.weight"]
    torch.testing.assert_close(merged.state_dict()[f"model.{name}.weight"], before + 8.0 / 4 * b @ a)


def test_loaded_merged_and_exported_are_one_model(adapter: Path, base: Path, tmp_path: Path, capsys):
    loaded = clip(base, lora=adapter)
    assert not np.array_equal(loaded, clip(base))
    for source, name in ((adapter, "a"), (adapter.parent, "b")):
        merge = [] if source == adapter else ["--merge", "--dtype", "float32"]
        assert main(["export", str(source), "--out", str(tmp_path / name), *merge]) == 0, capsys.readouterr().err
        assert np.array_equal(clip(tmp_path / name), loaded)
        assert json.loads((tmp_path / name / "training.json").read_text())["base"] == str(base)
    assert main(["export", str(adapter.parent), "--out", str(tmp_path / "c")]) == 0
    assert "adapter of step 5, averaged weights, float32" in capsys.readouterr().out
    assert np.array_equal(clip(base, lora=tmp_path / "c"), loaded)


def test_generate_takes_an_adapter(adapter: Path, base: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shape = ["--num-frames", "5", "--height", "32", "--width", "32", "--num-inference-steps", "2", "--seed", "1"]
    command = ["generate", "--model", str(base), "--prompt", "a red circle", *shape]
    assert main([*command, "--lora", str(adapter), "--output", "a.webp"]) == 0
    assert json.loads(Path("a.webp.json").read_text())["lora"] == str(adapter)
    assert main([*command, "--lora", str(base), "--output", "b.webp"]) == 2
    assert "is no adapter folder: it has no adapter_config.json" in capsys.readouterr().err
    assert not Path("b.webp").exists()


def spoil(folder: Path, name: str, change) -> None:
    path = folder / name
    if name.endswith(".json"):
        tree = json.loads(path.read_text())
        change(tree)
        path.write_text(json.dumps(tree))
    else:
        weights = load_file(path)
        change(weights)
        save_file(weights, path)


@pytest.mark.parametrize(("name", "change", "words"), [
    ("lumos_adapter.json", lambda t: t["tokenizers"].update(text="x"), "trained with another text tokenizer"),
    ("lumos_adapter.json", lambda t: t["tokenizers"].update(video="x"), "trained with another video tokenizer"),
    ("lumos_adapter.json", lambda t: t.pop("base"), r"lumos_adapter\.json is damaged"),
    ("adapter_config.json", lambda t: t.update(peft_type="IA3"), "type IA3; allowed: LORA"),
    ("adapter_config.json", lambda t: t.update(target_modules=["nothing"]), "does not fit this model"),
    ("adapter_config.json", lambda t: t.update(r=2), r"is for another model: .*lora_A.* has shape \(4, "),
    ("adapter_model.safetensors", lambda w: w.popitem(), "is for another model: .* has shape None"),
])  # fmt: skip
def test_adapters_that_do_not_fit(adapter: Path, base: Path, tmp_path: Path, name: str, change, words: str):
    shutil.copytree(adapter, tmp_path / "spoiled")
    spoil(tmp_path / "spoiled", name, change)
    with pytest.raises(UserError, match=words):
        LumosPipeline.from_pretrained(base, lora=tmp_path / "spoiled")


def test_an_adapter_of_another_base_model(adapter: Path, base: Path, tmp_path: Path):
    """A model of the same shape with other weights is refused; the same weights in bfloat16 are the same model."""
    shutil.copytree(base, tmp_path / "other")
    spoil(tmp_path / "other", "model.safetensors", lambda w: w["model.layers.1.mlp.up_proj.weight"].mul_(1.05))
    with pytest.raises(UserError, match=rf"another base model, {base} \(model\.layers\.1\.mlp\.up_proj\.weight differs.*--model"):
        LumosPipeline.from_pretrained(tmp_path / "other", lora=adapter)
    LumosPipeline.from_pretrained(base, lora=adapter, dtype=torch.bfloat16)
    shutil.copytree(adapter, tmp_path / "foreign")
    (tmp_path / "foreign" / "lumos_adapter.json").unlink()
    with pytest.warns(UserWarning, match=r"no lumos_adapter\.json"):
        LumosPipeline.from_pretrained(tmp_path / "other", lora=tmp_path / "foreign")
    (tmp_path / "foreign" / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="cannot be read"), pytest.warns(UserWarning, match="no lumos_adapter"):
        LumosPipeline.from_pretrained(base, lora=tmp_path / "foreign")


def test_a_run_goes_on_only_with_its_base_and_its_rank(tuning, base: Path, tmp_path: Path):
    train(tuning(training={"max_steps": 1}))
    with pytest.raises(UserError, match=r"lora\.rank was 4, now 8"):
        train(tuning({"rank": 8}, training={"max_steps": 2}))
    shutil.copytree(base, tmp_path / "other")
    spoil(tmp_path / "other", "model.safetensors", lambda w: w["lm_head.weight"].add_(0.1))
    settings = tuning(training={"max_steps": 2})
    settings.model.from_ = str(tmp_path / "other")
    with pytest.raises(UserError, match=r"model\.from \(sha256 of a sample\) was"):
        train(settings)


@pytest.mark.parametrize("kind", ["video", "text"])
def test_other_tokenizers_than_those_of_the_base_model(tuning, base: Path, tmp_path: Path, kind: str):
    """A tokenizer of the right size with other weights is refused; a copy of the right one is accepted."""
    shutil.copytree(base / f"{kind}_tokenizer", tmp_path / kind)
    settings = tuning()
    setattr(settings.tokenizer, kind, str(tmp_path / kind))
    ArdfTask(settings, CPU)
    if kind == "video":
        spoil(tmp_path / kind, "model.safetensors", lambda w: next(iter(w.values())).add_(0.1))
    else:
        symbols = [f"<special{i}>" for i in range(1, 255)]
        TextTokenizer.train(captions(1, 300), 900, reserved_symbols=symbols).save_pretrained(tmp_path / kind)
    with pytest.raises(UserError, match=rf"tokenizer\.{kind} .* is another tokenizer than .*leave tokenizer\.{kind} out"):
        ArdfTask(settings, CPU)


def test_a_text_tokenizer_that_uses_the_models_own_ids(micro_settings, tmp_path: Path):
    TextTokenizer.train(captions(0, 200), 600, reserved_symbols=["<one>"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"the text tokenizer uses id .* for text, the model for itself"):
        ArdfTask(micro_settings(tokenizer={"text": str(tmp_path)}), CPU)


@pytest.mark.slow
def test_without_peft(adapter: Path, base: Path, tmp_path: Path, forks: Forks):
    """Without peft, everything except adapters works, and the error for adapters names the extra."""
    code = (
        "import sys; assert 'peft' not in sys.modules; sys.modules['peft'] = None\n"
        "from lumos.cli import main\n"
        f"command = ['generate', '--model', {str(base)!r}, '--prompt', 'x', '--num-inference-steps', '1', '--num-frames', '1',"
        f" '--height', '32', '--width', '32', '--output', {str(tmp_path / 'x.png')!r}]\n"
        f"sys.exit(10 * main(command) + main([*command, '--lora', {str(adapter)!r}]))"
    )
    done = forks.run(["-c", code])
    assert done.returncode == 2, done.stderr
    assert "pip install 'lumos-video[lora]'" in done.stderr

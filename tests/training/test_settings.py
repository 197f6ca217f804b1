from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumos.errors import UserError
from lumos.settings import describe
from lumos.training.settings import TrainingSettings, build_settings, load_settings

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(path for generator in ("lumos1", "stiv") for path in (FOLDER / generator).glob("*.yaml"))
SMALL = {"model": {"preset": "tiny"}}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text("model: {preset: tiny}\ntraining: {lr: 1e-3, max_steps: 500}\n")
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_load_and_round_trip(path: Path):
    settings = load_settings(path)
    assert settings.name == path.stem
    assert build_settings(settings.to_dict()) == settings
    assert json.loads(json.dumps(settings.to_dict())) == settings.to_dict()  # a resumed run is compared with the JSON of its log


def test_overrides_apply_in_order_and_by_type(config: Path):
    settings = load_settings(
        config,
        ["training.max_steps=200", "training.max_steps=300", "model.overrides.hidden_size=64", "training.betas=[0.8, 0.9]",
         "data.stages=[{steps: 10, image_share: 1}, {image_share: 0.5}]", "training.eps=1e-6"],
    )  # fmt: skip
    assert settings.training.lr == 1e-3  # YAML 1.1 reads 1e-3 as text
    assert settings.training.max_steps == 300
    assert settings.model.overrides == {"hidden_size": 64}
    assert settings.training.betas == (0.8, 0.9)
    assert [stage.steps for stage in settings.data.stages] == [10, None]
    assert settings.training.eps == 1e-6
    assert settings.output_dir == Path("runs/small")


def test_every_engine_has_the_same_default_folder(config: Path, monkeypatch):
    """The default folder is the same, because each engine reads the checkpoints of all others."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert load_settings(config, ["deepspeed.zero_stage=1"]).output_dir == Path("runs/small")
    assert load_settings(config, ["training.output_dir=mine"]).output_dir == Path("mine")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.max_step=5", ["training.max_step", "did you mean max_steps?", "batch_size"]),
        ("trainings.max_steps=5", ["trainings", "did you mean training?"]),
        ("training.max_steps=many", ["training.max_steps", "a whole number", "'many'"]),
        ("training.max_steps=2.5", ["a whole number", "2.5"]),
        ("training.max_steps=true", ["a whole number"]),
        ("training.max_steps=0", ["training.max_steps", "between 1 and"]),
        ("training.lr=fast", ["a number"]),
        ("training.lr=.nan", ["training.lr", "finite"]),
        ("training.betas=[0.9]", ["training.betas", "2 values"]),
        ("training.activation_checkpointing=1", ["true or false"]),
        ("training.attention=flash", ["training.attention", "'flash'", "null, segmented, dense, flex"]),
        ("data.pad_to=0", ["data.pad_to", "between 1 and"]),
        ("data.processes=-1", ["data.processes", "between 0 and 256"]),
        ("training.schedule=linear", ["constant, cosine, wsd"]),
        ("masking.min_ratio=1.5", ["between 0 and 1"]),
        ("data.stages=[{image_shares: 1}]", ["data.stages[0].image_shares", "image_share"]),
        ("data.stages=[{image_share: 1}, {steps: 5}]", ["data.stages[0].steps"]),
        ("data.stages=[{image_batch_size: 8}]", ["no effect"]),
        ("data.stages=[{short_share: 0.5}]", ["short_share has no effect without first_frames"]),
        ("data.stages=[{first_frames: 5, image_share: 1}]", ["first_frames has no effect", "no short steps"]),
        ("data.stages=[{first_frames: 5, short_share: 0}]", ["first_frames has no effect", "no short steps"]),
        ("data.stages=[{first_frames: 17}]", ["first_frames is 17", "less than data.num_frames 17"]),
        ("training.min_lr=1", ["min_lr", "at most lr"]),
        ("training.decay_steps=5", ["wsd"]),
        ("training.ema_decay=1", ["0.999"]),
        ("training.keep_every=10", ["training.keep_every is 10", "multiple of training.save_every_steps", "is 0"]),
        ("training.seed=-1", ["training.seed is -1; it must be between 0 and 4294967295"]),
        ("training.seed=4294967296", ["training.seed is 4294967296; it must be between 0 and 4294967295"]),
        ("training.skip_not_finite=-1", ["training.skip_not_finite", "between 0 and"]),
        ("deepspeed.timeout_minutes=0", ["timeout_minutes is 0", "above 0"]),
        ("lora.rank=0", ["lora.rank", "between 1 and"]),
        ("lora.rank=8", ["lora.rank needs model.from"]),
        ("lora.alpha=8", ["lora.alpha has no effect without lora.rank"]),
        ("model.preset=null", ["model.preset", "model.from"]),
        ("data.size=256p", ["data.size has no effect with data.source=worlds"]),
        ("deepspeed.config=nowhere.json", ["nowhere.json"]),
        ("logging.to=[tensorboards]", ["logging.to", "'tensorboards'", "tensorboard, wandb, trackio"]),
        ("logging.to=tensorboard", ["logging.to", "a list"]),
        ("logging.to=[wandb, wandb]", ["names a dashboard twice", "wandb"]),
        ("logging.peak_tflops=0", ["logging.peak_tflops"]),
        ("samples.every=5", ["samples.prompts is empty", "at least one prompt"]),
        ("samples.prompts=[\"a \\u001b[31mcat\"]", ["samples.prompts", "has U+001B"]),
        ("samples.prompts=[\"\\u200b\"]", ["the empty prompt"]),
        ("samples={every: 5, prompts: ['']}", ["empty prompt"]),
        ("samples={every: 5, prompts: [a], options: {steps: 3}}", ["samples.options", "steps", "num_inference_steps"]),
        ("samples={every: 5, prompts: [a], options: {num_inference_steps: 0}}", ["num_inference_steps 0", "1 to 1000"]),
        ("samples.max_seconds=5000", ["between 1 and 1200"]),
        ("max_steps", ["section.key=value"]),
        ("name.x=1", ["name"]),
        ("training=5", ["section with keys"]),
        ("training.lr=[", ["not valid YAML"]),
    ],
)
def test_wrong_settings_say_what_is_wrong_and_allowed(config: Path, override: str, words: list[str]):
    with pytest.raises(UserError) as error:
        load_settings(config, [override])
    message = str(error.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(("section", "said"), [
    ({"flow": {"shift": 0}}, "flow.shift is 0.0; it must be a finite number above 0, at most 1000"),
    ({"given_noise": 1}, "given_noise is 1.0; it must be a finite number of 0 or more, below 1"),
    ({"training": {"lr": -1}}, "training.lr is -1.0; it must be a finite number of 0 or more, at most 1.8e+308"),
    ({"dropout": {"text": 1.5}}, "dropout.text is 1.5; it must be between 0 and 1"),
])  # fmt: skip
def test_a_number_out_of_its_range_is_told_the_range(section: dict, said: str):
    with pytest.raises(UserError) as error:
        build_settings({"generator": "stiv", "model": {"preset": "stiv-nano"}, **section})
    assert str(error.value) == said


def test_lora_settings():
    def lora(**values) -> TrainingSettings:
        return build_settings({"model": {"from": "x"}, "lora": {"rank": 4, **values}})

    assert lora().lora.targets == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for values, words in (
        ({"targets": ["q_proj", "qproj"]}, "lora.targets has 'qproj'; allowed: q_proj, k_proj"),
        ({"targets": []}, "must not be empty"),
        ({"dropout": 1.0}, "below 1"),
        ({"rang": 4}, "did you mean rank"),
    ):
        with pytest.raises(UserError, match=words):
            lora(**values)


def test_samples_take_less_time_than_processes_wait(config: Path):
    overrides = ["samples={every: 5, prompts: [a], max_seconds: 900}", "deepspeed.timeout_minutes=15"]
    with pytest.raises(UserError, match=r"samples\.max_seconds is 900.*only 15\.0 minutes.*raise deepspeed\.timeout_minutes"):
        load_settings(config, overrides)


def test_prompts_that_are_never_drawn_are_warned_of(config: Path):
    with pytest.warns(UserWarning, match=r"samples\.prompts has no effect with samples\.every=0"):
        load_settings(config, ["samples.prompts=[a circle]"])


def test_samples_have_no_given_frames(config: Path):
    with pytest.warns(UserWarning, match=r"samples\.options\.image_guidance_scale has no effect on samples"):
        load_settings(config, ["samples={every: 5, prompts: [a], options: {image_guidance_scale: 0.0}}"])


def test_files_that_are_no_config(tmp_path: Path):
    with pytest.raises(UserError, match=r"no config file.*configs/"):
        load_settings(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    for text in ("a: [1", "- 1\n- 2", "\x00"):
        bad.write_text(text)
        with pytest.raises(UserError, match=r"bad\.yaml"):
            load_settings(bad)


@given(st.text(min_size=1, max_size=20))
def test_any_unknown_key_is_refused(key: str):
    known = {name.partition(".")[2].partition(".")[0] for name, _, _ in describe(TrainingSettings) if name.startswith("training.")}
    if key not in known:
        with pytest.raises(UserError, match="unknown key"):
            build_settings({**SMALL, "training": {key: 1}})


def test_every_setting_has_a_meaning():
    entries = list(describe(TrainingSettings))
    assert len({key for key, _, _ in entries}) == len(entries) > 40
    assert all(len(meaning) > 10 for _, _, meaning in entries if _)


def test_a_warm_up_longer_than_the_run_is_said():
    raw = {**SMALL, "training": {"max_steps": 20, "warmup_steps": 40, "lr": 1e-3}}
    with pytest.warns(UserWarning, match=r"warmup_steps 40 is above .*max_steps 20: .* rises to 5.0e-04 only, not to .* 0.001"):
        build_settings(raw)
    raw["training"]["warmup_steps"] = 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_settings(raw)

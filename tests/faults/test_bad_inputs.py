"""Bad inputs to all verbs: each ends in one line that says what is wrong, and leaves nothing behind."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lumos.cli import VERBS, main

DEEP = "[" * 100_000
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)
TRAIN = "model: {preset: tiny}\ndata: {source: worlds}\n"
TEXTS = {
    "bomb.yaml": BOMB, "deep.yaml": DEEP, "list.yaml": "[1, 2]", "number.yaml": "7", "latin.yaml": b"a: \xff", "good.yaml": TRAIN,
    "long.yaml": "# " + "x" * 2**21, "odd.yaml": "? {a: 1}\n: 2\n", "tabs.yaml": "a:\n\t- b", "key.yaml": f"{'k' * 5000}: 1",
    "control.yaml": '"\\e[2Jname": 1', "variants.yaml": f"prompts: []\nvariants: {{{'v' * 300}: {{}}}}",
    "deep.json": DEEP, "null.json": "null", "list.json": "[1]", "digits.json": '{"a": ' + "9" * 5000 + "}", "cut.json": '{"a": ',
    "deep.jsonl": DEEP, "log.jsonl": '{"step": "x"}\n', "number.jsonl": "5\n", "empty.txt": "", "latin.txt": b"\xff\xe9\x00",
    "control.csv": "prompt,\x1b[31mred\nx,1\n", "nan.jsonl": '{"step": 1, "loss": "x"}\n', "scores.json": '{"color": []}',
    "prompts.json": '[{"prompt_en": 5, "dimension": []}]', "report.json": "{}", "sound.mp4": b"no clip",
}  # fmt: skip
CONFIGS = {
    "wide": {"hidden_size": 10**9}, "tall": {"num_hidden_layers": 10**6}, "text": {"hidden_size": "x" * 5000},
    "nan": {"rope_theta": float("nan")},
    "list": {"vocab_size": [1]}, "labels": {"num_labels": 10**9}, "filled": {"prompt_template": "{prompt:>1000000000}"},
    "other": {"position_scheme": "\x1b[2J"}, "grid": {"position_strides": [10**30, 1, 1]}, "frog": {"dtype": "frog"},
}  # fmt: skip


def folder_with(model: Path, place: Path, **texts: str) -> None:
    """Copy a model folder and change the content of the named files; in names, `__` stands for `/` and `_dot_` for `.`."""
    for path in (path for path in model.rglob("*") if path.is_file()):
        target = place / path.relative_to(model)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    for name, text in texts.items():
        target = place / name.replace("__", "/").replace("_dot_", ".")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.fixture(scope="module")
def inputs(micro_folder, tmp_path_factory) -> Path:
    """Make all files that the commands below name, outside of the folder where they run."""
    place = tmp_path_factory.mktemp("inputs")
    for name, text in TEXTS.items():
        (place / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    whole = json.loads((micro_folder / "config.json").read_text())
    for name, change in CONFIGS.items():
        folder_with(micro_folder, place / name, config_dot_json=json.dumps({**whole, **change}))
    tokenizer = json.loads((micro_folder / "video_tokenizer" / "config.json").read_text())
    for name, change in {"levels": {"levels": [10**6] * 3}, "window": {"attention_window": "x"}}.items():
        folder_with(micro_folder, place / name, video_tokenizer__config_dot_json=json.dumps({**tokenizer, **change}))
    folder_with(micro_folder, place / "deep", config_dot_json=DEEP)
    folder_with(micro_folder, place / "null", config_dot_json="null")
    folder_with(micro_folder, place / "video-list", video_tokenizer__config_dot_json="[1]")
    folder_with(micro_folder, place / "video-deep", video_tokenizer__config_dot_json=DEEP)
    folder_with(micro_folder, place / "defaults-null", pipeline_dot_json="null")
    folder_with(micro_folder, place / "defaults-steps", pipeline_dot_json='{"num_inference_steps": null}')
    folder_with(micro_folder, place / "defaults-size", pipeline_dot_json='{"height": 1000000000}')
    folder_with(micro_folder, place / "header", model_dot_safetensors=struct.pack("<Q", 2**60) + b"{}")
    folder_with(micro_folder, place / "index", model_dot_safetensors_dot_index_dot_json=DEEP)
    folder_with(micro_folder, place / "resized", training_dot_json="[]")
    folder_with(micro_folder, place / "adapter", adapter_config_dot_json="5")
    folder_with(micro_folder, place / "rank", adapter_config_dot_json='{"peft_type": "LORA", "r": 1000000000}')
    folder_with(micro_folder, place / "text-deep", text_tokenizer__tokenizer_dot_json=DEEP, text_tokenizer__tokenizer_dot_model="x")
    folder_with(micro_folder, place / "shards", dataset_dot_json=DEEP)
    weights = load_file(micro_folder / "model.safetensors")
    weights["lm_head.weight"] = torch.full_like(weights["lm_head.weight"], torch.nan)
    folder_with(micro_folder, place / "not-finite", model_dot_safetensors=b"")
    save_file(weights, place / "not-finite" / "model.safetensors", metadata={"format": "pt"})
    (place / "micro").symlink_to(micro_folder)
    return place


ROWS = [
    ("nothing", 2, "unknown verb 'nothing'; known verbs: generate, info, demo, serve, render, ingest, inspect, plan,"),
    ("generate", 2, "one of the arguments --prompt --prompts is required; `lumos generate --help` lists the options"),
    ("generate --model nowhere --prompt x", 2, "there is no model folder nowhere; give the folder of a saved or released model"),
    (
        "generate --model {inputs}/wide --prompt x",
        2,
        "{inputs}/wide/config.json: hidden_size 1000000000 is not allowed; give a whole number from 1 to 131,072",
    ),
    (
        "generate --model {inputs}/tall --prompt x",
        2,
        "{inputs}/tall/config.json: num_hidden_layers 1000000 is not allowed; give a whole number from 1 to 2,048",
    ),
    ("generate --model {inputs}/text --prompt x", 2, "{inputs}/text/config.json: hidden_size"),
    (
        "generate --model {inputs}/nan --prompt x",
        2,
        "{inputs}/nan/config.json: rope_theta nan is not allowed; give a number above 0, at most 1e+15",
    ),
    (
        "generate --model {inputs}/list --prompt x",
        2,
        "{inputs}/list/config.json: vocab_size [1] is not allowed; give a whole number from 1 to 16,777,216",
    ),
    (
        "generate --model {inputs}/labels --prompt x",
        2,
        "{inputs}/labels/config.json: more than 1,000 unknown fields, or num_labels over 1,000: that is no config",
    ),
    (
        "generate --model {inputs}/filled --prompt x",
        2,
        "{inputs}/filled/config.json: prompt_template '{{prompt:>1000000000}}' is not usable (it asks for 'prompt',",
    ),
    (
        "generate --model {inputs}/other --prompt x",
        2,
        "{inputs}/other/config.json: position_scheme '\\x1b[2J' is unknown; allowed: mm_rope, mm_rope_unscaled,",
    ),
    (
        "generate --model {inputs}/grid --prompt x",
        2,
        "{inputs}/grid/config.json: position_strides [1000000000000000000000000000000, 1, 1] is not allowed; give",
    ),
    (
        "generate --model {inputs}/frog --prompt x",
        2,
        "{inputs}/frog/config.json is damaged (module 'torch' has no attribute 'frog'); download or copy it again",
    ),
    (
        "generate --model {inputs}/deep --prompt x",
        2,
        "{inputs}/deep/config.json is not valid JSON: it is nested too deeply",
    ),
    (
        "generate --model {inputs}/null --prompt x",
        2,
        "{inputs}/null/config.json is damaged ({inputs}/null/config.json holds None; a model's config is a JSON object of",
    ),
    (
        "generate --model {inputs}/levels --prompt x",
        2,
        "{inputs}/levels/video_tokenizer/config.json: levels (1000000, 1000000, 1000000) is not possible: allowed",
    ),
    (
        "generate --model {inputs}/window --prompt x",
        2,
        "{inputs}/window/video_tokenizer/config.json: attention_window 'x' is not possible: allowed is a whole",
    ),
    (
        "generate --model {inputs}/video-list --prompt x",
        2,
        "{inputs}/video-list/video_tokenizer/config.json holds [1]; it must hold a JSON object with the settings of",
    ),
    (
        "generate --model {inputs}/video-deep --prompt x",
        1,
        "{inputs}/video-deep/video_tokenizer/config.json is not valid JSON: it is nested too deeply; copy it again",
    ),
    (
        "generate --model {inputs}/defaults-null --prompt x",
        2,
        "{inputs}/defaults-null/pipeline.json must hold a JSON object of settings, not a NoneType",
    ),
    (
        "generate --model {inputs}/defaults-steps --prompt x",
        2,
        "{inputs}/defaults-steps/pipeline.json: num_inference_steps None is not allowed; give a whole number",
    ),
    (
        "generate --model {inputs}/defaults-size --prompt x",
        2,
        "{inputs}/defaults-size/pipeline.json: height 1000000000 is not allowed; give a whole number of at least 1,",
    ),
    (
        "generate --model {inputs}/header --prompt x",
        2,
        "{inputs}/header/model.safetensors is damaged or no safetensors file (Error while deserializing header:",
    ),
    (
        "generate --model {inputs}/index --prompt x",
        2,
        "{inputs}/index/model.safetensors.index.json is damaged ({inputs}/index/model.safetensors.index.json is not valid",
    ),
    (
        "generate --model {inputs}/text-deep --prompt x",
        2,
        "{inputs}/text-deep/text_tokenizer/tokenizer.json: the file is not valid JSON: it is nested too deeply",
    ),
    (
        "generate --model {inputs}/micro --lora {inputs}/adapter --prompt x",
        2,
        "{inputs}/adapter/adapter_config.json holds 5; an adapter's config is a JSON object",
    ),
    (
        "generate --model {inputs}/micro --lora {inputs}/rank --prompt x",
        2,
        "{inputs}/rank/adapter_config.json has the rank r 1000000000; allowed: 1 to 65,536",
    ),
    (
        "generate --model {inputs}/not-finite --prompt x",
        1,
        "the model's numbers are not finite (NaN or infinity) where codes are drawn; check the weights and",
    ),
    (
        "generate --model {inputs}/micro --prompt x --num-frames 1000000001",
        2,
        "num_frames 1000000001 is not allowed; give a whole number of at least 1, at most 1,000,000",
    ),
    (
        "generate --model {inputs}/micro --prompt x --height 1000000000",
        2,
        "height 1000000000 is not allowed; give a whole number of at least 1, at most 16,384",
    ),
    ("generate --model {inputs}/micro --prompt x --top-k 1000000000", 2, "top_k 1000000000 is not allowed; give 1 to 16,777,216"),
    (
        "generate --model {inputs}/micro --prompt x --seed 99999999999999999999999",
        2,
        "seed 99999999999999999999999 is not allowed; give a whole number from 0 to 18446744073709551615",
    ),
    (
        "generate --model {inputs}/micro --prompt x --batch-size 1000000000 --seed 1 2",
        2,
        "--batch-size 1000000000 is not allowed; give at most 131,072",
    ),
    (
        "generate --model {inputs}/micro --prompt x --image {inputs}/empty.txt",
        2,
        "cannot read the picture {inputs}/empty.txt (cannot identify image file '{inputs}/empty.txt'): it is damaged, cut",
    ),
    (
        "generate --model {inputs}/micro --prompt x --video {inputs}/sound.mp4",
        2,
        "cannot read the video {inputs}/sound.mp4 (Invalid data found when processing input): it is damaged, cut",
    ),
    ("generate --model {inputs}/micro --prompts {inputs}/deep.jsonl", 2, "the row is not valid JSON: it is nested too deeply"),
    (
        "generate --model {inputs}/micro --prompts {inputs}/latin.txt",
        2,
        "cannot read {inputs}/latin.txt as a list of prompts: 'utf-8' codec can't decode byte 0xff in position 0:",
    ),
    ("generate --model {inputs}/micro --prompts {inputs}/empty.txt", 2, "{inputs}/empty.txt holds no prompts"),
    ("demo --port x", 2, "argument --port: invalid int value: 'x'; `lumos demo --help` lists the options"),
    ("demo --examples nowhere.txt", 2, "cannot read nowhere.txt as examples, one prompt a line: there is no such file"),
    (
        "demo --examples {inputs}/latin.txt",
        2,
        "cannot read {inputs}/latin.txt as examples, one prompt a line: 'utf-8' codec can't decode byte 0xff in",
    ),
    ("render --out clips --count 1000000000", 2, "--count 1000000000 is not allowed; give at most 1,000,000"),
    (
        "render --out clips --count 1000000 --num-frames 1001 --height 1024 --width 1024",
        2,
        "1,000,000 clips of 1001 frames of 1024x1024 pixels",
    ),
    ("render --out {inputs}", 2, "{inputs} exists already; name another --out, or move it away"),
    (
        "ingest nowhere --out shards --tokenizer {inputs}/micro",
        2,
        "there is no source nowhere; give a folder, a manifest (csv, jsonl, parquet), a tar or a media file",
    ),
    (
        "ingest {inputs}/deep.json --out shards --tokenizer {inputs}/micro",
        2,
        "{inputs}/deep.json is not a known kind of source; allowed: a folder, .csv .tsv .jsonl .ndjson .parquet, .tar,",
    ),
    ("inspect nowhere", 2, "nowhere holds no ingested clips (no dataset.json); make them with `python -m lumos ingest`"),
    ("plan --config {inputs}/good.yaml --gpus 1000000000", 2, "--gpus 1000000000 is not allowed; give at most 1,000,000"),
    (
        "plan --config {inputs}/bomb.yaml --gpus 1",
        2,
        "{inputs}/bomb.yaml is not valid YAML here: it stands for more than 1,048,576",
    ),
    (
        "plan --generate --model {inputs}/wide",
        2,
        "{inputs}/wide/config.json: hidden_size 1000000000 is not allowed; give a whole number from 1 to 131,072",
    ),
    (
        "plan --generate --preset 3b --height 1000000000",
        2,
        "height 1000000000 is not allowed; give a whole number of at least 1, at most 16,384",
    ),
    (
        "plan --config {inputs}/good.yaml --gpus 8 training.batch_size=1000000000",
        2,
        "training.batch_size is 1000000000; it must be between 1 and 131072",
    ),
    ("train --config nowhere.yaml", 2, "there is no config file nowhere.yaml; the shipped ones are in configs/"),
    (
        "train --config {inputs}/bomb.yaml",
        2,
        "{inputs}/bomb.yaml is not valid YAML here: it stands for more than 1,048,576",
    ),
    ("train --config {inputs}/deep.yaml", 2, "{inputs}/deep.yaml is not valid YAML: it is nested too deeply"),
    ("train --config {inputs}/list.yaml", 2, "{inputs}/list.yaml must hold sections such as model, data, training, not a list"),
    ("train --config {inputs}/number.yaml", 2, "{inputs}/number.yaml must hold sections such as model, data, training, not a int"),
    (
        "train --config {inputs}/latin.yaml",
        2,
        "cannot read {inputs}/latin.yaml as a config in YAML: 'utf-8' codec can't decode byte 0xff in position 3:",
    ),
    (
        "train --config {inputs}/long.yaml",
        2,
        "{inputs}/long.yaml is not valid YAML: it has more than the 1,048,576 characters that are allowed",
    ),
    (
        "train --config {inputs}/tabs.yaml",
        2,
        "{inputs}/tabs.yaml is not valid YAML: while scanning for the next token found character '\\t' that cannot",
    ),
    (
        "train --config {inputs}/control.yaml",
        2,
        "unknown key \\x1b[2Jname; allowed in a config: name, generator, model, lora, tokenizer, data, training,",
    ),
    (
        "train --config {inputs}/good.yaml training.batch_size=1000000000",
        2,
        "training.batch_size is 1000000000; it must be between 1 and 131072",
    ),
    ("train --config {inputs}/good.yaml data.processes=1000000", 2, "data.processes is 1000000; it must be between 0 and 256"),
    ("train --config {inputs}/good.yaml data.height=1000000000", 2, "data.height is 1000000000; it must be between 1 and 16384"),
    (
        "train --config {inputs}/good.yaml model.overrides.hidden_size=1000000000",
        2,
        "model: hidden_size 1000000000 is not allowed; give a whole number from 1 to 131,072",
    ),
    (
        "train --config {inputs}/good.yaml deepspeed.config={inputs}/list.json",
        2,
        "deepspeed.config {inputs}/list.json must hold keys with values, and so must its zero_optimization",
    ),
    ("export nowhere --out exported", 2, "nowhere is no run, checkpoint or adapter folder; give a run's folder or one of its"),
    (
        "export {inputs}/micro --out exported",
        2,
        "{inputs}/micro is no run, checkpoint or adapter folder; give a run's folder or one of its",
    ),
    (
        "resize {inputs}/resized --out big",
        2,
        "{inputs}/resized/training.json must hold a JSON object, with a list if it has 'resized'; mend it or take",
    ),
    (
        "resize {inputs}/wide --out big",
        2,
        "{inputs}/wide/config.json: hidden_size 1000000000 is not allowed; give a whole number from 1 to 131,072",
    ),
    (
        "convert --lumos {inputs}/deep --cosmos {inputs}/micro --out made",
        2,
        "{inputs}/deep/config.json is damaged ({inputs}/deep/config.json is not valid JSON: it is nested too deeply);",
    ),
    ("convert --lumos nowhere --cosmos {inputs} --out made", 2, "there is no folder nowhere; give the released decoder's"),
    (
        "train-tokenizer --config {inputs}/bomb.yaml",
        2,
        "{inputs}/bomb.yaml is not valid YAML here: it stands for more than 1,048,576",
    ),
    ("train-tokenizer --config {inputs}/list.yaml", 2, "{inputs}/list.yaml must hold sections such as model, data"),
    ("train-tokenizer --config {inputs}/deep.yaml", 2, "{inputs}/deep.yaml is not valid YAML: it is nested too deeply"),
    (
        "train-text-tokenizer --captions nowhere.txt --out text",
        2,
        "cannot read nowhere.txt as captions, one a line: there is no such file",
    ),
    (
        "train-text-tokenizer --captions {inputs}/latin.txt --out text",
        2,
        "cannot read {inputs}/latin.txt as captions, one a line: 'utf-8' codec can't decode byte 0xff in position",
    ),
    ("train-text-tokenizer --reserved 1000000000 --out text", 2, "--reserved 1000000000 is not allowed; give at most 1,048,576"),
    (
        "train-text-tokenizer --worlds 1000000000000 --out text",
        2,
        "--worlds 1000000000000 is not allowed; give at most 10,000,000",
    ),
    ("compress diffusers --model nowhere --plan vdmini --dry-run", 2, "nowhere has no config.json; give the folder of a U-Net or"),
    ("compress diffusers --model {inputs}/deep --plan vdmini --dry-run", 2, "{inputs}/deep/config.json is not valid JSON"),
    ("compress diffusers --model {inputs}/list --plan vdmini --out x", 2, "{inputs}/list holds no model of diffusers; supported: "),
    ("compress score --model nowhere", 2, "there is no model folder nowhere; give the folder of a saved or released model"),
    ("compress score --model {inputs}/micro --clips 1000000000", 2, "--clips 1000000000 is not allowed; give at most 1,000,000"),
    ("compress prune --model {inputs}/micro --keep 0 --dry-run", 2, "--keep 0 is not allowed; there are 2 units (0, 1): give 1"),
    ("compress prune --model {inputs}/wide --keep 1 --out x", 2, "{inputs}/wide/config.json: hidden_size 1000000000 is not"),
    ("compress prune --model {inputs}/micro --plan {inputs}/deep.json --out x", 2, "{inputs}/deep.json is not valid JSON: it is"),
    ("compress prune --model {inputs}/micro --plan {inputs}/list.json --out x", 2, "{inputs}/list.json is no plan; it must be a"),
    ("plot nowhere --out curves.png", 2, "there is no log nowhere; give the folder of a run, such as runs/tiny"),
    ("plot {inputs}/log.jsonl --out curves.png", 2, "{inputs}/log.jsonl is no log of a run: {{'step': 'x'}} has no step"),
    ("plot {inputs}/nan.jsonl --out curves.png", 2, "{inputs}/nan.jsonl: loss of step 1 is no number: 'x'"),
    ("plot {inputs}/log.jsonl --out curves.exe", 2, "--out curves.exe has no suffix of .png, .svg, .pdf"),
    ("evaluate", 2, "the following arguments are required: geneval|loss|prompts|tokenizer|vbench|vbench-i2v|views; `lumos"),
    ("evaluate loss --model {inputs}/micro --count 1000000000", 2, "--count 1000000000 is not allowed; give at most 1,000,000"),
    ("evaluate loss --model {inputs}/micro --bins 101", 2, "--bins 101 is not allowed; give at most 100"),
    ("evaluate prompts --model {inputs}/micro --count 1000000000", 2, "--count 1000000000 is not allowed; give at most 1,000,000"),
    (
        "evaluate tokenizer --tokenizer {inputs}/levels --data worlds",
        2,
        "{inputs}/levels/video_tokenizer/config.json: levels (1000000, 1000000, 1000000) is not possible: allowed",
    ),
    ("evaluate vbench --aggregate {inputs}/deep.json", 2, "{inputs}/deep.json is not valid JSON: it is nested too deeply"),
    (
        "evaluate vbench --aggregate {inputs}/scores.json",
        2,
        "{inputs}/scores.json is no result of VBench: color is [], not [score, details]",
    ),
    (
        "evaluate geneval --aggregate {inputs}/number.jsonl",
        2,
        "entry 0 of {inputs}/number.jsonl has no tag; it must be a list of objects with tag, prompt, correct",
    ),
    (
        "evaluate vbench --prompts {inputs}/prompts.json --out made",
        2,
        "entry 0 of the prompt list has no prompt_en; it must be a list of objects with prompt_en, dimension",
    ),
    ("experiment {inputs}/bomb.yaml", 2, "{inputs}/bomb.yaml is not valid YAML here: it stands for more than 1,048,576"),
    ("experiment {inputs}/variants.yaml", 2, "variant"),
    ("experiment {inputs}/list.yaml --parallel 100000", 2, "--parallel 100000 is not allowed; give at most 1,024"),
    ("finetune {inputs}/nowhere --out x", 2, "there is no source {inputs}/nowhere; give a folder, a manifest (csv, jsonl, parquet"),
    ("finetune {inputs} --out x --steps 1000000000000", 2, "--steps 1000000000000 is not allowed; give at most 100,000,000"),
    ("info {inputs}/nowhere", 2, "there is no model folder {inputs}/nowhere"),
    ("serve --model {inputs}/nowhere", 2, "there is no model folder {inputs}/nowhere"),
    ("bench", 2, "the following arguments are required: TARGET; `lumos bench --help` lists the options"),
    ("bench loss --hidden-size 1000000000 --vocab-size 1000000000", 2, "a head of 1,000,000,000 rows and 1,000,000,000 channels"),
    ("bench train --tokens 1000000000000", 2, "--tokens 1,000,000,000,000 is not allowed; give 1 to 16,777,216"),
    ("bench attention --repetitions 1000000000000", 2, "--repetitions 1000000000000 is not allowed; give at most 1,000,000"),
    ("bench loss --threads 100000000", 2, "--threads 100000000 is not allowed; give at most 1,024"),
]


@pytest.fixture
def run(inputs, tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder -> (exit code, lines on stderr, files that it left)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(command: str) -> tuple[int, list[str], list[str]]:
        code = main([part.format(inputs=inputs) for part in command.split()])
        said = capsys.readouterr().err.splitlines()
        return code, said, sorted(str(path) for path in tmp_path.rglob("*") if path.is_file())

    return call


@pytest.mark.filterwarnings("ignore:.*no lumos_adapter.json")
@pytest.mark.parametrize(("command", "code", "words"), ROWS, ids=[row[0] for row in ROWS])
def test_a_bad_input_ends_in_one_line(run, inputs, command: str, code: int, words: str):
    found, said, left = run(command)
    errors = [line for line in said if line.startswith("error: ")]
    assert found == code
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {words.format(inputs=inputs)}")
    assert len(errors[0]) < 500
    assert errors[0].isprintable()
    assert not any("Traceback" in line for line in said)
    assert left == []


def test_the_table_has_all_verbs():
    assert len(ROWS) >= 60
    assert {command.split()[0] for command, _, _ in ROWS} >= VERBS.keys()

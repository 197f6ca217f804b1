"""The pages of docs/: length, links and results of all pages, and commands of pages without a test of their own."""

from __future__ import annotations

import re
import shutil
import tomllib
from dataclasses import MISSING, fields
from itertools import dropwhile, takewhile
from pathlib import Path

import pytest
from pages import ROOT, blocks, command_lines, option_rows, verbs

from lumos.benchmarks.compare import check_one_machine, machine_of, read_result
from lumos.cli import main
from lumos.data.ingest import item, workers
from lumos.demo.limits import Limits
from lumos.models.lumos1.settings import GenerationSettings
from lumos.models.stiv.settings import StivOptions
from lumos.models.stiv.training_settings import StivTrainingSettings
from lumos.registry import Generator

PAGES = sorted((ROOT / "docs").rglob("*.md"))
CARDS = [f"checkpoints/{name}/README.md" for name in ("lumos-tiny", "lumos-mini", "stiv-tiny", "tokenizer-pictures")]
CARD = CARDS[0]
OUTSIDE = [ROOT / path for path in ("README.md", *CARDS, "integrations/comfyui/README.md", "tests/golden/README.md")]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def links(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return [target for target in LINK.findall(text) if not re.match(r"https?://", target)]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub and MkDocs give to plain headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_is_under_900_words(page: Path):
    assert len(page.read_text().split()) < 900


@pytest.mark.parametrize("page", [*PAGES, *OUTSIDE], ids=name)
def test_every_link_leads_somewhere(page: Path):
    for link in links(page):
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.is_file(), link
        assert not anchor or anchor in anchors(file), link


def test_a_table_of_a_benchmark_is_of_one_machine():
    """The heading over a table of results of `bench` names the processor of all its files."""
    page = ROOT / "docs" / "generate" / "benchmarks.md"
    headings = 0
    for section in re.split(r"^#+ ", page.read_text(), flags=re.MULTILINE):
        rows = "\n".join(line for line in section.splitlines() if line.startswith("|"))
        results = [read_result(page.parent / file) for file in re.findall(r"\((\.\./results/bench-.*?\.json)\)", rows)]
        if results:
            assert {machine_of(result)["cpu"] for result in results} == {section.splitlines()[0].split(": ")[-1]}
            check_one_machine(dict(enumerate(results)))
            headings += 1
    assert headings == 4


def test_every_result_is_shown_on_a_page():
    shown = {(page.parent / link.partition("#")[0]).resolve() for page in [*PAGES, *OUTSIDE] for link in links(page)}
    assert set((ROOT / "docs" / "results").iterdir()) - shown == set()


def test_the_site_has_every_page_in_its_menu():
    menu = (ROOT / "docs" / "site" / "mkdocs.yml").read_text()
    listed = set(re.findall(r"(\S+\.md)$", menu, re.MULTILINE))
    generated = {"model-card.md", "model-card-mini.md", "model-card-stiv.md", "model-card-pictures.md", "comfyui.md"}
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in PAGES} | generated


def test_every_section_that_code_cites_is_in_the_reference():
    code = [path for room in ("lumos", "tokenizer") for path in (ROOT / room).rglob("*.py")]
    cited = {number for path in code for sections in re.findall(r"[Rr]eference,? sections? ([\d., and]+)", path.read_text())
             for number in re.findall(r"\d+(?:\.\d+)?", sections)}  # fmt: skip
    assert len(cited) >= 10
    headings = {number for page in (ROOT / "docs" / "reference").glob("*.md")
                for number in re.findall(r"^#+ (\d+(?:\.\d+)?)\.? ", page.read_text(), re.MULTILINE)}  # fmt: skip
    chapters = headings | {number.split(".")[0] for number in headings}
    assert cited - chapters == set()
    index = (ROOT / "docs" / "reference" / "index.md").read_text()
    listed = set(re.findall(r"^\| (\d+)", index, re.MULTILINE))
    assert {number.split(".")[0] for number in headings} <= listed


@pytest.mark.parametrize("page", [page for page in [*PAGES, *OUTSIDE] if "reference" not in page.parts], ids=name)
def test_every_path_of_the_repository_exists(page: Path):
    """The pages of the reference name paths of the published release."""
    for path in re.findall(r"`((?:lumos|tokenizer|configs|tests|docs|checkpoints|integrations)/[\w./-]+)`", page.read_text()):
        assert "..." in path or (ROOT / path).exists(), path


# ---- what pages list


def table(page: str, heading: str) -> dict[str, str]:
    """Return {first column: second column} of the first table under a heading."""
    lines = (ROOT / page).read_text().splitlines()
    below = dropwhile(lambda line: not line.startswith("|"), lines[lines.index(heading) :])
    _, _, *rows = takewhile(lambda line: line.startswith("|"), below)
    cells = [row.strip("| ").split(" | ") for row in rows]
    return {name: value for name, value, *_ in cells}


def test_the_reasons_of_skipped_items():
    listed = {reason for cell in table("docs/data/skipped.md", "# Skipped items") for reason in re.findall("`(.*?)`", cell)}
    own = {value for module in (item, workers) for name, value in vars(module).items() if name.isupper() and isinstance(value, str)}
    assert listed == {value for value in own if re.fullmatch("[a-z ]+", value)}


def test_the_limits_of_the_demo():
    listed = table("docs/demo-server.md", "## Limits")
    limits = {f"`--{entry.name.replace('_', '-')}`": entry.default for entry in fields(Limits)}
    assert listed.keys() == limits.keys()
    assert {flag: float(listed[flag]) for flag, default in limits.items() if default is not None} == {
        flag: default for flag, default in limits.items() if default is not None
    }


def test_the_sampling_options_of_the_page():
    """The table equals the declarations; a failure shows the rows to write."""
    options = GenerationSettings.declared().values()
    listed = table("docs/generate/index.md", "### Sampling options of Lumos-1")
    assert list(listed.items()) == list(option_rows(option for option in options if not option.is_trade).items())
    listed = table("docs/generate/speed.md", "## Settings that trade quality for time")
    assert [setting.split()[0].strip("`") for setting in listed] == [option.flag for option in options if option.is_trade]


def test_the_sampling_options_of_stiv():
    options = StivOptions.declared().values()
    listed = table("docs/stiv.md", "## Sampling options of STIV")
    assert list(listed.items()) == list(option_rows(option for option in options if not option.is_trade).items())
    listed = table("docs/stiv.md", "### Options that trade quality for time")
    assert list(listed.items()) == list(option_rows(option for option in options if option.is_trade).items())


def test_the_training_settings_of_stiv():
    listed = table("docs/train/stiv.md", "# Train STIV")
    assert [setting.strip("`") for setting in listed] == [name for name in StivTrainingSettings.__annotations__ if name != "lora"]


def test_the_example_of_a_sampling_option_is_the_code():
    (example,) = blocks("docs/extend.md", "python")
    assert example.strip() in (ROOT / "lumos" / "models" / "lumos1" / "settings.py").read_text()


def test_the_drawing_of_the_rooms_is_the_contract():
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    drawn = re.search(r"^lumos/\n((?:  .*\n)+)", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)[1]
    lines = [re.split(r"\s{2,}", line.strip())[0].replace("models/lumos1", "models") for line in drawn.splitlines()]
    assert lines == [layer for layer in contract["layers"] if layer != "__main__"]


def test_parts_named_in_the_docs_are_those_of_the_registry():
    listed = {name for cell in table("docs/extend.md", "## Add a generator") for name in re.findall("`(.*?)`", cell)}
    assert listed <= {entry.name for entry in fields(Generator)}
    assert {entry.name for entry in fields(Generator) if entry.default_factory is MISSING} <= listed


# ---- commands


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A working folder that looks like the repository's root."""
    for part in ("checkpoints", "configs"):
        (tmp_path / part).symlink_to(ROOT / part)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_first_training_command(clone):
    shutil.copytree(ROOT / "configs", clone / "copy")
    command = verbs("docs/train/index.md")[0]
    assert command == ["train", "--config", "configs/lumos1/tiny.yaml"]
    small = ["training.max_steps=2", "data.stages=[]", "training.batch_size=2", "data.validation_clips=2", "samples.every=0"]
    assert main([*command, *small, f"training.output_dir={clone / 'run'}"]) == 0
    assert (clone / "run" / "export" / "model.safetensors").is_file()
    assert main(["generate", "--model", str(clone / "run" / "export"), "--prompt", "x", "--num-frames", "5", "--height", "64",
                 "--width", "64", "--fps", "8", "--num-inference-steps", "1", "--output", "x.gif"]) == 0  # fmt: skip


def test_the_page_shows_the_tested_deepspeed_command():
    """tests/training/test_deepspeed.py types it with a config of its own."""
    assert "deepspeed --num_gpus 2 train.py --config configs/lumos1/tiny.yaml" in command_lines("docs/train/index.md")


@pytest.mark.slow
def test_the_tokenizer_commands(clone):
    text, video = verbs("docs/tokenizer/training.md")
    (clone / "captions.txt").write_text("a red circle moves left\na small blue square grows\n" * 30)
    assert main([*text, "--vocab-size", "560"]) == 0
    assert (clone / "text_tokenizer" / "tokenizer.model").is_file()
    small = ["films=[]", "share_worlds=1", "steps=1", "warmup_steps=0", "batch_size=1", "pictures_per_batch=1"]
    assert main([*video, *small, "validation_clips=1", f"output_dir={clone / 'tokenizer-run'}"]) == 0
    assert (clone / "tokenizer-run" / "video_tokenizer" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_tokenizer_is_measured(clone, capsys):
    command = next(command for command in verbs("docs/tokenizer/index.md") if "worlds" in command)
    assert main([*command, "--count", "3", "--json"]) == 0
    assert (clone / "sheet.png").is_file()
    assert '"union"' in capsys.readouterr().out.splitlines()[-1]


def test_the_recipe_of_the_model_card_is_complete(clone):
    """Every command reads a config that exists, and folders that an earlier command has written."""
    outputs = {"tiny-gpu": "runs/tiny-gpu/export", "tiny-longer": "runs/tiny-longer/export"}
    tokenizers = {"tiny-gpu": "runs/tokenizer-tiny", "tiny-128": "runs/tokenizer-128"}
    written: set[str] = set()
    commands = verbs(CARD)
    assert len(commands) == 8
    for verb, *words in commands:
        config = Path(words[words.index("--config") + 1]) if "--config" in words else None
        assert config is None or config.is_file()
        made = {word.split("=")[1] for word in words if word.startswith("output_dir=")}
        if "--out" in words:
            made.add(words[words.index("--out") + 1])
        elif config and not made:
            made.add((outputs if verb == "train" else tokenizers)[config.stem])
        read = {word.split("=")[-1] for word in words if re.search(r"(^|=)(runs/|small$|text_tokenizer$)", word)} - made
        for folder in read:
            assert any(f"{folder}/".startswith(f"{known}/") or known.startswith(f"{folder}/") for known in written), folder
        written |= made

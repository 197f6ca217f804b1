"""Recipes by name and the shipped model, from the repository and from an installation elsewhere."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lumos import shipped
from lumos.cli import MODEL_OPTIONS, VERBS, Parser, main
from lumos.commands import subcommands
from lumos.errors import UserError
from lumos.pipeline.defaults import shipped_model
from lumos.pipeline.hub import local_folder
from lumos.shipped import find_config, find_shipped_models
from lumos.training.settings import load_settings
from lumos.training.tokenizer.settings import load_settings as load_tokenizer_settings


@pytest.mark.parametrize(
    ("name", "kinds", "file"),
    [
        ("tiny", ("lumos1", "stiv"), "lumos1/tiny.yaml"),
        ("tiny", ("tokenizer",), "tokenizer/tiny.yaml"),
        ("tiny.yaml", ("stiv",), "stiv/tiny.yaml"),
        ("stiv/tiny", ("lumos1", "stiv"), "stiv/tiny.yaml"),
        ("configs/lumos1/3b-384p.yaml", ("lumos1",), "lumos1/3b-384p.yaml"),
        ("m-512", ("lumos1", "stiv"), "stiv/m-512.yaml"),
        ("0.5b-stage1", ("lumos1",), "lumos1/0.5b-stage1.yaml"),
    ],
)
def test_recipes_are_found_by_name_from_any_folder(name, kinds, file, repo: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name, kinds) == repo / "configs" / file


def test_a_file_of_the_user_comes_first(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny").write_text("x: 1")
    assert find_config("tiny", ("lumos1",)) == Path("tiny")


def test_a_folder_of_the_name_of_a_recipe_is_none(repo: Path, tmp_path: Path, monkeypatch):
    """Such as the folder of results of an earlier run."""
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    assert find_config("tiny", ("lumos1",)) == repo / "configs" / "lumos1" / "tiny.yaml"


@pytest.mark.parametrize("has_own", [False, True], ids=["no folder", "checkpoints of a run"])
def test_shipped_models_are_found_from_any_folder(repo: Path, tmp_path: Path, monkeypatch, has_own):
    monkeypatch.chdir(tmp_path)
    if has_own:
        Path("checkpoints/step-00000100").mkdir(parents=True)
    for name in ("checkpoints/stiv-tiny", Path("checkpoints/lumos-mini")):
        assert local_folder(name) == repo / name
    assert local_folder(repo / "checkpoints" / "lumos-tiny") == repo / "checkpoints" / "lumos-tiny"
    Path("checkpoints/stiv-tiny").mkdir(parents=True)  # one's own comes first
    assert local_folder("checkpoints/stiv-tiny") == Path("checkpoints/stiv-tiny")


@pytest.mark.parametrize("name", ["tinny", "stiv/none", "../lumos1/tiny", "lumos1/../stiv/tiny"])
def test_an_unknown_name_lists_the_recipes(name, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"there is no config file .*for example lumos1/"):
        find_config(name, ("lumos1", "stiv"))


def test_settings_are_loaded_by_name(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_settings("lumos1/tiny").name == "tiny"
    assert load_tokenizer_settings("tiny") == load_tokenizer_settings("configs/tokenizer/tiny.yaml")


def test_options_find_shipped_models_from_any_folder(repo: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in (["info"], ["plan", "--generate", "--device", "cpu", "--peak-tflops", "1", "--model"]):
        assert main([*command, "checkpoints/stiv-tiny", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["model"] == str(repo / "checkpoints" / "stiv-tiny")


def test_no_option_that_names_a_model_is_left_out():
    modules = [verb.replace("-", "_") for verb in VERBS]
    parts = [place for verb in ("compress", "evaluate", "bench") for place in subcommands.found(verb).values()]
    modules += [place.rpartition(".")[2] for place in parts]
    found = set()
    for module in modules:
        parser = Parser()
        importlib.import_module(f"lumos.commands.{module}").add_arguments(parser)
        found |= {action.dest for action in parser._actions if action.nargs != 0 and action.dest != "what"
                  and re.search("model|tokenizer", f"{action.dest} {action.metavar}".lower())}  # fmt: skip
    assert found <= set(MODEL_OPTIONS)
    assert {"model", "mix", "text_tokenizer"} <= found


def test_recipes_find_shipped_models_from_any_folder(repo: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = repo / "checkpoints" / "lumos-tiny"
    tokenizer = load_settings("tiny").tokenizer
    assert (tokenizer.video, tokenizer.text) == (str(model / "video_tokenizer"), str(model / "text_tokenizer"))
    assert load_settings("finetune", ["model.from=checkpoints/stiv-tiny"]).model.from_ == str(repo / "checkpoints" / "stiv-tiny")
    assert load_settings("finetune", ["model.from=checkpoints/none"]).model.from_ == "checkpoints/none"
    monkeypatch.chdir(repo)
    assert load_settings("finetune").model.from_ == "checkpoints/lumos-tiny"


def test_aliases_in_a_config_are_read_once():
    """Each level names the one below it ten times, so that a walk through all of them would not end."""
    nested: list = ["checkpoints/lumos-tiny/README.md"]
    for _ in range(30):
        nested = [nested] * 10
    find_shipped_models({"a": nested})


def test_every_recipe_and_model_file_is_in_the_wheel(repo: Path):
    data = tomllib.loads((repo / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    packed = {file.relative_to(repo) for patterns in data.values() for pattern in patterns for file in repo.glob(pattern)}
    for place, patterns in data.items():
        assert all(Path(pattern).parent == Path(place).relative_to("share/lumos") for pattern in patterns)
    command = ["git", "ls-files", "configs", "checkpoints"]
    tracked = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=True).stdout.splitlines()
    files = {Path(name) for name in tracked if "vbench_i2v_images" not in name}
    assert files <= packed


def test_an_installation_has_the_recipes_and_the_model(repo: Path, tmp_path: Path, monkeypatch):
    """The layout of an installed wheel: packages in one folder, share/lumos in the data folder of the environment."""
    packages, data = tmp_path / "lib", tmp_path / "data"
    packages.mkdir()
    (data / "share").mkdir(parents=True)
    (data / "share" / "lumos").mkdir()
    for name in ("configs", "checkpoints"):
        (data / "share" / "lumos" / name).symlink_to(repo / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shipped, "__file__", str(packages / "lumos" / "shipped.py"))
    monkeypatch.setattr(shipped.sysconfig, "get_path", lambda name: str(data))
    assert shipped_model() == data / "share" / "lumos" / "checkpoints" / "lumos-tiny"
    assert find_config("stiv/tiny", ()) == data / "share" / "lumos" / "configs" / "stiv" / "tiny.yaml"
    (data / "share" / "lumos" / "configs").unlink()
    with pytest.raises(UserError, match="no config file"):
        find_config("stiv/tiny", ())


def test_the_packages_are_typed(repo: Path):
    assert (repo / "lumos" / "py.typed").is_file()
    assert (repo / "tokenizer" / "py.typed").is_file()


def linked(repo: Path, source: Path, folders: tuple[str, ...]) -> Path:
    """Return a folder with the tracked files of the root, and of these folders of it."""
    tracked = subprocess.run(["git", "ls-files"], cwd=repo, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in (name for name in tracked if name.split("/")[0] in folders or "/" not in name):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(repo / name, source / name)
    return source


@pytest.mark.slow
def test_a_source_distribution_holds_no_part_of_the_tests(repo: Path, tmp_path: Path):
    """It holds the packages and the short forms of commands. Checkpoints and recipes, which the wheel names, are left out here."""
    import tarfile

    source = linked(repo, tmp_path / "source", ("lumos", "tokenizer", "tests"))
    command = [sys.executable, "-c", f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {"pyproject.toml", "constraints.txt", "generate.py", "train.py", "lumos/cli.py", "tokenizer/py.typed"}
    assert not [name for name in names if name.startswith("tests")]


@pytest.mark.slow
def test_a_wheel_holds_them(repo: Path, tmp_path: Path):
    """`pip wheel` works without the network, and the wheel has the model and a recipe in their places."""
    import zipfile

    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), "-q", "."]
    source = linked(repo, tmp_path / "source", ("lumos", "tokenizer", "configs", "checkpoints"))
    for weights in source.glob("checkpoints/**/*.safetensors"):  # links, whose content would take seconds to compress
        weights.unlink()
        weights.touch()
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    model = "checkpoints/lumos-tiny"
    for file in ("configs/lumos1/tiny.yaml", f"{model}/model.safetensors", f"{model}/text_tokenizer/tokenizer.model"):
        assert any(name.endswith(f"data/share/lumos/{file}") for name in names), file
    assert {"lumos/py.typed", "tokenizer/py.typed"} <= set(names)

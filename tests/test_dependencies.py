"""pyproject.toml, the two files of pinned versions, and the imports of the code agree."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MODULES = {"pillow": "PIL", "pyyaml": "yaml"}
"""Distributions whose module has another name."""
NEEDS_EXTRA = {"lumos/demo": "demo", "lumos/data/ingest/ray_executor.py": "ray", "lumos/compression/pruned_unets.py": "diffusers"}
"""Files that are only imported where their extra is installed."""


@pytest.fixture(scope="module")
def project(repo) -> dict:
    return tomllib.loads((repo / "pyproject.toml").read_text())["project"]


def requirements(text: str) -> dict[str, Requirement]:
    """Return the requirements of a file by name, without their hashes."""
    lines = [line for line in text.replace("\\\n", "").splitlines() if not line.startswith("#")]
    found = [Requirement(line.split(" --hash")[0]) for line in lines]
    assert len({requirement.name for requirement in found}) == len(found)
    return {canonicalize_name(requirement.name): requirement for requirement in found}


@pytest.fixture(scope="module")
def pinned(repo) -> dict[str, Requirement]:
    return requirements((repo / "constraints.txt").read_text())


@pytest.fixture(scope="module")
def hashed(repo) -> dict[str, Requirement]:
    return requirements((repo / ".ci" / "requirements.txt").read_text())


def names(lines: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lines}


def test_both_files_name_the_same_versions(pinned, hashed):
    assert {name: str(wanted) for name, wanted in hashed.items()} == {name: str(pinned[name]) for name in hashed}
    assert all(re.fullmatch(r"==[^*]+", str(requirement.specifier)) for requirement in pinned.values())


def test_every_dependency_is_pinned_as_allowed(project, pinned):
    for line in (*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)):
        wanted = Requirement(line)
        (pin,) = pinned[canonicalize_name(wanted.name)].specifier
        assert wanted.specifier.contains(pin.version, prereleases=True), line


def test_ci_installs_all_but_torch_by_hash(repo, project, hashed):
    wanted = names(project["dependencies"]) | names(project["optional-dependencies"]["test"])
    assert wanted - set(hashed) == {"torch"}
    entries = (repo / ".ci" / "requirements.txt").read_text().replace("\\\n", "").splitlines()
    for entry in entries:
        assert entry.startswith("#") or re.fullmatch(r"\S+==[^-]+?( +--hash=sha256:[0-9a-f]{64})+", entry), entry


def test_neither_file_names_cuda_or_an_address(repo, pinned, hashed):
    assert not [name for name in pinned | hashed if re.match("nvidia-cu|nvidia-n|triton|cuda", name)]
    for file in ("constraints.txt", ".ci/requirements.txt"):
        assert not re.search(r"://|--(extra-)?index|--find-links", (repo / file).read_text())


def top_level_imports(path: Path) -> set[str]:
    """Return the modules that a file imports at its top level, without the standard library and this project."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"lumos", "tokenizer"}


@pytest.mark.slow
def test_a_plain_install_can_import_every_module(repo, project):
    """An extra's package is imported where it is used, never at the head of a file that others import."""
    core = names(project["dependencies"])
    for path in (*(repo / "lumos").rglob("*.py"), *(repo / "tokenizer").rglob("*.py")):
        place = path.relative_to(repo).as_posix()
        allowed = core.union(*(names(project["optional-dependencies"][extra]) for start, extra in NEEDS_EXTRA.items()
                               if place.startswith(start)))  # fmt: skip
        assert top_level_imports(path) <= {MODULES.get(name, name) for name in allowed}, place


def test_data_files_are_packaged(repo):
    globs = tomllib.loads((repo / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packaged = {path for room, kinds in globs.items() for kind in kinds for path in (repo / room.replace(".", "/")).glob(kind)}
    rooms = [path for room in ("lumos", "tokenizer") for path in (repo / room).rglob("*")]
    files = {path for path in rooms if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert packaged == files


def test_ci_ends_with_the_command_of_the_readme(repo):
    command = (repo / ".ci" / "run").read_text().splitlines()[-1]
    assert command.startswith("pytest ")
    assert f'-e ".[test]" && {command.partition(" < ")[0]}\n' in (repo / "README.md").read_text()

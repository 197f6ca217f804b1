"""Imports go one way, and shared rooms import no generator."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest


@pytest.fixture(scope="module")
def graph(repo) -> grimp.ImportGraph:
    """The imports of the product code, with type-only imports."""
    return grimp.build_graph("lumos", "tokenizer", cache_dir=None)


@pytest.mark.slow
def test_import_contracts_of_pyproject_hold(repo):
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=repo, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_module_is_in_an_import_cycle(graph):
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    TopologicalSorter(imports).prepare()  # CycleError names the cycle


def test_shared_rooms_import_no_generator(graph):
    shared = [m for m in graph.modules if not m.startswith(("lumos.models", "lumos.commands"))]
    found = {(m, i) for m in shared for i in graph.find_modules_directly_imported_by(m) if i.startswith("lumos.models")}
    assert found == set()


def test_tokenizer_imports_errors_and_files_only(graph):
    own = [m for m in graph.modules if m.split(".")[0] == "tokenizer"]
    found = {i for m in own for i in graph.find_modules_directly_imported_by(m) if i.startswith("lumos")}
    assert found == {"lumos.errors", "lumos.files"}


def test_nothing_imports_the_commands(graph):
    others = [m for m in graph.modules if not m.startswith("lumos.commands")]
    assert {m for m in others for i in graph.find_modules_directly_imported_by(m) if i.startswith("lumos.commands")} == set()


def test_public_classes_have_different_names(repo):
    """No two classes have the same name, nested classes included, so that a class is found by its name."""
    places = defaultdict(list)
    for path in (file for package in ("lumos", "tokenizer") for file in (repo / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(f"{path.relative_to(repo)}:{node.lineno}")
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


@pytest.mark.slow
def test_importing_the_package_loads_no_torch(repo):
    names = "import sys, lumos; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", names], cwd=repo, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_test_files_have_different_names(repo):
    names = [path.name for path in (repo / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))  # without packages, pytest can import only one file of a name


def test_names_of_tests_are_short(repo):
    files = (repo / "tests").rglob("test_*.py")
    names = [name for path in files for name in re.findall(r"def (test_\w+)\(", path.read_text(encoding="utf-8"))]
    assert [name for name in names if len(name) >= 60] == []

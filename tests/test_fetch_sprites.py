"""`fetch-sprites` as a user types it, from packages made here and with an npm that does what the test wants."""

from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from lumos.cli import main
from lumos.data import sprites
from lumos.data.sprites import PACKAGE, SPRITES


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LUMOS_SPRITES", str(tmp_path / "pictures"))
    return tmp_path


@pytest.fixture
def package(sprite_folder, tmp_path) -> Path:
    """A package with the layout of the real one, and files in it that nobody asked for."""
    return pack(tmp_path / "emoji.tgz", sprite_folder)


def pack(path: Path, pictures: Path, without: tuple[str, ...] = ()) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, code in SPRITES.items():
            if name not in without:
                archive.add(pictures / f"{name}.png", f"package/img/google/64/{code}.png")
        for other in ("package/LICENSE", "package/img/google/64/1f600.png", "package/../../outside.png"):
            archive.addfile(tarfile.TarInfo(other), io.BytesIO())
    return path


@pytest.fixture
def fetch(capsys):
    """Runs `fetch-sprites ...`; returns (exit code, stdout, error lines)."""

    def call(*args: object) -> tuple[int, str, list[str]]:
        code = main(["fetch-sprites", *map(str, args)])
        out, err = capsys.readouterr()
        return code, out, [line for line in err.splitlines() if line.startswith("error")]

    return call


def test_pictures_come_out_of_a_package(fetch, package, sprite_folder, tmp_path):
    code, out, errors = fetch("--package", package)
    assert (code, errors) == (0, [])
    assert out.splitlines()[0] == f"64 pictures in {tmp_path / 'pictures'}"
    assert "Noto Emoji, Google, Apache License 2.0" in out
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == sorted(f"{name}.png" for name in SPRITES)
    assert all((tmp_path / "pictures" / f"{n}.png").read_bytes() == (sprite_folder / f"{n}.png").read_bytes() for n in SPRITES)
    assert sprites.load("owl").max() > 0.5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emoji.tgz", "pictures"]


def test_out_goes_before_the_environment(fetch, package, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "owl.png").write_text("old")
    assert fetch("--package", package, "--out", "mine")[0] == 0
    assert len(list((tmp_path / "mine").iterdir())) == 64
    assert (tmp_path / "mine" / "owl.png").stat().st_size > 1000
    assert not (tmp_path / "pictures").exists()


def lacking(folder: Path, pictures: Path) -> Path:
    return pack(folder / "some.tgz", pictures, without=("owl", "rocket"))


def no_archive(folder: Path, pictures: Path) -> Path:
    (folder / "some.tgz").write_text("<html>not found</html>")
    return folder / "some.tgz"


def cut_off(folder: Path, pictures: Path) -> Path:
    path = pack(folder / "some.tgz", pictures)
    path.write_bytes(path.read_bytes()[:20_000])
    return path


def damaged(folder: Path, pictures: Path) -> Path:
    """A whole beginning, then a block of a type that does not exist."""
    path = pack(folder / "some.tgz", pictures)
    deflate = zlib.compressobj(wbits=31)
    beginning = deflate.compress(gzip.decompress(path.read_bytes())[:150_000]) + deflate.flush(zlib.Z_FULL_FLUSH)
    path.write_bytes(beginning + b"\xff" * 99)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lacking, f"some.tgz lacks the pictures owl.png, rocket.png; it should be {PACKAGE}"),
        (no_archive, "some.tgz cannot be read as a .tgz"),
        (cut_off, "some.tgz cannot be read as a .tgz"),
        (damaged, "some.tgz cannot be read as a .tgz"),
        (lambda folder, _: folder, "is no file; leave it out to have npm fetch"),
        (lambda folder, _: folder / "nowhere.tgz", "nowhere.tgz is no file"),
    ],
)
def test_a_package_that_cannot_serve_is_one_line_and_writes_nothing(fetch, sprite_folder, tmp_path, make, message):
    code, out, errors = fetch("--package", make(tmp_path, sprite_folder))
    assert (code, out, len(errors)) == (2, "", 1)
    assert message in errors[0]
    assert not (tmp_path / "pictures").exists()


def test_a_place_that_cannot_be_written_is_said_before_anything_is_fetched(fetch, package, tmp_path):
    (tmp_path / "taken").write_text("")
    code, _, errors = fetch("--package", "nowhere.tgz", "--out", "taken")
    assert code == 2
    assert "cannot write taken/" in errors[0]


def test_a_failure_half_way_leaves_whole_pictures_only(fetch, package, sprite_folder, tmp_path, monkeypatch):
    replaced = []

    def full_disk(source, target):
        if len(replaced) == 5:
            raise OSError(28, "No space left on device")
        replaced.append(Path(target).name)
        os.rename(source, target)

    monkeypatch.setattr("lumos.files.os.replace", full_disk)
    code, _, errors = fetch("--package", package)
    assert code == 1
    assert "No space left on device" in errors[0]
    left = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in left] == sorted(replaced)
    assert all(path.read_bytes() == (sprite_folder / path.name).read_bytes() for path in left)


def npm_that(folder: Path, monkeypatch, script: str) -> None:
    """Put an npm before all others in PATH; it runs in the folder where the package is to appear."""
    (folder / "bin").mkdir()
    npm = folder / "bin" / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)


def test_npm_fetches_the_package(fetch, package, tmp_path, monkeypatch):
    npm_that(tmp_path, monkeypatch, f'echo "$@" > {tmp_path}/asked\ncp {package} emoji-datasource.tgz\necho noise')
    code, out, _ = fetch()
    assert code == 0
    assert "noise" not in out
    assert (tmp_path / "asked").read_text().split()[:2] == ["pack", PACKAGE]
    assert len(list((tmp_path / "pictures").iterdir())) == 64
    assert np.ptp(sprites.load("whale")) > 0.5


@pytest.mark.parametrize(
    ("script", "code", "message"),
    [
        ("echo no network >&2; exit 7", 1, f"npm could not fetch {PACKAGE} (exit 7, see above)"),
        ("exit 0", 1, "left no .tgz"),
        ("echo rubbish > emoji.tgz", 2, "cannot be read as a .tgz"),
    ],
)
def test_an_npm_that_fails(fetch, tmp_path, monkeypatch, script, code, message):
    npm_that(tmp_path, monkeypatch, script)
    found, out, errors = fetch()
    assert (found, out, len(errors)) == (code, "", 1)
    assert message in errors[0]
    assert not (tmp_path / "pictures").exists()


def test_what_npm_says_is_shown(tmp_path, monkeypatch, capfd):
    npm_that(tmp_path, monkeypatch, "echo no network >&2; exit 7")
    assert main(["fetch-sprites"]) == 1
    assert "no network" in capfd.readouterr().err


def test_without_npm(fetch, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    code, out, errors = fetch()
    assert (code, out) == (2, "")
    assert f"npm is not installed; fetch {PACKAGE} elsewhere and give its .tgz as --package" in errors[0]
    assert not (tmp_path / "pictures").exists()

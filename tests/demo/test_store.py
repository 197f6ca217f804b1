"""One folder: what it serves, what it forgets, and what it never touches."""

from __future__ import annotations

import os

import pytest

from lumos.demo.limits import Limits
from lumos.demo.store import Store


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "root", Limits(keep_results=2, keep_uploads_mb=3, max_upload_mb=1))


def put(store: Store, name: str, age: int) -> str:
    """A result with its record, so many seconds old."""
    path = store.new_result(name)
    for file in (path, path.with_name(f"{path.name}.json")):
        file.write_text(name)
        os.utime(file, (1e9 - age, 1e9 - age))
    return path.name


def test_results_and_records_are_found_by_name(store):
    name = put(store, "a-red-circle-3.mp4", 0)
    assert store.find(name).read_text() == "a-red-circle-3.mp4"
    assert store.find(f"{name}.json") == store.results / f"{name}.json"
    assert store.find(put(store, "x-1.png", 0)).suffix == ".png"


def test_names_of_results_cannot_be_guessed(store):
    assert put(store, "a-3.mp4", 0) != put(store, "a-3.mp4", 0)
    assert store.find("a-3.mp4") is None


@pytest.mark.parametrize(
    "name", ["../secret-0123456789ab.mp4", "/etc/passwd", "..", "", "a/secret-0123456789ab.mp4", "secret-0123456789ab.mp4\x00",
             "secret-0123456789ab.txt", "..\\secret-0123456789ab.mp4", "SECRET-0123456789ab.mp4", "none-0123456789ab.mp4"],
)  # fmt: skip
def test_nothing_else_is_served(store, name):
    for place in (store.results.parent, store.results / "a", store.results):
        place.mkdir(exist_ok=True)
        for file in ("secret-0123456789ab.mp4", "secret-0123456789ab.txt"):
            if place != store.results or file.endswith("txt"):
                (place / file).write_text("secret")
    assert store.find(name) is None


def test_a_link_to_elsewhere_is_not_served(store, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (store.results / "link-0123456789ab.mp4").symlink_to(tmp_path / "secret")
    assert store.find("link-0123456789ab.mp4") is None


def test_the_oldest_result_gives_way_and_foreign_files_stay(store):
    (store.results / "holiday.mp4").write_text("mine")
    names = [put(store, f"clip-{n}.mp4", age=10 - n) for n in range(3)]
    assert [store.find(name) is not None for name in names] == [False, True, True]
    assert not (store.results / f"{names[0]}.json").exists()
    assert (store.results / "holiday.mp4").read_text() == "mine"


@pytest.mark.parametrize(
    ("given", "kept"),
    [("photo.png", "photo.png"), ("../../etc/pass wd.png", "pass_wd.png"), ("C:\\me\\clip.mp4", "clip.mp4"), ("..", "upload"),
     ("", "upload"), (".bashrc", "bashrc"), ("x" * 300 + ".mp4", "x" * 76 + ".mp4"), ("a\x00b.png", "a_b.png")],
)  # fmt: skip
def test_an_upload_is_named_as_its_visitor_names_it_and_stays_in_its_folder(store, given, kept):
    path = store.new_upload(given)
    assert path.name == kept
    assert path.parent.parent == store.uploads
    assert path.resolve() == path


def test_only_uploads_are_uploads(store, tmp_path):
    path = store.new_upload("a.png")
    assert not store.holds_upload(path)
    path.write_text("")
    (tmp_path / "secret").write_text("")
    (store.uploads / "link").symlink_to(tmp_path / "secret")
    assert store.holds_upload(path)
    assert store.holds_upload(str(path))
    for other in (tmp_path / "secret", store.uploads / ".." / ".." / "secret", store.uploads / "link", store.uploads, "/dev/zero",
                  "https://example.com/a.png"):  # fmt: skip
        assert not store.holds_upload(other)


def test_old_uploads_give_way(store):
    for age in range(4):
        path = store.new_upload(f"{age}.bin")
        path.write_bytes(bytes(2**20))
        os.utime(path, (1e9 - age, 1e9 - age))
    store.make_room()
    assert sorted(path.name for path in store.uploads.rglob("*.bin")) == ["0.bin", "1.bin"]  # and 1 MB is free

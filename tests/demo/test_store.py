"""The folder of results: the files that it serves, removes, and leaves alone."""

from __future__ import annotations

import os

import pytest

from lumos.demo.limits import Limits, ServerBusy
from lumos.demo.store import FRESH_SECONDS, UNDELIVERED_SECONDS, UNUSED_SECONDS, Store
from lumos.durable import owner


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
def test_an_upload_keeps_its_name_and_stays_in_its_folder(store, given, kept):
    path = store.new_upload(given)
    assert path.name == kept
    assert path.parent.parent == store.uploads
    assert path.resolve() == path


def test_files_outside_the_uploads_folder_are_no_uploads(store, tmp_path):
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


MB = 2**20


def upload(store: Store, size: int = MB):
    path = store.new_upload("a.png")
    path.write_bytes(bytes(size))
    return path, store.keep(path)


@pytest.fixture
def later(monkeypatch):
    """Let seconds pass."""
    clock = [1e6]
    monkeypatch.setattr("lumos.demo.store.time.monotonic", lambda: clock[0])
    return lambda seconds: clock.__setitem__(0, clock[0] + seconds)


def test_old_uploads_give_way_to_new_ones(store, later):
    names = []
    for _ in range(4):  # 3 MB and the rest of a form find room
        names.append(upload(store)[1])
        later(FRESH_SECONDS)
    with store.reservation() as room:
        room.grow(MB)
    assert [store.upload(name) is not None for name in names] == [False, True, True, True]
    later(UNUSED_SECONDS)
    with store.reservation() as room:
        room.grow(1)
    assert [store.upload(name) for name in names] == [None] * 4
    assert list(store.uploads.iterdir()) == []


def test_uploads_that_are_needed_or_fresh_stay(store, later):
    needed, called = upload(store)
    with store.needing(needed):
        later(UNUSED_SECONDS + 1)
        fresh = [upload(store)[0] for _ in range(3)]
        with store.reservation() as room, pytest.raises(ServerBusy, match="no room for more uploads now"):
            room.grow(1)
        assert needed.exists()
        assert all(path.exists() for path in fresh)
        store.leave(needed)
        assert needed.exists()
    assert not needed.exists()
    assert store.upload(called) is None


def test_bytes_on_their_way_count_before_they_arrive(store):
    with store.reservation() as one:
        one.grow(3 * MB)
        with store.reservation() as two:
            two.grow(MB)
            with pytest.raises(ServerBusy):
                two.grow(MB + 1)
            assert two.size == MB
    with store.reservation() as three:
        three.grow(4 * MB)


def test_a_result_stays_until_it_was_delivered(store, later):
    names = [put(store, f"clip-{n}.mp4", age=10 - n) for n in range(2)]
    store.stay(names[0])
    put(store, "clip-2.mp4", age=1)
    assert [store.find(name) is not None for name in names] == [True, False]
    later(UNDELIVERED_SECONDS)
    with store.delivering(names[0]):
        put(store, "clip-3.mp4", age=0)
        assert store.find(names[0])
    put(store, "clip-4.mp4", age=0)
    assert store.find(names[0]) is None


def test_uploads_of_an_earlier_server_are_removed(store, tmp_path):
    path, called = upload(store)
    assert store.upload(called) == path
    again = Store(tmp_path / "root", Limits())
    assert not path.exists()
    assert again.upload(called) is None


@pytest.mark.parametrize("name", ["/etc/passwd", "../results/x", "", ".", "upload-0/a.png", "a\x00b"])
def test_other_names_are_no_uploads(store, name):
    upload(store)
    assert store.upload(name) is None


def test_unfinished_results_of_dead_servers_are_removed(tmp_path):
    results = tmp_path / "root" / "results"
    results.mkdir(parents=True)
    dead = owner().replace(f"-{os.getpid()}-", f"-{2**22 + 1}-")
    names = [f".clip-{i}.mp4.{of}-0123.part" for i, of in enumerate((dead, owner()))]
    for name in names:
        (results / name).write_bytes(b"half")
    Store(tmp_path / "root", Limits())
    assert [path.name for path in results.iterdir()] == names[1:]

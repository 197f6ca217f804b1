"""`lumos.files` under power cuts and kills, with locks and file modes."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lumos import durable, files, locks
from lumos.errors import RunError, UserError
from lumos.files import only_writer, replacing, replacing_folder, updating_folder, write_bytes, write_json


def in_a_child(work) -> int:
    """Do `work` in a forked process and return its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def replace_folder(path: Path, text: str) -> None:
    with replacing_folder(path) as writing:
        (writing / "model").write_text(text)


def test_a_folder_does_not_replace_a_file(tmp_path):
    (tmp_path / "notes").write_text("mine")
    for write in (replacing_folder, lambda path: updating_folder(path, lambda name: True)):
        with pytest.raises(UserError, match="notes is a file, but a folder is to be written there"), write(tmp_path / "notes"):
            pass
    assert (tmp_path / "notes").read_text() == "mine"
    assert names(tmp_path) == ["notes"]


# -- power cuts --------------------------------------------------------------------------------------------------------


def test_files_are_synced_before_and_folders_after_a_rename(tmp_path, disk):
    write_json(tmp_path / "new" / "a.json", {"a": 1})
    disk.check_renames()
    assert ("rename", tmp_path / "new" / "a.json") in disk.calls
    assert disk.calls.index(("sync", tmp_path)) < disk.calls.index(("rename", tmp_path / "new" / "a.json"))  # `new` itself lasts
    assert disk.calls[-1] == ("sync", tmp_path / "new")


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_synchronized_with_all_that_is_in_it(tmp_path, disk, monkeypatch, exchanges: bool):
    if not exchanges:
        monkeypatch.setattr(durable, "_renameat2", lambda: None)
    for text in ("old", "new"):
        with replacing_folder(tmp_path / "a") as writing:
            (writing / "below").mkdir()
            (writing / "below" / "b").write_text(text)
        disk.check_renames()
    assert (tmp_path / "a" / "below" / "b").read_text() == "new"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES])
def test_folders_that_cannot_be_synchronized_are_left_so(tmp_path, disk, number: int):
    disk.refuse = lambda path: number if path.is_dir() else None
    write_bytes(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("folders", [True, False])
def test_a_disk_that_fails_is_told(tmp_path, disk, number: int, folders: bool):
    write_bytes(tmp_path / "a", b"old")
    disk.refuse = lambda path: number if path.is_dir() == folders else None
    with pytest.raises(RunError, match="cannot write"):
        write_bytes(tmp_path / "a", b"new")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == (b"new" if folders else b"old")


# -- kills -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_writer_always_leaves_a_folder(tmp_path):
    """The process is killed at each system call in turn, with and without a system that can exchange folders."""
    for exchanges in (True, False):
        path, kills = tmp_path / f"{exchanges}" / "model", 0
        for call in range(1, 100):
            replace_folder(path, "old")

            def killed(call=call, exchanges=exchanges, path=path):
                if not exchanges:
                    durable._renameat2 = lambda: None
                kill_at_call(call)
                replace_folder(path, "new")
                os._exit(0)

            code = in_a_child(killed)
            if exchanges:
                assert (path / "model").read_text() in ("old", "new")
            durable.put_back(path)
            assert (path / "model").read_text() in ("old", "new")
            replace_folder(path, "newest")
            assert names(path.parent) == ["model"]
            if code == 0:
                break
            kills += 1
        assert kills > 8, kills


def kill_at_call(number: int) -> None:
    """Kill this process before its n-th call of these functions, which change or store files."""
    calls = 0
    for module, name in ((os, "replace"), (os, "fsync"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"), (durable, "_exchange")):
        function = getattr(module, name)

        def counted(*args, function=function, **options):
            nonlocal calls
            calls += 1
            if calls == number:
                die()
            return function(*args, **options)

        setattr(module, name, counted)


def test_leftovers_of_killed_writers_go_and_live_files_stay(tmp_path):
    def killed():
        with replacing(tmp_path / "a") as temporary:
            temporary.write_text("half")
            die()

    assert in_a_child(killed) == -signal.SIGKILL
    assert len(names(tmp_path)) == 1
    with replacing(tmp_path / "a") as first:
        first.write_text("first")
        assert len(names(tmp_path)) == 1
        write_bytes(tmp_path / "a", b"second")
        assert first.exists()
        write_bytes(tmp_path / "a.b", b"another")
        assert first.exists()
    assert (names(tmp_path), (tmp_path / "a").read_text()) == (["a", "a.b"], "first")


def test_left_overs_of_another_machine_go_after_a_day(tmp_path):
    for name, age in (("new", 60), ("old", 2 * durable.ABANDONED_AFTER)):
        path = tmp_path / f".a.0{name}0-17-1-abcd.part"
        path.touch()
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    (tmp_path / ".a.0123abcd.part").touch()  # of an earlier version
    (tmp_path / ".a.mine.part").touch()
    write_bytes(tmp_path / "a", b"x")
    assert names(tmp_path) == [".a.0new0-17-1-abcd.part", ".a.mine.part", "a"]


@pytest.mark.parametrize("name", ["a" * 250, "é" * 120, "x" * 45])
def test_long_names_are_replaced_and_swept_too(tmp_path, name: str):
    def killed():
        with replacing_folder(tmp_path / name):
            die()

    assert in_a_child(killed) == -signal.SIGKILL
    for text in ("old", "new"):
        replace_folder(tmp_path / name, text)
        assert names(tmp_path) == [name]


def test_files_of_libraries_have_the_mode_of_the_umask(tmp_path):
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            with replacing_folder(tmp_path / "a") as writing:
                save_file({"a": torch.zeros(3)}, writing / "model.safetensors")
            with replacing(tmp_path / "b") as temporary:
                save_file({"a": torch.zeros(3)}, temporary)
        finally:
            os.umask(before)
        assert [path.stat().st_mode & 0o777 for path in (tmp_path / "a" / "model.safetensors", tmp_path / "b")] == [mode] * 2
    assert names(tmp_path) == ["a", "b"]


# -- locks -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["flock", errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, "windows"])
def system(request, monkeypatch):
    """The test runs with locks, with systems that refuse locks in several ways, and without the module."""
    if request.param == "windows":
        monkeypatch.setattr(locks, "fcntl", None)
    elif request.param != "flock":

        def refuse(*_):
            raise OSError(request.param, os.strerror(request.param))

        monkeypatch.setattr(locks.fcntl, "flock", refuse)
    return request.param


def locked(folder: Path) -> bool:
    try:
        with only_writer(folder, "run"):
            return False
    except RunError as error:
        return "another run is writing into" in str(error)


def test_one_writer_at_a_time(tmp_path, system):
    folder = tmp_path / "new" / "folder"
    with only_writer(folder, "run"):
        assert locked(folder)
        assert in_a_child(lambda: os._exit(locked(folder))) == 1
        assert not locked(tmp_path / "other")
    assert not locked(folder)


def test_a_lock_ends_with_its_process(tmp_path, system):
    def killed():
        with only_writer(tmp_path, "run"):
            die()

    assert in_a_child(killed) == -signal.SIGKILL
    assert not locked(tmp_path)


def test_a_forked_process_does_not_keep_the_lock_of_its_parent(tmp_path, system):
    reading, writing = os.pipe()
    started, starts = os.pipe()

    def killed():
        with only_writer(tmp_path, "run"):
            if os.fork() == 0:
                os.write(starts, b"x")
                os.read(reading, 1)
                os._exit(0)
            os.read(started, 1)  # a process that is killed sooner leaves a child that could not close the lock yet
            die()

    assert in_a_child(killed) == -signal.SIGKILL
    assert not locked(tmp_path)
    os.write(writing, b"x")


def test_a_forked_child_that_ends_leaves_its_parent_the_lock(tmp_path, system):
    with only_writer(tmp_path, "run") as _:
        lock = locks.Lock.__new__(locks.Lock)
        lock.file, lock.name = None, tmp_path / locks.OWNER
        in_a_child(lambda: (lock.release(), os._exit(0)))
        assert locked(tmp_path)


def test_a_lock_of_another_machine_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    (tmp_path / locks.OWNER).write_text('{"owner": "elsewhere-17-1700000000", "process": 17, "machine": "b"}')
    with pytest.raises(RunError, match=r"process 17 on 'b'.*if that process is gone, delete .*\.lock-owner"), only_writer(
        tmp_path, "run"
    ):
        pass
    for text in ("", "[]", '{"owner": 3}', '{"owner": "a-b"}', "\0\0"):  # cut off by a kill
        (tmp_path / locks.OWNER).write_text(text)
        assert locked(tmp_path)
        os.utime(tmp_path / locks.OWNER, (1, 1))
        assert not locked(tmp_path)


def test_a_lock_neither_follows_a_link_nor_empties_a_file(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"\.lock in it is a link"), only_writer(tmp_path / "a", "run"):
        pass
    (tmp_path / "b").mkdir()
    os.link(tmp_path / "precious", tmp_path / "b" / ".lock")
    assert not locked(tmp_path / "b")
    (tmp_path / "c" / ".lock").mkdir(parents=True)
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "d" / ".lock")
    for name in "cd":
        with pytest.raises(UserError, match="cannot write into"), only_writer(tmp_path / name, "run"):
            pass
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_lock_whose_file_was_removed_does_not_count(tmp_path):
    """One process removes the lock file while another waits for the lock."""
    with only_writer(tmp_path, "run"):
        (tmp_path / ".lock").unlink()
        with only_writer(tmp_path, "run"):
            assert locked(tmp_path)
        assert not locked(tmp_path)


# -- folders of models -------------------------------------------------------------------------------------------------


def save_model(folder: Path, text: str) -> None:
    with updating_folder(folder, lambda name: name in ("config.json", "weights", "more", "below")) as writing:
        for name in ("config.json", "weights", *(("more",) if text == "old" else ())):
            (writing / name).write_text(text)
        (writing / "below").mkdir()
        (writing / "below" / "config.json").write_text(text)


def model_in(folder: Path) -> set[str]:
    """Return the texts of the files of a model folder; none if it has no config.json and so holds no model."""
    if not (folder / "config.json").exists():
        return set()
    ours = [folder / "below" / "config.json", *(folder / name for name in ("config.json", "weights", "more"))]
    return {path.read_text() for path in ours if path.exists()}


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
def test_a_killed_save_leaves_no_mixture_of_two_models(tmp_path, monkeypatch, in_place: bool):
    if in_place:
        monkeypatch.setattr(files, "_can_be_renamed", lambda folder: False)
    folder = tmp_path / "model"
    found = set()
    for call in range(1, 200):
        save_model(folder, "old")
        (folder / "README.md").write_text("mine")
        (folder / "notes").mkdir(exist_ok=True)
        (folder / "notes" / "a").write_text("mine")

        def killed(call=call):
            kill_at_call(call)
            save_model(folder, "new")
            os._exit(0)

        code = in_a_child(killed)
        model = tuple(model_in(folder))
        found.add(model)
        assert (folder / "README.md").read_text() == (folder / "notes" / "a").read_text() == "mine"
        if code == 0:
            break
    assert found == {("old",), ("new",), *([()] if in_place else [])}
    save_model(folder, "newest")
    assert names(folder) == ["README.md", "below", "config.json", "notes", "weights"]
    assert names(tmp_path) == ["model"]


def test_a_model_is_saved_through_a_link_and_into_the_cwd(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to("disk")
    save_model(tmp_path / "model", "old")
    assert (tmp_path / "model").is_symlink()
    monkeypatch.chdir(tmp_path / "disk")
    save_model(Path("."), "new")
    assert model_in(Path(".")) == model_in(tmp_path / "model") == {"new"}
    assert names(Path(".")) == ["below", "config.json", "weights"]


def test_saved_weights_are_readable_as_the_umask_says(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert modes == {0o666 & ~os.umask(os.umask(0o022))}

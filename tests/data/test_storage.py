"""Files behind URLs and their bounded local copies, tested with fsspec's file system in memory."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lumos.data.shards import remote as storage
from lumos.data.shards.remote import LocalCopies, Remote, location
from lumos.errors import RunError, UserError


@pytest.fixture
def remote():
    system = fsspec.filesystem("memory")
    system.pipe({f"/bucket/data/part-{n}.bin": bytes([n]) * 100 for n in range(5)} | {"/bucket/data/note.txt": b""})
    yield Remote("memory://bucket/data")
    system.rm("/bucket", recursive=True)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)


def passes(file: Path) -> None:
    pass


def test_a_remote_folder_is_used_like_a_path(remote, tmp_path):
    assert location("memory://bucket/data/") == remote
    assert location("some/folder") == Path("some/folder")
    names = sorted(remote.glob("part-*.bin"))
    assert [path.name for path in names] == [f"part-{n}.bin" for n in range(5)]
    assert names[3].read_bytes() == b"\x03" * 100
    assert names[3].read_bytes(last=7) == b"\x03" * 7
    assert names[3].read_bytes(last=700) == b"\x03" * 100
    assert Remote("memory://elsewhere").glob("*") == []
    with pytest.raises(FileNotFoundError):
        (remote / "none").read_bytes()
    with pytest.raises(RunError, match="memory://bucket/data/none does not exist any more"):
        (remote / "none").download(tmp_path / "none")


def test_brief_faults_are_retried_and_lasting_ones_are_one_line(remote, monkeypatch):
    calls, whole = [], MemoryFileSystem.cat_file

    def flaky(self, path, **options):
        calls.append(path)
        if len(calls) % 3:
            raise TimeoutError("no answer\nfor a while")
        return whole(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", flaky)
    assert (remote / "part-1.bin").read_bytes() == b"\x01" * 100
    assert len(calls) == 3
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    with pytest.raises(RunError, match=r"part-1.bin cannot be read, tried 2 times \(no answer\); check address, network and cred"):
        (remote / "part-1.bin").read_bytes()

    def denied(self, path, **options):
        raise PermissionError("Forbidden")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", denied)
    with pytest.raises(RunError, match=r"may not be read \(Forbidden\); check the credentials"):
        (remote / "part-1.bin").read_bytes()


def test_urls_that_cannot_work():
    with pytest.raises(UserError, match=r"nonsense://a cannot be read \(Protocol not known: nonsense"):
        Remote("nonsense://a").read_bytes()
    fsspec.register_implementation("lumos-test", "no_such_package.System", errtxt="Install no_such_package to use it")
    with pytest.raises(UserError, match=r"needs a package that is not installed \(Install no_such_package to use it\)"):
        Remote("lumos-test://a").read_bytes()


def test_least_recently_used_copies_are_removed_at_the_limit(remote, tmp_path):
    copies = LocalCopies(tmp_path, 300)

    def use(number: int) -> None:
        with copies.open(remote / f"part-{number}.bin", f"{number}.bin", passes) as file:
            assert file.read() == bytes([number]) * 100

    for number in (0, 1, 2):
        use(number)
        os.utime(tmp_path / f"{number}.bin", (number, number))
    use(0)
    use(3)
    assert {path.name for path in tmp_path.glob("*.bin")} == {"0.bin", "2.bin", "3.bin"}
    copies.limit = 50  # less than one: that one stays while it is in use
    use(4)
    assert {path.name for path in tmp_path.iterdir()} == {"4.bin", "4.bin.lock"}


def test_waiting_threads_share_a_download_that_passes_its_check(remote, tmp_path, monkeypatch):
    calls, whole = [], MemoryFileSystem.get_file

    def slow(self, *args, **options):
        calls.append(args)
        threading.Event().wait(0.05)
        whole(self, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", slow)
    several = [LocalCopies(tmp_path, 1000) for _ in range(4)]
    threads = [threading.Thread(target=c.fetch, args=(remote / "part-1.bin", "1.bin", passes)) for c in several]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1

    def fails(file: Path) -> None:
        raise RunError(f"{file.stat().st_size} bytes arrived")

    with pytest.raises(RunError, match="100 bytes arrived"):
        several[0].fetch(remote / "part-2.bin", "2.bin", fails)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == ["1.bin"]


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    for name, age in ((".old.bin.1.part", 2 * 86400), (".new.bin.1.part", 60)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    LocalCopies(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == [".new.bin.1.part"]

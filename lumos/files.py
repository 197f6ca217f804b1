"""Files that are either whole or not there: written under a temporary name beside the target, then renamed."""

from __future__ import annotations

import glob
import json
import os
import shutil
import uuid
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lumos.errors import RunError, UserError

NAME_LENGTH = 40  # of a file's name that its temporary one keeps


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it takes the place of ``path`` when the block ends without an error.

    Whatever ends the block early (Ctrl-C included), nothing is left behind and an older file stays as it was. Missing
    parent folders are created. UserError if the place cannot be written to, RunError if writing fails half-way.
    """
    path = Path(path)
    _make_parents(path)
    temporary = _beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {_reason(error)}; check free space and permissions, or choose another place"
        ) from error
    finally:
        _remove(temporary)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """As `replacing`, for a folder: yields an empty one, which in the end takes the place of `path`, an older folder included."""
    path = Path(path)
    old = path.with_name(f".old-{path.name}")
    if len(path.name) <= NAME_LENGTH:  # a longer one may be another's
        for left_over in path.parent.glob(f".{glob.escape(path.name)}.????????.part"):  # of killed processes
            _remove(left_over)
    with replacing(path) as writing:
        writing.mkdir()
        yield writing
        _remove(old)
        if path.exists():
            os.replace(path, old)
    _remove(old)


@contextmanager
def only_writer(folder: str | Path, what: str) -> Iterator[None]:
    """Keep a second `what` out of the folder, which is made if need be; the lock goes with the process, however that ends.

    RunError if another one is there, UserError if the folder cannot be written to. On Windows nothing is locked.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}; choose another folder") from error
    with lock:
        try:
            import fcntl
        except ImportError:
            yield
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"another {what} is writing into {folder}; wait for it, stop it, or use another folder") from error
        yield


def file_identity(path: str | Path) -> Hashable:
    """What all names of one file have in common: its device and number there if it exists, else where it would be."""
    try:
        found = Path(path).stat()
    except OSError:
        return Path(path).resolve()
    return found.st_dev, found.st_ino


def check_writable(path: str | Path) -> None:
    """UserError if ``path`` could not be written later; leaves nothing behind. Call it before a long run starts."""
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; give the name of a file in it")
        folder = path.parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        with suppress(FileNotFoundError):  # the probe's name is shorter: this one sees a name that is too long
            (folder / path.name).lstat()
        probe = _beside(folder / path.name)
        try:
            probe.touch(exist_ok=False)
        finally:
            _remove(probe)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot write {path}: {_reason(error)}; choose another place for it") from error


def check_outputs(pictures: Iterable[str | Path | None] = (), others: Iterable[str | Path | None] = ()) -> None:
    """UserError unless every file that is named can be written later, no two are one, and the pictures are called .png."""
    pictures, others = ([path for path in paths if path is not None] for paths in (pictures, others))
    for path in pictures:
        if Path(path).suffix.lower() != ".png":
            raise UserError(f"{path} must end in .png")
    seen: dict[Hashable, str | Path] = {}
    for path in (*pictures, *others):
        check_writable(path)
        identity = file_identity(path)
        if identity in seen:
            raise UserError(f"{seen[identity]} and {path} are one file; name two")
        seen[identity] = path


def check_new(out: str | Path) -> None:
    """UserError if the folder ``--out`` exists, or could not be written later."""
    if Path(out).exists():
        raise UserError(f"{out} exists already; name another --out, or move it away")
    check_writable(out)


def user_cache(name: str) -> Path:
    """The folder for copies of what can be fetched again: lumos/`name` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lumos" / name


def parse_json(text: str, where: str) -> Any:
    """UserError, which begins with `where`, if the text is no JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error


def read_text(path: str | Path, what: str) -> str:
    """UserError if the file cannot be read as UTF-8; `what` says what it should be."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as {what}: {getattr(error, 'strerror', None) or error}") from error


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write ``data`` whole or not at all; returns the path."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return Path(path)


def write_json(path: str | Path, data: Any) -> Path:
    """Write ``data`` as indented JSON, whole or not at all; what JSON does not know (a path) becomes text."""
    text = json.dumps(data, indent=2, ensure_ascii=False, default=str)
    return write_bytes(path, (text + "\n").encode("utf-8", "replace"))


def _make_parents(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {path.parent}: {_reason(error)}; choose another place") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name[:NAME_LENGTH]}.{uuid.uuid4().hex[:8]}.part")


def _remove(path: Path) -> None:
    """Remove what is there, if anything; never hides the error that led here."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        pass

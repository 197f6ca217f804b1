"""Files that are either whole or not there: written under a temporary name beside the target, then renamed."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import stat
import uuid
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from lumos.errors import SHOWN_LENGTH, NotFound, RunError, UserError

NAME_LENGTH = 40  # of a file's name that its temporary one keeps
MAX_DOCUMENT_BYTES = 2**28  # of a JSON or text file that is read whole
MAX_DOCUMENT_DEPTH = 64
MAX_DOCUMENT_ENTRIES = 10_000_000
MAX_YAML_LENGTH = 2**20
MAX_YAML_ALIASES = 1000


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


def open_regular(path: str | Path) -> BinaryIO:
    """A regular file, opened to read its bytes. OSError or ValueError for all else; a pipe is never waited for."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return open(descriptor, "rb")


def read_bytes(path: str | Path, what: str, limit: int = MAX_DOCUMENT_BYTES) -> bytes:
    """A regular file's bytes, at most `limit`; `what` says what it should be.

    NotFound if there is none; UserError if it is a folder, a pipe or a device, too large, or unreadable. A pipe is never
    waited for.
    """
    try:
        with open_regular(path) as file:
            data = file.read(limit + 1)
    except FileNotFoundError as error:
        raise NotFound(f"cannot read {path} as {what}: there is no such file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as {what}: {_reason(error)}") from error
    if len(data) > limit:
        raise UserError(f"cannot read {path} as {what}: it has more than the {limit:,} bytes that are allowed")
    return data


def read_text(path: str | Path, what: str, limit: int = MAX_DOCUMENT_BYTES) -> str:
    """As `read_bytes`, decoded as UTF-8; UserError if it is not."""
    try:
        return read_bytes(path, what, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path} as {what}: {error}") from error


def read_json(path: str | Path, what: str, limit: int = MAX_DOCUMENT_BYTES) -> Any:
    """The value of a JSON file; errors as in `read_bytes` and `parse_json`."""
    return parse_json(read_text(path, what, limit), str(path))


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text. UserError, which begins with `where`, if it is no JSON or nested over MAX_DOCUMENT_DEPTH."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for a number of thousands of digits
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{where} is not valid JSON: {why}") from error
    if text.count("[") + text.count("{") > MAX_DOCUMENT_DEPTH:
        _check_nesting(value, where, "JSON")
    return value


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. UserError, which begins with `where`, if it is no YAML, too long or nested too deeply.

    Aliases count each time they are used, so that a few lines cannot stand for a billion entries.
    """
    if len(text) > MAX_YAML_LENGTH:
        raise UserError(f"{where} is not valid YAML: it has more than the {MAX_YAML_LENGTH:,} characters that are allowed")
    try:
        value = yaml.load(text, Loader=_BoundedLoader)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:  # ValueError: dates and numbers that are none
        why = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise UserError(f"{where} is not valid YAML: {why[:SHOWN_LENGTH]}") from error
    _check_nesting(value, where, "YAML")
    return value


class _BoundedLoader(yaml.SafeLoader):
    """yaml.SafeLoader that refuses texts in which aliases multiply while they are read."""

    aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.aliases += self.check_event(yaml.AliasEvent)
        if self.aliases > MAX_YAML_ALIASES:
            raise yaml.YAMLError(f"it uses more than {MAX_YAML_ALIASES:,} aliases")
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: Any) -> None:
        super().flatten_mapping(node)  # copies what `<<` names
        if len(node.value) > MAX_YAML_LENGTH // 100:
            raise yaml.YAMLError("it merges mappings into one that is too large")


def _check_nesting(value: Any, where: str, language: str) -> None:
    """UserError for containers in containers over MAX_DOCUMENT_DEPTH, and for over MAX_DOCUMENT_ENTRIES entries in all."""
    level, entries = [value], 0
    for _ in range(MAX_DOCUMENT_DEPTH + 2):
        below = []
        for container in level:
            if isinstance(container, (dict, list)):
                entries += len(container)
                if entries > MAX_DOCUMENT_ENTRIES:
                    raise UserError(
                        f"{where} is not valid {language} here: it stands for more than {MAX_DOCUMENT_ENTRIES:,} entries"
                    )
                below += container.values() if isinstance(container, dict) else container
        if not below:
            return
        level = below
    raise UserError(f"{where} is not valid {language} here: it is nested more than {MAX_DOCUMENT_DEPTH} levels deep")


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

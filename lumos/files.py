"""Write files atomically and read files with limits.

A file is written under a temporary name in the folder of the target and then renamed. So the target
is complete or does not exist, even after a crash.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from lumos.durable import (
    is_temporary,
    make_folder,
    put_back,
    put_file,
    put_folder,
    remove,
    sweep,
    sync_folder,
    sync_tree,
    temporary_name,
)
from lumos.errors import SHOWN_LENGTH, NotFound, RunError, UserError, shown
from lumos.locks import LOCK, Lock, LockHeld
from lumos.wording import encoding_of, text_of

CONFIG = "config.json"
MAX_DOCUMENT_BYTES = 2**28  # for a JSON or text file
MAX_CONFIG_BYTES = 2**20  # for a config of a model
MAX_DOCUMENT_DEPTH = 64
MAX_DOCUMENT_ENTRIES = 10_000_000
MAX_YAML_LENGTH = 2**20
MAX_YAML_ALIASES = 1000


@contextmanager
def replacing(path: str | Path, put: Callable[[Path, Path], object] = put_file) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; rename it to ``path`` when the block ends without an error.

    If the block ends with an error or Ctrl-C, the temporary file is removed and an older file stays as it
    was. Temporary files of killed processes are removed by the next call for the same path. After a power
    cut, ``path`` is the older or the new file. Missing parent folders are created. Raises UserError if the
    parent folder cannot be created, RunError if writing fails. `put` is what renames the file.
    """
    with _replacing(Path(path), put) as temporary:
        yield temporary


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yield a new empty folder; rename it to ``path`` when the block ends without an error.

    The folder replaces an older one. On Linux, ``path`` is at every moment either the older or the new
    folder. If the system cannot exchange folders, a kill may leave the older folder under another name;
    the next call restores it first. Errors are those of `replacing`, and UserError if ``path`` is a file.
    """
    path = Path(path)
    with _replacing(path, put_folder) as writing:
        put_back(path)
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file, but a folder is to be written there; choose another name")
        writing.mkdir()
        yield writing


@contextmanager
def updating_folder(path: str | Path, of_this: Callable[[str], bool]) -> Iterator[Path]:
    """Yield a new empty folder as `replacing_folder` does, but keep other entries of an older folder.

    `of_this(name)` says whether an entry is replaced. Entries for which it is false stay, for example a
    README or a .git.

    A folder that cannot be renamed (a mount point, the current folder, a folder in a read-only folder) is
    updated in place. Then config.json is removed first and written last, so that a kill may leave a folder
    without config.json, but never one that mixes old and new files and looks complete.
    """
    path = Path(path)
    if is_temporary(path):  # a caller renames the whole folder later
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    path = Path(os.path.realpath(path))
    if path.is_dir() and not _can_be_renamed(path):
        with _replacing(path / "model", lambda source, _: _update(source, path, of_this)) as writing:
            writing.mkdir()
            yield writing
        return
    with replacing_folder(path) as writing:
        yield writing
        for entry in path.iterdir() if path.is_dir() else ():
            if not of_this(entry.name) and not os.path.lexists(writing / entry.name):
                _copy(entry, writing / entry.name)


def _can_be_renamed(folder: Path) -> bool:
    return os.access(folder.parent, os.W_OK | os.X_OK) and not folder.is_mount() and not folder.samefile(Path.cwd())


def _update(source: Path, folder: Path, of_this: Callable[[str], bool]) -> None:
    sync_tree(source)
    (folder / CONFIG).unlink(missing_ok=True)
    sync_folder(folder)
    for old in folder.iterdir():
        if of_this(old.name) and not os.path.lexists(source / old.name):
            remove(old)
    for entry in sorted(source.iterdir(), key=lambda entry: entry.name == CONFIG):
        (put_folder if entry.is_dir() else put_file)(entry, folder / entry.name)


def _copy(source: Path, target: Path) -> None:
    """Hard-link a file, or all files of a folder, to `target`; copy those that cannot be linked."""
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=_copy_file)
    else:
        _copy_file(source, target)


def _copy_file(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


@contextmanager
def _replacing(path: Path, put: Callable[[Path, Path], object]) -> Iterator[Path]:
    _make_parents(path)
    sweep(path)
    temporary = temporary_name(path)
    try:
        yield temporary
        put(temporary, path)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {_reason(error)}; check free space and permissions, or choose another place"
        ) from error
    finally:
        remove(temporary)


@contextmanager
def only_writer(folder: str | Path, what: str) -> Iterator[None]:
    """Lock a folder for the block, so that no other `what` (for example "training run") writes into it.

    The folder is created if it does not exist. The lock ends with the process, even if that is killed.
    Raises RunError if another process holds the lock, UserError if the folder cannot be written to.
    """
    folder = Path(folder)
    try:
        make_folder(folder)
        lock = Lock(folder)
    except LockHeld as busy:
        raise RunError(f"another {what} is writing into {folder}{busy}; wait for it, stop it, or use another folder") from busy
    except OSError as error:
        why = f"{LOCK} in it is a link" if error.errno == errno.ELOOP else _reason(error)
        raise UserError(f"cannot write into {folder}: {why}; choose another folder") from error
    try:
        yield
    finally:
        lock.release()


def file_identity(path: str | Path) -> Hashable:
    """Return a value that is the same for all names of a file: its device and inode.

    For a file that does not exist yet, this is the resolved path.
    """
    try:
        found = Path(path).stat()
    except OSError:
        return Path(path).resolve()
    return found.st_dev, found.st_ino


def check_writable(path: str | Path) -> None:
    """Raise UserError if the file ``path`` cannot be written. Call it before a long run; it leaves no file."""
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; give the name of a file in it")
        folder = path.parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        with suppress(FileNotFoundError):  # raises OSError for a name that is too long; the probe's name is shorter
            (folder / path.name).lstat()
        probe = temporary_name(folder / path.name)
        try:
            probe.touch(exist_ok=False)
        finally:
            remove(probe)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot write {path}: {_reason(error)}; choose another place for it") from error


def check_outputs(pictures: Iterable[str | Path | None] = (), others: Iterable[str | Path | None] = ()) -> None:
    """Raise UserError unless all files can be written, all are different, and the pictures end in .png."""
    pictures, others = ([path for path in paths if path is not None] for paths in (pictures, others))
    for path in pictures:
        if Path(path).suffix.lower() != ".png":
            raise UserError(f"{path} must end in .png")
    seen: dict[Hashable, str | Path] = {}
    for path in (*pictures, *others):
        check_writable(path)
        identity = file_identity(path)
        if identity in seen:
            raise UserError(f"{seen[identity]} and {path} are one file; give two different files")
        seen[identity] = path


def check_new(out: str | Path) -> None:
    """Raise UserError if the folder ``--out`` exists or cannot be written."""
    if Path(out).exists():
        raise UserError(f"{out} exists already; name another --out, or move it away")
    check_writable(out)


def user_cache(name: str) -> Path:
    """Return the folder lumos/`name` in the user's cache folder, for files that can be downloaded again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lumos" / name


def open_regular(path: str | Path, *, pipes: bool = False) -> BinaryIO:
    """Open a regular file to read bytes.

    Raises OSError or ValueError for anything else, for example a folder, a device or a pipe, without
    waiting for data. With `pipes`, a pipe is allowed, and opening it waits for its writer.
    """
    wait = 0 if pipes else getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, os.O_RDONLY | wait | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or (pipes and stat.S_ISFIFO(mode))):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return open(descriptor, "rb")


def read_bytes(path: str | Path, what: str, limit: int = MAX_DOCUMENT_BYTES, *, pipes: bool = False) -> bytes:
    """Return the bytes of a regular file of at most `limit` bytes. `what` describes the file in messages.

    Raises NotFound if there is no such file, UserError if it is a folder, a pipe or a device, too large,
    or unreadable. `pipes` allows a pipe: set it for a path that the user gives, as in `<(command)`.
    """
    try:
        with open_regular(path, pipes=pipes) as file:
            data = file.read(limit + 1)
    except FileNotFoundError as error:
        raise NotFound(f"cannot read {path} as {what}: there is no such file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as {what}: {_reason(error)}") from error
    if len(data) > limit:
        raise UserError(f"cannot read {path} as {what}: it has more than the {limit:,} bytes that are allowed")
    return data


def read_text(path: str | Path, what: str, limit: int = MAX_DOCUMENT_BYTES, *, pipes: bool = False) -> str:
    """Return the text of a file. Errors are those of `read_bytes`, and UserError for bytes that `text_of` cannot decode."""
    try:
        return text_of(read_bytes(path, what, limit, pipes=pipes))
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path} as {what}: {error}; save it as UTF-8") from error


def read_prompts(path: str | Path, what: str, limit: int = MAX_DOCUMENT_BYTES, *, pipes: bool = False) -> str:
    """Return the text of a file of prompts or captions, as `read_text`, without byte order marks between its lines.

    Files that are joined have such marks inside. Lines end in a line feed, whatever the system of the file. Raises UserError also
    for characters that no prompt has: the mark of lost characters (U+FFFD) and zeros.
    """
    text = read_text(path, what, limit, pipes=pipes).replace("\ufeff", "")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if (wrong := re.search("[\ufffd\0]", text)) is not None:
        line = text.count("\n", 0, wrong.start()) + 1
        raise UserError(
            f"cannot read {path} as {what}: line {line} has U+{ord(wrong[0]):04X}, because an earlier conversion lost characters; "
            "write them again and save it as UTF-8"
        )
    return text


def existing_path(folder: Path, written: str) -> Path:
    """Return the path below `folder` that a user wrote into a file, in the form in which it exists, else as it is written.

    Windows writes backslashes, and macOS writes accents as characters of their own.
    """
    for slashed in (written, written.replace("\\", "/")):
        with suppress(OSError, ValueError):
            if (found := folder / slashed).exists() or (found := _in_forms_that_exist(folder, slashed)).exists():
                return found
    return folder / written


def _in_forms_that_exist(folder: Path, written: str) -> Path:
    """Return folder / written with each part in the Unicode form in which it exists; a part that does not exist stays."""
    found, *parts = (folder / written).parts
    path = Path(found)
    for part in parts:
        forms = (part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD")))
        path = next((path / form for form in forms if (path / form).exists()), path / part)
    return path


def read_json(path: str | Path, what: str, limit: int = MAX_DOCUMENT_BYTES) -> Any:
    """Return the value of a JSON file. Errors are those of `read_text` and `parse_json`."""
    return parse_json(read_text(path, what, limit), str(path))


def check_model_config(place: Path) -> None:
    """Raise UserError if a model's config, the file or config.json in the folder, is too large, no JSON, or holds no object.

    The same error is raised for an encoding that transformers does not read. Nothing is checked if there is no such file, because
    the name may be a repository on the hub.
    """
    file = place / "config.json" if place.is_dir() else place
    if not file.exists():
        return
    data = read_bytes(file, "a model's config", MAX_CONFIG_BYTES)
    if not isinstance(found := read_json(file, "a model's config", MAX_CONFIG_BYTES), dict):
        raise UserError(f"{file} holds {shown(found, 60)}; a model's config is a JSON object")
    if (encoding := encoding_of(data)) != ("utf-8", 0):
        mark = " with a byte order mark" if encoding[1] else ""
        raise UserError(f"{file} is {encoding[0].upper()}{mark}; save it as UTF-8 without a mark")


def parse_json(text: str, where: str) -> Any:
    """Return the value of a JSON text.

    Raises UserError if it is not JSON, has too many entries or is nested over MAX_DOCUMENT_DEPTH levels
    deep. The message begins with `where`.
    """
    try:
        value = json.loads(text, object_pairs_hook=_each_key_once)
    except (ValueError, RecursionError) as error:  # ValueError also for a number of thousands of digits
        raise UserError(f"{where} is not valid JSON: {_why_not(error)}") from error
    if text.count("[") + text.count("{") > MAX_DOCUMENT_DEPTH:
        _check_nesting(value, where, "JSON")
    return value


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the entries of a JSON object; ValueError for a key with two different values, of which one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs) and (wrong := next((key for key, value in pairs if found[key] != value), None)) is not None:
        raise ValueError(f"the key {shown(wrong, 60)} stands twice in an object, with different values")
    return found


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of a YAML text.

    Raises UserError if it is not YAML, too long or nested too deeply. The message begins with `where`.
    The entries behind an alias count each time the alias is used, so that a few lines cannot expand to a
    billion entries.
    """
    if len(text) > MAX_YAML_LENGTH:
        raise UserError(f"{where} is not valid YAML: it has more than the {MAX_YAML_LENGTH:,} characters that are allowed")
    try:
        value = yaml.load(text, Loader=_BoundedLoader)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:  # ValueError: impossible dates and numbers
        raise UserError(f"{where} is not valid YAML: {' '.join(_why_not(error).split())[:SHOWN_LENGTH]}") from error
    _check_nesting(value, where, "YAML", MAX_YAML_LENGTH)  # only aliases give more entries than characters
    return value


def _why_not(error: Exception) -> str:
    """Return in words for a user why a text is no document."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if str(error).startswith("Exceeds the limit"):  # Python's own words tell how to raise its limit
        return "it has a number of thousands of digits; shorten it"
    return str(error)


class _BoundedLoader(yaml.SafeLoader):
    """A yaml.SafeLoader that refuses texts in which aliases or merges expand to too many entries."""

    aliases, depth = 0, 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DOCUMENT_DEPTH + 2:
            raise RecursionError
        try:
            return self._compose(parent, index)
        finally:
            self.depth -= 1

    def _compose(self, parent: Any, index: Any) -> Any:
        self.aliases += self.check_event(yaml.AliasEvent)
        if self.aliases > MAX_YAML_ALIASES:
            raise yaml.YAMLError(f"it uses more than {MAX_YAML_ALIASES:,} aliases")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> Any:
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if (key.tag, key.value) in seen:  # one of the two values would be lost
                    line = key.start_mark.line + 1
                    raise yaml.YAMLError(f"the key {shown(key.value, 60)} stands twice in a section, again in line {line}")
                seen.add((key.tag, key.value))
        return node

    def flatten_mapping(self, node: Any) -> None:
        super().flatten_mapping(node)  # copies the entries of the mappings that `<<` merges
        if len(node.value) > MAX_YAML_LENGTH // 100:
            raise yaml.YAMLError("it merges mappings into one that is too large")


def _check_nesting(value: Any, where: str, language: str, limit: int = MAX_DOCUMENT_ENTRIES) -> None:
    """Raise UserError if a value is nested over MAX_DOCUMENT_DEPTH levels deep or has over `limit` entries in total."""
    level, entries = [value] if isinstance(value, dict | list) else [], 0
    for _ in range(MAX_DOCUMENT_DEPTH):
        below = []
        for container in level:
            entries += len(container)
            if entries > limit:
                raise UserError(f"{where} is not valid {language} here: it stands for more than {limit:,} entries")
            inside = container.values() if isinstance(container, dict) else container
            below += [value for value in inside if isinstance(value, dict | list)]
        if not below:
            return
        level = below
    raise UserError(f"{where} is not valid {language} here: it is nested more than {MAX_DOCUMENT_DEPTH} levels deep")


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write ``data`` to a file atomically and return the path."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return Path(path)


def write_json(path: str | Path, data: Any) -> Path:
    """Write ``data`` as indented JSON atomically and return the path. Values that JSON lacks, such as paths, become text."""
    text = json.dumps(data, indent=2, ensure_ascii=False, default=str)
    if not text.replace("\n", "").isprintable():  # escape control characters, which could act on a terminal
        text = "".join(c if c == "\n" or c.isprintable() else json.dumps(c)[1:-1] for c in text)
    return write_bytes(path, (text + "\n").encode("utf-8"))


def _make_parents(path: Path) -> None:
    try:
        make_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot create the folder {path.parent}: {_reason(error)}; choose another place") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


HASHED = (".json", ".safetensors", ".model", ".jit")
"""The suffixes of the files that models and tokenizers consist of. A README or a picture in the folder does not count."""


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, as sha256sum prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(folder: Path, files: list[Path] | None = None) -> str:
    """Return the SHA-256 of the sorted lines `<path in the folder> <its SHA-256>` of `files`.

    `files` None means all files in the folder with a suffix in HASHED.
    """
    if files is None:
        files = [path for path in folder.rglob("*") if path.is_file() and path.suffix in HASHED]
    lines = sorted(f"{path.relative_to(folder).as_posix()} {file_sha256(path)}\n" for path in set(files))
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

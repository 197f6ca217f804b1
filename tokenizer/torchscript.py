"""Tensors of TorchScript archives, read without `torch.jit.load`, which compiles and runs the source that an archive brings.

An archive is a zip file. `NAME/data.pkl` holds the model's objects as a pickle (`tokenizer.pickled`), `NAME/data/0`, `1` ... the
raw numbers of its tensors. Both are stored, not compressed. The source (`NAME/code/`) and its constants are never read.
"""

from __future__ import annotations

import os
import struct
import sys
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lumos.errors import RunError, UserError, shown
from tokenizer.pickled import Record, Refused, StorageReference, TensorReference, read_pickled

# The published network has 322 tensors, about 100 kB of structure and as much of directory. What is read takes up to about
# a hundred times the memory of either.
MAX_DIRECTORY_BYTES = 2**20
MAX_STRUCTURE_BYTES = 2**20
MAX_DEPTH = 64  # of modules in modules
MAX_NAMES = 2**16  # of modules and tensors, each counted as often as it is reached
MAX_KEY_LENGTH = 500
PIECE = 2**20  # bytes that are read at once


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The tensors that are attributes of the archive's modules, on the CPU, under their dotted names.

    Names, order and tensors are those of `torch.jit.load(path).state_dict()` for what `torch.jit.trace` makes, the published
    form. The structure does not tell a plain tensor attribute, which only a scripted module can have, from a buffer (the source
    alone does): such an attribute is given too. Tensors that share their numbers in the archive share memory here.

    Raises UserError if the archive holds anything that such an archive has no need of, RunError if it is damaged.
    """
    try:
        with open(path, "rb") as file:
            _check_directory(file)
            with zipfile.ZipFile(file) as archive:
                return _read(archive, os.fstat(file.fileno()).st_size)
    except Refused as error:
        raise UserError(
            f"{path} is no archive of weights as published: {error}; download it again, or take weights as safetensors"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, OverflowError, struct.error, zipfile.BadZipFile) as error:
        reason = shown(str(error)).strip("'\"") or type(error).__name__  # ValueError: a name that is not UTF-8, a place before 0
        raise RunError(f"cannot read the video tokenizer's weights in {path}: {reason}") from error


def _check_directory(file: BinaryIO) -> None:
    """Refused unless the zip's directory is as torch writes it: at the very end, without a comment, of bounded size.

    zipfile holds all of the directory in memory, at many times its size, before it shows an entry.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 98, 0))
    tail = file.read().rjust(98, b"\0")
    record, locator, end = tail[:56], tail[56:76], tail[76:]  # the first two: their 64-bit form, which may be missing
    if end[:4] != b"PK\5\6":
        raise zipfile.BadZipFile("it does not end as a zip file does; it is cut off, or another kind of file")
    length, offset, comment = struct.unpack("<12xIIH", end)
    begin_of_end = size - 22
    if locator[:4] == b"PK\6\7":
        if record[:4] != b"PK\6\6":
            raise Refused("its zip directory has two ends that do not agree")
        length, offset = struct.unpack("<40xQQ", record)
        begin_of_end = size - 98
    if comment or offset + length != begin_of_end:
        raise Refused("its zip directory is not where torch writes it")
    if length > MAX_DIRECTORY_BYTES:
        raise Refused(f"its zip directory has {length:,} bytes, over the {MAX_DIRECTORY_BYTES:,} that are allowed")


def _read(archive: zipfile.ZipFile, archive_bytes: int) -> dict[str, Tensor]:
    entries = _entries(archive)
    if "byteorder" in entries and _read_entry(archive, entries["byteorder"], 6).numpy().tobytes() != b"little":
        raise Refused("its numbers are not little-endian")
    if sys.byteorder != "little":
        raise Refused("its numbers are little-endian, unlike this machine's")
    if "data.pkl" not in entries:
        raise Refused("it has no data.pkl")
    root = read_pickled(_read_entry(archive, entries["data.pkl"], MAX_STRUCTURE_BYTES).numpy().tobytes())
    references = named_tensors(root)
    used: dict[str, zipfile.ZipInfo] = {}
    for reference in references.values():
        used[reference.storage.key] = _entry_of(reference.storage, entries)
    if sum(entry.file_size for entry in used.values()) > archive_bytes:  # entries that lie in one another
        raise Refused("its tensors take more bytes than the file has")
    numbers = {key: _read_entry(archive, entry, archive_bytes) for key, entry in used.items()}
    return {key: _tensor(reference, numbers[reference.storage.key]) for key, reference in references.items()}


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The entries by their names in the archive's one folder."""
    found: dict[str, zipfile.ZipInfo] = {}
    infos = archive.infolist()
    top = infos[0].filename.partition("/")[0] if infos else ""
    for entry in infos:
        folder, *parts = entry.filename.split("/")
        name = "/".join(parts)
        if folder != top or not parts or not {"", ".", ".."}.isdisjoint((folder, *parts)) or entry.orig_filename != entry.filename:
            raise Refused(f"its entry {shown(entry.filename)} is not where torch writes one")
        if name in found:
            raise Refused(f"its entry {shown(entry.filename)} is there twice")
        found[name] = entry
    if not infos or min(entry.header_offset for entry in infos) > 0:
        raise Refused("it does not begin with an entry")
    return found


def _entry_of(storage: StorageReference, entries: dict[str, zipfile.ZipInfo]) -> zipfile.ZipInfo:
    name = f"data/{storage.key}"
    if name not in entries:
        raise Refused(f"it has no entry {shown(name)}")
    stored, needed = entries[name].file_size, storage.numel * storage.dtype.itemsize
    if stored != needed:
        raise Refused(f"its entry {shown(name)} has {stored:,} bytes, its tensors need {needed:,}")
    return entries[name]


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, limit: int) -> Tensor:
    """The bytes of an entry, uint8 [size], compared with their checksum."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 0x2061:
        raise Refused(f"its entry {shown(entry.filename)} is compressed or encrypted")
    if entry.file_size > limit:
        raise Refused(f"its entry {shown(entry.filename)} has {entry.file_size:,} bytes, over the {limit:,} that are allowed")
    data = torch.empty(entry.file_size, dtype=torch.uint8)
    view, position = memoryview(data.numpy()), 0
    with archive.open(entry) as file:
        while position < len(view):
            count = file.readinto(view[position : position + PIECE])
            if not count:
                raise EOFError(f"{entry.filename} is cut off")
            position += count
    return data


def _tensor(reference: TensorReference, data: Tensor) -> Tensor:
    """A view of the bytes; nothing is copied, so a stride of 0 takes no memory either."""
    if reference.storage.dtype == torch.bool and len(data) and data.max() > 1:
        raise Refused(f"its entry {shown(f'data/{reference.storage.key}')} has truth values that are neither 0 nor 1")
    return data.view(reference.storage.dtype).as_strided(reference.size, reference.stride, reference.offset)


def named_tensors(root: object) -> dict[str, TensorReference]:
    """The tensor attributes of a module and, after them, of the modules in it, under their dotted names."""
    if not isinstance(root, Record):
        raise Refused("it holds no module")
    found: dict[str, TensorReference] = {}
    steps = 0

    def walk(record: Record, prefix: str, depth: int) -> None:
        nonlocal steps
        if record.attributes is None:
            raise Refused(f"it has an object of {shown(record.class_name)} without attributes")
        if depth > MAX_DEPTH:
            raise Refused(f"its modules are nested over {MAX_DEPTH} deep")
        modules = []
        for name, value in record.attributes.items():
            if isinstance(value, TensorReference | Record):
                key, steps = f"{prefix}{name}", steps + 1
                if not (isinstance(name, str) and name and name.isprintable() and "." not in name and len(key) <= MAX_KEY_LENGTH):
                    raise Refused(f"it has an attribute {shown(key)}")
                if steps > MAX_NAMES:
                    raise Refused(f"it has over {MAX_NAMES:,} modules and tensors")
                if isinstance(value, Record):
                    modules.append((value, key))
                else:
                    found[key] = value
        for module, key in modules:
            walk(module, f"{key}.", depth + 1)

    walk(root, "", 0)
    return found

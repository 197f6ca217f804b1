"""Read the tensors of TorchScript archives without `torch.jit.load`.

`torch.jit.load` compiles and runs the source code in an archive, so it is not safe for files from
others. An archive is a zip file without compression. `NAME/data.pkl` holds the model's objects as a
pickle (`tokenizer.pickled`); `NAME/data/0`, `NAME/data/1`, ... hold the raw numbers of its tensors.
The source code (`NAME/code/`) and its constants are never read.
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

# The published network has 322 tensors, about 100 kB of structure (data.pkl) and 100 kB of zip directory. Python objects
# made of either take up to about a hundred times its size, so both are limited.
MAX_DIRECTORY_BYTES = 2**20
MAX_STRUCTURE_BYTES = 2**20
MAX_DEPTH = 64  # nested modules
MAX_NAMES = 2**16  # modules and tensors; one that is reached twice counts twice
MAX_KEY_LENGTH = 500
PIECE = 2**20  # bytes per read


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Return the tensor attributes of the archive's modules, on the CPU, by their dotted names.

    For a module from `torch.jit.trace`, the published form, names, order and tensors are those of
    `torch.jit.load(path).state_dict()`. A scripted module may also have plain tensor attributes. Only
    the source code tells these from buffers, so they are returned too. Tensors that share a storage
    in the archive share memory here.

    Raises UserError if the archive holds anything that weights do not need, RunError if it is damaged.
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
        # ValueError: a name that is not UTF-8, or an entry at a negative position
        reason = shown(str(error)).strip("'\"") or type(error).__name__
        raise RunError(f"cannot read the video tokenizer's weights in {path}: {reason}") from error


def _check_directory(file: BinaryIO) -> None:
    """Raise Refused unless the zip directory is where torch writes it, has no comment and is small enough.

    `zipfile` reads the whole directory into memory, where it takes many times its size, before it
    returns an entry. So the size must be checked first. torch writes the directory at the end.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 98, 0))
    tail = file.read().rjust(98, b"\0")
    record, locator, end = tail[:56], tail[56:76], tail[76:]  # record and locator exist in the 64-bit form of zip only
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
    if sum(entry.file_size for entry in used.values()) > archive_bytes:  # entries overlap in the file
        raise Refused("its tensors take more bytes than the file has")
    numbers = {key: _read_entry(archive, entry, archive_bytes) for key, entry in used.items()}
    return {key: _tensor(reference, numbers[reference.storage.key]) for key, reference in references.items()}


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the entries by their names inside the only folder of the archive."""
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
    """Return the bytes of an entry as uint8 [size]; `zipfile` checks their checksum."""
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
    """Return the tensor as a view of the bytes. Nothing is copied, so a stride of 0 cannot use up memory."""
    if reference.storage.dtype == torch.bool and len(data) and data.max() > 1:
        raise Refused(f"its entry {shown(f'data/{reference.storage.key}')} has truth values that are neither 0 nor 1")
    return data.view(reference.storage.dtype).as_strided(reference.size, reference.stride, reference.offset)


def named_tensors(root: object) -> dict[str, TensorReference]:
    """Return the tensor attributes of a module, then those of its submodules, by their dotted names."""
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

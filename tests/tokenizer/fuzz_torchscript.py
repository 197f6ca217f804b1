"""Reads mutated archives and checks each outcome: python tests/tokenizer/fuzz_torchscript.py COUNT FOLDER [SEED].

Each is either refused in one clear line or gives exactly the right tensors, with at most SPARE more bytes of memory than the
process has after its first archive. Prints the number of each outcome.
"""

from __future__ import annotations

import pickletools
import random
import struct
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import psutil
import torch
from archives import entries_of, module, packed, read_by_pickle, same_tensors, structure, tensor, text, traced_bytes, with_structure

from lumos.errors import RunError, UserError
from tokenizer.torchscript import read_torchscript

SPARE = 128 * 2**20
HOSTILE = (
    b"cos\nsystem\n(X\x04\x00\x00\x00truetR", b"cbuiltins\neval\n", b"c__torch__\nX\n)\x81}b", b"(lp0\n", b"ios\nsystem\n", b"\x93",
    b"X\xff\xff\xff\xff", b"r\xff\xff\xff\xffj\xff\xff\xff\xff", b"(" * 50, b"]" * 50, b"}q\xf0h\xf0h\xf0s", b"]q\xf1h\xf1a",
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"0", b"2", b".", b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f", b"t", b"R",
    b"b",
)  # fmt: skip
NUMBERS = (0, 1, 2, 255, 2**16, 2**31 - 1, 2**32 - 1, 10**12, 2**62, -1, -(2**63))


LARGE = 2**20 - 100
HEAVY = {
    "dicts": b"}" * LARGE,
    "lists in lists": b"]" * (LARGE // 2) + b"a" * (LARGE // 2 - 1),
    "tuples in tuples": b")" + b"\x85" * LARGE,
    "many tuples": b"N\x85" * (LARGE // 2),
    "marks": b"(" * LARGE,
    "stored values": b"]" + b"".join(b"r" + i.to_bytes(4, "little") for i in range(LARGE // 5)),
    "objects in objects": b"c__torch__\nA\nq\0" + b")\x81}X\1\0\0\0ah\0" * (LARGE // 11),
    "a dict of numbers": b"}(" + b"".join(b"J" + i.to_bytes(4, "little") + b"N" for i in range(LARGE // 6)) + b"u",
    "long names": module(b"".join(text(f"{i:0480}") + tensor() for i in range(1400))),
    "deep objects": (b"c__torch__\nA\n)\x81}" + text("a")) * (LARGE // 24) + module(b"") + b"sb" * (LARGE // 24),
}
"""Return structures near the allowed limits, which take the most memory."""


def flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def removed(data: bytes, rng: random.Random) -> bytes:
    begin = rng.randrange(len(data) + 1)
    return data[:begin] + data[begin + rng.randrange(1, 100) :]


def doubled(data: bytes, rng: random.Random) -> bytes:
    begin = rng.randrange(len(data) + 1)
    end = begin + rng.randrange(1, 100)
    return data[:end] + data[begin:]


def of_directory(data: bytes, rng: random.Random) -> bytes:
    """Change one field of an entry in the zip's directory, or of the end of the directory."""
    begins = [i for i in range(len(data)) if data.startswith((b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7"), i)]
    begin, size = rng.choice(begins), rng.choice((2, 4))
    place = begin + rng.choice((4, 6, 8, 10, 12, 16, 20, 24, 28, 30, 32, 36, 40, 42, 48))
    number = rng.choice((*NUMBERS, rng.randrange(2**16), rng.randrange(len(data)))) % 2 ** (8 * size)
    return (data[:place] + number.to_bytes(size, "little") + data[place + size :])[: max(len(data), place)]


def of_entries(data: bytes, rng: random.Random) -> bytes:
    entries = entries_of(data)
    kept = [name for name, _ in entries if "/data" in name or "byteorder" in name]
    names = [name for name, _ in entries]
    one, other = names.index(rng.choice(kept)), names.index(rng.choice(kept))
    name, content = entries[one]
    match rng.randrange(9):
        case 0:
            del entries[one]
        case 1:
            entries.insert(other, entries[one])
        case 2:
            entries[one], entries[other] = (name, entries[other][1]), (entries[other][0], content)
        case 3:
            other_names = (flipped(name.encode(), rng).decode("latin1"), f"x/{name}", f"../{name}", f"/{name}")
            entries[one] = (rng.choice(other_names), content)
        case 4:
            entries[one] = (name, content + bytes(rng.randrange(1, 64)))
        case 5:
            entries[one] = (name, content[:-1])
        case 6:
            entries[one] = (name, flipped(content, rng))
        case 7:
            return packed(entries, compress=name)
        case 8:
            entries.append((f"{name.partition('/')[0]}/data/99", bytes(9)))
    return packed(entries)


def of_opcodes(pickled: bytes, rng: random.Random) -> bytes:
    """Return the structure with opcodes replaced, removed, inserted or doubled, or with other numbers."""
    places = [place for _, _, place in pickletools.genops(pickled)] + [len(pickled)]
    parts = [pickled[begin:end] for begin, end in pairwise(places)]
    at = rng.randrange(1, len(parts))
    numbers = [i for i, part in enumerate(parts) if part[:1] in (b"K", b"M", b"J", b"\x8a")]
    match rng.randrange(8):
        case 0:
            parts[at] = bytes([rng.randrange(256)]) + parts[at][1:]
        case 1:
            del parts[at]
        case 2:
            parts.insert(at, rng.choice(HOSTILE))
        case 3:
            parts.insert(at, rng.choice(parts))
        case 4:
            parts[at : at + 1] = parts[at : at + rng.randrange(1, 20)] * 2
        case 5:
            parts[rng.choice(numbers)] = b"\x8a\x08" + struct.pack("<q", rng.choice((*NUMBERS, rng.randrange(30))))
        case 6:
            parts[rng.choice(numbers)] = b"K" + bytes([rng.randrange(30)])
        case 7:
            parts[at] = flipped(parts[at], rng)
    return b"".join(parts)


def of_structure(data: bytes, rng: random.Random) -> bytes:
    """Write the archive with a mutated structure and a right checksum."""
    change = rng.choice((of_opcodes, of_opcodes, of_opcodes, flipped, cut, removed, doubled))
    return packed([(name, change(old, rng) if name.endswith("/data.pkl") else old) for name, old in entries_of(data)])


UNDER_WRONG_CHECKSUMS: tuple[Callable[[bytes, random.Random], bytes], ...] = (flipped, cut, removed, doubled, of_directory)
UNDER_RIGHT_CHECKSUMS: tuple[Callable[[bytes, random.Random], bytes], ...] = (of_entries, *[of_structure] * 4)


def fuzz(count: int, folder: Path, seed: int = 0, spare: int | None = None) -> Counter[str]:
    """Return the number of each outcome for `count` archives. AssertionError, which names the archive, for a wrong outcome."""
    path = folder / "a.jit"
    originals = []
    for dtype in (torch.float32, torch.bfloat16):
        data = traced_bytes(dtype)
        path.write_bytes(data)
        originals.append((data, read_torchscript(path)))
    if spare is not None:
        allowed = psutil.Process().memory_info().vms + spare
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    for name, opcodes in HEAVY.items() if spare is not None else ():
        path.write_bytes(with_structure(structure(opcodes)))
        try:
            number = len(read_torchscript(path))
        except UserError:
            number = 0
        assert number == (1400 if name == "long names" else 0), name
    outcomes: Counter[str] = Counter()
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        data, tensors = rng.choice(originals)
        change = rng.choice((*UNDER_WRONG_CHECKSUMS, *UNDER_RIGHT_CHECKSUMS))
        path.write_bytes(change(data, rng))
        where = f"archive {number} of seed {seed} ({change.__name__})"
        try:
            found = read_torchscript(path)
        except (UserError, RunError) as error:
            line = str(error)
            begins = (f"{path} is no archive of weights", f"cannot read the video tokenizer's weights in {path}: ")
            assert line.startswith(begins), f"{where}: {line}"
            assert line.isprintable(), f"{where}: {line!r}"
            assert len(line) < 600 + len(str(path)), f"{where}: {line}"
            assert "memory" not in line, f"{where}: {line}"
            outcomes[f"{change.__name__} refused"] += 1
        except BaseException:
            print(where, file=sys.stderr)
            raise
        else:
            right = tensors if change in UNDER_WRONG_CHECKSUMS else read_by_pickle(path)
            assert same_tensors(found, right), f"{where}: other tensors"
            outcomes[f"{change.__name__} read"] += 1
    return outcomes


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, number in sorted(fuzz(int(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:4]), spare=SPARE).items()):
        print(number, name)

"""Three hundred items as they occur in practice, in sources of every kind, with the result that ingest must have for each."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lumos.video.io import write_video

TAKEN = "taken"
DEEP = 1200
"""Levels of folders, more than Python's stack has."""
LONGEST = "word " * 2000
"""A caption of 9,999 characters."""


class Sources:
    """Writes sources below a folder and keeps the verdict on each item: TAKEN, or the reason why it is skipped."""

    def __init__(self, root: Path):
        self.root, self.verdicts, self.sources = root, {}, []
        frames = np.random.default_rng(0).integers(0, 255, (24, 16, 24, 3)).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(frames[0]).save(buffer, "PNG")
        self.png = buffer.getvalue()
        write_video(root / "made.mp4", frames, 24)
        self.mp4 = (root / "made.mp4").read_bytes()
        (root / "pool").mkdir()
        (root / "pool" / "v.mp4").write_bytes(self.mp4)
        for n in range(60):
            (root / "pool" / f"{n}.png").write_bytes(self.png)
        (root / "pool" / os.fsdecode(b"caf\xe9.png")).write_bytes(self.png)
        (root / "pool" / os.fsdecode(b"caf\xe8.png")).write_bytes(self.png)
        os.mkfifo(root / "pool" / "pipe.mp4")

    def expect(self, id_: str, verdict: str) -> None:
        assert id_ not in self.verdicts, id_
        self.verdicts[id_] = verdict

    def source(self, name: str) -> Path:
        self.sources.append(self.root / name)
        return self.root / name


def build(root: Path) -> Sources:
    made = Sources(root)
    folder(made)
    for table in (csv_table, tsv_table, jsonl_table, parquet_tables, tars, whole_files):
        table(made)
    return made


def folder(made: Sources) -> None:
    root = made.source("dirty")
    root.mkdir()

    def add(name: str | bytes, verdict: str, data: bytes | None = None, caption: bytes | None = b"a caption",
        id_: str = "") -> Path:
        file = root / os.fsdecode(name)
        if data is not None:
            file.write_bytes(data)
        if caption is not None:
            file.with_suffix(".txt").write_bytes(caption)
        made.expect(f"dirty/{id_ or name}", verdict)
        return file

    for n in range(24):
        add(f"good{n}.png", TAKEN, made.png)
    for n in range(4):
        add(f"good{n}.mp4", TAKEN, made.mp4, caption=None)
    names = ["caf\u00e9.png", "cafe\u0301.png", "line\nbreak.png", "bell\x07\x1b[31m.png", "left\u202e.png", "back\\slash.png",
        " .png",
             "'\"`$(x).png", "\U0001f600.png", "n" * 251 + ".png", "%s{0}.png", "-rf.png", "a..png", "row 1.png", "x (again 1).png",
             "out of memory.png", "null.png", "CON.png", "a@0.5-1.0.png", "\ufeff.png"]  # fmt: skip
    for name in names:
        add(name, TAKEN, made.png)
    for name, id_ in ((b"caf\xe9.png", r"caf\udce9.png"), (b"\xff.png", r"\udcff.png"), (rb"\udcff.png", r"\\udcff.png"),
                      (rb"\\udcff.png", r"\\\\udcff.png"), (b"\\\xff.png", r"\\\udcff.png"), (b"\xed\xa0\x80.png",
                      r"\udced\udca0\udc80.png"), (rb"\x40.png", r"\\x40.png")):  # fmt: skip
        add(name, TAKEN, made.png, id_=id_)

    captions = {
        "latin1": (b"caf\xe9", "bad caption"), "utf16": ("a cat".encode("utf-16"), TAKEN), "surrogate": (b"\xed\xa0\x80",
            "bad caption"),
        "empty": (b"", "no caption"), "blank": (b" \n\t ", "no caption"), "only-bom": (b"\xef\xbb\xbf", "no caption"),
        "bom": (b"\xef\xbb\xbfa cat", TAKEN), "nul": (b"a\0cat", "bad caption"), "escape": (b"\x1b[2Ja cat", "bad caption"),
        "longest": (LONGEST.encode() + b"\n\n", TAKEN), "long": (LONGEST.encode() + b"ab", "long caption"),
        "emoji": ("\U0001f600".encode(), TAKEN),
    }  # fmt: skip
    for name, (caption, verdict) in captions.items():
        add(f"caption-{name}.png", verdict, made.png, caption)
    os.truncate(add("caption-huge.png", "long caption", made.png).with_suffix(".txt"), 1 << 32)
    os.mkfifo(add("caption-pipe.png", "bad caption", made.png, None).with_suffix(".txt"))
    add("caption-folder.png", "bad caption", made.png, None).with_suffix(".txt").mkdir()
    add("caption-loop.png", "bad caption", made.png, None).with_suffix(".txt").symlink_to("caption-loop.txt")
    add("caption-device.png", "bad caption", made.png, None).with_suffix(".txt").symlink_to("/dev/zero")
    add("caption-nowhere.png", "bad caption", made.png, None).with_suffix(".txt").symlink_to("nowhere")
    add("caption-link.png", TAKEN, made.png, None).with_suffix(".txt").symlink_to("good0.txt")

    for name, data in (("empty", b""), ("text", b"no picture"), ("half", made.png[: len(made.png) // 2]), ("mp4", made.mp4),
                       ("svg", b"<svg/>"), ("zeros", bytes(1000)), ("playlist", b"#EXTM3U\n/etc/passwd\n")):  # fmt: skip
        add(f"media-{name}.png", TAKEN if name == "mp4" else "unreadable", data)
    for name, data in (("half", made.mp4[: len(made.mp4) // 2]), ("empty", b""), ("zeros", bytes(5000)), ("text",
        b"ffconcat version 1.0")):
        add(f"media-{name}.mp4", "unreadable", data)
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    add("media-bomb.png", "unreadable", bomb.getvalue())
    os.mkfifo(add("media-pipe.mp4", "not a file"))
    os.mkfifo(add("media-pipe.png", "not a file"))
    os.mknod(add("media-socket.mp4", "not a file"), stat.S_IFSOCK | 0o600)
    add("media-nowhere.png", "missing file").symlink_to("nowhere")
    add("media-loop.png", "unreadable").symlink_to("media-loop.png")
    add("media-device.png", "not a file").symlink_to("/dev/zero")
    add("media-to-folder.png", "duplicate").symlink_to("inner.png")
    add("media-to-pipe.png", "not a file").symlink_to("media-pipe.png")
    add("media-link.png", TAKEN).symlink_to("good0.png")
    (root / "inner.png").mkdir()
    add("inner.png/inside.png", TAKEN, made.png)
    (root / "inner.png" / "circle").symlink_to(root)
    made.expect("dirty/inner.png/circle", "duplicate")
    (root / ".hidden.png").write_bytes(made.png)  # no item
    deepest = root / "deep"
    deepest.mkdir()
    for _ in range(DEEP):  # os.makedirs would exceed Python's recursion limit
        deepest /= "d"
        deepest.mkdir()
    (deepest / "x.png").write_bytes(made.png)
    (deepest / "x.txt").write_text("deep down")
    made.expect(f"dirty/deep/{'d/' * DEEP}x.png", TAKEN)


def csv_table(made: Sources) -> None:
    lines: list[bytes] = [b"\xef\xbb\xbfpath,caption,start,end"]
    row = 0

    def add(line: bytes, id_: str | None, verdict: str) -> None:
        nonlocal row
        row += 1
        lines.append(line)
        made.expect(f"odd.csv/row {row}" if id_ is None else f"odd.csv/{id_}", verdict)

    for n in range(10):
        add(b"pool/%d.png,a caption" % n, f"pool/{n}.png", TAKEN)
    add(b"pool/0.png,again", "pool/0.png (again 1)", "duplicate")
    add(b"./pool//0.png,again", "pool/0.png (again 2)", "duplicate")
    add(b"pool/0.png (again 1),no duplicate", r"pool/0.png \x28again 1)", "missing file")
    add(b"row 3,a path", r"\x72ow 3", "missing file")
    add(b"pool/caf\xe9.png,undecodable", r"pool/caf\udce9.png", TAKEN)
    add(b"pool/caf\xe8.png,undecodable too", r"pool/caf\udce8.png", TAKEN)
    add(b"pool/10.png,caf\xe9", "pool/10.png", "bad caption")
    add(b"pool/11.png", "pool/11.png", "no caption")
    add(b"pool/12.png,more,,,cells,than,columns", None, "bad row")
    add(b",no path", None, "bad row")
    add(b",", None, "bad row")
    add(b"pool/a\0b.png,a zero byte", "pool/a\0b.png", "missing file")
    add(b"/dev/zero,a device", "/dev/zero", "not a file")
    add(b"pool,a folder", "pool", "not a file")
    add(b"/,all", "/", "not a file")
    add(b"pool/pipe.mp4,a pipe", "pool/pipe.mp4", "not a file")
    add(b"pool/../pool/13.png,up", "pool/../pool/13.png", TAKEN)
    add(b"x" * 300 + b".png,long", "x" * 300 + ".png", "unreadable")
    add(b"x/" * 2500 + b"y.png,longer", None, "bad row")
    times = {b"0.25,0.75": ("@0.25-0.75", TAKEN), b",nan": ("", TAKEN), b"1e308,": ("@1e+308-", "too short"), b"0.9,": ("@0.9-",
        "too short"),
             b"0,1e308": ("@0.0-1e+308", TAKEN)}  # fmt: skip
    for cells, (part, verdict) in times.items():
        add(b"pool/v.mp4,times," + cells, f"pool/v.mp4{part}", verdict)
    for cells in (b"-1,", b"1e999,", b"inf,", b"x,", b"2,1", b"1,1", b"0,inf", b"0,-1", b"9" * 400 + b",", b"0x10,",
        b"1 2,"):
        add(b"pool/v.mp4,bad times," + cells, None, "bad row")
    add(b"pool/v.mp4,an empty cell of pandas,nan,", "pool/v.mp4 (again 1)", "duplicate")
    add(b"pool/v.mp4@0.25-0.75,a name like times", r"pool/v.mp4\x400.25-0.75", "missing file")
    add(b'pool/14.png,"with ""quotes"" and, a comma"', "pool/14.png", TAKEN)
    add(b'pool/15.png,"two\nlines"', "pool/15.png", TAKEN)
    add(b'pool/16.png,"closed" too early', None, "bad row")
    add(b'pool/17.png,"never closed', None, "bad row")
    add(b'pool/18.png,"good after it"', "pool/18.png", TAKEN)
    add(b"pool/19.png," + LONGEST.encode() + b"ab", "pool/19.png", "long caption")
    add(b"pool/20.png," + b"x" * (1 << 24), None, "bad row")
    add(b"pool/21.png,\x1b]0;title\x07", "pool/21.png", "bad caption")
    add(b"\x1b[31m.png,\xe2\x80\xae", "\x1b[31m.png", "no caption")
    lines.append(b"")
    add(b"pool/22.png,after an empty line", "pool/22.png", TAKEN)
    add(b'pool/23.png,"cut off', None, "bad row")
    made.source("odd.csv").write_bytes(b"\r\n".join(lines))


def tsv_table(made: Sources) -> None:
    made.source("odd.tsv").write_bytes(b"caption\tpath\rone\tpool/0.png\rtwo, with a comma\tpool/1.png\rthree\t\r")
    for id_, verdict in (("pool/0.png", TAKEN), ("pool/1.png", TAKEN), ("row 3", "bad row")):
        made.expect(f"odd.tsv/{id_}", verdict)


def jsonl_table(made: Sources) -> None:
    lines: list[bytes] = []

    def add(line: bytes | dict, id_: str | None, verdict: str) -> None:
        lines.append(line if isinstance(line, bytes) else json.dumps(line).encode())
        made.expect(f"odd.jsonl/row {len(lines)}" if id_ is None else f"odd.jsonl/{id_}", verdict)

    add(b'\xef\xbb\xbf{"path": "pool/0.png", "caption": "after a mark"}', "pool/0.png", TAKEN)
    for n in range(1, 11):
        add({"path": f"pool/{n}.png", "text": "a caption"}, f"pool/{n}.png", TAKEN)
    nested = b'{"path": "pool/1.png", "caption": "x", "more": %s}'
    for line in (b'{"path": ', b"[1]", b"3", b"null", b'"text"', b"{}", b"\xff\xfe{\x00", b"{'path': 'pool/1.png'}", b"[" * 100_000,
                 b'{"a":' * 100_000, nested % (b"[" * 100_000 + b"]" * 100_000), nested % (b"[" * 100 + b"]" * 100),
                 b'{"path": "pool/1.png", "start": %s}' % (b"9" * 5000), b'{"path": 7, "caption": "x"}', b"\0",
                 b'{"path": ["pool/1.png"], "caption": "x"}', b'{"path": {"x": 1}, "caption": "x"}',
                 b'{"path": " ", "caption": "x"}',
                 b'{"path": "pool/1.png", "caption": "' + b"x" * (1 << 24) + b'"}'):  # fmt: skip
        add(line, None, "bad row")
    for value in (b"Infinity", b"1e999", b"-0.5", b"true", b"[]", b"{}", b'"soon"', b"1" + b"0" * 400, b"false"):
        add(b'{"path": "pool/v.mp4", "caption": "x", "start": %s}' % value, None, "bad row")
    for value in (b"0", b"-1", b"Infinity", b"1" + b"0" * 400, b"[1]"):
        add(b'{"path": "pool/v.mp4", "caption": "x", "end": %s}' % value, None, "bad row")
    add({"path": "pool/v.mp4", "caption": "x", "start": "0.25", "end": 1}, "pool/v.mp4@0.25-1.0", TAKEN)
    add({"path": "pool/v.mp4", "caption": "x", "start": None, "end": None}, "pool/v.mp4", TAKEN)
    add(b'{"path": "pool/v.mp4", "caption": "x", "start": NaN}', "pool/v.mp4 (again 1)", "duplicate")
    add({"path": "pool/\ud800.png", "caption": "x"}, r"pool/\ud800.png", "missing file")
    add({"path": r"pool/\ud800.png", "caption": "x"}, r"pool/\\ud800.png", "missing file")
    add({"path": "pool/caf\udce9.png", "caption": "x"}, r"pool/caf\udce9.png", TAKEN)
    add(b'{"path": "pool/caf\xe8.png", "caption": "x"}', r"pool/caf\udce8.png", TAKEN)
    add({"path": "pool/12.png", "caption": "half \ud83d"}, "pool/12.png", "bad caption")
    add(b'{"path": "pool/13.png", "caption": "caf\xe9"}', "pool/13.png", "bad caption")
    add({"path": "pool/14.png", "caption": "whole \U0001f600"}, "pool/14.png", TAKEN)
    add({"path": "pool/15.png", "caption": ["a", "list"]}, "pool/15.png", "bad caption")
    add({"path": "pool/16.png", "caption": 3}, "pool/16.png", "bad caption")
    add({"path": "pool/17.png", "caption": LONGEST + "ab"}, "pool/17.png", "long caption")
    add({"path": "pool/\0.png", "caption": "x"}, "pool/\0.png", "missing file")
    add({"path": "pool\\18.png", "caption": "x"}, "pool\\18.png", TAKEN)
    add(b'{"path": "pool/18.png", "path": "pool/19.png", "caption": "x"}\r', None, "bad row")
    add({"path": "", "file_name": "pool/20.png", "caption": "", "prompt": "x"}, "pool/20.png", TAKEN)
    made.source("odd.jsonl").write_bytes(b"\n".join(lines))


def parquet_tables(made: Sources) -> None:
    paths = [b"pool/0.png", b"pool/\xff.png", b"pool/1.png", None, b"pool/2.png", b"pool/3.png"]
    column = pa.array(paths, pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(column), column.buffers(), column.null_count)  # its second value is not UTF-8
    captions = pa.array(["x", "x", "x", "x", None, "y"])
    pq.write_table(pa.table({"path": text, "caption": captions}), made.source("odd.parquet"))
    for id_, verdict in (("pool/0.png", TAKEN), ("row 2", "bad row"), ("pool/1.png", TAKEN), ("row 4", "bad row"),
                         ("pool/2.png", "no caption"), ("pool/3.png", TAKEN)):  # fmt: skip
        made.expect(f"odd.parquet/{id_}", verdict)
    types = {"path": ["pool/0.png", "pool/1.png"], "caption": [{"a": 1}, {"a": 2}], "start": [[1.0], []], "extra": [[["x"]], None]}
    pq.write_table(pa.table(types), made.source("types.parquet"))
    for row in (1, 2):
        made.expect(f"types.parquet/row {row}", "bad row")
    pq.write_table(pa.table({"path": [1, 2], "caption": ["x", "y"]}), made.source("numbers.parquet"))
    for row in (1, 2):
        made.expect(f"numbers.parquet/row {row}", "bad row")
    grouped = made.source("group.parquet")
    pq.write_table(pa.table({"path": [f"pool/{n}.png" for n in range(6)], "caption": ["x"] * 6}), grouped, row_group_size=2,
                   compression="none", use_dictionary=False)  # fmt: skip
    start = pq.read_metadata(grouped).row_group(1).column(0).data_page_offset
    data = bytearray(grouped.read_bytes())
    data[start : start + 8] = b"\xff" * 8
    grouped.write_bytes(data)
    for id_, verdict in (("pool/0.png", TAKEN), ("pool/1.png", TAKEN), ("row 3", "bad row"), ("pool/4.png", TAKEN),
        ("pool/5.png", TAKEN)):
        made.expect(f"group.parquet/{id_}", verdict)
    for name, content in (("half.parquet", data[: len(data) // 2]), ("text.parquet", b"path,caption\n"), ("empty.parquet", b"")):
        made.source(name).write_bytes(content)
        made.expect(name, "broken table")


def tars(made: Sources) -> None:
    with tarfile.open(made.source("odd.tar"), "w", format=tarfile.PAX_FORMAT) as archive:

        def add(name: str | bytes, data: bytes = made.png, kind: bytes = tarfile.REGTYPE, link: str = "", **pax: str) -> None:
            info = tarfile.TarInfo(os.fsdecode(name))
            info.type, info.linkname, info.size, info.pax_headers = kind, link, len(data) if kind == tarfile.REGTYPE else 0, pax
            archive.addfile(info, io.BytesIO(data))

        for n in range(8):
            add(f"good/{n}.png")
            add(f"good/{n}.txt", b"a caption")
            made.expect(f"odd.tar/good/{n}.png", TAKEN)
        odd = {"../up": "../up", "/abs": "/abs", "y" * 4000: "y" * 4000, b"\xff": r"\udcff", r"\udcff": r"\\udcff",
            "bell\x07": "bell\x07",
               "line\nbreak": "line\nbreak", "row 1": "row 1", "a//b/./c": "a//b/./c"}  # fmt: skip
        for name, id_ in odd.items():
            add((name if isinstance(name, bytes) else name.encode()) + b".png")
            add((name if isinstance(name, bytes) else name.encode()) + b".txt", b"odd name")
            made.expect(f"odd.tar/{id_}.png", TAKEN)
        add("good/0.png")
        made.expect("odd.tar/good/0.png (again 1)", "duplicate")
        for name, kind in (("symlink", tarfile.SYMTYPE), ("link", tarfile.LNKTYPE), ("pipe", tarfile.FIFOTYPE), ("device",
            tarfile.CHRTYPE),
                           ("block", tarfile.BLKTYPE)):  # fmt: skip
            add(f"{name}.png", kind=kind, link="good/0.png")
            add(f"{name}.txt", b"x")
            made.expect(f"odd.tar/{name}.png", "not a file")
        add("folder.png", kind=tarfile.DIRTYPE)
        for name in ("", "."):  # pictures by their content
            add(name, kind=tarfile.REGTYPE)
            made.expect(f"odd.tar/{name}", "no caption")
        sidecars = {
            "latin1.txt": (b"caf\xe9", "bad caption"), "empty.txt": (b"", "no caption"), "long.txt": (LONGEST.encode() + b"ab",
                "long caption"),
            "json.json": (b"{", "bad caption"), "list.json": (b"[1]", "bad caption"), "deep.json": (b"[" * 100_000, "bad caption"),
            "half.json": (b'{"caption": "\\ud800"}', "bad caption"), "other.json": (b'{"title": "x"}', "no caption"),
            "text.json": (b'{"text": "x"}', TAKEN), "mark.txt": (b"\xef\xbb\xbfx", TAKEN),
        }  # fmt: skip
        for name, (data, verdict) in sidecars.items():
            add(f"side-{name.replace('.', '-')}.png")
            add(f"side-{name.replace('.', '-')}{Path(name).suffix}", data)
            made.expect(f"odd.tar/side-{name.replace('.', '-')}.png", verdict)
        add("both.json", b"{")
        add("both.png")
        add("both.txt", b"the text is whole")
        made.expect("odd.tar/both.png", TAKEN)
        add("linked.txt", kind=tarfile.SYMTYPE, link="good/0.txt")
        add("linked.png")
        made.expect("odd.tar/linked.png", "bad caption")
        add("sparse.png", b"abcd", **{"GNU.sparse.map": "0,4", "GNU.sparse.size": "1000000"})
        add("sparse.txt", b"x")
        made.expect("odd.tar/sparse.png", "not a file")
        add("broken.png", b"no picture")
        add("broken.txt", b"x")
        made.expect("odd.tar/broken.png", "unreadable")
    whole = (made.root / "odd.tar").read_bytes()
    header = bytearray(whole[:512])
    header[124:136] = (-1024 & (1 << 96) - 1).to_bytes(12, "big")  # a size below 0, for which tarfile reads on without end
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
    for name, data in (("negative.tar", header + bytes(10240)), ("none.tar", b"no tar" * 200), ("empty.tar", b""), ("gzip.tar",
        b"\x1f\x8b" * 99)):
        made.source(name).write_bytes(data)
        made.expect(name, "broken tar")
    made.source("zeros.tar").write_bytes(bytes(10240))  # a tar of nothing
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in (("a.png", made.png), ("a.txt", b"whole"), ("b.png", made.png)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        cut = archive.offset - 600
    made.source("cut.tar").write_bytes(buffer.getvalue()[:cut])
    made.expect("cut.tar/a.png", TAKEN)
    made.expect("cut.tar", "broken tar")


def whole_files(made: Sources) -> None:
    """Single files as sources, and good ones up to three hundred items."""
    for name, id_ in ((b"one.png", "one.png"), (b"\xfe.png", r"\udcfe.png")):
        file = made.source(os.fsdecode(name))
        file.write_bytes(made.png)
        file.with_suffix(".txt").write_text("a file by itself")
        made.expect(id_, TAKEN)
    plain = made.source("plain")
    plain.mkdir()
    for n in range(300 - len(made.verdicts)):
        shutil.copy(made.root / "pool" / "0.png", plain / f"{n}.png")
        (plain / f"{n}.txt").write_text("plain")
        made.expect(f"plain/{n}.png", TAKEN)


def remove_deep(root: Path) -> None:
    """Remove the deep folders of `folder`, which shutil cannot do below Python 3.13."""
    deepest = root / "dirty" / "deep" / "/".join("d" * DEEP)
    for file in deepest.iterdir():
        file.unlink()
    os.removedirs(deepest)

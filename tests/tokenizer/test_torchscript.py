"""TorchScript archives: the tensors equal those of torch.jit.load, and no source code is run or read."""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from archives import (
    entries_of,
    module,
    packed,
    read_by_pickle,
    same_tensors,
    structure,
    tensor,
    text,
    traced_bytes,
    with_entry,
    with_structure,
    write_published,
)
from fuzz_torchscript import fuzz
from torch import nn

from lumos.errors import RunError, UserError
from tokenizer import VideoTokenizer, VideoTokenizerConfig
from tokenizer import torchscript as under_test
from tokenizer.pickled import OPCODES, REFUSED_OPCODES
from tokenizer.torchscript import read_torchscript

HERE = Path(__file__).parent
MODEL = {"channels": 4, "channels_mult": [1], "num_res_blocks": 1, "levels": [5, 4], "embedding_dim": 2, "z_channels": 4,
         "spatial_compression": 4}  # fmt: skip


@pytest.fixture(scope="module")
def small() -> bytes:
    return traced_bytes()


@pytest.fixture
def read(tmp_path) -> Callable[[bytes], dict[str, torch.Tensor]]:
    def read_bytes(data: bytes) -> dict[str, torch.Tensor]:
        (tmp_path / "a.jit").write_bytes(data)
        return read_torchscript(tmp_path / "a.jit")

    return read_bytes


def weight(*sizes: object, **options: object) -> bytes:
    """Write an archive of a module with a single tensor."""
    return with_structure(structure(module(text("weight") + tensor(*sizes, **options))))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.thorough)])
def test_published_layout_gives_what_torch_gives(tmp_path, dtype):
    config = VideoTokenizerConfig.from_dict(MODEL)
    check_published_layout(VideoTokenizer(config).to(dtype).eval(), tmp_path)


@pytest.mark.slow
def test_published_network_gives_what_torch_gives(tmp_path, golden):
    check_published_layout(VideoTokenizer.from_pretrained(golden / "cosmos"), tmp_path)


def check_published_layout(model: VideoTokenizer, folder: Path) -> None:
    write_published(model, folder)
    for name in ("encoder", "decoder", "autoencoder"):
        found = read_torchscript(folder / f"{name}.jit")
        assert same_tensors(found, torch.jit.load(folder / f"{name}.jit").state_dict())
        parts = {"encoder": ("encoder.", "quant_conv."), "decoder": ("decoder.", "post_quant_conv."), "autoencoder": ("",)}[name]
        weights = {key: value for key, value in model.state_dict().items() if key.startswith(parts)}
        assert found.keys() - weights.keys() == {"quantizer._levels", "quantizer.wavelets"}
        assert all(torch.equal(found[key], value) for key, value in weights.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_types_and_views_are_those_of_torch(tmp_path, read, dtype):
    found = read(traced_bytes(dtype))
    assert same_tensors(found, torch.jit.load(tmp_path / "a.jit").state_dict())
    assert same_tensors(found, read_by_pickle(tmp_path / "a.jit"))
    assert {value.dtype for value in found.values()} >= {dtype, torch.bool, torch.uint8, torch.float64, torch.float16, torch.int16}
    assert found["repeated"].stride() == (0, 0)
    assert found["first.weight"].data_ptr() == found["layers.1.weight"].data_ptr() != found["layers.0.weight"].data_ptr()


class Scripted(nn.Module):
    """A module with attributes of all kinds beside the tensors of the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("b", torch.arange(3.0))
        self.weight = nn.Parameter(torch.ones(2))
        self.register_parameter("missing", None)
        self.number, self.large, self.text, self.real, self.kind = 3, 2**40, "x", 0.5, torch.float32
        self.place, self.pair = torch.device("cpu"), (1, 2.0)
        self.numbers, self.reals, self.truths, self.texts = [1, 2], [0.5], [True], ["a"]
        self.tensors, self.by_name, self.by_number = [torch.ones(1)], {"a": torch.ones(1)}, {1: 2}
        self.layers = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.ReLU()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.number > len(self.text) + len(self.numbers) + len(self.reals) + len(self.truths) + len(self.texts):
            x = x * self.large + self.real + self.b[0] + self.weight[0] + self.tensors[0] + self.by_name["a"] + self.by_number[1]
        for layer in self.layers.values():
            x = layer(x.to(self.place).to(self.kind)) + self.pair[0]
        return x


def test_a_scripted_module_gives_what_torch_gives(tmp_path):
    torch.jit.save(torch.jit.script(Scripted()), str(tmp_path / "a.jit"))
    assert same_tensors(read_torchscript(tmp_path / "a.jit"), torch.jit.load(tmp_path / "a.jit").state_dict())


def test_a_plain_tensor_attribute_is_given_too(tmp_path):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.weight = torch.ones(2), nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.plain

    torch.jit.save(torch.jit.script(Plain()), str(tmp_path / "a.jit"))
    assert list(torch.jit.load(tmp_path / "a.jit").state_dict()) == ["weight"]
    assert list(read_torchscript(tmp_path / "a.jit")) == ["weight", "plain"]


# What the two hide from Python's parser, as a string that begins and ends in what torch's parser takes for comments.
WAYS_TO_HIDE = {
    "carriage return": b'  # a\r  """\n%s\n  # b\r  """\n',
    "coding cookie": b"  # +AAoAIAAgACIAIgAi-\n%s\n  # +AAoAIAAgACIAIgAi-\n",
    "nothing": b"%s\n",
}


@pytest.mark.parametrize("way", WAYS_TO_HIDE)
@pytest.mark.parametrize("state", ["Dict[str, Tensor]", "Tensor"])
def test_a_hidden_setstate_is_never_run(tmp_path, way, state):
    path, victim = tmp_path / "a.jit", tmp_path / "victim"
    got = "self.weight" if state == "Tensor" else '{"weight": self.weight}'
    method = f"  def __getstate__(self) -> {state}:\n    return {got}\n  def __setstate__(self, s: {state}) -> NoneType:\n"
    method += f'    x = torch.from_file("{victim}", True, 4)\n    self.weight = x'
    source = b"# coding: utf-7\n" if way == "coding cookie" else b""
    source += b"class A(Module):\n  __parameters__ = []\n  __buffers__ = []\n  weight : Tensor\n"
    source += WAYS_TO_HIDE[way] % method.encode() + b"  def forward(self, x: Tensor) -> Tensor:\n    return x\n"
    if state == "Tensor":
        pickled = structure(b"c__torch__\nA\n)\x81" + tensor() + b"b")
    else:
        pickled = structure(module(text("weight") + tensor()))
    path.write_bytes(packed([("a/data/0", bytes(24)), ("a/data.pkl", pickled), ("a/code/__torch__.py", source),
                             ("a/constants.pkl", b"\x80\x02)."), ("a/version", b"3\n")]))  # fmt: skip
    if state == "Tensor":
        with pytest.raises(UserError, match=r"an object of '__torch__\.A' that only the archive's own code could restore"):
            read_torchscript(path)
    else:
        assert same_tensors(read_torchscript(path), {"weight": torch.zeros(6)})
    assert not victim.exists()
    torch.jit.load(path)
    assert victim.exists()


DEEP = b"".join(b"c__torch__\nA\n)\x81}" + text("a") for _ in range(70)) + module(b"") + b"sb" * 70


@pytest.mark.parametrize(("opcodes", "refusal"), [
    (b"cos\nsystem\n(X\1\0\0\0atR", r"names 'os\.system'"),
    (b"cbuiltins\neval\n", r"names 'builtins\.eval'"),
    (b"ctorch\nComplexFloatStorage\n", r"names 'torch\.ComplexFloatStorage'"),
    (b"ctorch._utils\n_rebuild_sparse_tensor\n", r"names 'torch\._utils\._rebuild_sparse_tensor'"),
    (b"c__torch__2\nA\n", r"names '__torch__2\.A'"),
    (b"ca\x1b[31m\nb\n", r"names 'a\\x1b\[31m\.b'"),
    (b"c" + b"a" * 2000 + b"\nb\n", r"names something in over 1000 bytes"),
    (b"ios\nsystem\n", "uses the opcode INST"),
    (b"\x8c\2os\x8c\6system\x93", "uses the opcode SHORT_BINUNICODE"),
    (b"\xff", "uses the opcode 0xff"),
    (b"]0", "uses the opcode POP"),
    (b"\x80\x02]", "uses the opcode PROTO"),
    (b"c__torch__\nA\n(K\1t\x81", "makes an object from arguments"),
    (b"c__torch__\nA\n)R", "has a Class where a Function belongs"),
    (b"ccollections\nOrderedDict\n)\x81", "has a Function where a Class belongs"),
    (b"ccollections\nOrderedDict\n(K\1tR", "calls collections.OrderedDict with arguments that torch does not write"),
    (b"ctorch._utils\n_rebuild_tensor_v2\n)R", "calls torch._utils._rebuild_tensor_v2 with arguments"),
    (b"c__torch__\nA\n)\x81)b", r"an object of '__torch__\.A' that only the archive's own code could restore"),
    (b"c__torch__\nA\n)\x81}b}b", "sets the attributes of an object of '__torch__.A' twice"),
    (b"c__torch__\nA\n)\x81", "an object of '__torch__.A' without attributes"),
    (module(b"") + b"h\7", "takes the value 7, which it never stored"),
    (module(b"") + b"q\0q\0", "stores the value 0 twice"),
    (b"]]", "does not end with one value"),
    (b"](", "does not end with one value"),
    (b"].]", "does not end with one value"),
    (b"]q\0h\0a", "holds no module"),
    (b"t", "lacks a mark"),
    (b"](a", "takes a value where there is none"),
    (b"\x81", "takes a value where there is none"),
    (b"}(K\1u", "a key that lacks its value"),
    (b"}(K\1K\1K\1K\1u", "a dict with two entries 1"),
    (b"})K\1s", "a dict with a tuple as key"),
    (b"(K\1tQ", "a reference to something else than a storage"),
    (b"X\xff\xff\xff\xffabc", "is cut off"),
    (b"X\2\0\0\0\xc3\x28", "text that is not UTF-8"),
    (b"\x8a\x09" + bytes(9), "a number of 9 bytes"),
    (DEEP, "nested over 64 deep"),
    (b"c__torch__\nA\n)\x81q\0}" + text("a") + b"h\0sb", "nested over 64 deep"),  # contains itself
    (module(text("a.b") + tensor()), "an attribute 'a.b'"),
    (module(text("a\n") + tensor()), r"an attribute 'a\\n'"),
    (module(text("") + tensor()), "an attribute ''"),
    (module(text("a" * 600) + tensor()), "an attribute 'a"),
    (module(text("a") + tensor() + text("a") + tensor()), "a dict with two entries 'a'"),
    (module(b"K\1" + tensor()), "an attribute '1'"),
    (module(text("a") + tensor(key="9")), "no entry 'data/9'"),
    (module(text("a") + tensor(key="../data/0")), "no entry 'data/../data/0'"),
    (module(text("a") + tensor(numel=7)), "has 24 bytes, its tensors need 28"),
    (module(text("a") + tensor(numel=2**62)), "has 24 bytes, its tensors need 18"),
    (module(text("a") + tensor(kind=b"Double")), "has 24 bytes, its tensors need 48"),
    (module(text("a") + tensor(numel=-1)), "a reference to something else than a storage"),
    (module(text("a") + tensor((7,))), "reaches beyond its storage '0'"),
    (module(text("a") + tensor((6,), (2,))), "reaches beyond its storage"),
    (module(text("a") + tensor((6,), offset=1)), "reaches beyond its storage"),
    (module(text("a") + tensor((0,), offset=7)), "reaches beyond its storage"),
    (module(text("a") + tensor((2, 2), (2**62, 2**62))), "reaches beyond its storage"),
    (module(text("a") + tensor((2**62, 2), (0, 0))), "reaches beyond its storage"),
    (module(text("a") + tensor((6,), (-1,), 5)), "a tensor with an impossible shape"),
    (module(text("a") + tensor((-1,))), "a tensor with an impossible shape"),
    (module(text("a") + tensor((6,), offset=-1)), "a tensor with an impossible shape"),
    (module(text("a") + tensor((6, 1), (1,))), "a tensor with an impossible shape"),
    (module(text("a") + tensor((1,) * 65, (1,) * 65)), "a tensor with an impossible shape"),
    (module(text("a") + tensor(hooks=b"}K\1K\1s")), "a tensor with hooks"),
    (module(text("a") + tensor(hooks=b"}}")), "with arguments that torch does not write"),
])  # fmt: skip
def test_a_structure_of_another_form_is_refused(read, opcodes, refusal):
    with pytest.raises(UserError, match=f"a.jit is no archive of weights as published: .*{refusal}.*; download it again") as raised:
        read(with_structure(structure(opcodes)))
    assert str(raised.value).isprintable()


def test_every_opcode_is_known_or_refused_by_its_name():
    names = {opcode.code.encode("latin1"): opcode.name for opcode in pickletools.opcodes}
    assert {code: name for code, name in names.items() if code not in OPCODES and name != "STOP"} == REFUSED_OPCODES


def test_modules_that_hold_one_another_twice_are_counted(read):
    def holds(number: int) -> bytes:
        return b"h" + bytes([number])

    layers = [text(f"m{i}") + module(text("a") + holds(i - 1) + text("b") + holds(i - 1)) + b"q" + bytes([i]) for i in range(1, 40)]
    with pytest.raises(UserError, match="over 65,536 modules and tensors"):
        read(with_structure(structure(module(text("m0") + module(b"") + b"q\0" + b"".join(layers)))))


def test_a_view_of_stride_zero_takes_no_memory(read):
    found = read(weight((10**6, 10**6), (0, 0), 5))["weight"]
    assert found.shape == (10**6, 10**6)
    assert found.untyped_storage().nbytes() == 24


def test_truth_values_are_zero_or_one(read):
    assert read(weight((24,), numel=24, kind=b"Bool"))["weight"].dtype == torch.bool
    with pytest.raises(UserError, match="truth values that are neither 0 nor 1"):
        read(with_structure(structure(module(text("a") + tensor((24,), numel=24, kind=b"Bool"))), b"\2" * 24))


ONE = structure(module(text("a") + tensor()))
ENTRIES = [("a/data/0", bytes(24)), ("a/data.pkl", ONE)]


@pytest.mark.parametrize(("data", "refusal"), [
    (lambda: packed([*ENTRIES, ("a/byteorder", b"big")]), "not little-endian"),
    (lambda: packed([*ENTRIES, ("a/byteorder", b"little\n")]), "'a/byteorder' has 7 bytes, over the 6"),
    (lambda: packed(ENTRIES, compress="a/data.pkl"), "'a/data.pkl' is compressed"),
    (lambda: packed(ENTRIES, compress="a/data/0"), "'a/data/0' is compressed"),
    (lambda: packed(ENTRIES[:1]), "has no data.pkl"),
    (lambda: packed(ENTRIES[1:]), "has no entry 'data/0'"),
    (lambda: packed([]), "does not begin with an entry"),
    (lambda: packed([*ENTRIES, ENTRIES[0]]), "'a/data/0' is there twice"),
    (lambda: packed([*ENTRIES, ("b/data/0", b"")]), "'b/data/0' is not where"),
    (lambda: packed([*ENTRIES, ("a/../x", b"")]), "'a/../x' is not where"),
    (lambda: packed([*ENTRIES, ("a/", b"")]), "'a/' is not where"),
    (lambda: packed([("/a", b""), *ENTRIES]), "'/a' is not where"),
    (lambda: packed([("a/model.json", b"{}")]), "has no data.pkl"),
    (lambda: b"x" * 99 + packed(ENTRIES), "directory is not where torch writes it"),
    (lambda: packed(ENTRIES)[:-2] + b"\1\0x", "no zip file|directory is not where|does not end as a zip file"),
    (lambda: packed([*ENTRIES, *((f"a/{i:080}", b"") for i in range(9000))]), "over the 1,048,576 that are allowed"),
    (lambda: packed([ENTRIES[0], ("a/data.pkl", ONE + bytes(2**20))]), "over the 1,048,576 that are allowed"),
    (lambda: with_structure(ONE[2:]), "no pickle of protocol 2"),
    (lambda: with_structure(b"\x80\x04" + ONE[2:]), "no pickle of protocol 2"),
])  # fmt: skip
def test_an_archive_of_another_form_is_refused(read, data, refusal):
    with pytest.raises((UserError, RunError), match=refusal):
        read(data())


def test_an_encrypted_entry_is_refused(read):
    data = packed(ENTRIES)
    place = data.index(b"PK\1\2") + 8
    with pytest.raises(UserError, match="'a/data/0' is compressed or encrypted"):
        read(data[:place] + b"\1" + data[place + 1 :])


def test_entries_that_lie_in_one_another_are_refused(read):
    keys = [str(i) for i in range(9)]
    tensors = b"".join(text(f"t{key}") + tensor((250,), numel=250, key=key) for key in keys)
    entries = entries_of(packed([(f"a/data/{key}", bytes(1000) if key == "0" else b"") for key in keys]))
    data = packed([*entries, ("a/data.pkl", structure(module(tensors)))])
    for key in keys[1:]:  # sizes of 1,000 bytes in the directory
        place = data.rindex(f"a/data/{key}".encode()) - 46
        data = data[: place + 20] + (1000).to_bytes(4, "little") * 2 + data[place + 28 :]
    with pytest.raises((UserError, RunError), match="take more bytes than the file has"):
        read(data)


def test_other_byte_orders_are_refused(read, small, monkeypatch):
    with pytest.raises(UserError, match="not little-endian"):
        read(with_entry(small, "byteorder", b"bigbig"))
    monkeypatch.setattr(under_test.sys, "byteorder", "big")
    with pytest.raises(UserError, match="unlike this machine's"):
        read(small)


@pytest.mark.parametrize("length", [0, 1, 21, 22, 100, 5000, -1])
def test_a_cut_archive_is_damaged(read, small, length):
    with pytest.raises(RunError, match=r"cannot read the video tokenizer's weights in .*: it does not end as a zip file does"):
        read(small[:length])


def test_a_wrong_checksum_is_damage(read, small):
    weights = dict(entries_of(small))["archive/data/0"]
    place = small.index(weights)
    with pytest.raises(RunError, match="Bad CRC-32"):
        read(small[:place] + bytes([small[place] ^ 1]) + small[place + 1 :])


def test_source_and_constants_are_not_read(read, small):
    changed = packed([(name, b"\xff(" if "/code/" in name or "constants" in name else old) for name, old in entries_of(small)])
    assert same_tensors(read(changed), read(small))


def test_mutated_archives_are_refused_or_read_right(tmp_path):
    check_outcomes(fuzz(200, tmp_path, seed=1), 200)


def test_mutated_archives_in_little_memory(tmp_path, times, forks):
    pytest.importorskip("resource")
    count = times(300, 2000)
    ran = forks.run([HERE / "fuzz_torchscript.py", count, tmp_path])
    assert ran.returncode == 0, ran.stderr[-3000:]
    check_outcomes({name: int(number) for number, name in (line.split(" ", 1) for line in ran.stdout.splitlines())}, count)


def check_outcomes(outcomes: dict[str, int], count: int) -> None:
    assert sum(outcomes.values()) == count
    assert all(outcomes[f"of_structure {outcome}"] for outcome in ("read", "refused"))
    assert all(outcomes[f"{kind} refused"] for kind in ("of_entries", "of_directory", "flipped"))

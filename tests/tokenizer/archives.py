"""TorchScript archives for tests: made by torch, changed entry by entry, and read by Python's own unpickler."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from tokenizer import VideoTokenizer

Entries = list[tuple[str, bytes]]


class Published(nn.Module):
    """The parts of a video tokenizer in one published archive, with the constants of the archive."""

    def __init__(self, model: VideoTokenizer, encodes: bool, decodes: bool) -> None:
        super().__init__()
        self.encodes, self.decodes, self.config = encodes, decodes, model.config
        if encodes:
            self.encoder, self.quant_conv = model.encoder, model.quant_conv
        if decodes:
            self.post_quant_conv, self.decoder = model.post_quant_conv, model.decoder
        self.quantizer = nn.Module()
        self.quantizer.register_buffer("_levels", torch.tensor([8, 5]), persistent=False)
        self.quantizer.register_buffer("wavelets", torch.ones(2) * 0.5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.quantizer.wavelets[0] + self.quantizer._levels[0]
        if self.encodes:
            x = self.quant_conv(self.encoder(x))[:, : self.config.value_channels]
        return self.decoder(self.post_quant_conv(x)) if self.decodes else x


def write_published(model: VideoTokenizer, folder: Path, names: tuple[str, ...] = ("encoder", "decoder", "autoencoder")) -> None:
    """Write encoder.jit, decoder.jit and autoencoder.jit by torch.jit.trace, without the patches of pixels."""
    config, weight = model.config, next(model.quant_conv.parameters())
    frames = () if config.is_image else (2,)
    patches = torch.zeros(1, config.in_channels * config.patch_channels, *frames, 4, 4, dtype=weight.dtype)
    latent = torch.zeros(1, config.value_channels, *frames[:1], 2, 2, dtype=weight.dtype)
    for name in names:
        part = Published(model, name != "decoder", name != "encoder")
        with torch.no_grad():
            traced = torch.jit.trace(part, latent if name == "decoder" else patches, check_trace=False)
        torch.jit.save(traced, str(folder / f"{name}.jit"))


class Small(nn.Module):
    """A network with tensors of several dtypes, and views of all kinds that share storage."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layers = nn.Linear(2, 3), nn.ModuleList([nn.Linear(2, 3), nn.Linear(2, 3)])
        self.layers[1].weight = self.first.weight
        self.again = self.layers[0]
        self.to(dtype)
        numbers = torch.arange(24.0, dtype=dtype)
        for name, view in {
            "turned": numbers.view(4, 6).t(),
            "part": numbers[5:20:3],
            "repeated": numbers[7].expand(3, 2),
            "one": torch.tensor(7, dtype=torch.int16),
            "none": torch.zeros(0, 3, dtype=torch.int64),
            "truths": torch.tensor([True, False, True]),
            "bytes": torch.tensor([1, 255], dtype=torch.uint8),
            "signed": torch.tensor([-1, 127], dtype=torch.int8),
            "ints": torch.tensor([-(2**31)], dtype=torch.int32),
            "halves": torch.ones(2, dtype=torch.float16) / 3,
            "doubles": torch.ones(2, dtype=torch.float64) / 3,
        }.items():
            self.register_buffer(name, view)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.layers[0](x) + self.layers[1](x) + self.again(x) + self.turned[0, 0]


def traced_bytes(dtype: torch.dtype = torch.float32) -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(Small(dtype), torch.zeros(1, 2, dtype=dtype)), file)
    return file.getvalue()


def entries_of(data: bytes) -> Entries:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def packed(entries: Entries, compress: str = "") -> bytes:
    """Write an archive of the entries with right checksums; the entry named `compress` is deflated."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries:
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED if name == compress else zipfile.ZIP_STORED)
    return file.getvalue()


def with_entry(data: bytes, ending: str, content: bytes) -> bytes:
    """Write a copy of the archive with other content in the only entry whose name ends with `name`."""
    entries = entries_of(data)
    (wanted,) = [name for name, _ in entries if name.endswith(ending)]
    return packed([(name, content if name == wanted else old) for name, old in entries])


def with_structure(structure: bytes, numbers: bytes = bytes(24)) -> bytes:
    """Write an archive of this pickle with one storage."""
    return packed([("a/data/0", numbers), ("a/data.pkl", structure), ("a/byteorder", b"little")])


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def long(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def module(attributes: bytes) -> bytes:
    """Return the opcodes of a module with these attributes."""
    return b"c__torch__\nA\n)\x81}(" + attributes + b"ub"


def tensor(
    size: tuple[int, ...] = (6,), stride: tuple[int, ...] = (1,), offset: int = 0, numel: int = 6, kind: bytes = b"Float",
    key: str = "0", hooks: bytes = b"}",
) -> bytes:  # fmt: skip
    """Return the opcodes of a tensor in the storage."""
    storage = b"(" + text("storage") + b"ctorch\n" + kind + b"Storage\n" + text(key) + text("cpu") + long(numel) + b"tQ"
    sizes, strides = (b"(" + b"".join(map(long, numbers)) + b"t" for numbers in (size, stride))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + long(offset) + sizes + strides + b"\x89" + hooks + b"tR"


def structure(*opcodes: bytes) -> bytes:
    return b"\x80\x02" + b"".join(opcodes) + b"."


class _Unpickler(pickle._Unpickler):
    """Python's unpickler, in which every name stands for a harmless object."""

    def __init__(self, archive: zipfile.ZipFile, top: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{top}/data.pkl")))
        self.archive, self.top = archive, top

    def find_class(self, module_name: str, name: str) -> object:
        if name.endswith("Storage"):
            return {"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
                    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
                    "Bool": torch.bool}[name.removesuffix("Storage")]  # fmt: skip
        if name == "_rebuild_tensor_v2":
            return lambda storage, offset, size, stride, grad, hooks: storage.as_strided(size, stride, offset)
        if module_name.startswith("__torch__"):
            return type("Object", (), {})
        return {"OrderedDict": dict, "device": str, "restore_type_tag": lambda value, tag: value}.get(name, lambda value: value)

    def persistent_load(self, reference: tuple) -> Tensor:
        _, dtype, key, _, numel = reference
        content = bytearray(self.archive.read(f"{self.top}/data/{key}"))
        return torch.frombuffer(content, dtype=dtype) if content else torch.empty(numel, dtype=dtype)


def read_by_pickle(path: Path) -> dict[str, Tensor]:
    """A slow form of `read_torchscript` by Python's unpickler, for archives that do no harm to it."""
    with zipfile.ZipFile(path) as archive:
        root = _Unpickler(archive, archive.namelist()[0].partition("/")[0]).load()
    found: dict[str, Tensor] = {}

    def walk(value: object, prefix: str) -> None:
        attributes = vars(value)
        found.update({prefix + name: value for name, value in attributes.items() if isinstance(value, Tensor)})
        for name, below in attributes.items():
            if type(below).__name__ == "Object":
                walk(below, f"{prefix}{name}.")

    walk(root, "")
    return found


def same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Return whether names, their order, types, shapes, strides, offsets and bits are equal."""
    return list(found) == list(expected) and all(
        (a.dtype, a.shape, a.stride(), a.storage_offset()) == (b.dtype, b.shape, b.stride(), b.storage_offset())
        and (a.numel() > 10**6 or bits(a).equal(bits(b)))
        for a, b in zip(found.values(), expected.values(), strict=True)
    )


def bits(tensor: Tensor) -> Tensor:
    return tensor.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)

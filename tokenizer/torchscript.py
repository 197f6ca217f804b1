"""Tensors of TorchScript archives, of those that run no code of their own while torch reads them.

`torch.jit.load` compiles the archive's source. It runs what gives default values to arguments and fields, and `__setstate__`; a
model that is only kept for its weights has neither.
"""

from __future__ import annotations

import ast
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from lumos.errors import UserError

MAX_CODE_BYTES = 2**27  # of one file of source


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers on the CPU. UserError for an archive that would run code; what zipfile and torch raise for damage."""
    check_archive(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive = torch.jit.load(str(path), map_location="cpu")
    return {key: tensor.detach() for key, tensor in archive.state_dict().items()}


def check_archive(path: Path) -> None:
    """UserError unless all of its source is seen here as torch will see it, and holds nothing that runs when it is read."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        begins_later = min((entry.header_offset for entry in entries), default=1) > 0  # where torch may see another directory
        of_old = any("model.json" in name for name in names)  # a form in which any entry may be source
        if begins_later or of_old or len(set(names)) < len(names):
            raise UserError(f"{path} is no archive of weights as published; download it again, or take weights as safetensors")
        for entry in entries:
            if entry.filename.endswith(".py"):
                if entry.file_size > MAX_CODE_BYTES:
                    raise UserError(f"{path} holds more source than a model's; take weights as safetensors")
                if what := runs_when_read(archive.read(entry)):
                    raise UserError(f"{path} would run code of its own while it is read ({what}); take weights as safetensors")


def runs_when_read(source: bytes) -> str | None:
    """What of TorchScript source, which is a subset of Python, runs when it is read: a default that is no constant, or a method."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "source that cannot be checked"
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            name, arguments = getattr(node, "name", "lambda"), node.args
            if name in ("__setstate__", "__getstate__"):
                return name
            if not all(default is None or is_constant(default) for default in (*arguments.defaults, *arguments.kw_defaults)):
                return f"a default of {name}"
        elif isinstance(node, ast.ClassDef):
            for line in node.body:
                if isinstance(line, ast.Assign | ast.AnnAssign) and line.value is not None and not is_constant(line.value):
                    target = line.targets[0] if isinstance(line, ast.Assign) else line.target
                    if not (isinstance(target, ast.Subscript) and ast.unparse(target.value) == "__annotations__"):  # a type
                        return f"a field of {node.name}"
    return None


def is_constant(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp):
        return is_constant(node.operand)
    if isinstance(node, ast.List | ast.Tuple):
        return all(map(is_constant, node.elts))
    return isinstance(node, ast.Constant)

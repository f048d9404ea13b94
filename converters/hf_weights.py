"""Tensors of safetensors files in a folder: found and checked by their headers, each read when it is wanted."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from a3q.errors import InputError
from a3q.model import Source
from a3q.solve.grid import Blocks
from converters.gptq import TENSORS, Form, Packed, unpack
from converters.tensors import check_finite
from converters.unchanged import Stamp, check_unchanged

DTYPES = ("F32", "F16", "BF16")
_WORDS = "I32"
LARGE = 1 << 25
"""Weights above which a tensor outside the layers is not copied into main memory."""
_INDEX = "model.safetensors.index.json"
_BUFFER = re.compile(r"(^|\.)(rotary_emb\.inv_freq|\d+\.(attn|attention)\.(masked_)?bias)$")
"""Rotation and causal mask in old checkpoints: the config says the same."""


@dataclass(frozen=True)
class Stored:
    """A tensor as the header of its file describes it."""

    path: Path
    stamp: Stamp
    handle: Any
    name: str
    """As the file has it."""
    shape: tuple[int, ...]
    dtype: str

    def load(self) -> Tensor:
        """As it is stored, in the memory of the file."""
        check_unchanged([self.stamp])
        try:
            tensor: Tensor = self.handle.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.path}: tensor {self.name} cannot be read: {one_line(error)}") from error
        return tensor

    def borrow(self) -> Tensor:
        """A large tensor as it is stored, in the memory of the file, which the system takes back when it needs some;
        else like `read`."""
        if prod(self.shape) < LARGE:
            return self.read()
        tensor = self.load()
        for rows in torch.split(tensor, max(1, LARGE // prod(self.shape[1:]))):
            check_finite(rows, self.name, self.path)
        return tensor

    def read(self) -> Tensor:
        """As float32, the caller's own."""
        # Copied even from float32: the file is memory-mapped.
        return check_finite(self.load().to(torch.float32, copy=True), self.name, self.path)


@dataclass(frozen=True)
class StoredLinear:
    """A matrix that GPTQ's four tensors hold."""

    path: Path
    name: str
    """As the file has it, without what distinguishes the four."""
    parts: dict[str, Stored]
    form: Form
    matrix: tuple[int, int]
    """Rows and inputs."""
    transposed: bool = False
    """The same family stores its plain matrices `[inputs, rows]`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the plain matrix in its place."""
        return self.matrix[::-1] if self.transposed else self.matrix

    @property
    def dtype(self) -> str:
        """What the parameters are stored as."""
        return f"GPTQ {self.form.bits} bits"

    def read(self) -> Tensor:
        """The plain matrix in its place, as float32."""
        weight = check_finite(self._packed().dequantize(), self.name, self.path)
        return weight.T.contiguous() if self.transposed else weight

    def blocks(self) -> Blocks | None:
        """The matrix `[rows, inputs]` on its grid; None where its groups are not successive inputs."""
        return self._packed().blocks()

    def _packed(self) -> Packed:
        tensors = {name: stored.load() for name, stored in self.parts.items()}
        return unpack(tensors, self.form, f"{self.path}: tensor {self.name}")


@dataclass(frozen=True)
class Weights:
    """The tensors of a folder by name; `read` loads one."""

    tensors: dict[str, Stored | StoredLinear]
    files: tuple[Path, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor as it is stored, or would be if it were not quantized."""
        return {name: stored.shape for name, stored in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        """One tensor as float32, the caller's own."""
        return self.tensors[name].read()

    def borrow(self, name: str) -> Tensor:
        """One tensor, a large one of the type and in the memory of its file; not to be written to."""
        stored = self.tensors[name]
        return stored.borrow() if isinstance(stored, Stored) else stored.read()

    def blocks(self, name: str) -> Blocks | None:
        """The matrix `[rows, inputs]` on its grid; None where it is not quantized, or its groups are no blocks."""
        stored = self.tensors.get(name)
        return stored.blocks() if isinstance(stored, StoredLinear) else None

    def source(self, folder: Path) -> Source:
        """Where these weights are, their size, and how many parameters each dtype holds."""
        types: Counter[str] = Counter()
        for stored in self.tensors.values():
            types[stored.dtype] += prod(stored.shape)
        size = sum(file.stat().st_size for file in self.files)
        return Source(folder, "huggingface", size, self.files, dict(types))


def open_weights(folder: Path, form: Form | None = None, transposed: bool = False) -> Weights:
    """The headers of all weight files in `folder`; InputError where they are not what they should be.

    `form` is that of quantized matrices, if there may be any. Each takes the name of its plain weight, and with
    `transposed` its shape as families have it that store matrices `[inputs, rows]`.
    """
    single, index = folder / "model.safetensors", folder / _INDEX
    if single.is_file():
        handle = _open_file(single)
        where = dict.fromkeys(handle.keys(), single)
        handles = {single: handle}
    elif index.is_file():
        where = _read_index(index)
        handles = {path: _open_file(path) for path in sorted(set(where.values()))}
    elif any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise InputError(f"{folder}: has pickled weights only; convert them to safetensors (model.safetensors) first")
    else:
        raise InputError(f"{folder}: has no model.safetensors and no {_INDEX}; download the weights")
    stamps = {path: Stamp.of(path) for path in handles}
    found: dict[str, Stored] = {}
    held = {path: set(handle.keys()) for path, handle in handles.items()}
    for name, path in where.items():
        if name not in held[path]:
            raise InputError(f"{path}: tensor {name} is missing, though {_INDEX} says it is here")
        if _BUFFER.search(name):
            continue
        part = handles[path].get_slice(name)
        found[name] = Stored(path, stamps[path], handles[path], name, tuple(part.get_shape()), str(part.get_dtype()))
    linears = {} if form is None else _take_linears(found, form, transposed)
    for stored in found.values():
        if stored.dtype not in DTYPES:
            raise InputError(
                f"{stored.path}: tensor {stored.name} has dtype {stored.dtype}; a3q reads {', '.join(DTYPES)}"
            )
    return Weights({**found, **linears}, tuple(handles))


def _take_linears(found: dict[str, Stored], form: Form, transposed: bool) -> dict[str, StoredLinear]:
    """The quantized matrices among `found`, from which their tensors are taken."""
    linears = {}
    for module in [name.removesuffix(".qweight") for name in found if name.endswith(".qweight")]:
        path, plain = found[f"{module}.qweight"].path, f"{module}.weight"
        if plain in found:
            raise InputError(f"{path}: tensors {plain} and {module}.qweight are both there; remove the wrong one")
        if missing := [name for name in TENSORS if f"{module}.{name}" not in found]:
            raise InputError(f"{path}: tensor {module}.{missing[0]} is missing beside {module}.qweight")
        parts = {name: found.pop(f"{module}.{name}") for name in TENSORS}
        for name, stored in parts.items():
            known = DTYPES if name == "scales" else (_WORDS,)
            if stored.dtype not in known:
                raise InputError(
                    f"{stored.path}: tensor {stored.name} has dtype {stored.dtype}; a3q reads {', '.join(known)} there"
                )
        shapes = {name: stored.shape for name, stored in parts.items()}
        matrix = form.matrix(shapes, f"{path}: tensor {module}")
        linears[plain] = StoredLinear(path, module, parts, form, matrix, transposed)
    return linears


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; InputError names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not valid JSON: {one_line(error)}; download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object; download it again")
    return content


def one_line(error: BaseException) -> str:
    """What an error says."""
    return " ".join(str(error).split()) or type(error).__name__


def _read_index(index: Path) -> dict[str, Path]:
    """Tensor name → its file, which must lie in the folder itself."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no weight_map; download it again")
    where = {}
    for name, file in weight_map.items():
        # Checked by its letters: in the Hub's cache the files are links that lead outside, and rightly so.
        if not isinstance(file, str) or file in ("", ".", "..") or any(mark in file for mark in "/\\:\0"):
            raise InputError(f"{index}: names the file {file!r}, which is not in this folder; download it again")
        where[str(name)] = index.with_name(file)
    for path in sorted(set(where.values())):
        if not path.is_file():
            raise InputError(f"{path}: is missing, though {index.name} names it; download it")
    return where


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or one_line(error)}") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: is truncated or damaged: {one_line(error)}; download it again") from error
    except RuntimeError as error:  # PyTorch's own, where the process may not map so much
        raise InputError(f"{path}: cannot be read: {one_line(error)}; raise the limit on address space") from error

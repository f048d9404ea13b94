"""Which tensors a written folder has in which file, plain or in GPTQ's layout, and their bytes, layer by layer."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from a3q.errors import InputError, VerifyError
from a3q.hf.layout import Part, norm_offset
from a3q.model import Layer, Model
from a3q.solve.grid import Blocks, Grid
from converters import gptq
from converters.gptq_config import describe
from converters.tensors import check_finite

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32"}
INDEX = "model.safetensors.index.json"

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes in all."""
Quantized = Callable[[int, str], Blocks | None]
"""The matrix of a role in a layer as GPTQ stores it; None: it stays plain. The output always does: transformers would
take a quantized one for missing and draw it at random."""
Parts = Callable[[int | None], list[Part]]
"""The tensors of a layer, or those outside the layers, if none were quantized."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.dtype.itemsize * prod(self.shape)


@dataclass(frozen=True)
class Entry:
    """One tensor of the model, to be written as one or as GPTQ's four."""

    part: Part
    layer: int | None
    shapes: tuple[tuple[int, ...], ...]
    """Of the weights that it is made of."""
    tensors: tuple[Stored, ...]
    form: gptq.Form | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(stored.size for stored in self.tensors)


@dataclass(frozen=True)
class Plan:
    """All that is to be written."""

    files: Mapping[str, list[Entry]]
    """In the order in which they are computed."""
    quantization: dict[str, Any] | None
    """`quantization_config` of config.json."""

    @property
    def entries(self) -> list[Entry]:
        """Of all files."""
        return [entry for entries in self.files.values() for entry in entries]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.entries)


def make_plan(
    model: Model,
    parts: Parts,
    dtype: torch.dtype,
    shard_bytes: int,
    quantized: Quantized | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Plan:
    """Tensors of `dtype` but for those that are `quantized`, in files of at most `shard_bytes`.

    `settings` are further entries of `quantization_config`. InputError where one configuration cannot describe all.
    """
    top = [(part, None) for part in parts(None)]
    first = [one for one in top if one[0].roles[0].name in ("embed", "positions")]
    ordered: list[tuple[Part, int | None]] = [*first]
    for i in range(model.config.num_hidden_layers):
        ordered += [(part, i) for part in parts(i)]
    ordered += [one for one in top if one not in first]
    # The matrices themselves are let go: they are asked for again when they are written.
    grids = [_grid(_blocks(model, part, layer, quantized)) for part, layer in ordered]
    form = _common_form([grid for grid in grids if grid is not None])
    entries = [
        _entry(model, part, layer, dtype, None if grid is None else form)
        for (part, layer), grid in zip(ordered, grids, strict=True)
    ]
    quantization = None
    if form is not None:
        matrices = [entry for entry in entries if entry.layer is not None and len(entry.shapes[0]) == 2]
        quantization = describe(
            form,
            symmetric=not form.v2,
            plain=[_module(entry.part) for entry in matrices if entry.form is None],
            quantized=[_module(entry.part) for entry in matrices if entry.form is not None],
            settings=settings,
        )
    return Plan(_files(entries, shard_bytes), quantization)


def _entry(model: Model, part: Part, layer: int | None, dtype: torch.dtype, form: gptq.Form | None) -> Entry:
    shapes = tuple(part.shapes(model.config, model.config.layers[layer or 0]))
    rows, rest = sum(shape[0] for shape in shapes), shapes[0][1:]
    if form is None:
        return Entry(part, layer, shapes, (Stored(part.name, dtype, (rows, *rest)),))
    tensors = tuple(
        Stored(f"{_module(part)}.{name}", torch.float16 if name == "scales" else torch.int32, shape)
        for name, shape in form.shapes(rows, rest[0]).items()
    )
    return Entry(part, layer, shapes, tensors, form)


def _common_form(grids: list[Grid]) -> gptq.Form | None:
    """The form of all quantized matrices, None where there are none."""
    sizes = {(grid.bits, grid.block) for grid in grids}
    if len(sizes) > 1:
        found = ", ".join(f"{bits} bits in groups of {group}" for bits, group in sorted(sizes))
        raise InputError(f"a GPTQ folder has one number of bits and one group size for all matrices; found {found}")
    for bits, group in sizes:
        # Zero points less one are trusted by GPTQModel only in what it has written itself, and cannot be 0.
        return gptq.Form(bits, group, v2=any(grid.zero for grid in grids))
    return None


def _module(part: Part) -> str:
    return part.name.removesuffix(".weight")


def _grid(blocks: Blocks | None) -> Grid | None:
    return None if blocks is None else blocks.grid


def _blocks(model: Model, part: Part, layer: int | None, quantized: Quantized | None) -> Blocks | None:
    """The quantized matrix that is stored as `part`, rows of several weights one below the other."""
    shapes = part.shapes(model.config, model.config.layers[layer or 0])
    if quantized is None or layer is None or len(shapes[0]) != 2:
        return None
    roles = [role.name for role in part.roles]
    found = [quantized(layer, role) for role in roles]
    blocks = [one for one in found if one is not None]
    if not blocks:
        return None
    if len(blocks) < len(found) or len({one.grid for one in blocks}) > 1:
        raise InputError(f"{part.name}: {', '.join(roles)} are one tensor; quantize all of them alike or none")
    for one, shape in zip(blocks, shapes, strict=True):
        if tuple(one.codes.shape) != shape:
            raise VerifyError(f"{part.name}: the codes are {list(one.codes.shape)}, the weight is {list(shape)}")
    rows, n = sum(shape[0] for shape in shapes), shapes[0][1]
    if not gptq.fits(rows, n, blocks[0].grid):
        raise InputError(
            f"{part.name}: GPTQ has no matrix of {rows} by {n} in {blocks[0].grid.name} with groups of "
            f"{blocks[0].grid.block}: its kernels want whole groups and multiples of {gptq.ALIGNED}; leave it plain"
        )
    return Blocks.joined(blocks)


def _files(entries: list[Entry], shard_bytes: int) -> dict[str, list[Entry]]:
    shards: list[list[Entry]] = [[]]
    for item in entries:
        if shards[-1] and sum(other.size for other in shards[-1]) + item.size > shard_bytes:
            shards.append([])
        shards[-1].append(item)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i + 1:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards)}


def write_files(
    folder: Path, model: Model, plan: Plan, dtype: torch.dtype, quantized: Quantized | None, progress: Progress | None
) -> None:
    """One file after another, of each the header first, so that no more than one layer is in memory."""
    total, done = plan.size, 0
    encoded = _encoded(model, plan.entries, dtype, quantized)
    for name, entries in plan.files.items():
        with (folder / name).open("wb") as file:
            _write_header(file, entries)
            for entry in entries:
                for tensor in next(encoded):
                    file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
                done += entry.size
                if progress is not None:
                    progress(done, total)
            file.flush()
            os.fsync(file.fileno())
    if len(plan.files) > 1:
        where = {
            stored.name: name for name, entries in plan.files.items() for entry in entries for stored in entry.tensors
        }
        content = {"metadata": {"total_size": total, "total_parameters": model.parameters()}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_header(file: BinaryIO, entries: list[Entry]) -> None:
    """Length and JSON of names, types, shapes and offsets: safetensors' own functions want all tensors at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for stored in (stored for entry in entries for stored in entry.tensors):
        start, end = end, end + stored.size
        header[stored.name] = {"dtype": DTYPES[stored.dtype], "shape": stored.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)


def _encoded(
    model: Model, entries: list[Entry], dtype: torch.dtype, quantized: Quantized | None
) -> Iterator[list[Tensor]]:
    """The tensors of each entry as they are stored; a layer is loaded once, and only for what stays plain."""
    layer: Layer = {}
    loaded: int | None = None
    for entry in entries:
        if entry.form is not None:
            blocks = _blocks(model, entry.part, entry.layer, quantized)
            if blocks is None:
                raise VerifyError(f"{entry.part.name}: was quantized when it was planned, but no longer")
            packed = gptq.pack(blocks, entry.form.v2)
            yield [packed[stored.name.rpartition(".")[2]] for stored in entry.tensors]
            continue
        if entry.layer is not None and loaded != entry.layer:
            layer, loaded = model.layers[entry.layer], entry.layer
        source = model.top if entry.layer is None else layer
        yield [_encode(entry, [source[role.name] for role in entry.part.roles], model, dtype)]


def _encode(entry: Entry, weights: list[Tensor], model: Model, dtype: torch.dtype) -> Tensor:
    """The plain tensor as it is stored."""
    parts, name = [], entry.part.name
    for role, weight, shape in zip(entry.part.roles, weights, entry.shapes, strict=True):
        if tuple(weight.shape) != shape:
            raise VerifyError(f"{name}: the weight is {list(weight.shape)}, its configuration says {list(shape)}")
        full = check_finite(weight.detach().to("cpu", torch.float32), name, model.source.path)
        stored = (full - norm_offset(model.family, role.name)).to(dtype)
        if not torch.isfinite(stored).all():
            raise InputError(
                f"{model.source.path}: tensor {name} holds {float(full.abs().max()):g}, too large for "
                f"{dtype_name(dtype)}; write bfloat16 or float32"
            )
        parts.append(stored)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def dtype_name(dtype: torch.dtype) -> str:
    """Its name in PyTorch and in config.json."""
    return str(dtype).removeprefix("torch.")

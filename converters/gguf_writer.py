"""`Model` → GGUF file: streamed layer by layer, checked by reading it back, and only then given its name."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFValueType, quants
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType
from gguf.gguf_writer import GGUFValue
from torch import Tensor

from a3q.errors import InputError, VerifyError
from a3q.families import Role
from a3q.model import Layer, LayerShape, Model, ModelConfig
from converters import rope
from converters.gguf_graphs import query_scale
from converters.gguf_reader import ROPE_FACTORS, GGUFHeader, check_gguf
from converters.gguf_target import Target, as_read_back, dimension_keys, factors_for, target_for
from converters.tensors import check_finite, stored_roles
from converters.types import QuantPlan, type_for

_HALF_MAX = 65504.0
_HEADER_ROOM = 16 << 20
"""Free space asked for beside the tensors: metadata, of which the vocabulary is the bulk."""

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes in all."""


@dataclass(frozen=True)
class WrittenFile:
    """What was written."""

    path: Path
    size: int
    """Bytes."""
    tensor_types: Mapping[str, int]
    """GGML type name → number of parameters stored in it."""
    notes: tuple[str, ...]
    """Where a tensor has another type than was asked for."""
    sha256: str


@dataclass(frozen=True)
class _Entry:
    """One tensor to be written."""

    name: str
    roles: tuple[Role, ...]
    """Whose rows follow one another in it; none: the RoPE factors."""
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    layer: int | None

    @property
    def weights(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.weights // int(block) * int(size)


def check_output(path: Path, force: bool = False) -> None:
    """InputError when `path` cannot become the output: no such folder, no right to write, or it exists already."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the name of a file in it")
    if not path.parent.is_dir():
        raise InputError(f"{path}: its folder does not exist; create {path.parent} first")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: its folder cannot be written to")
    if path.exists() and not force:
        raise InputError(f"{path}: exists already; use --force to replace it")


def write_gguf(
    model: Model,
    plan: QuantPlan,
    path: Path,
    *,
    name: str | None = None,
    provenance: Mapping[str, GGUFValue] | None = None,
    progress: Progress | None = None,
) -> WrittenFile:
    """Write `model` as `plan` says. `path` is replaced at the end or not touched at all.

    InputError: what llama.cpp cannot hold (see `check_runtime`), no room, a folder that is not there, a weight that the
    type cannot hold. VerifyError: the file does not read back as what was meant.
    """
    target = target_for(model)
    check_output(path, force=True)
    entries, notes = _entries(model, target, plan)
    needed = sum(_padded(entry.bytes) for entry in entries) + _HEADER_ROOM
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise InputError(f"{path}: disk full: {needed:,} bytes are needed and {free:,} are free; make room")
    if name is None and "general.name" not in model.metadata:
        name = path.stem
    weights = sum(entry.weights for entry in entries)
    metadata = _metadata(model, target, plan, name, weights) | dict(provenance or {})
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        _write(part, model, target, entries, metadata, progress)
        _check(check_gguf(part), model, target, entries)
        digest = _sync_and_hash(part)
        part.replace(path)
    except OSError as error:
        # numpy reports a full disk as an OSError without a number.
        if error.errno in (errno.ENOSPC, errno.EDQUOT, None):
            raise InputError(f"{path}: disk full: {needed:,} bytes are needed; make room") from error
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
    types: Counter[str] = Counter()
    for entry in entries:
        types[entry.kind.name] += entry.weights
    return WrittenFile(path, path.stat().st_size, dict(types), notes, digest)


def _padded(size: int) -> int:
    alignment = int(GGUF_DEFAULT_ALIGNMENT)
    return -(-size // alignment) * alignment


def _entries(model: Model, target: Target, plan: QuantPlan) -> tuple[list[_Entry], tuple[str, ...]]:
    """All tensors in the order of the file, and a note for each role whose type had to differ."""
    config = model.config
    entries: list[_Entry] = []
    notes: Counter[tuple[str, str]] = Counter()

    def add(name: str, roles: Sequence[Role], shape: LayerShape, layer: int | None) -> None:
        parts = [role.expected_shape(config, shape) for role in roles]
        whole = (sum(part[0] for part in parts), *parts[0][1:])
        kind, note = type_for(roles[0].name, whole, plan)
        if note is not None:
            notes[", ".join(role.name for role in roles), note] += 1
        entries.append(_Entry(name, tuple(roles), whole, kind, layer))

    for role in target.family.top:
        if (role.name in model.top and role.name != "output") or (role.name == "output" and not target.tied):
            add(role.gguf, [role], config.layers[0], None)
    if (factors := factors_for(target, config)) is not None:
        entries.append(_Entry(ROPE_FACTORS, (), (len(factors),), GGMLQuantizationType.F32, None))
    for i, shape in enumerate(config.layers):
        for name, roles in stored_roles(target.family, "gguf", i).items():
            if roles[0].name in model.layer_roles:
                add(name, roles, shape, i)
    said = [f"{roles} ({count} tensors): {note}" for (roles, note), count in notes.items()]
    if config.tie_word_embeddings and not target.tied:
        said.append(f"output: llama.cpp's {target.architecture} needs one of its own; the embedding is stored twice")
    return entries, tuple(said)


def _write(
    part: Path,
    model: Model,
    target: Target,
    entries: list[_Entry],
    metadata: Mapping[str, GGUFValue],
    progress: Progress | None,
) -> None:
    """Header, then one tensor after another; one layer is in memory at a time."""
    writer = gguf.GGUFWriter(part, target.architecture)
    for key, value in metadata.items():
        writer.add_key_value(key, value.value, value.type, value.sub_type)
    for entry in entries:
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.bytes, raw_dtype=entry.kind)
    total, done = sum(entry.bytes for entry in entries), 0
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry, parts in _weights(model, target, entries):
            writer.write_tensor_data(_encode(entry, parts, model, target))
            done += entry.bytes
            if progress is not None:
                progress(done, total)
        writer.flush()
    finally:
        writer.close()


def _weights(model: Model, target: Target, entries: list[_Entry]) -> Iterator[tuple[_Entry, list[Tensor]]]:
    """The weights of each entry, one for each of its roles."""
    top = {**model.top, "output": model.output}
    layer: Layer = {}
    loaded: int | None = None
    for entry in entries:
        if not entry.roles:
            yield entry, [torch.tensor(factors_for(target, model.config), dtype=torch.float32)]
            continue
        if entry.layer is not None and loaded != entry.layer:
            layer, loaded = model.layers[entry.layer], entry.layer
        weights = top if entry.layer is None else layer
        yield entry, [weights[role.name] for role in entry.roles]


def _encode(entry: _Entry, parts: list[Tensor], model: Model, target: Target) -> Any:
    """The tensor's bytes as an array, q and k in the runtime's order. The caller's tensors are left alone."""
    config = model.config
    shape = config.layers[entry.layer or 0]
    arranged = []
    for role, part in zip_longest(entry.roles, parts):
        expected = entry.shape if role is None else role.expected_shape(config, shape)
        if tuple(part.shape) != expected:
            raise VerifyError(
                f"{entry.name}: the weight is {list(part.shape)}, its configuration says {list(expected)}"
            )
        part = check_finite(part.detach().to("cpu", torch.float32), entry.name, model.source.path)
        arranged.append(part if role is None else _arranged(part, role, config, target))
    weight = arranged[0] if len(arranged) == 1 else torch.cat(arranged)
    if entry.kind not in (GGMLQuantizationType.F32, GGMLQuantizationType.BF16):
        # The block scales of the quantized types are half floats as well.
        largest = float(weight.abs().max())
        if largest > _HALF_MAX:
            raise InputError(
                f"{model.source.path}: tensor {entry.name} holds {largest:g}, too large for {entry.kind.name}; "
                "write bf16 or f32"
            )
    return quants.quantize(np.ascontiguousarray(weight.numpy()), entry.kind)


def _arranged(weight: Tensor, role: Role, config: ModelConfig, target: Target) -> Tensor:
    if role.name == "q_norm":
        weight = weight / query_scale(target.architecture, config)
    if role.rotary is None or target.form.written_rope == "half":
        return weight
    heads = config.num_attention_heads if role.rotary == "queries" else config.num_key_value_heads
    return rope.to_interleaved(weight, heads)


def _metadata(model: Model, target: Target, plan: QuantPlan, name: str | None, weights: int) -> dict[str, GGUFValue]:
    """All keys of the file but provenance; `general.architecture` is the writer's own."""
    keys = {
        key if key.startswith(("general.", "a3q.")) else f"{target.architecture}.{key}": value
        for key, value in model.metadata.items()
    }
    texts = {"general.type": "model", "general.size_label": gguf.size_label(weights, weights, 0, 0)}
    if name is not None:
        texts["general.name"] = name
    integers = {
        "general.file_type": int(plan.file_type),
        "general.quantization_version": int(gguf.GGML_QUANT_VERSION),
    }
    keys |= {key: GGUFValue(text, GGUFValueType.STRING) for key, text in texts.items()}
    keys |= {key: GGUFValue(number, GGUFValueType.UINT32) for key, number in integers.items()}
    return keys | dimension_keys(target, model.config) | model.tokenizer.metadata


def _check(header: GGUFHeader, model: Model, target: Target, entries: list[_Entry]) -> None:
    """The file read back says what was meant; VerifyError otherwise. Its shapes already fit its own metadata."""
    meant = {entry.name: (entry.kind, entry.shape) for entry in entries}
    found = {
        name: (tensor.tensor_type, tuple(int(size) for size in reversed(tensor.shape)))
        for name, tensor in header.tensors.items()
    }
    wrong = [name for name in meant.keys() | found.keys() if meant.get(name) != found.get(name)]
    if wrong or header.config != as_read_back(target, model.config, header.config):
        what = f"tensor {sorted(wrong)[0]}" if wrong else "its dimensions"
        raise VerifyError(f"the written file does not read back as it was meant: {what} came out different")


def _sync_and_hash(part: Path) -> str:
    """SHA-256 of the file, after its bytes are on the disk: a crash must not leave an empty file under the name."""
    with part.open("rb+") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()

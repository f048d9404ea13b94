"""`Model` → GGUF in one file or several: streamed layer by layer, checked by reading it back, then given its name."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFValueType, quants
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType
from gguf.gguf_writer import GGUFValue
from numpy.typing import NDArray
from torch import Tensor

from a3q.errors import InputError, VerifyError
from a3q.families import Role
from a3q.model import Layer, Model, ModelConfig
from a3q.solve.gptq import nearest
from a3q.solve.grid import GRIDS
from converters import ggml_encode, gguf_split, rope
from converters.assignment import Types, assign
from converters.entries import Entry, entries
from converters.ggml_pack import pack
from converters.gguf_graphs import query_scale
from converters.gguf_reader import GGUFHeader, check_gguf
from converters.gguf_target import Target, as_read_back, dimension_keys, factors_for, target_for
from converters.tensors import check_finite
from converters.types import QuantPlan

_T = GGMLQuantizationType
_BY_GGUF = frozenset((_T.F32, _T.F16, _T.BF16, _T.Q8_0, _T.Q5_1, _T.Q5_0, _T.Q4_1, _T.Q4_0))
"""Types that the gguf package encodes itself."""
_HALF_MAX = 65504.0
_PROVENANCE_ROOM = 16 << 10
"""What a3q says about a file takes less, with sizes of its own in each of a hundred layers."""
_HEADER_ROOM = 16 << 20
"""Free space asked for beside the tensors: metadata, of which the vocabulary is the bulk."""

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes in all."""
Packed = Callable[[int | None, str], NDArray[np.uint8] | None]
"""Given a layer (None: outside the layers) and a role, the weight already encoded as its tensor's type, uint8
`[rows, bytes of a row]` with the rows in the order of the model; None where there is only the weight itself."""


@dataclass(frozen=True)
class WrittenFile:
    """What was written."""

    path: Path
    """The only file, or the first of several, which is the one to load."""
    size: int
    """Bytes of all files."""
    tensor_types: Mapping[str, int]
    """GGML type name → number of parameters stored in it."""
    notes: tuple[str, ...]
    """Where a tensor has another type than was asked for."""
    files: tuple[Path, ...]
    sha256: tuple[str, ...]
    """Of each of `files`."""


@dataclass(frozen=True)
class _Part:
    """One file to be written."""

    name: str
    tensors: Sequence[Entry]
    metadata: Mapping[str, GGUFValue]


def check_output(path: Path, force: bool = False, split: bool = False) -> None:
    """InputError when `path` cannot become the output: no such folder, no right to write, or it exists already.

    With `split` it is its shards, of whatever number, that must not exist.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the name of a file in it")
    if not path.parent.is_dir():
        raise InputError(f"{path}: its folder does not exist; create {path.parent} first")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: its folder cannot be written to")
    if force:
        return
    if split and (old := gguf_split.existing(path)):
        raise InputError(f"{old[0]}: exists already; use --force to replace it and the files that belong to it")
    if not split and path.exists():
        raise InputError(f"{path}: exists already; use --force to replace it")


def write_gguf(
    model: Model,
    plan: QuantPlan,
    path: Path,
    *,
    name: str | None = None,
    provenance: Mapping[str, GGUFValue] | None = None,
    progress: Progress | None = None,
    types: Types | None = None,
    packed: Packed | None = None,
    split_max_size: int | None = None,
) -> WrittenFile:
    """Write `model` as `plan` says. `path` is replaced at the end or not touched at all.

    `split_max_size`: bytes of tensors in a file; then `path` OUT.gguf stands for OUT-00001-of-0000N.gguf and so on,
    also where one file is enough, and all shards that it had before are replaced.

    `types`: of every tensor, as `assign` settled them; settled here, without measuring, unless given. `packed`: where
    weights were encoded before; a tensor is written from it if it has all of the tensor's roles.

    InputError: what llama.cpp cannot hold (see `check_runtime`), no room, a folder that is not there, a weight that the
    type cannot hold. VerifyError: the file does not read back as what was meant.
    """
    if split_max_size is not None:
        gguf_split.check_limit(split_max_size)
    target = target_for(model)
    check_output(path, force=True)
    tensors = entries(model, target)
    if types is None:
        types = assign(plan, tensors, model.config, target.tied)
    room = {entry.name: padded(entry.bytes(types.kinds[entry.name])) for entry in tensors}
    needed = sum(room.values()) + _HEADER_ROOM
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise InputError(f"{path}: disk full: {needed:,} bytes are needed and {free:,} are free; make room")
    if name is None and "general.name" not in model.metadata:
        name = path.stem
    weights = sum(entry.weights for entry in tensors)
    metadata = _metadata(model, target, plan, name, weights) | dict(provenance or {})
    if split_max_size is None:
        parts = [_Part(path.name, tensors, metadata)]
    else:
        parts = _split(path, gguf_split.plan(tensors, room, split_max_size), metadata)
    try:
        # A folder, so that the parts have their final names, by which they find each other.
        with tempfile.TemporaryDirectory(
            prefix=f".{path.name}.", suffix=".part", dir=path.parent, ignore_cleanup_errors=True
        ) as folder:
            drafts = [Path(folder) / part.name for part in parts]
            _write(drafts, parts, model, target, types, packed, progress)
            _check(check_gguf(drafts[0]), model, target, tensors, types)
            digests = tuple(_sync_and_hash(draft) for draft in drafts)
            if split_max_size is None:
                files: tuple[Path, ...] = (drafts[0].replace(path),)
            else:
                files = gguf_split.place(drafts, path)
    except OSError as error:
        # numpy reports a full disk as an OSError without a number.
        if error.errno in (errno.ENOSPC, errno.EDQUOT, None):
            raise InputError(f"{path}: disk full: {needed:,} bytes are needed; make room") from error
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    totals: Counter[str] = Counter()
    for entry in tensors:
        totals[types.kinds[entry.name].name] += entry.weights
    notes = types.notes
    if model.config.tie_word_embeddings and not target.tied:
        notes += (f"output: llama.cpp's {target.architecture} needs one of its own; the embedding is stored twice",)
    return WrittenFile(files[0], sum(file.stat().st_size for file in files), dict(totals), notes, files, digests)


def padded(size: int) -> int:
    """Bytes that a tensor of this size takes in a file."""
    alignment = int(GGUF_DEFAULT_ALIGNMENT)
    return -(-size // alignment) * alignment


def _split(path: Path, shards: Sequence[Sequence[Entry]], metadata: Mapping[str, GGUFValue]) -> list[_Part]:
    """The shards as files; the first carries all metadata."""
    count, total = len(shards), sum(map(len, shards))
    return [
        _Part(name, shard, {**(metadata if i == 0 else {}), **gguf_split.keys(i, count, total)})
        for i, (name, shard) in enumerate(zip(gguf_split.names(path, count), shards, strict=True))
    ]


def _write(
    drafts: Sequence[Path],
    parts: Sequence[_Part],
    model: Model,
    target: Target,
    types: Types,
    packed: Packed | None,
    progress: Progress | None,
) -> None:
    """Of one file after another the header, then one tensor after another; one layer is in memory at a time."""
    tensors = [entry for part in parts for entry in part.tensors]
    sizes = {entry.name: entry.bytes(types.kinds[entry.name]) for entry in tensors}
    total, done = sum(sizes.values()), 0
    contents = _contents(model, target, tensors, types, packed)
    for draft, part in zip(drafts, parts, strict=True):
        writer = gguf.GGUFWriter(draft, target.architecture)
        try:
            if part is not parts[0]:
                # The architecture, which the writer has put there by itself, is metadata of the first file too.
                writer.kv_data[0].clear()
            _write_header(writer, part.tensors, types.kinds, part.metadata)
            for entry, data in islice(contents, len(part.tensors)):
                writer.write_tensor_data(data)
                done += sizes[entry.name]
                if progress is not None:
                    progress(done, total)
            writer.flush()
        finally:
            writer.close()


def _write_header(
    writer: gguf.GGUFWriter,
    tensors: Sequence[Entry],
    kinds: Mapping[str, GGMLQuantizationType],
    metadata: Mapping[str, GGUFValue],
) -> None:
    for key, value in metadata.items():
        writer.add_key_value(key, value.value, value.type, value.sub_type)
    for entry in tensors:
        kind = kinds[entry.name]
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.bytes(kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def header_size(model: Model, room: int = _PROVENANCE_ROOM) -> int:
    """Bytes of a file of `model` before its first tensor, with `room` for what is said about its making."""
    target = target_for(model)
    tensors = entries(model, target)
    metadata = _metadata(model, target, QuantPlan("f32"), model.source.path.stem, 0)
    with tempfile.TemporaryDirectory(prefix="a3q-") as folder:
        part = Path(folder) / "header"
        writer = gguf.GGUFWriter(part, target.architecture)
        try:
            _write_header(writer, tensors, {entry.name: _T.F32 for entry in tensors}, metadata)
        finally:
            writer.close()
        return part.stat().st_size + room


def _contents(
    model: Model, target: Target, tensors: list[Entry], types: Types, packed: Packed | None
) -> Iterator[tuple[Entry, NDArray[Any]]]:
    """The bytes of each tensor as an array."""
    top = {**model.top, "output": model.output}
    layer: Layer = {}
    loaded: int | None = None
    for entry in tensors:
        kind = types.kinds[entry.name]
        if packed is not None and (ready := _ready(entry, kind, packed, model.config, target)) is not None:
            yield entry, ready
            continue
        if not entry.roles:
            factors = torch.tensor(factors_for(target, model.config), dtype=torch.float32)
            yield entry, _encode(entry, kind, [factors], model, target)
            continue
        if entry.layer is not None and loaded != entry.layer:
            layer, loaded = model.layers[entry.layer], entry.layer
        weights = top if entry.layer is None else layer
        yield entry, _encode(entry, kind, [weights[role.name] for role in entry.roles], model, target)


def _ready(
    entry: Entry, kind: GGMLQuantizationType, packed: Packed, config: ModelConfig, target: Target
) -> NDArray[np.uint8] | None:
    """The tensor's bytes out of what was encoded before; None unless all of its roles were."""
    if len(entry.shape) == 1:
        return None
    parts = []
    for role in entry.roles:
        part = packed(entry.layer, role.name)
        if part is None:
            return None
        rows = role.expected_shape(config, config.layers[entry.layer or 0])[0]
        expected = (rows, entry.bytes(kind) // entry.shape[0])
        if part.shape != expected:
            raise VerifyError(
                f"{entry.name}: the encoded {role.name} is {list(part.shape)}, {kind.name} asks for {list(expected)}"
            )
        heads = _interleaved_heads(role, config, target)
        parts.append(part if heads is None else part[rope.to_interleaved(torch.arange(rows), heads).numpy()])
    return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))


def _encode(
    entry: Entry, kind: GGMLQuantizationType, parts: list[Tensor], model: Model, target: Target
) -> NDArray[Any]:
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
    if kind not in (_T.F32, _T.BF16):
        # The block scales of the quantized types are half floats as well.
        largest = float(weight.abs().max())
        if largest > _HALF_MAX:
            raise InputError(
                f"{model.source.path}: tensor {entry.name} holds {largest:g}, too large for {kind.name}; "
                "write bf16 or f32"
            )
    rows = np.ascontiguousarray(weight.numpy())
    if kind in _BY_GGUF:
        data: NDArray[Any] = quants.quantize(rows, kind)
        return data
    if ggml_encode.available():
        return ggml_encode.encode(rows, kind, None)
    return pack(nearest(weight, GRIDS[kind.name.lower()], torch.ones(weight.shape[1])))


def _arranged(weight: Tensor, role: Role, config: ModelConfig, target: Target) -> Tensor:
    if role.name == "q_norm":
        weight = weight / query_scale(target.architecture, config)
    heads = _interleaved_heads(role, config, target)
    return weight if heads is None else rope.to_interleaved(weight, heads)


def _interleaved_heads(role: Role, config: ModelConfig, target: Target) -> int | None:
    """Heads of a weight whose rows the file holds interleaved; None where it holds them as the model does."""
    if role.rotary is None or target.form.written_rope == "half":
        return None
    return config.num_attention_heads if role.rotary == "queries" else config.num_key_value_heads


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


def _check(header: GGUFHeader, model: Model, target: Target, tensors: list[Entry], types: Types) -> None:
    """The file read back says what was meant; VerifyError otherwise. Its shapes already fit its own metadata."""
    meant = {entry.name: (types.kinds[entry.name], entry.shape) for entry in tensors}
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

"""`Model` → GGUF file: streamed layer by layer, checked by reading it back, and only then given its name."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
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
from a3q.model import Layer, Model
from converters import rope
from converters.gguf_reader import ROPE_FACTORS, GGUFHeader, check_gguf
from converters.tensors import check_finite, layer_names
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
    role: Role | None
    """None for the RoPE factors."""
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

    InputError: no room, a folder that is not there, a weight that the type cannot hold. VerifyError: the file does
    not read back as what was meant.
    """
    check_output(path, force=True)
    entries, notes = _entries(model, plan)
    needed = sum(_padded(entry.bytes) for entry in entries) + _HEADER_ROOM
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise InputError(f"{path}: disk full: {needed:,} bytes are needed and {free:,} are free; make room")
    if name is None and "general.name" not in model.metadata:
        name = path.stem
    metadata = _metadata(model, plan, name, sum(entry.weights for entry in entries)) | dict(provenance or {})
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        _write(part, model, plan, entries, metadata, progress)
        _check(check_gguf(part), model, entries)
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


def _entries(model: Model, plan: QuantPlan) -> tuple[list[_Entry], tuple[str, ...]]:
    """All tensors in the order of the file, and a note for each role whose type had to differ."""
    entries: list[_Entry] = []
    notes: Counter[tuple[str, str]] = Counter()

    def add(role: Role, name: str, layer: int | None) -> None:
        shape = role.expected_shape(model.config)
        kind, note = type_for(role.name, shape, plan)
        if note is not None:
            notes[role.name, note] += 1
        entries.append(_Entry(name, role, shape, kind, layer))

    for role in model.family.top:
        if role.name != "output" or model.output is not None:
            add(role, role.gguf, None)
    if rope.factors(model.config) is not None:
        entries.append(_Entry(ROPE_FACTORS, None, (model.config.head_dim // 2,), GGMLQuantizationType.F32, None))
    present = set(model.layers[0])
    for i in range(model.config.num_hidden_layers):
        for role, name in layer_names(model.family, "gguf", i):
            if role.name in present:
                add(role, name, i)
    return entries, tuple(f"{role} ({count} tensors): {note}" for (role, note), count in notes.items())


def _write(
    part: Path,
    model: Model,
    plan: QuantPlan,
    entries: list[_Entry],
    metadata: Mapping[str, GGUFValue],
    progress: Progress | None,
) -> None:
    """Header, then one tensor after another; one layer is in memory at a time."""
    writer = gguf.GGUFWriter(part, model.family.written_as)
    for key, value in metadata.items():
        writer.add_key_value(key, value.value, value.type, value.sub_type)
    for entry in entries:
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.bytes, raw_dtype=entry.kind)
    total, done = sum(entry.bytes for entry in entries), 0
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry, weight in _weights(model, entries):
            writer.write_tensor_data(_encode(entry, weight, model, part))
            done += entry.bytes
            if progress is not None:
                progress(done, total)
        writer.flush()
    finally:
        writer.close()


def _weights(model: Model, entries: list[_Entry]) -> Iterator[tuple[_Entry, Tensor]]:
    top = {"embed": model.embed, "final_norm": model.final_norm, "output": model.output}
    layer: Layer = {}
    loaded: int | None = None
    for entry in entries:
        if entry.role is None:
            yield entry, torch.tensor(rope.factors(model.config), dtype=torch.float32)
        elif entry.layer is None:
            weight = top[entry.role.name]
            assert weight is not None
            yield entry, weight
        else:
            if loaded != entry.layer:
                layer, loaded = model.layers[entry.layer], entry.layer
            yield entry, layer[entry.role.name]


def _encode(entry: _Entry, weight: Tensor, model: Model, part: Path) -> Any:
    """The tensor's bytes as an array, q and k in interleaved order. The caller's tensor is left alone."""
    if tuple(weight.shape) != entry.shape:
        raise VerifyError(
            f"{entry.name}: the weight is {list(weight.shape)}, its configuration says {list(entry.shape)}"
        )
    weight = check_finite(weight.detach().to("cpu", torch.float32), entry.name, model.source.path)
    if entry.role is not None and entry.role.rotary is not None:
        config = model.config
        queries = entry.role.rotary == "queries"
        weight = rope.to_interleaved(weight, config.num_attention_heads if queries else config.num_key_value_heads)
    if entry.kind not in (GGMLQuantizationType.F32, GGMLQuantizationType.BF16):
        # The block scales of the quantized types are half floats as well.
        largest = float(weight.abs().max())
        if largest > _HALF_MAX:
            raise InputError(
                f"{model.source.path}: tensor {entry.name} holds {largest:g}, too large for {entry.kind.name}; "
                "write bf16 or f32"
            )
    return quants.quantize(np.ascontiguousarray(weight.numpy()), entry.kind)


def _metadata(model: Model, plan: QuantPlan, name: str | None, weights: int) -> dict[str, GGUFValue]:
    """All keys of the file but provenance; `general.architecture` is the writer's own."""
    config, arch = model.config, model.family.written_as
    keys = {
        key if key.startswith(("general.", "a3q.")) else f"{arch}.{key}": value for key, value in model.metadata.items()
    }
    texts = {
        "general.type": "model",
        "general.size_label": gguf.size_label(weights, weights, 0, 0),
    }
    if name is not None:
        texts["general.name"] = name
    integers = {
        "general.file_type": int(plan.file_type),
        "general.quantization_version": int(gguf.GGML_QUANT_VERSION),
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.vocab_size": config.vocab_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.value_length": config.v_head_dim,
        f"{arch}.rope.dimension_count": config.head_dim,
    }
    # Scaled frequencies are spelled out in rope_freqs.weight, so no scaling key is written.
    floats = {
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.freq_base": config.rope_theta,
    }
    keys |= {key: GGUFValue(text, GGUFValueType.STRING) for key, text in texts.items()}
    keys |= {key: GGUFValue(number, GGUFValueType.UINT32) for key, number in integers.items()}
    keys |= {key: GGUFValue(number, GGUFValueType.FLOAT32) for key, number in floats.items()}
    return keys | model.tokenizer.metadata


def _check(header: GGUFHeader, model: Model, entries: list[_Entry]) -> None:
    """The file read back says what was meant; VerifyError otherwise. Its shapes already fit its own metadata."""
    meant = {entry.name: (entry.kind, entry.shape) for entry in entries}
    found = {
        name: (tensor.tensor_type, tuple(int(size) for size in reversed(tensor.shape)))
        for name, tensor in header.tensors.items()
    }
    wrong = [name for name in meant.keys() | found.keys() if meant.get(name) != found.get(name)]
    # Floats went through float32, and frequencies through a quotient of such.
    same = np.allclose(header.config.frequencies, model.config.frequencies, rtol=1e-5, atol=0.0) and np.allclose(
        (header.config.rope_theta, header.config.rms_norm_eps),
        (model.config.rope_theta, model.config.rms_norm_eps),
        rtol=1e-6,
        atol=0.0,
    )
    config = replace(
        model.config,
        rope_theta=header.config.rope_theta,
        rms_norm_eps=header.config.rms_norm_eps,
        frequencies=header.config.frequencies,
        tie_word_embeddings=model.output is None,
    )
    if wrong or not same or config != header.config:
        what = f"tensor {sorted(wrong)[0]}" if wrong else "its dimensions"
        raise VerifyError(f"the written file does not read back as it was meant: {what} came out different")


def _sync_and_hash(part: Path) -> str:
    """SHA-256 of the file, after its bytes are on the disk: a crash must not leave an empty file under the name."""
    with part.open("rb+") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()

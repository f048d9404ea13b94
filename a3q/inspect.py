"""What a model file holds and what running it will take, read from headers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from a3q.model import LayerShape, Model, ModelConfig
from converters import rope
from converters.gguf_reader import ROPE_FACTORS, GGUFHeader, check_gguf
from converters.gptq_config import read_form
from converters.hf_reader import open_huggingface
from converters.hf_weights import Stored, StoredLinear, open_weights, read_json

CACHE_BLOCK = 32
"""Values of a head that a quantized cache stores together; the head size must be a multiple of it."""

_DTYPE_BYTES = {"F32": 4, "I32": 4, "F16": 2, "BF16": 2}
_FLASH_CUDA = (40, 64, 72, 80, 96, 112, 128, 256)
_FLASH_METAL = (*_FLASH_CUDA, 32, 48, 192)


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor; shape in Hugging Face order, with whole blocks for quantized types."""

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class TypeTotal:
    """All tensors of one type."""

    type: str
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Rope:
    """Rotary position encoding."""

    theta: float
    frequencies: int
    """Number of rotated pairs of a head."""
    scaled: bool
    """Whether any differs from `theta ** (-i / frequencies)`; layers with a sliding window may have their own theta."""
    shared_list: bool
    """Whether the file carries its own list of frequencies for all layers (`rope_freqs.weight`)."""


@dataclass(frozen=True)
class Inspection:
    """Facts about a model file; plain values, so that `dataclasses.asdict` gives JSON."""

    path: str
    format: str
    architecture: str
    name: str | None
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    qk_head_dim: tuple[int, ...]
    """Size of a query or key head in each layer."""
    v_head_dim: tuple[int, ...]
    intermediate_size: tuple[int, ...]
    sliding_window: tuple[int | None, ...]
    """Positions that each layer sees; None: all."""
    context: int
    vocab_size: int
    tied_output: bool
    rope: Rope | None
    tensors: tuple[TensorInfo, ...]
    types: tuple[TypeTotal, ...]
    """By size, the largest first."""
    parameters: int
    weight_bytes: int
    file_bytes: int
    bits_per_weight: float
    """Of the stored weights, metadata not counted."""
    kv_bytes_per_token: dict[str, float]
    """Cache type → bytes for one token in all layers; quantized types only where llama.cpp can start with them."""
    flash_attention: tuple[str, ...]
    """Backends of llama.cpp whose flash attention takes the head sizes of every layer."""
    provenance: dict[str, str]
    """What a3q noted in the file, by key without `a3q.`."""

    @property
    def quantized_cache(self) -> bool:
        """Whether llama.cpp can start with a quantized cache."""
        return all(size % CACHE_BLOCK == 0 for size in (*self.qk_head_dim, *self.v_head_dim))


def inspect_file(path: Path) -> Inspection:
    """Inspect a GGUF or a Hugging Face folder; InputError when it is not a model that a3q can read."""
    return _from_folder(open_huggingface(path)) if path.is_dir() else _from_gguf(check_gguf(path))


def _from_gguf(header: GGUFHeader) -> Inspection:
    tensors = tuple(
        TensorInfo(
            name=name,
            type=tensor.tensor_type.name,
            shape=tuple(int(size) for size in reversed(tensor.shape)),
            bytes=int(tensor.n_bytes),
        )
        for name, tensor in header.tensors.items()
    )
    return _inspection(
        path=header.path,
        source_format="gguf",
        architecture=header.architecture,
        config=header.config,
        fields={key: field.value for key, field in header.fields.items()},
        tensors=tensors,
        files=header.files,
    )


def _from_folder(model: Model) -> Inspection:
    return _inspection(
        path=model.source.path,
        source_format=model.source.format,
        architecture=model.family.name,
        config=model.config,
        fields={key: field.value for key, field in model.metadata.items()},
        tensors=tuple(_stored_tensors(model.source.path)),
        files=model.source.weight_files,
    )


def _stored_tensors(folder: Path) -> Iterable[TensorInfo]:
    """Tensors of a folder, which `open_huggingface` has checked; the four of a GPTQ matrix are one."""
    config = folder / "config.json"
    for name, stored in open_weights(folder, read_form(read_json(config), config)).tensors.items():
        if isinstance(stored, StoredLinear):
            size = sum(_bytes(part) for part in stored.parts.values())
            yield TensorInfo(name, stored.form.type_name, stored.shape, size)
        else:
            yield TensorInfo(name, stored.dtype, stored.shape, _bytes(stored))


def _bytes(stored: Stored) -> int:
    return math.prod(stored.shape) * _DTYPE_BYTES[stored.dtype]


def _inspection(
    *,
    path: Path,
    source_format: str,
    architecture: str,
    config: ModelConfig,
    fields: Mapping[str, object],
    tensors: tuple[TensorInfo, ...],
    files: Iterable[Path],
) -> Inspection:
    parameters = sum(tensor.parameters for tensor in tensors)
    weight_bytes = sum(tensor.bytes for tensor in tensors)
    layers = config.layers
    head_sizes = {size for shape in layers for size in (shape.qk_head_dim, shape.v_head_dim)}
    name = fields.get("general.name")
    return Inspection(
        path=str(path),
        format=source_format,
        architecture=architecture,
        name=None if name is None else str(name),
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        qk_head_dim=tuple(shape.qk_head_dim for shape in layers),
        v_head_dim=tuple(shape.v_head_dim for shape in layers),
        intermediate_size=tuple(shape.intermediate_size for shape in layers),
        sliding_window=tuple(shape.sliding_window for shape in layers),
        context=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        tied_output=config.tie_word_embeddings,
        rope=_rope(config, shared_list=any(tensor.name == ROPE_FACTORS for tensor in tensors)),
        tensors=tensors,
        types=_totals(tensors),
        parameters=parameters,
        weight_bytes=weight_bytes,
        file_bytes=sum(file.stat().st_size for file in files),
        bits_per_weight=8 * weight_bytes / parameters,
        kv_bytes_per_token=_cache_bytes(config),
        flash_attention=tuple(
            backend
            for backend in flash_attention_backends(max(head_sizes))
            if all(backend in flash_attention_backends(size) for size in head_sizes)
        ),
        provenance={key.removeprefix("a3q."): str(value) for key, value in fields.items() if key.startswith("a3q.")},
    )


def _rope(config: ModelConfig, shared_list: bool) -> Rope | None:
    """None where positions are encoded otherwise."""
    rotated = [shape for shape in config.layers if shape.pairs]
    if not rotated:
        return None
    # Only layers with a window may have a theta of their own, and none of these is scaled.
    windowed = {shape.sliding_window is not None for shape in rotated} == {True, False}

    def plain(shape: LayerShape) -> bool:
        own = windowed and shape.sliding_window is not None
        found = (rope.base_and_factor(one, config.rope_theta) for one in shape.frequencies)
        return all(
            one is not None and one[1] == 1.0 and (own or math.isclose(one[0], config.rope_theta)) for one in found
        )

    return Rope(
        theta=config.rope_theta,
        frequencies=max(shape.pairs for shape in rotated),
        scaled=not all(plain(shape) for shape in set(rotated)),
        shared_list=shared_list,
    )


def _totals(tensors: Iterable[TensorInfo]) -> tuple[TypeTotal, ...]:
    groups: dict[str, list[TensorInfo]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.type, []).append(tensor)
    totals = [
        TypeTotal(kind, len(group), sum(one.parameters for one in group), sum(one.bytes for one in group))
        for kind, group in groups.items()
    ]
    return tuple(sorted(totals, key=lambda total: -total.bytes))


def _cache_bytes(config: ModelConfig) -> dict[str, float]:
    kinds = [GGMLQuantizationType.F16]
    if all(size % CACHE_BLOCK == 0 for shape in config.layers for size in (shape.qk_head_dim, shape.v_head_dim)):
        kinds += [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0]
    cost = {}
    for kind in kinds:
        values, size = GGML_QUANT_SIZES[kind]
        cost[kind.name.lower()] = config.kv_bytes_per_token(size / values)
    return cost


def flash_attention_backends(head_dim: int) -> tuple[str, ...]:
    """Backends of llama.cpp whose flash attention takes this size of key and value heads, as of late 2026."""
    takes = {
        "CPU": True,
        "CUDA": head_dim in _FLASH_CUDA,
        "Metal": head_dim in _FLASH_METAL,
        "Vulkan": head_dim % 8 == 0,
    }
    return tuple(backend for backend, taken in takes.items() if taken)


def render(inspection: Inspection, list_tensors: bool = False) -> RenderableType:
    """Tables for a terminal; `list_tensors` adds one row for each tensor."""
    parts: list[RenderableType] = [_facts(inspection), "", _type_table(inspection)]
    if inspection.provenance:
        provenance = _two_columns(inspection.provenance.items())
        parts += ["", "Made by a3q:", provenance]
    if list_tensors:
        parts += ["", _tensor_table(inspection.tensors)]
    return Group(*parts)


def _facts(one: Inspection) -> Table:
    output = "tied to the embedding" if one.tied_output else "separate"
    cache = ", ".join(f"{kind} {_number(size)}" for kind, size in one.kv_bytes_per_token.items())
    qk, v = _range(one.qk_head_dim), _range(one.v_head_dim)
    if not one.quantized_cache:
        odd = next(size for size in (*one.qk_head_dim, *one.v_head_dim) if size % CACHE_BLOCK)
        cache += f"; a quantized cache will not start (head size {odd} is no multiple of {CACHE_BLOCK})"
    size = f"size {qk}" if one.qk_head_dim == one.v_head_dim else f"size {qk} for queries and keys, {v} for values"
    rows = {
        "file": one.path,
        "name": one.name or "none",
        "architecture": f"{one.architecture} ({one.format})",
        "layers": str(one.layers),
        "hidden size": str(one.hidden_size),
        "heads": f"{one.heads} for queries, {one.kv_heads} for keys and values, of {size}",
        "MLP size": _range(one.intermediate_size),
        "context": f"{one.context:,} tokens",
        "vocabulary": f"{one.vocab_size:,} tokens, output {output}",
        "RoPE": _rope_facts(one.rope),
        "parameters": f"{one.parameters:,} at {one.bits_per_weight:.2f} bits",
        "size": f"{one.file_bytes:,} bytes, of which {one.weight_bytes:,} are weights",
        "cache per token": f"{cache} (bytes)",
        "flash attention": ", ".join(one.flash_attention),
    }
    windows = [window for window in one.sliding_window if window is not None]
    if windows:
        rows["sliding window"] = f"{_range(windows)} tokens in {len(windows)} of {one.layers} layers"
    return _two_columns(rows.items())


def _rope_facts(one: Rope | None) -> str:
    if one is None:
        return "none"
    facts = [f"theta {one.theta:g}", f"{one.frequencies} frequencies"]
    if one.shared_list:
        facts.append("own list, shared by all layers")
    facts.append("scaled or chosen" if one.scaled else "plain")
    return ", ".join(facts)


def _range(sizes: Sequence[int]) -> str:
    """One number where all are the same."""
    low, high = min(sizes), max(sizes)
    return str(low) if low == high else f"{low} to {high}"


def _number(size: float) -> str:
    return f"{size:,.0f}" if size == int(size) else f"{size:,.1f}"


def _two_columns(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows:
        table.add_row(escape(key), escape(value))
    return table


def _type_table(one: Inspection) -> Table:
    table = Table("type", "tensors", "parameters", "bytes", "bits each", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for total in one.types:
        bits = 8 * total.bytes / total.parameters
        table.add_row(total.type, f"{total.tensors}", f"{total.parameters:,}", f"{total.bytes:,}", f"{bits:.2f}")
    return table


def _tensor_table(tensors: Iterable[TensorInfo]) -> Table:
    table = Table("tensor", "type", "shape", "bytes", box=None, pad_edge=False)
    table.columns[-1].justify = "right"
    for tensor in tensors:
        shape = " × ".join(map(str, tensor.shape))
        table.add_row(escape(tensor.name), tensor.type, shape, f"{tensor.bytes:,}")
    return table

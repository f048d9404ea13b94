"""What a model file holds and what running it will take, read from headers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from a3q.footprint import CACHE_BLOCK, CACHE_TYPES, Footprint, TensorInfo, TypeTotal, Use, element_bytes, footprint
from a3q.footprint_table import comparison
from a3q.model import LayerShape, ModelConfig
from a3q.units import span
from converters import rope
from converters.gguf_reader import ROPE_FACTORS
from converters.headers import open_header


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
    footprint: Footprint
    """What it takes to run."""
    provenance: dict[str, str]
    """What a3q noted in the file, by key without `a3q.`."""


def inspect_file(path: Path, context: int | None = None, cache_type: str = "f16", parallel: int = 1) -> Inspection:
    """Inspect a GGUF, a Hugging Face folder or a config.json, to be run with so many tokens of context.

    `context`: all it was trained for, unless told. InputError when it is not a model that a3q can read.
    """
    header = open_header(path)
    model, tensors = header.model, header.tensors
    config, layers = model.config, model.config.layers
    use = Use(config.max_position_embeddings if context is None else context, cache_type, parallel)
    use.check()
    name = header.fields.get("general.name")
    parameters = sum(tensor.parameters for tensor in tensors)
    weight_bytes = sum(tensor.bytes for tensor in tensors)
    found = footprint(model.family, config, tensors, header.file_bytes, parameters, use)
    return Inspection(
        path=str(path),
        format=model.source.format,
        architecture=header.architecture,
        name=None if name is None else str(name.value),
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
        types=found.types,
        parameters=parameters,
        weight_bytes=weight_bytes,
        file_bytes=header.file_bytes,
        bits_per_weight=8 * weight_bytes / parameters,
        kv_bytes_per_token={
            kind: config.kv_bytes_per_token(element_bytes(kind))
            for kind in CACHE_TYPES
            if kind == "f16" or found.quantized_cache
        },
        footprint=found,
        provenance={
            key.removeprefix("a3q."): str(field.value) for key, field in header.fields.items() if key.startswith("a3q.")
        },
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


def facts(inspection: Inspection) -> dict[str, Any]:
    """The same as plain values, sizes in bytes."""
    found = asdict(inspection)
    found["footprint"]["memory"] = inspection.footprint.memory
    return found


def render(inspection: Inspection, list_tensors: bool = False) -> RenderableType:
    """Tables for a terminal; `list_tensors` adds one row for each tensor."""
    parts: list[RenderableType] = [_facts(inspection), "", comparison({"": inspection.footprint})]
    if inspection.provenance:
        provenance = _two_columns(inspection.provenance.items())
        parts += ["", "Made by a3q:", provenance]
    if list_tensors:
        parts += ["", _tensor_table(inspection.tensors)]
    return Group(*parts)


def _facts(one: Inspection) -> Table:
    output = "tied to the embedding" if one.tied_output else "separate"
    cache = ", ".join(f"{kind} {_number(size)}" for kind, size in one.kv_bytes_per_token.items())
    qk, v = span(one.qk_head_dim), span(one.v_head_dim)
    if not one.footprint.quantized_cache:
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
        "MLP size": span(one.intermediate_size),
        "context": f"{one.context:,} tokens",
        "vocabulary": f"{one.vocab_size:,} tokens, output {output}",
        "RoPE": _rope_facts(one.rope),
        "parameters": f"{one.parameters:,} at {one.bits_per_weight:.2f} bits",
        "size": f"{one.file_bytes:,} bytes, of which {one.weight_bytes:,} are weights",
        "cache per token": f"{cache} (bytes)",
    }
    windows = [window for window in one.sliding_window if window is not None]
    if windows:
        rows["sliding window"] = f"{span(windows)} tokens in {len(windows)} of {one.layers} layers"
    return _two_columns(rows.items())


def _rope_facts(one: Rope | None) -> str:
    if one is None:
        return "none"
    facts = [f"theta {one.theta:g}", f"{one.frequencies} frequencies"]
    if one.shared_list:
        facts.append("own list, shared by all layers")
    facts.append("scaled or chosen" if one.scaled else "plain")
    return ", ".join(facts)


def _number(size: float) -> str:
    return f"{size:,.0f}" if size == int(size) else f"{size:,.1f}"


def _two_columns(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows:
        table.add_row(escape(key), escape(value))
    return table


def _tensor_table(tensors: Iterable[TensorInfo]) -> Table:
    table = Table("tensor", "type", "shape", "bytes", box=None, pad_edge=False)
    table.columns[-1].justify = "right"
    for tensor in tensors:
        shape = " × ".join(map(str, tensor.shape))
        table.add_row(escape(tensor.name), tensor.type, shape, f"{tensor.bytes:,}")
    return table

"""Folder of `model_type` a3q → `Model`: what `hf_writer` wrote, checked like any other file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from a3q.errors import InputError
from a3q.families import Family
from a3q.hf.fields import Description, read_description
from a3q.hf.layout import Part, layer_parts, norm_offset, top_parts
from a3q.model import Layer, LayerShape, Model, ModelConfig
from a3q.solve.grid import Blocks
from converters.gptq_config import read_form
from converters.hf_reader import folder_metadata, record_of
from converters.hf_weights import Weights, open_weights
from converters.tensors import LazyLayers, shape_only
from converters.tokenizer import tokenizer_from_hf


def read_a3q_config(raw: Mapping[str, Any], path: Path) -> tuple[Family, ModelConfig]:
    """Family and dimensions from the content of config.json; InputError names `path` and the field."""
    description = read_description(raw, path)
    return description.family, description.config


def open_a3q(folder: Path, raw: Mapping[str, Any], pre: str | None = None, read_weights: bool = True) -> Model:
    """Read a folder whose config.json is `raw`. InputError (one line, naming the file) for whatever cannot be used.

    Without `read_weights`, those outside the layers have a shape only.
    """
    path = folder / "config.json"
    description = read_description(raw, path)
    family, config, weights = description.family, description.config, open_weights(folder, read_form(raw, path))
    check_folder_tensors(description, weights, folder)
    top: Layer = {}
    for part in top_parts(family, description.top_roles):
        if read_weights:
            top |= _weights(family, config, config.layers[0], part, weights)
        else:
            shapes = part.shapes(config, config.layers[0])
            top |= {role.name: shape_only(shape) for role, shape in zip(part.roles, shapes, strict=True)}
    # Some tools store a tied weight twice.
    twice = read_weights and config.tie_word_embeddings and "lm_head.weight" in weights.tensors
    if twice and not torch.equal(weights.read("lm_head.weight"), top["embed"]):
        raise InputError(
            f"{folder}: tie_word_embeddings is true in config.json, but lm_head.weight differs from the embedding; "
            "correct whichever is wrong"
        )

    def layer(i: int) -> Layer:
        w: Layer = {}
        for part in layer_parts(family, description.layer_roles, i):
            w |= _weights(family, config, config.layers[i], part, weights)
        return w

    def blocks(i: int) -> dict[str, Blocks]:
        found: dict[str, Blocks] = {}
        for part in layer_parts(family, description.layer_roles, i):
            if (whole := weights.blocks(part.name)) is not None:
                rows = [size[0] for size in part.shapes(config, config.layers[i])]
                found |= {role.name: piece for role, piece in zip(part.roles, whole.split(rows), strict=True)}
        return found

    return Model(
        family=family,
        config=config,
        top=top,
        layers=LazyLayers(config.num_hidden_layers, layer, blocks),
        layer_roles=description.layer_roles,
        tokenizer=tokenizer_from_hf(folder, config.vocab_size, pre),
        metadata=folder_metadata(folder) | record_of(raw),
        source=weights.source(folder),
    )


def check_folder_tensors(description: Description, weights: Weights, folder: Path) -> None:
    """Every tensor is there with the shape that the configuration asks for, and none is left over; else InputError."""
    family, config = description.family, description.config
    # A count from a damaged file must not decide how long the loop below runs.
    if config.num_hidden_layers > len(weights.tensors):
        raise InputError(
            f"{folder}: {len(weights.tensors)} tensors cannot make {config.num_hidden_layers} layers; "
            "the folder is damaged or cut"
        )
    expected = {part.name: part.shape(config, config.layers[0]) for part in top_parts(family, description.top_roles)}
    for i, shape in enumerate(config.layers):
        expected |= {part.name: part.shape(config, shape) for part in layer_parts(family, description.layer_roles, i)}
    if missing := [name for name in expected if name not in weights.tensors]:
        raise InputError(f"{folder}: tensor {missing[0]} is missing ({len(missing)} in all); write the folder again")
    if config.tie_word_embeddings:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    for name, stored in weights.tensors.items():
        if name not in expected:
            raise InputError(f"{folder}: tensor {name} is not part of what config.json describes; remove it")
        if stored.shape != expected[name]:
            raise InputError(
                f"{folder}: tensor {name} has shape {list(stored.shape)}, but config.json asks for "
                f"{list(expected[name])}; the two do not belong together"
            )


def _weights(family: Family, config: ModelConfig, shape: LayerShape, part: Part, weights: Weights) -> Layer:
    """The weights by role that one tensor holds."""
    rows = [size[0] for size in part.shapes(config, shape)]
    pieces = torch.split(weights.read(part.name), rows)
    return {
        role.name: piece + offset if (offset := norm_offset(family, role.name)) else piece
        for role, piece in zip(part.roles, pieces, strict=True)
    }

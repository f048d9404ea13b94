"""Hugging Face folder → `Model`: config.json and safetensors, checked by their headers, layers read at access."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue
from torch import Tensor

from a3q.errors import InputError
from a3q.families import Family, Role, family_for_hf
from a3q.model import Layer, LayerShape, Model, ModelConfig
from a3q.solve.grid import Blocks
from converters.gguf_keys import as_keys
from converters.gptq_config import read_form
from converters.hf_config import config_from_hf, query_factor
from converters.hf_weights import Weights, open_weights, read_json
from converters.tensors import LazyLayers, check_tensors, shape_only, stored_roles
from converters.tokenizer import tokenizer_from_hf

_OWN = "a3q"
"""`model_type` of the folders that a3q itself writes."""


def open_huggingface(folder: Path, pre: str | None = None, read_weights: bool = True) -> Model:
    """Read a folder in Hugging Face layout. InputError (one line, naming the file) for whatever cannot be used.

    `pre` names the llama.cpp pre-tokenizer where it is not recognised. Without `read_weights`, those outside the layers
    have a shape only.
    """
    raw, path = _config_json(folder), folder / "config.json"
    if raw.get("model_type") == _OWN:
        from converters.a3q_folder import open_a3q

        return open_a3q(folder, raw, pre, read_weights)
    family = family_for_hf(raw.get("model_type"), path)
    config = config_from_hf(family, raw, path)
    factor = query_factor(family, raw, config, path)
    weights = _with_prefix(open_weights(folder, read_form(raw, path), family.hf_transposed), family)
    check_tensors(family, config, weights.shapes, "hf", folder)
    layers = LazyLayers(
        config.num_hidden_layers,
        lambda i: _layer(family, config, weights, factor, i),
        lambda i: _blocks(family, config, weights, factor, i),
    )
    return Model(
        family=family,
        config=config,
        top=_top(family, config, weights, folder) if read_weights else _top_shapes(family, config, weights),
        layers=layers,
        layer_roles=frozenset(
            role.name
            for name, roles in stored_roles(family, "hf", 0).items()
            if name in weights.tensors
            for role in roles
        ),
        tokenizer=tokenizer_from_hf(folder, config.vocab_size, pre),
        metadata=folder_metadata(folder) | record_of(raw),
        source=weights.source(folder),
    )


def read_config(folder: Path, name: str = "config.json") -> tuple[Family, ModelConfig]:
    """Family and dimensions from config.json alone, or a file of another `name`.

    InputError for a model that a3q cannot compute.
    """
    raw, path = _config_json(folder, name), folder / name
    if raw.get("model_type") == _OWN:
        from converters.a3q_folder import read_a3q_config

        return read_a3q_config(raw, path)
    family = family_for_hf(raw.get("model_type"), path)
    config = config_from_hf(family, raw, path)
    query_factor(family, raw, config, path)
    return family, config


def _with_prefix(weights: Weights, family: Family) -> Weights:
    """The same tensors under the table's names: a checkpoint of the model without its output lacks their first part."""
    embed = next(role.hf for role in family.top if role.name == "embed")
    prefix, _, bare = embed.partition(".")
    if embed in weights.tensors or bare not in weights.tensors:
        return weights
    whole = {role.hf for role in family.top if not role.hf.startswith(f"{prefix}.")}
    tensors = {name if name in whole else f"{prefix}.{name}": stored for name, stored in weights.tensors.items()}
    return Weights(tensors, weights.files)


def _top(family: Family, config: ModelConfig, weights: Weights, folder: Path) -> Layer:
    top = {role.name: weights.borrow(role.hf) for role in family.top if role.hf in weights.tensors}
    # The same weight twice is kept once.
    output = top.pop("output", None) if config.tie_word_embeddings else None
    if output is not None and not torch.equal(output, top["embed"]):
        name = next(role.hf for role in family.top if role.name == "output")
        raise InputError(
            f"{folder}: tie_word_embeddings is true in config.json or by default, but {name} differs from the "
            "embedding; correct whichever is wrong"
        )
    if family.hf_position_offset:
        top["positions"] = top["positions"][family.hf_position_offset :].clone()
    return _true_norms(family, top)


def _top_shapes(family: Family, config: ModelConfig, weights: Weights) -> Layer:
    return {
        role.name: shape_only(role.expected_shape(config, config.layers[0]))
        for role in family.top
        if role.hf in weights.tensors and not (role.name == "output" and config.tie_word_embeddings)
    }


def _layer(family: Family, config: ModelConfig, weights: Weights, factor: float, i: int) -> Layer:
    w: Layer = {}
    for name, roles in stored_roles(family, "hf", i).items():
        if name in weights.tensors:
            parts = _take_apart(family, config, config.layers[i], roles, weights.read(name))
            w |= {role.name: part for role, part in zip(roles, parts, strict=True)}
    w = _true_norms(family, w)
    if factor != 1.0:
        # A norm of the queries would undo what is done in front of it.
        for role in ("q_norm",) if "q_norm" in w else ("q", "q_bias"):
            if role in w:
                w[role] = w[role] * factor
    return w


def _blocks(family: Family, config: ModelConfig, weights: Weights, factor: float, i: int) -> dict[str, Blocks]:
    """Quantized weights of layer `i` by role, where they are those that `_layer` gives."""
    found: dict[str, Blocks] = {}
    for name, roles in stored_roles(family, "hf", i).items():
        if (blocks := weights.blocks(name)) is not None:
            rows = torch.arange(len(blocks.codes))
            parts = _take_apart(family, config, config.layers[i], roles, rows)
            found |= {role.name: blocks.rows(part) for role, part in zip(roles, parts, strict=True)}
    if factor != 1.0 and config.qk_norm is None:
        found.pop("q", None)
    return found


def _true_norms(family: Family, w: Layer) -> Layer:
    """Weights by which the norms multiply."""
    if not family.hf_norm_offset:
        return w
    return {role: weight + family.hf_norm_offset if role.endswith("norm") else weight for role, weight in w.items()}


def _take_apart(
    family: Family, config: ModelConfig, shape: LayerShape, roles: list[Role], tensor: Tensor
) -> list[Tensor]:
    """The weight of each role in one stored tensor, in our layout."""
    if family.hf_transposed and tensor.ndim == 2:
        tensor = tensor.T.contiguous()
    if len(roles) == 1:
        return [tensor]
    if family.hf_heads_together:
        rest = tensor.shape[1:]
        heads = tensor.view(config.num_attention_heads, len(roles), -1, *rest)
        return [heads[:, j].reshape(-1, *rest) for j in range(len(roles))]
    return list(torch.split(tensor, [role.expected_shape(config, shape)[0] for role in roles]))


def _config_json(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """config.json, of a model whose weights can be read."""
    path = folder / name
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise InputError(f"{folder}: is a LoRA adapter, not a model; merge it into its base model first")
        raise InputError(f"{folder}: has no config.json, so it is not a Hugging Face model folder")
    raw = read_json(path)
    read_form(raw, path)
    return raw


def record_of(raw: Mapping[str, Any]) -> dict[str, GGUFValue]:
    """What config.json says about the reduction, under the keys that a GGUF has for it."""
    record = raw.get("reduction")
    return as_keys({f"a3q.{key}": value for key, value in record.items()}) if isinstance(record, Mapping) else {}


def folder_metadata(folder: Path) -> dict[str, GGUFValue]:
    """`general.*` keys as llama.cpp's converter derives them from the model card, the config and the folder's name."""
    writer = gguf.GGUFWriter(None, "")
    try:
        described = gguf.Metadata.load(model_path=folder)
        described.name = described.name or folder.resolve().name
        described.set_gguf_meta_model(writer)
    # A model card is free text in YAML that gguf neither validates nor guards; the model is usable without it.
    except Exception:
        writer = gguf.GGUFWriter(None, "")
        writer.add_name(folder.resolve().name)
    writer.add_type("model")
    # general.size_label is guessed from the name; the writer states it from the weights.
    return {key: _clean(value) for key, value in writer.kv_data[0].items() if key != "general.size_label"}


def _clean(value: GGUFValue) -> GGUFValue:
    """The value in exactly its declared type: YAML turns a version into a number and Norwegian into False."""
    if value.type is GGUFValueType.STRING:
        return GGUFValue(str(value.value), value.type)
    if value.type is GGUFValueType.ARRAY:
        texts = ["no" if item is False else str(item) for item in value.value]
        return GGUFValue(texts, value.type, GGUFValueType.STRING)
    return value

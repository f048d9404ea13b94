"""Hugging Face folder → `Model`: config.json and safetensors, checked by their headers, layers read at access."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue
from safetensors import SafetensorError, safe_open
from torch import Tensor

from a3q.errors import InputError
from a3q.families import Family, Role, family_for_hf
from a3q.model import Layer, LayerShape, Model, ModelConfig, Source
from converters.hf_config import config_from_hf, query_factor
from converters.tensors import LazyLayers, check_finite, check_tensors, stored_roles
from converters.tokenizer import tokenizer_from_hf

_DTYPES = ("F32", "F16", "BF16")
_INDEX = "model.safetensors.index.json"
_OWN = "a3q"
"""`model_type` of the folders that a3q itself writes."""
_BUFFER = re.compile(r"(^|\.)(rotary_emb\.inv_freq|\d+\.(attn|attention)\.(masked_)?bias)$")
"""Rotation and causal mask in old checkpoints: the config says the same."""


@dataclass(frozen=True)
class Stored:
    """A tensor as the header of its file describes it."""

    path: Path
    handle: Any
    name: str
    """As the file has it."""
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Weights:
    """The tensors of a folder by name; `read` loads one."""

    tensors: dict[str, Stored]
    files: tuple[Path, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor as it is stored."""
        return {name: stored.shape for name, stored in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        """One tensor as float32, the caller's own."""
        stored = self.tensors[name]
        try:
            tensor = stored.handle.get_tensor(stored.name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{stored.path}: tensor {stored.name} cannot be read: {_line(error)}") from error
        # Copied even from float32: the file is memory-mapped.
        return check_finite(tensor.to(torch.float32, copy=True), stored.name, stored.path)

    def source(self, folder: Path) -> Source:
        """Where these weights are, their size, and how many parameters each dtype holds."""
        types: Counter[str] = Counter()
        for stored in self.tensors.values():
            types[stored.dtype] += prod(stored.shape)
        size = sum(file.stat().st_size for file in self.files)
        return Source(folder, "huggingface", size, self.files, dict(types))


def open_huggingface(folder: Path, pre: str | None = None) -> Model:
    """Read a folder in Hugging Face layout. InputError (one line, naming the file) for whatever cannot be used.

    `pre` names the llama.cpp pre-tokenizer where it is not recognised.
    """
    raw, path = _config_json(folder), folder / "config.json"
    if raw.get("model_type") == _OWN:
        from converters.a3q_folder import open_a3q

        return open_a3q(folder, raw, pre)
    family = family_for_hf(raw.get("model_type"), path)
    config = config_from_hf(family, raw, path)
    factor = query_factor(family, raw, config, path)
    weights = _with_prefix(open_weights(folder), family)
    check_tensors(family, config, weights.shapes, "hf", folder)
    return Model(
        family=family,
        config=config,
        top=_top(family, config, weights, folder),
        layers=LazyLayers(config.num_hidden_layers, lambda i: _layer(family, config, weights, factor, i)),
        layer_roles=frozenset(
            role.name
            for name, roles in stored_roles(family, "hf", 0).items()
            if name in weights.tensors
            for role in roles
        ),
        tokenizer=tokenizer_from_hf(folder, config.vocab_size, pre),
        metadata=folder_metadata(folder),
        source=weights.source(folder),
    )


def read_config(folder: Path) -> tuple[Family, ModelConfig]:
    """Family and dimensions from config.json alone; InputError for a model that a3q cannot compute."""
    raw, path = _config_json(folder), folder / "config.json"
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
    top = {role.name: weights.read(role.hf) for role in family.top if role.hf in weights.tensors}
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


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; InputError names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not valid JSON: {_line(error)}; download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object; download it again")
    return content


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _config_json(folder: Path) -> dict[str, Any]:
    """config.json, of a model that is not quantized."""
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise InputError(f"{folder}: is a LoRA adapter, not a model; merge it into its base model first")
        raise InputError(f"{folder}: has no config.json, so it is not a Hugging Face model folder")
    raw = read_json(path)
    if quantized := raw.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise InputError(f"{path}: the model is already quantized ({method}); take the unquantized original")
    return raw


def open_weights(folder: Path) -> Weights:
    """The headers of all weight files in `folder`; InputError where they are not what they should be."""
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
    tensors = {}
    held = {path: set(handle.keys()) for path, handle in handles.items()}
    for name, path in where.items():
        if name not in held[path]:
            raise InputError(f"{path}: tensor {name} is missing, though {_INDEX} says it is here")
        if _BUFFER.search(name):
            continue
        part = handles[path].get_slice(name)
        stored = Stored(path, handles[path], name, tuple(part.get_shape()), str(part.get_dtype()))
        if stored.dtype not in _DTYPES:
            raise InputError(f"{path}: tensor {name} has dtype {stored.dtype}; a3q reads {', '.join(_DTYPES)}")
        tensors[name] = stored
    return Weights(tensors, tuple(handles))


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
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: is truncated or damaged: {_line(error)}; download it again") from error


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

"""Hugging Face folder → `Model`: config.json and safetensors, checked by their headers, layers read at access."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue
from safetensors import SafetensorError, safe_open
from torch import Tensor

from a3q.errors import InputError
from a3q.families import Family, family_for_hf
from a3q.model import Layer, Model, ModelConfig, Source
from converters import rope
from converters.tensors import LazyLayers, check_finite, check_tensors, layer_names
from converters.tokenizer import tokenizer_from_hf

_DTYPES = ("F32", "F16", "BF16")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class _Stored:
    """A tensor as the header of its file describes it."""

    path: Path
    handle: Any
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class _Weights:
    """The tensors of a folder; `read` loads one."""

    tensors: dict[str, _Stored]
    files: tuple[Path, ...]

    def read(self, name: str) -> Tensor:
        """One tensor as float32, the caller's own."""
        stored = self.tensors[name]
        try:
            tensor = stored.handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{stored.path}: tensor {name} cannot be read: {_line(error)}") from error
        # Copied even from float32: the file is memory-mapped.
        return check_finite(tensor.to(torch.float32, copy=True), name, stored.path)


def open_huggingface(folder: Path, pre: str | None = None) -> Model:
    """Read a folder in Hugging Face layout. InputError (one line, naming the file) for whatever cannot be used.

    `pre` names the llama.cpp pre-tokenizer where it is not recognised.
    """
    family, config = read_config(folder)
    weights = _open_weights(folder)
    check_tensors(family, config, {name: stored.shape for name, stored in weights.tensors.items()}, "hf", folder)
    top = {role.name: weights.read(role.hf) for role in family.top if role.hf in weights.tensors}
    output = top.get("output")
    if config.tie_word_embeddings and output is not None:
        if not torch.equal(output, top["embed"]):
            raise InputError(
                f"{folder}: config.json says tie_word_embeddings, but lm_head.weight differs from the embedding; "
                "correct whichever is wrong"
            )
        output = None
    types: Counter[str] = Counter()
    for stored in weights.tensors.values():
        types[stored.dtype] += prod(stored.shape)
    return Model(
        family=family,
        config=config,
        embed=top["embed"],
        final_norm=top["final_norm"],
        output=output,
        layers=LazyLayers(config.num_hidden_layers, lambda i: _layer(family, weights, i)),
        tokenizer=tokenizer_from_hf(folder, config.vocab_size, pre),
        metadata=_metadata(folder),
        source=Source(
            folder, "huggingface", sum(file.stat().st_size for file in weights.files), weights.files, dict(types)
        ),
    )


def read_config(folder: Path) -> tuple[Family, ModelConfig]:
    """Family and dimensions from config.json alone; InputError for a model that a3q cannot compute."""
    raw, path = _config_json(folder), folder / "config.json"
    return family_for_hf(raw.get("model_type"), path), _config(raw, path)


def _layer(family: Family, weights: _Weights, i: int) -> Layer:
    names = layer_names(family, "hf", i)
    return {role.name: weights.read(name) for role, name in names if name in weights.tensors}


def _json(path: Path) -> dict[str, Any]:
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
    raw = _json(path)
    if quantized := raw.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise InputError(f"{path}: the model is already quantized ({method}); take the unquantized original")
    return raw


def _open_weights(folder: Path) -> _Weights:
    """Headers of all weight files; which tensor is where."""
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
        if name.endswith("rotary_emb.inv_freq"):
            continue  # a buffer of old checkpoints; the config says the same
        part = handles[path].get_slice(name)
        stored = _Stored(path, handles[path], tuple(part.get_shape()), str(part.get_dtype()))
        if stored.dtype not in _DTYPES:
            raise InputError(f"{path}: tensor {name} has dtype {stored.dtype}; a3q reads {', '.join(_DTYPES)}")
        tensors[name] = stored
    return _Weights(tensors, tuple(handles))


def _read_index(index: Path) -> dict[str, Path]:
    """Tensor name → its file, which must lie in the folder itself."""
    weight_map = _json(index).get("weight_map")
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


def _config(raw: Mapping[str, Any], path: Path) -> ModelConfig:
    """Dimensions; InputError for a variant of the family that a3q does not compute."""

    def integer(key: str, default: int | None = None) -> int:
        value = raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
            raise InputError(f"{path}: {key} must be a positive whole number, found {value!r}")
        return value

    if (act := raw.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise InputError(f"{path}: hidden_act {act!r} is not supported; a3q knows silu")
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if raw.get(key):
            raise InputError(f"{path}: {key} is {raw[key]}; a mixture of experts is not supported")
    hidden, heads = integer("hidden_size"), integer("num_attention_heads")
    kv_heads = integer("num_key_value_heads", heads)
    head_dim = integer("head_dim", hidden // heads)
    if heads % kv_heads or head_dim % 2:
        raise InputError(f"{path}: {heads} heads of size {head_dim} with {kv_heads} key heads cannot be")
    context = integer("max_position_embeddings")
    _check_window(raw, context, path)
    eps = raw.get("rms_norm_eps", 1e-6)
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not isfinite(eps) or eps <= 0:
        raise InputError(f"{path}: rms_norm_eps must be a positive number, found {eps!r}")
    if head_dim > 1 << 16:
        raise InputError(f"{path}: head_dim {head_dim} cannot be")
    theta, frequencies = rope.frequencies_from_hf(raw, head_dim, path)
    return ModelConfig(
        num_hidden_layers=integer("num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=integer("intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=head_dim,
        vocab_size=integer("vocab_size"),
        max_position_embeddings=context,
        rms_norm_eps=float(eps),
        rope_theta=theta,
        frequencies=frequencies,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
    )


def _check_window(raw: Mapping[str, Any], context: int, path: Path) -> None:
    """Each family has its own way to say that a layer sees only the last tokens."""
    # transformers takes 4096 for a Mistral whose config does not say.
    window = raw.get("sliding_window", 4096 if raw.get("model_type") == "mistral" else None)
    kinds = raw.get("layer_types")
    in_use = {
        "mistral": isinstance(window, int) and window < context,
        "qwen2": bool(raw.get("use_sliding_window")),
    }.get(str(raw.get("model_type")), False)
    if in_use or (isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds)):
        raise InputError(f"{path}: the model uses a sliding attention window ({window}), which is not supported")


def _metadata(folder: Path) -> dict[str, GGUFValue]:
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

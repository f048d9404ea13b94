"""What a model is, read from headers alone: a GGUF, a folder, or a config.json without any weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from gguf.gguf_writer import GGUFValue

from a3q.errors import InputError
from a3q.families import Family
from a3q.footprint import TensorInfo
from a3q.hf.layout import layer_parts, top_parts
from a3q.model import Layer, Model, ModelConfig, Source, Tokenizer
from converters.gguf_reader import GGUFHeader, check_gguf, model_of
from converters.gptq_config import read_form
from converters.hf_plain import plain_parts
from converters.hf_reader import folder_metadata, open_huggingface, read_config, record_of
from converters.hf_weights import Stored, StoredLinear, open_weights, read_json
from converters.open import locate
from converters.tensors import LazyLayers, shape_only, stored_roles
from converters.tokenizer import tokenizer_from_hf

_DTYPE_BYTES = {"F32": 4, "I32": 4, "F16": 2, "BF16": 2}
_CONFIG_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_OWN = "a3q"


@dataclass(frozen=True)
class Header:
    """A model of which no weight has been read."""

    model: Model
    """Weights outside the layers have a shape only; those of the layers must not be asked for."""
    architecture: str
    """As the file calls it."""
    tensors: tuple[TensorInfo, ...]
    file_bytes: int
    fields: Mapping[str, GGUFValue]
    """Metadata under the keys of a GGUF."""
    has_weights: bool = True
    """Whether weight files are there; sizes are otherwise those that the config's dtype gives."""


@dataclass
class UnknownTokenizer:
    """Stands where only a config.json is known."""

    vocab_size: int
    metadata: dict[str, GGUFValue] = field(default_factory=dict)
    bos_id: int | None = None
    eos_id: int | None = None
    add_bos: bool = False
    chat_template: str | None = None

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Refuses."""
        raise InputError("a config.json alone has no tokenizer; give the whole folder")

    def decode(self, ids: Sequence[int]) -> str:
        """Refuses."""
        raise InputError("a config.json alone has no tokenizer; give the whole folder")


def open_header(model: str | Path | None, pre: str | None = None) -> Header:
    """Open a GGUF, a folder, a config.json, a hub name, or (None) the demo model.

    InputError (one line, naming the file) for whatever cannot be used.
    """
    if model is not None and (path := Path(model).expanduser()).is_file() and path.suffix == ".json":
        return _from_config(path, None)
    place = locate(model, configs_only=True)
    if place.format == "gguf":
        return _from_gguf(check_gguf(place.path))
    folder = place.path
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")) and (folder / "config.json").is_file():
        return _from_config(folder / "config.json", pre)
    return _from_folder(folder, pre)


def _from_gguf(header: GGUFHeader) -> Header:
    tensors = tuple(
        TensorInfo(
            name=name,
            type=tensor.tensor_type.name,
            shape=tuple(int(size) for size in reversed(tensor.shape)),
            bytes=int(tensor.n_bytes),
        )
        for name, tensor in header.tensors.items()
    )
    model = model_of(header, weights=False)
    return Header(model, header.architecture, tensors, model.source.file_size, header.fields)


def _from_folder(folder: Path, pre: str | None) -> Header:
    model = open_huggingface(folder, pre, read_weights=False)
    tensors = tuple(_stored(folder))
    return Header(model, model.family.name, tensors, model.source.file_size, model.metadata)


def _stored(folder: Path) -> Iterator[TensorInfo]:
    """Tensors of a folder, which `open_huggingface` has checked; the four of a GPTQ matrix are one."""
    config = folder / "config.json"
    for name, stored in open_weights(folder, read_form(read_json(config), config)).tensors.items():
        if isinstance(stored, StoredLinear):
            size = sum(_bytes(part) for part in stored.parts.values())
            yield TensorInfo(name, stored.form.type_name, stored.shape, size)
        else:
            yield TensorInfo(name, stored.dtype, stored.shape, _bytes(stored))


def _bytes(stored: Stored) -> int:
    return prod(stored.shape) * _DTYPE_BYTES[stored.dtype]


def _from_config(path: Path, pre: str | None) -> Header:
    """From a config.json, with the tokenizer beside it if there is one."""
    folder, raw = path.parent, read_json(path)
    family, config = read_config(folder, path.name)
    top_roles, layer_roles = _roles(family, config, raw, path)
    top: Layer = {
        role.name: shape_only(role.expected_shape(config, config.layers[0]))
        for role in family.top
        if role.name in top_roles
    }
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    tokenizer: Tokenizer = UnknownTokenizer(config.vocab_size)
    if has_tokenizer:
        tokenizer = tokenizer_from_hf(folder, config.vocab_size, pre)
    dtype = _CONFIG_DTYPES.get(str(raw.get("dtype") or raw.get("torch_dtype")), "BF16")
    shapes = dict(_shapes(family, config, top_roles, layer_roles, raw.get("model_type") == _OWN))
    tensors = tuple(TensorInfo(name, dtype, shape, prod(shape) * _DTYPE_BYTES[dtype]) for name, shape in shapes.items())
    size = sum(tensor.bytes for tensor in tensors)
    metadata = folder_metadata(folder) | record_of(raw)

    def refuse(i: int) -> Layer:
        raise InputError(f"{path}: has no weights beside it; give a folder or a GGUF with weights")

    model = Model(
        family=family,
        config=config,
        top=top,
        layers=LazyLayers(config.num_hidden_layers, refuse),
        layer_roles=layer_roles,
        tokenizer=tokenizer,
        metadata=metadata,
        source=Source(folder if path.name == "config.json" else path, "huggingface", size),
    )
    return Header(model, family.name, tensors, size, metadata, has_weights=False)


def _roles(
    family: Family, config: ModelConfig, raw: Mapping[str, Any], path: Path
) -> tuple[frozenset[str], frozenset[str]]:
    """Roles that a model of this config.json has, outside the layers and in each of them."""
    if raw.get("model_type") == _OWN:
        from a3q.hf.fields import read_description

        description = read_description(raw, path)
        return description.top_roles, description.layer_roles
    names = _names_in_transformers(raw, path)
    top = {role.name for role in family.top if role.hf in names} - {"output"}
    # transformers stores gpt_neox's under another name than its model has.
    top |= set() if config.tie_word_embeddings else {"output"}
    layer = {role.name for name, roles in stored_roles(family, "hf", 0).items() if name in names for role in roles}
    return frozenset(top), frozenset(layer)


def _names_in_transformers(raw: Mapping[str, Any], path: Path) -> set[str]:
    """Names of the weights that transformers makes for one layer of it: which biases there are is its business."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kept = {key: value for key, value in raw.items() if key not in ("quantization_config", "auto_map")}
    try:
        config = CONFIG_MAPPING[str(raw["model_type"])].from_dict(kept)
        config.num_hidden_layers = 1
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1]
        with torch.device("meta"):
            return set(AutoModelForCausalLM.from_config(config, trust_remote_code=False).state_dict())
    # Whatever a stranger's config makes transformers raise, it is the config that is wrong.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: transformers cannot make a model of it: {reason}") from error


def _shapes(
    family: Family, config: ModelConfig, top_roles: frozenset[str], layer_roles: frozenset[str], own: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of a folder, in a3q's `own` layout or the family's."""
    outside = top_parts(family, top_roles) if own else plain_parts(family, layer_roles, top_roles, None)
    for part in outside:
        yield part.name, part.shape(config, config.layers[0])
    for i, shape in enumerate(config.layers):
        parts = layer_parts(family, layer_roles, i) if own else plain_parts(family, layer_roles, top_roles, i)
        for part in parts:
            size = part.shape(config, shape)
            yield part.name, size[::-1] if family.hf_transposed and not own else size

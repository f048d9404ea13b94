"""GGUF file → `Model`: everything checked before a weight is read, layers dequantized at access."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFValueType, ReaderTensor, quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.gguf_writer import GGUFValue
from torch import Tensor

from a3q.errors import InputError
from a3q.families import Family, Role, family_for_gguf
from a3q.model import Layer, Model, ModelConfig, Source, plain_frequencies
from converters import rope
from converters.gguf_file import read_parts, reading
from converters.tensors import LazyLayers, check_finite, check_tensors, layer_names
from converters.tokenizer import tokenizer_from_gguf

ROPE_FACTORS = "rope_freqs.weight"


_STALE = ("GGUF.", "split.", "general.architecture", "general.file_type", "general.quantization_version",
          "general.alignment")  # fmt: skip
"""Keys about the file that was read, not about the model."""
_DIMENSIONS = ("block_count", "embedding_length", "feed_forward_length", "context_length", "vocab_size", "rope.",
               "attention.head_count", "attention.key_length", "attention.value_length",
               "attention.layer_norm_rms_epsilon", "tensor_data_layout")  # fmt: skip
"""Architecture keys that the writer states anew."""
_NEUTRAL: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "expert_count": ((0,), "a mixture of experts"),
    "expert_used_count": ((0,), "a mixture of experts"),
    "attention.sliding_window": ((0,), "sliding-window attention"),
    "attention.causal": ((True,), "attention that is not causal"),
    "attention.scale": ((0.0,), "its own attention scale"),
    "attention.clamp_kqv": ((0.0,), "clamped attention"),
    "attn_logit_softcapping": ((0.0,), "capped attention scores"),
    "final_logit_softcapping": ((0.0,), "capped logits"),
    "embedding_scale": ((0.0, 1.0), "scaled embeddings"),
    "residual_scale": ((0.0, 1.0), "scaled residuals"),
    "logit_scale": ((0.0, 1.0), "scaled logits"),
    "rope.scaling.attn_factor": ((0.0, 1.0), "scaled attention scores"),
}
"""Architecture keys that change the computation: the values that do not, and what any other value means."""


@dataclass(frozen=True)
class GGUFHeader:
    """A checked GGUF of which no weight has been read; tensors are memory-mapped."""

    path: Path
    files: tuple[Path, ...]
    family: Family
    architecture: str
    config: ModelConfig
    fields: dict[str, GGUFValue]
    tensors: dict[str, ReaderTensor]

    def weight(self, role: Role, name: str) -> Tensor:
        """One tensor as float32 in Hugging Face layout."""
        return _half_split(self._read(name), role, self.config, self.family)

    def _read(self, name: str) -> Tensor:
        return check_finite(_dequantize(self.tensors[name]), name, self.path)

    def layer(self, i: int) -> Layer:
        """Weights of layer `i` by role."""
        return {
            role.name: self.weight(role, name)
            for role, name in layer_names(self.family, "gguf", i)
            if name in self.tensors
        }


def _dequantize(tensor: ReaderTensor) -> Tensor:
    """Float32 copy of a tensor; the caller may write to it."""
    with np.errstate(all="ignore"):  # infinite block scales are reported by the caller, with the tensor's name
        values = quants.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def _half_split(weight: Tensor, role: Role, config: ModelConfig, family: Family) -> Tensor:
    if role.rotary is None or family.gguf_rope_layout == "half":
        return weight
    heads = config.num_attention_heads if role.rotary == "queries" else config.num_key_value_heads
    return rope.to_half_split(weight, heads)


def open_gguf(path: Path) -> Model:
    """Read a GGUF, or all parts of a split one. InputError (one line, naming the file) for whatever cannot be used."""
    header = check_gguf(path)
    config, names = header.config, {role.name: role for role in header.family.top}
    top = {name: header.weight(role, role.gguf) for name, role in names.items() if role.gguf in header.tensors}
    types: Counter[str] = Counter()
    for tensor in header.tensors.values():
        types[tensor.tensor_type.name] += int(tensor.n_elements)
    return Model(
        family=header.family,
        config=config,
        embed=top["embed"],
        final_norm=top["final_norm"],
        output=top.get("output"),
        layers=LazyLayers(config.num_hidden_layers, header.layer),
        tokenizer=tokenizer_from_gguf(header.fields, path),
        metadata=_carried(header),
        source=Source(path, "gguf", sum(file.stat().st_size for file in header.files), header.files, dict(types)),
    )


def check_gguf(path: Path) -> GGUFHeader:
    """Read a file's metadata and hold every tensor's name, type and shape against it; no weights are read."""
    with reading(path):
        files, fields, tensors = read_parts(path)
        architecture = _Keys(path, "general", fields).text("architecture", "")
        family = family_for_gguf(architecture, path)
        for tensor in tensors.values():
            _check_type(tensor, path)
        config = _config(_Keys(path, architecture, fields), tensors)
        # The runtime takes frequency factors only in the graph that a3q writes for.
        extra = {ROPE_FACTORS} if architecture == family.written_as else set()
        shapes = {name: _shape(tensor) for name, tensor in tensors.items() if name not in extra}
        check_tensors(family, config, shapes, "gguf", path)
        # Only now is head_dim known to be what the tensors have, and not a damaged 2^31.
        frequencies = _frequencies(_Keys(path, architecture, fields), config, tensors)
    return GGUFHeader(path, files, family, architecture, replace(config, frequencies=frequencies), fields, tensors)


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    """Hugging Face order."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _check_type(tensor: ReaderTensor, path: Path) -> None:
    kind: GGMLQuantizationType = tensor.tensor_type
    try:
        with np.errstate(all="ignore"):
            quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError as error:
        raise InputError(
            f"{path}: tensor {tensor.name} has type {kind.name}, which a3q cannot read; take an F16 or Q8_0 version"
        ) from error


@dataclass(frozen=True)
class _Keys:
    """Typed access to the metadata of one architecture; InputError names the key."""

    path: Path
    prefix: str
    fields: Mapping[str, GGUFValue]

    def get(self, key: str) -> Any:
        """The value, None when absent; an array with one value for each layer must hold the same one."""
        field = self.fields.get(f"{self.prefix}.{key}")
        if field is None:
            return None
        if field.type is not GGUFValueType.ARRAY:
            return field.value
        if not field.value or any(value != field.value[0] for value in field.value):
            raise InputError(f"{self.path}: {self.prefix}.{key} differs between layers, which is not supported")
        return field.value[0]

    def text(self, key: str, default: str) -> str:
        return str(self._typed(key, default, str))

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._typed(key, default, int)
        if not 0 < value < 1 << 31:
            raise InputError(f"{self.path}: {self.prefix}.{key} is {value}; the file is damaged, download it again")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        value = float(self._typed(key, default, float))
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{self.path}: {self.prefix}.{key} is {value}; the file is damaged, download it again")
        return value

    def _typed(self, key: str, default: Any, kind: type) -> Any:
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise InputError(f"{self.path}: the key {self.prefix}.{key} is missing; download the file again")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(f"{self.path}: {self.prefix}.{key} is {value!r}; the file is damaged, download it again")
        return value


def _config(keys: _Keys, tensors: Mapping[str, ReaderTensor]) -> ModelConfig:
    """Dimensions, with no frequencies yet."""
    for key, (neutral, meaning) in _NEUTRAL.items():
        if (value := keys.get(key)) is not None and value not in neutral:
            raise InputError(f"{keys.path}: {keys.prefix}.{key} is {value}: {meaning} is not supported")
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    kv_heads = keys.integer("attention.head_count_kv", heads)
    head_dim = keys.integer("attention.key_length", hidden // heads)
    widths = {head_dim, keys.integer("attention.value_length", hidden // heads)}
    if len(widths | {keys.integer("rope.dimension_count", head_dim)}) > 1:
        raise InputError(
            f"{keys.path}: key_length, value_length and rope.dimension_count differ, which is not supported"
        )
    if heads % kv_heads or head_dim % 2:
        raise InputError(f"{keys.path}: {heads} heads of size {head_dim} with {kv_heads} key heads cannot be")
    embed, tokens = tensors.get("token_embd.weight"), keys.fields.get("tokenizer.ggml.tokens")
    if tokens is None or tokens.type is not GGUFValueType.ARRAY:
        raise InputError(f"{keys.path}: has no vocabulary (tokenizer.ggml.tokens); a3q needs a whole model")
    if embed is None or _shape(embed)[:1] != (len(tokens.value),):
        rows = "missing" if embed is None else f"of shape {list(_shape(embed))}"
        raise InputError(f"{keys.path}: token_embd.weight is {rows}, but the vocabulary has {len(tokens.value)} tokens")
    return ModelConfig(
        num_hidden_layers=keys.integer("block_count"),
        hidden_size=hidden,
        intermediate_size=keys.integer("feed_forward_length"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=head_dim,
        vocab_size=len(tokens.value),
        max_position_embeddings=keys.integer("context_length"),
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope_theta=keys.number("rope.freq_base", 10000.0),
        frequencies=(),
        tie_word_embeddings="output.weight" not in tensors,
    )


def _frequencies(keys: _Keys, config: ModelConfig, tensors: Mapping[str, ReaderTensor]) -> tuple[float, ...]:
    """Plain frequencies, divided by the linear factor and by `rope_freqs.weight`, as the runtime does."""
    kind = keys.text("rope.scaling.type", "linear")  # the runtime's default, without effect when no factor is given
    if kind not in ("none", "linear"):
        raise InputError(f"{keys.path}: RoPE scaling {kind!r} is not supported; a3q knows none and linear")
    scale = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0)) if kind == "linear" else 1.0
    factors = [1.0] * (config.head_dim // 2)
    if ROPE_FACTORS in tensors:
        tensor = tensors[ROPE_FACTORS]
        if _shape(tensor) != (len(factors),):
            raise InputError(
                f"{keys.path}: tensor {ROPE_FACTORS} has shape {list(_shape(tensor))} and contradicts its metadata, "
                f"which asks for {[len(factors)]}"
            )
        factors = _dequantize(tensor).tolist()
    plain = plain_frequencies(config.rope_theta, config.head_dim)
    frequencies = tuple(omega / scale / factor for omega, factor in zip(plain, factors, strict=True))
    if not all(math.isfinite(omega) and omega > 0 for omega in frequencies):
        raise InputError(f"{keys.path}: tensor {ROPE_FACTORS} gives RoPE frequencies that are not positive numbers")
    return frequencies


def _carried(header: GGUFHeader) -> dict[str, GGUFValue]:
    """Metadata that still holds for a file made from this one.

    `general.*` and `a3q.*`, and the architecture's own keys under their bare name unless they are dimensions or say
    something that a3q does not compute. Notes of other tools (`quantize.imatrix.*`, ...) are about the old file.
    """
    carried = {}
    prefix = f"{header.architecture}."
    for key, value in header.fields.items():
        bare = key.removeprefix(prefix)
        if value.type is GGUFValueType.ARRAY and not value.value:
            continue  # cannot be written again
        stated_anew = bare.startswith(_DIMENSIONS) or bare in _NEUTRAL
        if (key.startswith(("general.", "a3q.")) and not key.startswith(_STALE)) or (bare != key and not stated_anew):
            carried[bare] = value
    return carried

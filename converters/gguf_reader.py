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
from a3q.model import Layer, LayerShape, Model, ModelConfig, Source, plain_frequencies
from a3q.solve.grid import GRIDS, Blocks
from converters import rope
from converters.ggml_pack import unpack
from converters.gguf_file import read_parts, reading
from converters.gguf_graphs import GRAPHS, LOCAL_BASE, Graph, alibi_slopes, local_layers, query_scale
from converters.gguf_keys import Keys
from converters.tensors import LazyLayers, check_finite, check_tensors, layer_names, shape_only, stored_roles
from converters.tokenizer import tokenizer_from_gguf
from converters.unchanged import Stamp, check_unchanged

ROPE_FACTORS = "rope_freqs.weight"


_STALE = ("GGUF.", "split.", "general.architecture", "general.file_type", "general.quantization_version",
          "general.alignment")  # fmt: skip
"""Keys about the file that was read, not about the model."""
_DIMENSIONS = ("block_count", "embedding_length", "feed_forward_length", "context_length", "vocab_size", "rope.",
               "attention.head_count", "attention.key_length", "attention.value_length", "attention.layer_norm_",
               "attention.sliding_window", "attention.max_alibi_bias", "use_parallel_residual",
               "tensor_data_layout")  # fmt: skip
"""Architecture keys that the writer states anew."""
_NEUTRAL: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "expert_count": ((0,), "a mixture of experts"),
    "expert_used_count": ((0,), "a mixture of experts"),
    "attention.sliding_window": ((0,), "sliding-window attention"),
    "attention.causal": ((True,), "attention that is not causal"),
    "attention.scale": ((0.0,), "its own attention scale"),
    "attention.clamp_kqv": ((0.0,), "clamped attention"),
    "attention.max_alibi_bias": ((0.0,), "ALiBi"),
    "attn_logit_softcapping": ((0.0,), "capped attention scores"),
    "final_logit_softcapping": ((0.0,), "capped logits"),
    "embedding_scale": ((0.0, 1.0), "scaled embeddings"),
    "residual_scale": ((0.0, 1.0), "scaled residuals"),
    "logit_scale": ((0.0, 1.0), "scaled logits"),
    "nextn_predict_layers": ((0,), "prediction of several tokens"),
    "rope.scaling.attn_factor": ((0.0, 1.0), "scaled attention scores"),
}
"""Architecture keys that change the computation: the values that do not, and what any other value means."""


@dataclass(frozen=True)
class GGUFHeader:
    """A checked GGUF of which no weight has been read; tensors are memory-mapped."""

    path: Path
    stamps: tuple[Stamp, ...]
    """Of all files."""
    family: Family
    architecture: str
    config: ModelConfig
    fields: dict[str, GGUFValue]
    tensors: dict[str, ReaderTensor]

    @property
    def files(self) -> tuple[Path, ...]:
        """The parts of a split one, or the file itself."""
        return tuple(stamp.path for stamp in self.stamps)

    def weight(self, name: str) -> Tensor:
        """One tensor as float32, its rows as they are stored."""
        check_unchanged(self.stamps)
        return check_finite(_dequantize(self.tensors[name]), name, self.path)

    def layer(self, i: int) -> Layer:
        """Weights of layer `i` by role, in Hugging Face layout; a tensor of several roles is taken apart."""
        config, shape = self.config, self.config.layers[i]
        layer: Layer = {}
        for name, roles in stored_roles(self.family, "gguf", i).items():
            if name not in self.tensors:
                continue
            rows = [role.expected_shape(config, shape)[0] for role in roles]
            parts = torch.split(self.weight(name), rows)
            # One role's weight is the whole; several get storage of their own, for each may be dropped alone.
            for role, part in zip(roles, parts, strict=True):
                layer[role.name] = self._arranged(role, part if len(roles) == 1 else part.clone())
        return layer

    def blocks(self, i: int) -> dict[str, Blocks]:
        """Those weights of layer `i` by role that are stored on a grid a3q knows: the very same as `layer` gives."""
        config, shape = self.config, self.config.layers[i]
        found: dict[str, Blocks] = {}
        for name, roles in stored_roles(self.family, "gguf", i).items():
            if (whole := self._on_grid(name)) is None:
                continue
            for role, part in zip(roles, whole.split([r.expected_shape(config, shape)[0] for r in roles]), strict=True):
                found[role.name] = part.rows(self._arranged(role, torch.arange(len(part.codes))))
        return found

    def top_blocks(self) -> dict[str, Blocks]:
        """The same of the weights outside the layers."""
        found = {role.name: self._on_grid(role.gguf) for role in self.family.top}
        return {role: blocks for role, blocks in found.items() if blocks is not None}

    def _on_grid(self, name: str) -> Blocks | None:
        """A stored tensor as it is; None where there is none on a grid."""
        tensor = self.tensors.get(name)
        grid = None if tensor is None else GRIDS.get(tensor.tensor_type.name.lower())
        if tensor is None or grid is None:
            return None
        check_unchanged(self.stamps)
        return unpack(tensor.data, grid)

    def _arranged(self, role: Role, weight: Tensor) -> Tensor:
        if role.name == "q_norm":
            weight = weight * query_scale(self.architecture, self.config)
        if role.rotary is None or self.family.gguf is None or self.family.gguf.reads_rope == "half":
            return weight
        config = self.config
        return rope.to_half_split(
            weight, config.num_attention_heads if role.rotary == "queries" else config.num_key_value_heads
        )


def _dequantize(tensor: ReaderTensor) -> Tensor:
    """Float32 copy of a tensor; the caller may write to it."""
    with np.errstate(all="ignore"):  # infinite block scales are reported by the caller, with the tensor's name
        values = quants.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def open_gguf(path: Path) -> Model:
    """Read a GGUF, or all parts of a split one. InputError (one line, naming the file) for whatever cannot be used."""
    return model_of(check_gguf(path))


def model_of(header: GGUFHeader, weights: bool = True) -> Model:
    """The model of a checked file; without `weights` those outside the layers have a shape only."""
    family, tensors, path = header.family, header.tensors, header.path
    types: Counter[str] = Counter()
    for tensor in tensors.values():
        types[tensor.tensor_type.name] += int(tensor.n_elements)
    return Model(
        family=family,
        config=header.config,
        top={
            role.name: header.weight(role.gguf) if weights else shape_only(_shape(tensors[role.gguf]))
            for role in family.top
            if role.gguf in tensors
        },
        layers=LazyLayers(header.config.num_hidden_layers, header.layer, header.blocks, header.top_blocks),
        layer_roles=frozenset(role.name for role, name in layer_names(family, "gguf", 0) if name in tensors),
        tokenizer=tokenizer_from_gguf(header.fields, path),
        metadata=_carried(header),
        source=Source(
            path,
            "gguf",
            sum(file.stat().st_size for file in header.files),
            header.files,
            dict(types),
            {name: tensor.tensor_type.name for name, tensor in tensors.items()},
        ),
    )


def check_gguf(path: Path) -> GGUFHeader:
    """Read a file's metadata and hold every tensor's name, type and shape against it; no weights are read."""
    with reading(path):
        files, fields, tensors = read_parts(path)
        stamps = tuple(map(Stamp.of, files))
        architecture = Keys(path, "general", fields).text("architecture", "")
        keys = Keys(path, architecture, fields)
        experts = keys.get("expert_count")
        if experts is not None and experts != 0:
            raise InputError(f"{path}: {architecture} with {experts} experts: a mixture of experts is not supported")
        family = family_for_gguf(architecture, path)
        for tensor in tensors.values():
            _check_type(tensor, path)
        graph = GRAPHS[architecture]
        config = _config(keys, graph, tensors)
        extra = {ROPE_FACTORS} if graph.factors else set()
        shapes = {name: _shape(tensor) for name, tensor in tensors.items() if name not in extra}
        check_tensors(family, config, shapes, "gguf", path)
        # Only now is the head size known to be what the tensors have, and not a damaged 2^31.
        if graph.rotary != "none":
            config = _with_frequencies(keys, graph, config, tensors)
    return GGUFHeader(path, stamps, family, architecture, config, fields, tensors)


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


def _config(keys: Keys, graph: Graph, tensors: Mapping[str, ReaderTensor]) -> ModelConfig:
    """Dimensions and form, with no frequencies yet."""
    known = {"attention.sliding_window": graph.window_period is not None, "attention.max_alibi_bias": graph.alibi}
    for key, (neutral, meaning) in _NEUTRAL.items():
        if not known.get(key) and (value := keys.get(key)) is not None and value not in neutral:
            raise InputError(f"{keys.path}: {keys.prefix}.{key} is {value}: {meaning} is not supported")
    layers, hidden, heads = (keys.integer(key) for key in ("block_count", "embedding_length", "attention.head_count"))
    if layers > len(tensors):
        raise InputError(f"{keys.path}: {len(tensors)} tensors cannot make {layers} layers; the file is damaged or cut")
    kv_heads = keys.integer("attention.head_count_kv", heads)
    head_dim = keys.integer("attention.key_length", hidden // heads)
    if heads % kv_heads or _rotated(keys, graph, head_dim) % 2:
        raise InputError(f"{keys.path}: {heads} heads of size {head_dim} with {kv_heads} key heads cannot be")
    embed, tokens = tensors.get("token_embd.weight"), keys.fields.get("tokenizer.ggml.tokens")
    if tokens is None or tokens.type is not GGUFValueType.ARRAY:
        raise InputError(f"{keys.path}: has no vocabulary (tokenizer.ggml.tokens); a3q needs a whole model")
    if embed is None or _shape(embed)[:1] != (len(tokens.value),):
        rows = "missing" if embed is None else f"of shape {list(_shape(embed))}"
        raise InputError(f"{keys.path}: token_embd.weight is {rows}, but the vocabulary has {len(tokens.value)} tokens")
    if graph.mixed:
        sizes = keys.integers("feed_forward_length", layers)
    else:
        sizes = [keys.integer("feed_forward_length")] * layers
    windows = _windows(keys, graph, layers)
    epsilon = "attention.layer_norm_rms_epsilon" if graph.norm == "rms" else "attention.layer_norm_epsilon"
    return ModelConfig(
        layers=tuple(
            LayerShape(head_dim, head_dim, size, (), window) for size, window in zip(sizes, windows, strict=True)
        ),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=len(tokens.value),
        max_position_embeddings=keys.integer("context_length"),
        norm_eps=keys.number(epsilon),
        tie_word_embeddings="output.weight" not in tensors,
        rope_theta=keys.number("rope.freq_base", 10000.0),
        norm=graph.norm,
        activation=graph.activation,
        parallel_residual=graph.parallel and keys.flag("use_parallel_residual"),
        qk_norm=graph.qk_norm,
        alibi_slopes=alibi_slopes(keys.number("attention.max_alibi_bias", 0.0, zero=True), heads)
        if graph.alibi
        else (),
        embedding_scale=math.sqrt(hidden) if graph.scaled_embedding else 1.0,
    )


def _rotated(keys: Keys, graph: Graph, head_dim: int) -> int:
    """Rotated dimensions of a head; InputError where sizes differ that the graph takes for one."""
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    sizes = {"key_length": head_dim, "value_length": keys.integer("attention.value_length", hidden // heads)}
    rotated = 0 if graph.rotary == "none" else keys.integer("rope.dimension_count", head_dim)
    if graph.rotary == "whole":
        sizes["rope.dimension_count"] = rotated
    if graph.window_period is not None:
        swa = {"key_length_swa": "attention.", "value_length_swa": "attention.", "dimension_count_swa": "rope."}
        sizes |= {key: keys.integer(prefix + key, head_dim) for key, prefix in swa.items()}
    if len(set(sizes.values())) > 1 or rotated > head_dim:
        names = list(sizes) if "rope.dimension_count" in sizes else [*sizes, "rope.dimension_count"]
        listed = ", ".join(names[:-1])
        raise InputError(f"{keys.path}: {listed} and {names[-1]} differ, which is not supported")
    return rotated


def _windows(keys: Keys, graph: Graph, layers: int) -> list[int | None]:
    """Sliding window of each layer."""
    window = None if graph.window_period is None else keys.get("attention.sliding_window")
    if graph.window_period is None or window in (None, 0):
        return [None] * layers
    window = keys.integer("attention.sliding_window")
    pattern = keys.fields.get(f"{keys.prefix}.attention.sliding_window_pattern")
    if pattern is not None and pattern.type is GGUFValueType.ARRAY:
        local = [bool(value) for value in pattern.value]
        if len(local) != layers:
            raise InputError(
                f"{keys.path}: {keys.prefix}.attention.sliding_window_pattern has {len(local)} values for {layers} "
                "layers; the file is damaged, download it again"
            )
    else:
        local = local_layers(keys.integer("attention.sliding_window_pattern", graph.window_period), layers)
    return [window if one else None for one in local]


def _with_frequencies(
    keys: Keys, graph: Graph, config: ModelConfig, tensors: Mapping[str, ReaderTensor]
) -> ModelConfig:
    """`config` with plain frequencies, divided by the linear factor and by `rope_freqs.weight`, as the runtime does.

    Layers with a sliding window have a base of their own and no factor.
    """
    kind = keys.text("rope.scaling.type", "linear")  # the runtime's default, without effect when no factor is given
    if kind not in ("none", "linear"):
        raise InputError(f"{keys.path}: RoPE scaling {kind!r} is not supported; a3q knows none and linear")
    scale = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0)) if kind == "linear" else 1.0
    rotated = _rotated(keys, graph, config.layers[0].qk_head_dim)
    factors = [1.0] * (rotated // 2)
    if graph.factors and ROPE_FACTORS in tensors:
        tensor = tensors[ROPE_FACTORS]
        if _shape(tensor) != (len(factors),):
            raise InputError(
                f"{keys.path}: tensor {ROPE_FACTORS} has shape {list(_shape(tensor))} and contradicts its metadata, "
                f"which asks for {[len(factors)]}"
            )
        factors = _dequantize(tensor).tolist()
    plain = plain_frequencies(config.rope_theta, rotated)
    frequencies = tuple(omega / scale / factor for omega, factor in zip(plain, factors, strict=True))
    if not all(math.isfinite(omega) and omega > 0 for omega in frequencies):
        raise InputError(f"{keys.path}: tensor {ROPE_FACTORS} gives RoPE frequencies that are not positive numbers")
    local = plain_frequencies(keys.number("rope.freq_base_swa", LOCAL_BASE), rotated)
    return replace(
        config,
        layers=tuple(
            replace(shape, frequencies=(frequencies if shape.sliding_window is None else local,))
            for shape in config.layers
        ),
    )


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

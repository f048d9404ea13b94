"""What stands between a model and stock llama.cpp, and the metadata that tells llama.cpp the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

from a3q.errors import InputError
from a3q.families import Family, GGUFForm, family_for_gguf
from a3q.model import Model, ModelConfig
from converters import rope
from converters.gguf_graphs import GRAPHS, LOCAL_BASE, Graph, alibi_slopes, local_layers

_Frequencies = tuple[float, ...]


@dataclass(frozen=True)
class Target:
    """How a model goes into a file."""

    architecture: str
    graph: Graph
    form: GGUFForm
    family: Family
    """The family that the file is read back as; its table names the tensors."""
    tied: bool
    """Whether the output is left out."""


def check_runtime(model: Model) -> None:
    """InputError with what stands in the way where stock llama.cpp cannot hold `model`. No weight is read."""
    target_for(model)


def target_for(model: Model) -> Target:
    """How `model` is written; InputError where it cannot be."""
    form, config, origin = model.family.gguf, model.config, model.source.path
    if form is None:
        raise InputError(
            f"{origin}: llama.cpp has no architecture for {model.family.name}, so it cannot become a GGUF; "
            "write a Hugging Face folder with a3q reduce"
        )
    sizes = {shape.intermediate_size for shape in config.layers}
    architecture = form.mixed if len(sizes) > 1 and form.mixed is not None else form.writes
    graph, family = GRAPHS[architecture], family_for_gguf(architecture, origin)
    obstacle = (
        _sizes_obstacle(graph, config)
        or _positions_obstacle(graph, config)
        or _form_obstacle(graph, config)
        or _weights_obstacle(graph, family, model)
    )
    if obstacle is not None:
        raise InputError(f"{origin}: llama.cpp's {architecture} cannot hold this model, which {obstacle}")
    tied = config.tie_word_embeddings and graph.tied
    return Target(architecture, graph, form, family, tied)


def _sizes_obstacle(graph: Graph, config: ModelConfig) -> str | None:
    units = {shape.intermediate_size for shape in config.layers}
    if len(units) > 1 and not graph.mixed:
        return f"has MLP sizes that differ between layers ({min(units)} to {max(units)}); reduce with --ranks uniform"
    sizes = sorted({size for shape in config.layers for size in (shape.qk_head_dim, shape.v_head_dim)})
    if len(sizes) > 1:
        advice = "reduce with a3q reduce --frequencies shared" if graph.factors else "reduce only MLP"
        return f"has heads of size {sizes[0]} to {sizes[-1]}, not of one size; {advice}"
    heads, [size] = config.num_attention_heads, sizes
    if not graph.free_heads and heads * size != config.hidden_size:
        return f"has {heads} heads of size {size}, not as wide as the hidden size {config.hidden_size}; reduce only MLP"
    return None


def _positions_obstacle(graph: Graph, config: ModelConfig) -> str | None:
    windows = {shape.sliding_window for shape in config.layers if shape.sliding_window is not None}
    if windows and graph.window_period is None:
        return f"uses a sliding attention window ({min(windows)})"
    if len(windows) > 1:
        return "has sliding attention windows that differ between layers"
    if graph.rotary == "none":
        return "uses RoPE" if any(shape.frequencies for shape in config.layers) else None
    if any(len(shape.frequencies) > 1 for shape in config.layers):
        return "has RoPE frequencies for each key head; reduce with one list for all (--frequencies shared)"
    for shape in config.layers:
        if shape.pairs == 0 or (graph.rotary == "whole" and 2 * shape.pairs != shape.qk_head_dim):
            return f"turns {2 * shape.pairs} of the {shape.qk_head_dim} dimensions of a head by RoPE"
    everywhere, local = _lists(config)
    if len(everywhere) > 1 or len(local) > 1:
        return "has RoPE frequencies that differ between layers; reduce with one list for all layers"
    if not graph.factors and any(rope.base_and_factor(one, config.rope_theta) is None for one in everywhere):
        return "has RoPE frequencies that follow from no base; leave QK as it is"
    if any((found := rope.base_and_factor(one, LOCAL_BASE)) is None or found[1] != 1.0 for one in local):
        return "has RoPE frequencies that follow from no base in layers with a window; leave QK as it is"
    return None


def _form_obstacle(graph: Graph, config: ModelConfig) -> str | None:
    # The exact GELU may stand: llama.cpp then computes its usual approximation.
    activation = "gelu_tanh" if config.activation == "gelu" else config.activation
    if activation != graph.activation:
        return f"uses {config.activation} in its MLP, not {graph.activation}"
    if config.norm != graph.norm:
        return f"has norms of kind {config.norm}, not {graph.norm}"
    if config.qk_norm != graph.qk_norm:
        wanted, found = (_QK_NORMS[kind] for kind in (graph.qk_norm, config.qk_norm))
        return f"has {found} of queries and keys where {wanted} is taken; leave QK as it is"
    if config.parallel_residual and not graph.parallel:
        return "runs attention and MLP side by side"
    if config.alibi_slopes and not (graph.alibi and _max_bias(config) is not None):
        return "has ALiBi slopes that no maximum bias gives" if graph.alibi else "uses ALiBi"
    if not math.isclose(config.embedding_scale, _embedding_scale(graph, config), rel_tol=1e-6):
        return f"scales its embedding by {config.embedding_scale:g}"
    return None


_QK_NORMS = {
    None: "no norm",
    "head": "a norm with one weight for all heads",
    "heads": "a norm with a weight for each head",
    "all": "a norm over all heads",
}


def _weights_obstacle(graph: Graph, family: Family, model: Model) -> str | None:
    """Weights that the loader takes no notice of, or misses."""
    known = {role.name for role in family.layer}
    biases = {name for name in known if name.endswith("_bias") and not name.endswith("norm_bias")}
    stray = model.layer_roles - (known - (biases - graph.biases)) | (
        model.top.keys() - {role.name for role in family.top}
    )
    if stray:
        return f"has weights without a place there: {', '.join(sorted(stray))}"
    required = {role.name for role in family.layer if role.required} | graph.needs
    if missing := required - model.layer_roles:
        return f"lacks weights that are needed there: {', '.join(sorted(missing))}"
    return None


def _lists(config: ModelConfig) -> tuple[list[_Frequencies], list[_Frequencies]]:
    """The distinct lists of frequencies of layers that see everything, and of those with a window."""
    everywhere = {shape.frequencies[0] for shape in config.layers if shape.frequencies and not shape.sliding_window}
    local = {shape.frequencies[0] for shape in config.layers if shape.frequencies and shape.sliding_window}
    return sorted(everywhere), sorted(local)


def _embedding_scale(graph: Graph, config: ModelConfig) -> float:
    return math.sqrt(config.hidden_size) if graph.scaled_embedding else 1.0


def _max_bias(config: ModelConfig) -> float | None:
    """The maximum ALiBi bias that gives the slopes; None when none does."""
    heads, first = config.num_attention_heads, config.alibi_slopes[0]
    if not 0 < first < 1:
        return None
    # A multiple of 1e-4 that float32 holds as well as it needs.
    bias = round(-math.log2(first) * (1 << (heads.bit_length() - 1)), 4)
    slopes = alibi_slopes(bias, heads)
    same = len(slopes) == len(config.alibi_slopes) and all(
        math.isclose(one, other, rel_tol=1e-4) for one, other in zip(slopes, config.alibi_slopes, strict=True)
    )
    return bias if same else None


def factors_for(target: Target, config: ModelConfig) -> _Frequencies | None:
    """Divisors for `rope_freqs.weight`; None when the file needs none."""
    return rope.factors(config.layers[0].frequencies[0], config.rope_theta) if target.graph.factors else None


def dimension_keys(target: Target, config: ModelConfig) -> dict[str, GGUFValue]:
    """Architecture keys for the dimensions and form of `config`, with the architecture in front."""
    graph, shape, layers = target.graph, config.layers[0], config.num_hidden_layers
    integers: dict[str, Any] = {
        "block_count": layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": shape.qk_head_dim,
        "attention.value_length": shape.v_head_dim,
        "feed_forward_length": shape.intermediate_size,
    }
    arrays = {}
    if graph.mixed:
        arrays = {key: [integers.pop(key)] * layers for key in ("attention.head_count", "attention.head_count_kv")}
        arrays["feed_forward_length"] = [one.intermediate_size for one in config.layers]
        del integers["feed_forward_length"]
    epsilon = "attention.layer_norm_rms_epsilon" if graph.norm == "rms" else "attention.layer_norm_epsilon"
    floats = {epsilon: config.norm_eps}
    keys = {}
    if graph.rotary != "none":
        integers["rope.dimension_count"] = 2 * shape.pairs
        floats |= _rope_keys(target, config)
        if "rope.scaling.factor" in floats:
            keys["rope.scaling.type"] = GGUFValue("linear", GGUFValueType.STRING)
    if graph.parallel:
        keys["use_parallel_residual"] = GGUFValue(config.parallel_residual, GGUFValueType.BOOL)
    if graph.alibi:
        floats["attention.max_alibi_bias"] = (config.alibi_slopes and _max_bias(config)) or 0.0
    if graph.window_period is not None and any(one.sliding_window for one in config.layers):
        local = [one.sliding_window is not None for one in config.layers]
        integers["attention.sliding_window"] = next(one.sliding_window for one in config.layers if one.sliding_window)
        # Older releases know the usual pattern alone.
        if local != local_layers(graph.window_period, layers):
            keys["attention.sliding_window_pattern"] = GGUFValue(local, GGUFValueType.ARRAY, GGUFValueType.BOOL)
    keys |= {key: GGUFValue(number, GGUFValueType.UINT32) for key, number in integers.items()}
    keys |= {key: GGUFValue(number, GGUFValueType.FLOAT32) for key, number in floats.items()}
    keys |= {key: GGUFValue(row, GGUFValueType.ARRAY, GGUFValueType.UINT32) for key, row in arrays.items()}
    return {f"{target.architecture}.{key}": value for key, value in keys.items()}


def _rope_keys(target: Target, config: ModelConfig) -> dict[str, float]:
    """Base and factor of the frequencies; with a list of divisors these say the rest."""
    everywhere, local = _lists(config)
    floats = {"rope.freq_base": config.rope_theta}
    if not target.graph.factors:
        for one in everywhere:
            base, factor = rope.base_and_factor(one, config.rope_theta) or (config.rope_theta, 1.0)
            floats["rope.freq_base"] = base
            if factor != 1.0:
                floats["rope.scaling.factor"] = factor
        for one in local:
            base, _ = rope.base_and_factor(one, LOCAL_BASE) or (LOCAL_BASE, 1.0)
            floats["rope.freq_base_swa"] = base
    return floats


def as_read_back(target: Target, config: ModelConfig, found: ModelConfig) -> ModelConfig:
    """`config` as a reader must find it in the file; numbers of `found` that float32 explains are taken over."""
    layers = config.layers
    if _close(_frequencies(config), _frequencies(found), 1e-5):
        layers = tuple(
            replace(one, frequencies=other.frequencies) for one, other in zip(layers, found.layers, strict=True)
        )
    config = replace(
        config,
        layers=layers,
        activation=target.graph.activation,
        tie_word_embeddings=target.tied,
        # The frequencies say what it stands for.
        rope_theta=found.rope_theta,
    )
    if _close([config.norm_eps, config.embedding_scale], [found.norm_eps, found.embedding_scale], 1e-6):
        config = replace(config, norm_eps=found.norm_eps, embedding_scale=found.embedding_scale)
    if _close(config.alibi_slopes, found.alibi_slopes, 1e-4):
        config = replace(config, alibi_slopes=found.alibi_slopes)
    return config


def _frequencies(config: ModelConfig) -> list[float]:
    return [omega for shape in config.layers for one in shape.frequencies for omega in one]


def _close(a: list[float] | tuple[float, ...], b: list[float] | tuple[float, ...], tolerance: float) -> bool:
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=tolerance) for x, y in zip(a, b, strict=True))

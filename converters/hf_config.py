"""config.json of Hugging Face → `ModelConfig`: for each family its keys, their defaults in transformers, its form."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from a3q.errors import InputError
from a3q.families import Family
from a3q.model import LayerShape, ModelConfig
from converters import rope

_Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
_Lists = tuple[tuple[float, ...], ...]
"""Frequencies, one list for all heads."""

_ACTIVATIONS: Mapping[str, _Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_LARGEST = 1 << 16
"""Above it a number of layers or heads, or the size of a head, is damage: what is built from it must fit in memory."""


@dataclass(frozen=True)
class _Keys:
    """What a family calls its dimensions; with `head_dim` its heads may have a size of their own."""

    hidden: str = "hidden_size"
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"
    head_dim: str | None = "head_dim"
    default_head_dim: int | None = None
    intermediate: str | None = "intermediate_size"
    """None: always four times `hidden`."""
    context: str = "max_position_embeddings"
    eps: str | None = "rms_norm_eps"
    """None: the default is fixed."""
    default_eps: float = 1e-6
    activation: str | None = "hidden_act"
    """None: the default is fixed."""
    default_activation: str = "silu"
    tied: bool = False
    """Where the config does not say."""


_KEYS: Mapping[str, _Keys] = {
    "llama": _Keys(),
    "qwen2": _Keys(),
    "phi3": _Keys(default_eps=1e-5),
    "qwen3": _Keys(default_head_dim=128),
    "gemma3": _Keys(
        default_head_dim=256, activation="hidden_activation", default_activation="gelu_pytorch_tanh", tied=True
    ),
    "olmo2": _Keys(default_eps=1e-5),
    "gpt_neox": _Keys(kv_heads=None, head_dim=None, eps="layer_norm_eps", default_eps=1e-5, default_activation="gelu"),
    "gpt2": _Keys(
        hidden="n_embd",
        layers="n_layer",
        heads="n_head",
        kv_heads=None,
        head_dim=None,
        intermediate="n_inner",
        context="n_positions",
        eps="layer_norm_epsilon",
        default_eps=1e-5,
        activation="activation_function",
        default_activation="gelu_new",
        tied=True,
    ),
    "opt": _Keys(
        kv_heads=None,
        head_dim=None,
        intermediate="ffn_dim",
        eps=None,
        default_eps=1e-5,
        activation="activation_function",
        default_activation="relu",
        tied=True,
    ),
    "mpt": _Keys(
        hidden="d_model",
        layers="n_layers",
        heads="n_heads",
        kv_heads=None,
        head_dim=None,
        intermediate=None,
        context="max_seq_len",
        eps="layer_norm_epsilon",
        default_eps=1e-5,
        activation=None,
        default_activation="gelu",
        tied=True,
    ),
}

_NEUTRAL: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "gemma3": {
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "use_bidirectional_attention": (False,),
    },
    "gpt2": {"scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
    "opt": {
        "do_layer_norm_before": (True,),
        "_remove_final_layer_norm": (False,),
        "layer_norm_elementwise_affine": (True,),
    },
    "mpt": {
        "expansion_ratio": (4,),
        "no_bias": (True,),
        "logit_scale": (None,),
        "norm_type": ("low_precision_layernorm", "layernorm"),
    },
}
"""Keys that change the computation: the values that a3q computes, the default first."""
_NEUTRAL_ATTENTION: Mapping[str, tuple[Any, ...]] = {
    # transformers adds the slopes even where this is false.
    "alibi": (True,),
    "attn_type": ("multihead_attention",),
    "clip_qkv": (None, 0),
    "qk_ln": (False,),
    "qk_gn": (False,),
    "prefix_lm": (False,),
    "rope": (False,),
    "sliding_window_size": (-1,),
    "attn_logit_softcapping": (None,),
}
"""The same for `attn_config` of MPT."""


@dataclass(frozen=True)
class _Fields:
    """A config.json, its values checked at access; an absent key and `null` are the default."""

    raw: Mapping[str, Any]
    path: Path

    def integer(self, key: str, default: int | None = None, most: int = (1 << 31) - 1) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            wanted = "a positive whole number" if most >= (1 << 31) - 1 else f"a whole number from 1 to {most}"
            raise InputError(f"{self.path}: {key} must be {wanted}, found {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= rope.LARGEST:
            raise InputError(f"{self.path}: {key} must be a positive number, found {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise InputError(f"{self.path}: {key} must be true or false, found {value!r}")
        return value

    def part(self, key: str) -> _Fields:
        """The fields of an object in this one."""
        value = self.raw.get(key) or {}
        if not isinstance(value, Mapping):
            raise InputError(f"{self.path}: {key} must be an object, found {value!r}")
        return _Fields(value, self.path)

    def need(self, neutral: Mapping[str, tuple[Any, ...]], inside: str = "") -> None:
        """Refuse values other than these."""
        for key, values in neutral.items():
            value = self.raw.get(key)
            if value is not None and value not in values:
                wanted = "null" if values[0] is None else str(values[0]).lower()
                raise InputError(f"{self.path}: {inside}{key} {value!r} is not supported; a3q computes {wanted} only")


class _Form(TypedDict, total=False):
    """Fields of `ModelConfig` that are not dimensions, where they are not the default."""

    norm: Literal["rms", "layer"]
    parallel_residual: bool
    qk_norm: Literal["head", "heads", "all"] | None
    alibi_slopes: tuple[float, ...]
    embedding_scale: float


def config_from_hf(family: Family, raw: Mapping[str, Any], path: Path) -> ModelConfig:
    """Dimensions and form; InputError for a variant of the family that a3q does not compute."""
    fields, keys = _Fields(raw, path), _KEYS[family.name]
    for key in raw:
        if raw[key] and (key in _EXPERTS or key.startswith("moe_")):
            raise InputError(f"{path}: {key} is {raw[key]!r}; a mixture of experts is not supported")
    fields.need(_NEUTRAL.get(family.name, {}))
    hidden = fields.integer(keys.hidden)
    heads = fields.integer(keys.heads, most=_LARGEST)
    kv_heads = fields.integer(keys.kv_heads, heads, _LARGEST) if keys.kv_heads else heads
    head_dim = hidden // heads
    if keys.head_dim:
        head_dim = fields.integer(keys.head_dim, keys.default_head_dim or head_dim, _LARGEST)
    if heads % kv_heads or head_dim < 1 or head_dim > _LARGEST or (not keys.head_dim and heads * head_dim != hidden):
        raise InputError(
            f"{path}: {heads} heads of size {head_dim} with {kv_heads} key heads and {keys.hidden} {hidden} cannot be"
        )
    count, context = fields.integer(keys.layers, most=_LARGEST), fields.integer(keys.context)
    intermediate = 4 * hidden
    if keys.intermediate:
        # Only GPT-2 has a default.
        intermediate = fields.integer(keys.intermediate, intermediate if family.name == "gpt2" else None)
    name = str(raw.get(keys.activation) or keys.default_activation) if keys.activation else keys.default_activation
    if name not in _ACTIVATIONS:
        known = ", ".join(sorted(_ACTIVATIONS))
        raise InputError(f"{path}: {keys.activation} {name!r} is not supported; a3q knows {known}")
    slides = _sliding_layers(family, fields, count)
    window = _window(fields, context) if any(slides) else None
    theta, whole, local = _frequencies(family, fields, head_dim)
    shapes = {
        slide: LayerShape(head_dim, head_dim, intermediate, local if slide else whole, window if slide else None)
        for slide in (False, True)
    }
    return ModelConfig(
        layers=tuple(shapes[slide] for slide in slides),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=fields.integer("vocab_size"),
        max_position_embeddings=context,
        norm_eps=fields.number(keys.eps, keys.default_eps) if keys.eps else keys.default_eps,
        tie_word_embeddings=fields.flag("tie_word_embeddings", keys.tied),
        rope_theta=theta,
        activation=_ACTIVATIONS[name],
        **_form(family, fields, hidden, heads),
    )


def query_factor(family: Family, raw: Mapping[str, Any], config: ModelConfig, path: Path) -> float:
    """What the queries are multiplied by so that scores divided by the root of the head size are the family's own."""
    fields, root = _Fields(raw, path), math.sqrt(config.layers[0].qk_head_dim)
    factor = 1.0
    if family.name == "gemma3":
        factor = root / math.sqrt(fields.number("query_pre_attn_scalar", 256))
    elif family.name == "gpt2" and not fields.flag("scale_attn_weights", True):
        factor = root
    elif family.name == "mpt":
        factor = root * fields.part("attn_config").number("softmax_scale", 1 / root)
    # A scale that is meant to be the usual one must not touch the weights.
    return 1.0 if math.isclose(factor, 1.0, rel_tol=1e-6) else factor


def _form(family: Family, fields: _Fields, hidden: int, heads: int) -> _Form:
    """What else distinguishes the family's computation."""

    def neox() -> _Form:
        return {"norm": "layer", "parallel_residual": fields.flag("use_parallel_residual", True)}

    def opt() -> _Form:
        width = fields.integer("word_embed_proj_dim", hidden)
        if width != hidden:
            raise InputError(
                f"{fields.path}: word_embed_proj_dim {width} is not supported; a3q needs embeddings of hidden_size"
            )
        return {"norm": "layer"}

    def mpt() -> _Form:
        attention = fields.part("attn_config")
        attention.need({**_NEUTRAL_ATTENTION, "kv_n_heads": (heads,)}, "attn_config.")
        return {"norm": "layer", "alibi_slopes": _alibi_slopes(heads, attention.number("alibi_bias_max", 8))}

    forms: Mapping[str, Callable[[], _Form]] = {
        "qwen3": lambda: {"qk_norm": "head"},
        "gemma3": lambda: {"qk_norm": "head", "embedding_scale": math.sqrt(hidden)},
        "olmo2": lambda: {"qk_norm": "all"},
        "gpt_neox": neox,
        "gpt2": lambda: {"norm": "layer"},
        "opt": opt,
        "mpt": mpt,
    }
    return forms[family.name]() if family.name in forms else {}


def _alibi_slopes(heads: int, largest: float) -> tuple[float, ...]:
    """MPT's: a geometric sequence for the next power of two, of which every second comes first."""
    power = 2 ** math.ceil(math.log2(heads))
    slopes = [2.0 ** -(i * largest / power) for i in range(1, power + 1)]
    return tuple(slopes if power == heads else [*slopes[1::2], *slopes[::2]][:heads])


def _sliding_layers(family: Family, fields: _Fields, count: int) -> Sequence[bool]:
    """For each layer whether it sees a window only."""
    raw, model_type = fields.raw, fields.raw.get("model_type")
    listed = None
    kinds = raw.get("layer_types")
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != count or not all(kind in known for kind in kinds):
            raise InputError(f"{fields.path}: layer_types must name {' or '.join(known)} for each of {count} layers")
        listed = [kind == "sliding_attention" for kind in kinds]
    slides, chosen = [False] * count, False
    if family.name == "gemma3":
        pattern = fields.integer("sliding_window_pattern", 6)
        slides, chosen = [bool((i + 1) % pattern) for i in range(count)], True
    elif family.name in ("qwen2", "qwen3"):
        chosen = fields.flag("use_sliding_window", False) and raw.get("sliding_window", 4096) is not None
        first = raw.get("max_window_layers", 28) if chosen else count
        if isinstance(first, bool) or not isinstance(first, int):
            raise InputError(f"{fields.path}: max_window_layers must be a whole number, found {first!r}")
        slides = [i >= first for i in range(count)]
    # transformers takes 4096 for a Mistral whose config does not say.
    elif model_type == "mistral" or family.name == "phi3":
        window = raw.get("sliding_window", 4096 if model_type == "mistral" else None)
        slides = [window is not None] * count
    if listed is None or listed == slides:
        return slides
    if not chosen:
        raise InputError(
            f"{fields.path}: layer_types and sliding_window contradict each other for a {model_type} model; "
            "correct the wrong one"
        )
    return listed


def _window(fields: _Fields, context: int) -> int | None:
    """Size of the window; one that never closes is none."""
    window = fields.integer("sliding_window", None if fields.raw.get("sliding_window", 0) is None else 4096)
    return window if window < context else None


def _frequencies(family: Family, fields: _Fields, head_dim: int) -> tuple[float, _Lists, _Lists]:
    """Theta and frequencies, then those of the layers with a window."""
    raw, path = fields.raw, fields.path
    if family.name in ("gpt2", "opt", "mpt"):
        return 10000.0, (), ()
    if family.name == "gemma3":
        parameters = fields.part("rope_parameters")
        if parameters.raw and not parameters.raw.keys() <= {"full_attention", "sliding_attention"}:
            raise InputError(f"{path}: rope_parameters must hold full_attention and sliding_attention")
        scaling, context = fields.part("rope_scaling").raw, raw.get("max_position_embeddings")
        whole = {
            "rope_theta": 1e6 if raw.get("rope_theta") is None else raw["rope_theta"],
            "rope_parameters": {**parameters.part("full_attention").raw, **scaling},
            "max_position_embeddings": context,
        }
        theta = raw.get("rope_local_base_freq")
        local = {
            "rope_theta": 1e4 if theta is None else theta,
            "rope_parameters": parameters.part("sliding_attention").raw,
            "max_position_embeddings": context,
        }
        theta, frequencies = rope.frequencies_from_hf(whole, head_dim, path)
        return theta, (frequencies,), (rope.frequencies_from_hf(local, head_dim, path)[1],)
    if family.name == "gpt_neox":
        own = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
        named = {own[key]: raw[key] for key in own if raw.get(key) is not None}
        raw = {**raw, "partial_rotary_factor": 0.25, "rope_theta": 10000.0, **named}
    partial = family.name in ("gpt_neox", "phi3")
    theta, frequencies = rope.frequencies_from_hf(raw, head_dim, path, partial=partial)
    return theta, (frequencies,), (frequencies,)

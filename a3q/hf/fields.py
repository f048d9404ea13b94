"""What a config.json of `model_type` a3q says ↔ `ModelConfig`; transformers is not needed for it.

The JSON comes from anywhere, so every value is checked.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from a3q.errors import InputError
from a3q.families import FAMILIES, Family, Role, family_named
from a3q.hf.layout import fused_in
from a3q.model import LayerShape, ModelConfig

_LIMIT = 1 << 31
"""No dimension is as large; a damaged one must not decide how long a loop runs."""

_HUGE = 3e38
"""Beyond it no float32 is finite, and numbers are stored and computed as such."""


@dataclass(frozen=True)
class Description:
    """A checked configuration."""

    family: Family
    config: ModelConfig
    layer_roles: frozenset[str]
    """Weights that every layer has."""
    top_roles: frozenset[str]
    """Weights outside the layers."""


def describe(
    family: Family,
    config: ModelConfig,
    layer_roles: Collection[str],
    top_roles: Collection[str],
    reduction: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The fields that say all about a model's form, as JSON values."""
    windows = {shape.sliding_window for shape in config.layers} - {None}
    if len(windows) > 1:
        raise InputError(
            f"layers have different attention windows ({', '.join(map(str, sorted(filter(None, windows))))}); "
            "transformers runs only one width, so this model cannot be written as a folder; write a GGUF"
        )
    layers = config.layers
    return {
        "family": family.name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "norm": config.norm,
        "norm_eps": config.norm_eps,
        "norm_offset": family.hf_norm_offset,
        "hidden_act": config.activation,
        "parallel_residual": config.parallel_residual,
        "qk_norm": config.qk_norm,
        "alibi_slopes": list(config.alibi_slopes),
        "embedding_scale": config.embedding_scale,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": "output" not in top_roles,
        "qk_head_dim": [shape.qk_head_dim for shape in layers],
        "v_head_dim": [shape.v_head_dim for shape in layers],
        "intermediate_size": [shape.intermediate_size for shape in layers],
        "frequencies": [[list(head) for head in shape.frequencies] for shape in layers],
        # The names by which transformers' caches and masks know of windows.
        "sliding_window": next(iter(windows), None),
        "layer_types": ["full_attention" if s.sliding_window is None else "sliding_attention" for s in layers],
        "weights": sorted(layer_roles),
        "top_weights": sorted(top_roles),
        "fused": fused_in(family),
        "reduction": None if reduction is None else dict(reduction),
    }


def read_description(raw: Mapping[str, Any], origin: object) -> Description:
    """The inverse of `describe`; InputError names the field that cannot be."""
    fields = _Fields(raw, origin)
    family = family_named(fields.text("family"))
    if family is None:
        known = ", ".join(sorted(entry.name for entry in FAMILIES))
        raise fields.wrong("family", f"one of {known}")
    for name, meant in (("fused", fused_in(family)), ("norm_offset", family.hf_norm_offset)):
        if fields.get(name) != meant:
            raise fields.wrong(name, f"{meant!r} for the family {family.name}")
    heads, kv_heads = fields.integer("num_attention_heads"), fields.integer("num_key_value_heads")
    if heads % kv_heads:
        raise fields.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    slopes = fields.numbers("alibi_slopes")
    if len(slopes) not in (0, heads):
        raise fields.wrong("alibi_slopes", f"a list of {heads} numbers, one for each query head, or empty")
    hints = get_type_hints(ModelConfig)
    layer_roles = fields.roles("weights", family.layer)
    for members in (("q", "k", "v"), ("gate", "up")):
        biases = {role in layer_roles for member in members if (role := f"{member}_bias")}
        if set(members) <= family.fused and len(biases) > 1:
            raise fields.wrong("weights", f"biases for all of {', '.join(members)} or for none: they are one tensor")
    top_roles = fields.roles("top_weights", family.top)
    tied = fields.flag("tie_word_embeddings")
    if tied == ("output" in top_roles):
        raise fields.wrong("tie_word_embeddings", "true exactly where top_weights has no output")
    config = ModelConfig(
        layers=_layers(fields, kv_heads),
        hidden_size=fields.integer("hidden_size"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=fields.integer("vocab_size"),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        norm_eps=fields.number("norm_eps"),
        tie_word_embeddings=tied,
        rope_theta=fields.number("rope_theta"),
        norm=fields.choice("norm", get_args(hints["norm"])),
        activation=fields.choice("hidden_act", get_args(hints["activation"])),
        parallel_residual=fields.flag("parallel_residual"),
        qk_norm=fields.choice("qk_norm", (*get_args(get_args(hints["qk_norm"])[0]), None)),
        alibi_slopes=slopes,
        embedding_scale=fields.number("embedding_scale"),
    )
    if (config.qk_norm is None) == ("q_norm" in layer_roles) or ("q_norm" in layer_roles) != ("k_norm" in layer_roles):
        raise fields.wrong("qk_norm", "set exactly where weights has q_norm and k_norm")
    return Description(family, config, layer_roles, top_roles)


def _layers(fields: _Fields, kv_heads: int) -> tuple[LayerShape, ...]:
    count = fields.integer("num_hidden_layers")
    lists: dict[str, list[Any]] = {}
    for name in ("qk_head_dim", "v_head_dim", "intermediate_size", "frequencies", "layer_types"):
        value = fields.get(name)
        if not isinstance(value, list | tuple) or len(value) != count:
            raise fields.wrong(name, f"a list of {count} entries, one for each layer")
        lists[name] = list(value)
    window = None if fields.get("sliding_window") is None else fields.integer("sliding_window")
    layers = []
    for qk, v, inner, frequencies, kind in zip(*lists.values(), strict=True):
        for name, value in (("qk_head_dim", qk), ("v_head_dim", v), ("intermediate_size", inner)):
            if not _is_size(value):
                raise fields.wrong(name, "a list of positive whole numbers", value)
        if kind not in ("full_attention", "sliding_attention") or (kind == "sliding_attention" and window is None):
            raise fields.wrong("layer_types", "full_attention, or sliding_attention where sliding_window is set", kind)
        heads = _frequencies(fields, frequencies, kv_heads, qk)
        layers.append(LayerShape(qk, v, inner, heads, window if kind == "sliding_attention" else None))
    return tuple(layers)


def _frequencies(fields: _Fields, lists: Any, kv_heads: int, qk: int) -> tuple[tuple[float, ...], ...]:
    if not isinstance(lists, list | tuple) or len(lists) not in (0, 1, kv_heads):
        raise fields.wrong("frequencies", f"for each layer no list, one, or {kv_heads} (one for each key head)", lists)
    heads = tuple(_numbers(head) for head in lists)
    if any(
        head is None or len(head) != len(heads[0] or ()) or 2 * len(head) > qk or any(omega <= 0 for omega in head)
        for head in heads
    ):
        raise fields.wrong("frequencies", f"for each head equally many positive numbers, at most {qk // 2}", lists)
    return tuple(head for head in heads if head is not None)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < _LIMIT


def _is_number(value: object) -> bool:
    # An integer may be too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and -_HUGE < value < _HUGE


def _numbers(value: object) -> tuple[float, ...] | None:
    if not isinstance(value, list | tuple) or not all(map(_is_number, value)):
        return None
    return tuple(float(item) for item in value)


@dataclass(frozen=True)
class _Fields:
    """Typed access to the fields; InputError names the field."""

    raw: Mapping[str, Any]
    origin: object

    def get(self, name: str) -> Any:
        if name not in self.raw:
            raise InputError(f"{self.origin}: {name} is missing; write the folder again with a3q")
        return self.raw[name]

    def wrong(self, name: str, expected: str, found: object = ...) -> InputError:
        shown = repr(self.raw.get(name) if found is ... else found)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        return InputError(f"{self.origin}: {name} must be {expected}; found {shown}")

    def integer(self, name: str) -> int:
        value = self.get(name)
        if not _is_size(value):
            raise self.wrong(name, "a positive whole number")
        return int(value)

    def number(self, name: str) -> float:
        value = self.get(name)
        if not _is_number(value) or value <= 0:
            raise self.wrong(name, "a positive number")
        return float(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        values = _numbers(self.get(name))
        if values is None:
            raise self.wrong(name, "a list of finite numbers")
        return values

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise self.wrong(name, "a text")
        return value

    def choice(self, name: str, choices: Sequence[Any]) -> Any:
        value = self.get(name)
        if value not in choices:
            raise self.wrong(name, f"one of {', '.join('null' if item is None else str(item) for item in choices)}")
        return value

    def roles(self, name: str, known: Sequence[Role]) -> frozenset[str]:
        """Names of weights that the family has, the required ones among them."""
        value, names = self.get(name), [role.name for role in known]
        if not isinstance(value, list | tuple) or any(item not in names for item in value):
            raise self.wrong(name, f"a list of names out of {', '.join(names)}")
        if lacking := [role.name for role in known if role.required and role.name not in value]:
            raise self.wrong(name, f"a list with {', '.join(lacking)}")
        return frozenset(value)

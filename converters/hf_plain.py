"""A model as its family's own transformers class has it, where that class can: config.json and names of tensors.

Any tool that knows the family reads such a folder, without a3q.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from a3q.errors import InputError
from a3q.families import Family
from a3q.hf.layout import Part
from a3q.model import Model
from converters.hf_config import config_from_hf, query_factor
from converters.tensors import stored_roles

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
}
"""Model types whose tensors are the roles' weights, one below the other at most."""
_FROM_GGUF = ("llama", "qwen2", "qwen3")
"""Families whose config.json is made where there is none."""
_BIASES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "attention_bias": {
        "llama": ("q_bias", "k_bias", "v_bias", "o_bias"),
        "qwen3": ("q_bias", "k_bias", "v_bias", "o_bias"),
    },
    "mlp_bias": {"llama": ("gate_bias", "up_bias", "down_bias")},
}
"""Keys that decide about biases, which a model type has all or none of."""


def plain_config(model: Model) -> dict[str, Any] | None:
    """Fields of config.json with which the family's own class computes `model`; None where it cannot.

    It can for an unreduced model, and for one whose layers are all reduced alike and rotate as the config says.
    """
    raw = _own_config(model)
    model_type = str(raw.get("model_type"))
    if model_type not in _CLASSES or ("output" in model.top) == model.config.tie_word_embeddings:
        return None
    widths = {shape.intermediate_size for shape in model.config.layers}
    heads = {size for shape in model.config.layers for size in (shape.qk_head_dim, shape.v_head_dim)}
    if len(widths) > 1 or len(heads) > 1:
        return None
    raw |= {"intermediate_size": widths.pop(), "architectures": [_CLASSES[model_type]]}
    size = heads.pop()
    # A class that has the key reads it, even where it could be told from the others.
    if "head_dim" in raw or size * model.config.num_attention_heads != model.config.hidden_size:
        raw["head_dim"] = size
    optional = {role.name for role in model.family.layer if not role.required and role.name in model.layer_roles}
    for key, types in _BIASES.items():
        if model_type in types:
            raw[key] = set(types[model_type]) <= optional
            optional -= set(types[model_type]) if raw[key] else set()
    if optional:
        return None
    with suppress(InputError):
        config = config_from_hf(model.family, raw, model.source.path)
        if config == model.config and query_factor(model.family, raw, config, model.source.path) == 1.0:
            return raw
    return None


def plain_parts(family: Family, roles: frozenset[str], top: frozenset[str], i: int | None) -> list[Part]:
    """Tensors of layer `i` under the family's own names, or those outside the layers (None)."""
    if i is None:
        return [Part(role.hf, (role,)) for role in family.top if role.name in top]
    stored = stored_roles(family, "hf", i)
    return [Part(name, tuple(members)) for name, members in stored.items() if members[0].name in roles]


def _own_config(model: Model) -> dict[str, Any]:
    """What the model that was read says, or would say; empty where it cannot be known."""
    if model.source.format == "huggingface":
        raw: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            raw = json.loads((model.source.path / "config.json").read_text(encoding="utf-8"))
        # `auto_map` names code of the source's repository.
        dropped = ("quantization_config", "auto_map", "torch_dtype", "transformers_version")
        return {key: value for key, value in raw.items() if key not in dropped}
    config = model.config
    if model.family.name not in _FROM_GGUF or config.alibi_slopes:
        return {}
    return {
        "model_type": model.family.name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.widest.qk_head_dim,
        "hidden_act": config.activation,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        # The second is transformers 5's, the first that of all others.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }

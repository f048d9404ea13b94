"""The one table of architectures: which weights a family has, what they are called in each format, and their shapes.

Readers find tensors by it, the writer names and checks them by it, and the stages speak only of roles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from a3q.errors import InputError
from a3q.model import ModelConfig

Dim = Literal["hidden", "vocab", "intermediate", "queries", "keys", "values", "attended"]
RopeLayout = Literal["half", "interleaved"]


@dataclass(frozen=True)
class Role:
    """One weight: its role, its names (with `{i}` for the layer) and its shape in symbols, Hugging Face order."""

    name: str
    hf: str
    gguf: str
    shape: tuple[Dim, ...]
    required: bool = True
    rotary: Literal["queries", "keys"] | None = None
    """Rows are laid out per head for RoPE, so the format's layout matters."""

    def expected_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of this weight under `config`."""
        sizes: Mapping[Dim, int] = {
            "hidden": config.hidden_size,
            "vocab": config.vocab_size,
            "intermediate": config.intermediate_size,
            "queries": config.num_attention_heads * config.head_dim,
            "keys": config.num_key_value_heads * config.head_dim,
            "values": config.num_key_value_heads * config.v_head_dim,
            "attended": config.num_attention_heads * config.v_head_dim,
        }
        return tuple(sizes[dim] for dim in self.shape)


@dataclass(frozen=True)
class Family:
    """An architecture as a3q understands it."""

    name: str
    hf_model_types: tuple[str, ...]
    gguf_architectures: tuple[str, ...]
    gguf_rope_layout: RopeLayout
    """How this family's own GGUF files lay out the rows of q and k."""
    written_as: str
    """GGUF architecture of what a3q writes; always with interleaved rows, since `llama` wants them."""
    layer: tuple[Role, ...]
    top: tuple[Role, ...]


_ATTN, _MLP = "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."


def _decoder_layer(*, qkv_bias_required: bool) -> tuple[Role, ...]:
    """Pre-norm decoder layer with separate q, k, v, o and a gated MLP."""
    return (
        Role("attn_norm", "model.layers.{i}.input_layernorm.weight", "blk.{i}.attn_norm.weight", ("hidden",)),
        Role("q", _ATTN + "q_proj.weight", "blk.{i}.attn_q.weight", ("queries", "hidden"), rotary="queries"),
        Role("k", _ATTN + "k_proj.weight", "blk.{i}.attn_k.weight", ("keys", "hidden"), rotary="keys"),
        Role("v", _ATTN + "v_proj.weight", "blk.{i}.attn_v.weight", ("values", "hidden")),
        Role("o", _ATTN + "o_proj.weight", "blk.{i}.attn_output.weight", ("hidden", "attended")),
        Role("q_bias", _ATTN + "q_proj.bias", "blk.{i}.attn_q.bias", ("queries",), qkv_bias_required, "queries"),
        Role("k_bias", _ATTN + "k_proj.bias", "blk.{i}.attn_k.bias", ("keys",), qkv_bias_required, "keys"),
        Role("v_bias", _ATTN + "v_proj.bias", "blk.{i}.attn_v.bias", ("values",), qkv_bias_required),
        Role("o_bias", _ATTN + "o_proj.bias", "blk.{i}.attn_output.bias", ("hidden",), False),
        Role("mlp_norm", "model.layers.{i}.post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight", ("hidden",)),
        Role("gate", _MLP + "gate_proj.weight", "blk.{i}.ffn_gate.weight", ("intermediate", "hidden")),
        Role("up", _MLP + "up_proj.weight", "blk.{i}.ffn_up.weight", ("intermediate", "hidden")),
        Role("down", _MLP + "down_proj.weight", "blk.{i}.ffn_down.weight", ("hidden", "intermediate")),
        Role("gate_bias", _MLP + "gate_proj.bias", "blk.{i}.ffn_gate.bias", ("intermediate",), False),
        Role("up_bias", _MLP + "up_proj.bias", "blk.{i}.ffn_up.bias", ("intermediate",), False),
        Role("down_bias", _MLP + "down_proj.bias", "blk.{i}.ffn_down.bias", ("hidden",), False),
    )


_TOP = (
    Role("embed", "model.embed_tokens.weight", "token_embd.weight", ("vocab", "hidden")),
    Role("final_norm", "model.norm.weight", "output_norm.weight", ("hidden",)),
    Role("output", "lm_head.weight", "output.weight", ("vocab", "hidden"), required=False),
)

FAMILIES: tuple[Family, ...] = (
    Family("llama", ("llama", "mistral"), ("llama",), "interleaved", "llama",
           _decoder_layer(qkv_bias_required=False), _TOP),
    Family("qwen2", ("qwen2",), ("qwen2",), "half", "llama", _decoder_layer(qkv_bias_required=True), _TOP),
)  # fmt: skip

COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "QK": ("q", "k", "q_bias", "k_bias"),
    "OV": ("v", "o", "v_bias"),
    "MLP": ("gate", "up", "down", "gate_bias", "up_bias"),
}
"""Weights whose inner dimension each A3 component reduces."""


def _known(kind: str, names: list[str]) -> str:
    return f"a3q knows these {kind}: {', '.join(sorted(names))}"


def family_for_hf(model_type: str | None, origin: object) -> Family:
    """The family of a Hugging Face `model_type`; InputError names those that work."""
    for family in FAMILIES:
        if model_type in family.hf_model_types:
            return family
    known = _known("model types", [name for family in FAMILIES for name in family.hf_model_types])
    raise InputError(f"{origin}: model_type {model_type!r} is not supported; {known}")


def family_for_gguf(architecture: str | None, origin: object) -> Family:
    """The family of a GGUF `general.architecture`; InputError names those that work."""
    for family in FAMILIES:
        if architecture in family.gguf_architectures:
            return family
    known = _known("architectures", [name for family in FAMILIES for name in family.gguf_architectures])
    raise InputError(f"{origin}: architecture {architecture!r} is not supported; {known}")

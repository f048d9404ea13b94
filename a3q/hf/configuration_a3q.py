"""`A3QConfig`: transformers' configuration of a model whose inner dimensions differ from layer to layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from transformers import PreTrainedConfig

from a3q.families import Family
from a3q.hf import MODEL_TYPE, fields, register_models
from a3q.hf.layout import Fused
from a3q.model import ModelConfig


class A3QConfig(PreTrainedConfig):
    """Dimensions and form of a reduced decoder; the defaults are those of a toy model.

    Values of `weights` and `top_weights` are roles of `a3q.families`; all else is described at `a3q.model.ModelConfig`
    and `LayerShape`, with one entry for each layer where the layers differ.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ("cache",)

    def __init__(
        self,
        *,
        family: str = "llama",
        vocab_size: int = 256,
        hidden_size: int = 64,
        num_hidden_layers: int = 1,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 4,
        max_position_embeddings: int = 2048,
        norm: str = "rms",
        norm_eps: float = 1e-6,
        norm_offset: float = 0.0,
        hidden_act: str = "silu",
        parallel_residual: bool = False,
        qk_norm: str | None = None,
        alibi_slopes: Collection[float] = (),
        embedding_scale: float = 1.0,
        rope_theta: float = 10000.0,
        tie_word_embeddings: bool = True,
        qk_head_dim: Collection[int] = (16,),
        v_head_dim: Collection[int] = (16,),
        intermediate_size: Collection[int] = (128,),
        frequencies: Collection[Collection[Collection[float]]] = ((),),
        sliding_window: int | None = None,
        layer_types: Collection[str] = ("full_attention",),
        weights: Collection[str] = ("attn_norm", "mlp_norm", "q", "k", "v", "o", "gate", "up", "down"),
        top_weights: Collection[str] = ("embed", "final_norm"),
        fused: Collection[Fused] = (),
        reduction: Mapping[str, Any] | None = None,
        use_cache: bool = True,
        initializer_range: float = 0.02,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.family = family
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        self.norm = norm
        self.norm_eps = norm_eps
        self.norm_offset = norm_offset
        self.hidden_act = hidden_act
        self.parallel_residual = parallel_residual
        self.qk_norm = qk_norm
        self.alibi_slopes = _plain(alibi_slopes)
        self.embedding_scale = embedding_scale
        self.rope_theta = rope_theta
        self.tie_word_embeddings = tie_word_embeddings
        self.qk_head_dim = _plain(qk_head_dim)
        self.v_head_dim = _plain(v_head_dim)
        self.intermediate_size = _plain(intermediate_size)
        self.frequencies = _plain(frequencies)
        self.sliding_window = sliding_window
        self.layer_types = _plain(layer_types)
        self.weights = _plain(weights)
        self.top_weights = _plain(top_weights)
        self.fused = _plain(fused)
        self.reduction = reduction
        self.use_cache = use_cache
        self.initializer_range = initializer_range
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        describe_config(self)
        super().__init__(**kwargs)
        register_models()


def _plain(value: Any) -> Any:
    """Tuples as the lists that JSON makes of them; whatever else stays, to be refused by name."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def describe_config(config: A3QConfig) -> fields.Description:
    """Family, dimensions and weights of a configuration; InputError names the field that cannot be."""
    return fields.read_description(vars(config), "A3QConfig")


def to_model_config(config: A3QConfig) -> ModelConfig:
    """The same dimensions as the stages of a3q know them."""
    return describe_config(config).config


def from_model_config(
    family: Family,
    config: ModelConfig,
    weights: Collection[str],
    top_weights: Collection[str],
    *,
    reduction: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> A3QConfig:
    """The configuration of a model whose layers have `weights` and that has `top_weights` outside them."""
    return A3QConfig(**fields.describe(family, config, weights, top_weights, reduction), **kwargs)

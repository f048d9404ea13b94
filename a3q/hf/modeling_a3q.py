"""`A3QForCausalLM`: a reduced decoder of any family as a transformers model.

It computes what `a3q.forward` does. Each layer has its own head sizes, MLP width and RoPE frequencies, and as many
matrix products as the family's own model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from a3q.hf.configuration_a3q import A3QConfig

Rotation = tuple[Tensor, Tensor]
"""Cosine and signed sine `[B, lists, T, 2 m]` of a layer's angles, in the type of the hidden states."""

_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}
"""transformers' names where they are not a3q's."""

_FEW = 4
"""So many different lists of frequencies are worth keeping the angles of while the layers run."""


class A3QRMSNorm(nn.Module):
    """RMS norm in float32 over the last dimension, or over each of `groups` equal parts of it."""

    def __init__(self, size: int, eps: float, offset: float = 0.0, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self.eps = eps
        self.offset = offset
        """Added to the weight (Gemma)."""
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        parts = x.float() if self.groups == 1 else x.float().reshape(*x.shape[:-1], self.groups, -1)
        parts = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + self.eps)
        normed = parts if self.groups == 1 else parts.flatten(-2)
        if self.offset:
            return (normed * (self.offset + self.weight.float())).to(x.dtype)
        return self.weight * normed.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}, offset={self.offset}, groups={self.groups}"


def _norm(config: A3QConfig, role: str, roles: list[str]) -> nn.Module:
    """The norm called `role`; nothing where the model has none."""
    if role not in roles:
        return nn.Identity()
    if config.norm == "layer":
        return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=f"{role}_bias" in roles)
    return A3QRMSNorm(config.hidden_size, config.norm_eps, config.norm_offset)


class A3QScaledEmbedding(nn.Embedding):
    """Token embedding times a constant, which is rounded to the embedding's type first, as the families do."""

    def __init__(self, count: int, size: int, scale: float) -> None:
        super().__init__(count, size)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        embedded = super().forward(input)
        return embedded if self.scale == 1.0 else embedded * _rounded(self.scale, embedded.dtype)


@lru_cache(maxsize=8)
def _rounded(value: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(value, dtype=dtype, device="cpu"))


class _Rotations:
    """Angles of every layer from its frequencies.

    No module: the frequencies are float32 made from the configuration's numbers, whatever type the model is cast to.
    """

    def __init__(self, config: A3QConfig) -> None:
        lists = [tuple(tuple(head) for head in layer) for layer in config.frequencies]
        self.distinct = list(dict.fromkeys(lists))
        self.of_layer = [self.distinct.index(layer) for layer in lists]
        self._on: dict[torch.device, list[Tensor]] = {}

    def _signed(self, device: torch.device) -> list[Tensor]:
        """Frequencies `[lists, 2 m]`, those of the real parts negative: the sine of their angles is then signed."""
        if device not in self._on:
            self._on[device] = [
                torch.tensor([[*(-w for w in head), *head] for head in lists], dtype=torch.float32, device=device)
                for lists in self.distinct
            ]
        return self._on[device]

    def __call__(self, x: Tensor, position_ids: Tensor) -> Iterator[Rotation | None]:
        """One rotation for each layer in turn, None for a layer without RoPE. `position_ids` `[B, T]`."""
        signed = self._signed(x.device)
        kept: dict[int, Rotation | None] = {}
        if position_ids.shape[-1] == 1 and len(signed) > 1:
            # Decoding: all layers at once, or the kernels' start-up would take longer than their work.
            flat = _turn(torch.cat([w.flatten() for w in signed])[None], x, position_ids)
            sizes = [w.numel() for w in signed]
            parts = zip(*(torch.split(part[:, 0, 0], sizes, dim=-1) for part in flat), strict=True)
            for i, (w, (cos, sin)) in enumerate(zip(signed, parts, strict=True)):
                shape = (-1, len(w), 1, w.shape[-1]) if w.numel() else None
                kept[i] = None if shape is None else (cos.reshape(shape), sin.reshape(shape))
        for i in self.of_layer:
            if i not in kept:
                if len(signed) > _FEW:
                    kept.clear()
                kept[i] = _turn(signed[i], x, position_ids) if signed[i].numel() else None
            yield kept[i]


def _turn(signed: Tensor, x: Tensor, position_ids: Tensor) -> Rotation:
    angles = position_ids[:, None, :, None].float() * signed[:, None]
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def _rotate(x: Tensor, rotation: Rotation | None) -> Tensor:
    """Rotate the pairs of `[B, heads, T, d]`; where there is a list for each key head, its query heads share it."""
    if rotation is None:
        return x
    cos, sin = rotation
    lists, width, heads = cos.shape[1], cos.shape[-1], x.shape[1]
    if lists not in (1, heads):
        x = x.reshape(x.shape[0], lists, -1, *x.shape[2:])
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    pairs = x[..., :width]
    turned = torch.addcmul(pairs * cos, pairs.roll(width // 2, -1), sin)
    if x.shape[-1] > width:
        turned = torch.cat((turned, x[..., width:]), dim=-1)
    return turned if turned.ndim == 4 else turned.flatten(1, 2)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, softmax in float32; `[B, T, heads, v_head_dim]` and the weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class A3QAttention(nn.Module):
    """Causal self-attention with the head sizes of one layer."""

    is_causal = True
    q_norm: A3QRMSNorm
    k_norm: A3QRMSNorm

    def __init__(self, config: A3QConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.qk_head_dim[layer_idx]
        self.v_head_dim = config.v_head_dim[layer_idx]
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None
        hidden, roles = config.hidden_size, config.weights
        self.sizes = (
            config.num_attention_heads * self.head_dim,
            config.num_key_value_heads * self.head_dim,
            config.num_key_value_heads * self.v_head_dim,
        )
        if "qkv" in config.fused:
            self.qkv_proj = nn.Linear(hidden, sum(self.sizes), bias="q_bias" in roles)
        else:
            self.q_proj, self.k_proj, self.v_proj = (
                nn.Linear(hidden, size, bias=f"{role}_bias" in roles)
                for role, size in zip("qkv", self.sizes, strict=True)
            )
        attended = config.num_attention_heads * self.v_head_dim
        self.o_proj = nn.Linear(attended, hidden, bias="o_bias" in roles)
        self.qk_norm = config.qk_norm
        if self.qk_norm is not None:
            for name, heads in (("q_norm", config.num_attention_heads), ("k_norm", config.num_key_value_heads)):
                size = self.head_dim if self.qk_norm == "head" else heads * self.head_dim
                groups = heads if self.qk_norm == "heads" else 1
                setattr(self, name, A3QRMSNorm(size, config.norm_eps, config.norm_offset, groups))

    def forward(
        self,
        hidden_states: Tensor,
        rotation: Rotation | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if "qkv" in self.config.fused:
            q, k, v = self.qkv_proj(hidden_states).split(self.sizes, dim=-1)
        else:
            q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self.qk_norm in ("heads", "all"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.unflatten(-1, (-1, self.head_dim)), k.unflatten(-1, (-1, self.head_dim))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = _rotate(q.transpose(1, 2), rotation), _rotate(k.transpose(1, 2), rotation)
        v = v.unflatten(-1, (-1, self.v_head_dim)).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = attend(
            self, q, k, v, attention_mask,
            dropout=0.0, scaling=self.scaling, sliding_window=self.sliding_window, **kwargs,
        )  # fmt: skip
        return self.o_proj(attended.flatten(2)), weights


class A3QMLP(nn.Module):
    """MLP of one layer's width, gated where the family's is."""

    def __init__(self, config: A3QConfig, layer_idx: int) -> None:
        super().__init__()
        hidden, width, roles = config.hidden_size, config.intermediate_size[layer_idx], config.weights
        self.width = width
        self.fused = "gate_up" in config.fused
        self.gated = "gate" in roles
        if self.fused:
            self.gate_up_proj = nn.Linear(hidden, 2 * width, bias="gate_bias" in roles)
        else:
            if self.gated:
                self.gate_proj = nn.Linear(hidden, width, bias="gate_bias" in roles)
            self.up_proj = nn.Linear(hidden, width, bias="up_bias" in roles)
        self.down_proj = nn.Linear(width, hidden, bias="down_bias" in roles)
        self.activation = ACT2FN[_ACTIVATIONS.get(config.hidden_act, config.hidden_act)]

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            gate, up = self.gate_up_proj(x).split(self.width, dim=-1)
            inner = self.activation(gate) * up
        elif self.gated:
            inner = self.activation(self.gate_proj(x)) * self.up_proj(x)
        else:
            inner = self.activation(self.up_proj(x))
        return cast(Tensor, self.down_proj(inner))


class A3QDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, one after the other or side by side, with a norm before or behind each."""

    def __init__(self, config: A3QConfig, layer_idx: int) -> None:
        super().__init__()
        self.parallel = config.parallel_residual
        self.attn_norm = _norm(config, "attn_norm", config.weights)
        self.self_attn = A3QAttention(config, layer_idx)
        self.attn_post_norm = _norm(config, "attn_post_norm", config.weights)
        self.mlp_norm = _norm(config, "mlp_norm", config.weights)
        self.mlp = A3QMLP(config, layer_idx)
        self.mlp_post_norm = _norm(config, "mlp_post_norm", config.weights)

    def forward(
        self,
        hidden_states: Tensor,
        rotation: Rotation | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        attended, _ = self.self_attn(
            self.attn_norm(hidden_states),
            rotation=rotation,
            attention_mask=attention_mask,
            cache=cache,
            **kwargs,
        )
        after = hidden_states + self.attn_post_norm(attended)
        inner = self.mlp(self.mlp_norm(hidden_states if self.parallel else after))
        return cast(Tensor, after + self.mlp_post_norm(inner))


class A3QPreTrainedModel(PreTrainedModel):
    """What all a3q models share."""

    config_class = A3QConfig
    config: A3QConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["A3QDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["cache"]
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {"hidden_states": A3QDecoderLayer, "attentions": A3QAttention}

    def __init__(self, config: A3QConfig, *args: Any, **kwargs: Any) -> None:
        # Its kernels take neither position biases nor values of another size than the keys.
        self._supports_flash_attn = not config.alibi_slopes and config.qk_head_dim == config.v_head_dim
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, A3QRMSNorm) and module.offset:
            init.constant_(module.weight, 1.0 - module.offset)


class A3QModel(A3QPreTrainedModel):
    """The decoder without its output layer."""

    def __init__(self, config: A3QConfig) -> None:
        super().__init__(config)
        self.embed_tokens = A3QScaledEmbedding(config.vocab_size, config.hidden_size, config.embedding_scale)
        self.embed_positions = None
        if "positions" in config.top_weights:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList([A3QDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = _norm(config, "final_norm", config.top_weights)
        self.rotations = _Rotations(config)
        self._slopes: dict[torch.device, Tensor] = {}
        self.gradient_checkpointing = False
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Final, normed hidden states; arguments as for every transformers decoder."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            start = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + start).unsqueeze(0)
        masks = self._masks(inputs_embeds, attention_mask, cache, position_ids)
        hidden_states = inputs_embeds
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(position_ids)
        rotations = self.rotations(hidden_states, position_ids)
        for layer, kind, rotation in zip(self.layers, self.config.layer_types, rotations, strict=True):
            hidden_states = layer(
                hidden_states,
                rotation=rotation,
                attention_mask=masks[kind],
                position_ids=position_ids,
                cache=cache,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), cache=cache)

    def _masks(
        self,
        x: Tensor,
        attention_mask: Tensor | dict[str, Tensor | None] | None,
        cache: Cache | None,
        position_ids: Tensor,
    ) -> dict[str, Tensor | None]:
        """The mask of each type of layer, position biases included."""
        if isinstance(attention_mask, dict):  # prepared by `generate`
            masks = dict(attention_mask)
        else:
            make = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
            masks = {
                kind: make[kind](
                    config=self.config,
                    inputs_embeds=x,
                    attention_mask=attention_mask,
                    cache=cache,
                    position_ids=position_ids,
                )
                for kind in dict.fromkeys(self.config.layer_types)
            }
        if self.config.alibi_slopes:
            masks = {kind: self._biased(kind, mask, x, cache) for kind, mask in masks.items()}
        return masks

    def _biased(self, kind: str, mask: Tensor | None, x: Tensor, cache: Cache | None) -> Tensor:
        """`mask` with ALiBi's biases `[1 or B, heads, T, keys]`; the distance of two tokens knows no padding."""
        length = x.shape[1]
        layer = self.config.layer_types.index(kind)
        start, (keys, offset) = 0, (length, 0)
        if cache is not None:
            start, (keys, offset) = cache.get_seq_length(layer), cache.get_mask_sizes(length, layer)
        queries = torch.arange(length, device=x.device) + start
        distance = queries[:, None] - (torch.arange(keys, device=x.device) + offset)
        if x.device not in self._slopes:
            self._slopes[x.device] = torch.tensor(self.config.alibi_slopes, dtype=torch.float32, device=x.device)
        bias = -self._slopes[x.device][:, None, None] * distance
        # A finite lowest number: a padded query, which sees nothing, must not become NaN.
        lowest = torch.finfo(x.dtype).min
        if mask is None:
            bias = bias.masked_fill(distance < 0, lowest)[None]
        elif mask.dtype == torch.bool:
            bias = bias.masked_fill(~mask, lowest)
        else:
            bias = (bias + mask).clamp(min=lowest)
        # sdpa takes only its own type; written out, the scores may be the finer.
        return bias if self.config._attn_implementation == "eager" else bias.to(x.dtype)


class A3QForCausalLM(A3QPreTrainedModel, GenerationMixin):
    """The decoder with its output layer."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: A3QConfig) -> None:
        super().__init__(config)
        self.model = A3QModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the last `logits_to_keep` positions (0: all), and the loss where there are `labels`."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["A3QForCausalLM", "A3QModel", "A3QPreTrainedModel"]

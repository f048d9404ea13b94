"""The decoder's forward pass as functions on weights by role, so that any head size and frequency list can run.

Checked against transformers and llama.cpp by the tests. Activations are float32 row vectors `[batch, time, hidden]`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from a3q.model import Layer, Model, ModelConfig

Observer = Callable[[str, Tensor], None]
"""Receives `q`, `k` before RoPE (`[B, heads, T, head_dim]`), `o` (`[B, heads, T, head_dim]`) and `m` (`[B, T, F]`)."""

BATCH_BYTES = 256 * 2**20
"""Activation bytes that one batch of sequences may take inside a layer."""


def to_device(layer: Layer, device: torch.device) -> Layer:
    """The same weights on `device`."""
    return {role: weight.to(device) for role, weight in layer.items()}


class Rope:
    """Rotation angles for positions `0 … length`; pair `p` of a head is (`p`, `p + head_dim / 2`)."""

    def __init__(self, frequencies: Sequence[float], length: int, device: torch.device) -> None:
        positions = torch.arange(length, dtype=torch.float64)
        angles = positions[:, None] * torch.tensor(frequencies, dtype=torch.float64)
        self.cos = torch.cos(angles).float().to(device)
        self.sin = torch.sin(angles).float().to(device)

    def window(self, start: int, end: int) -> Rope:
        """The same rotation for positions `start … end` only."""
        part = copy.copy(self)
        part.cos, part.sin = self.cos[start:end], self.sin[start:end]
        return part

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate `[B, heads, T, head_dim]`."""
        re, im = x.chunk(2, dim=-1)
        return torch.cat((re * self.cos - im * self.sin, im * self.cos + re * self.sin), dim=-1)


class KeyValueCache:
    """Keys and values of one layer for up to `capacity` positions, for generation."""

    def __init__(self, config: ModelConfig, batch: int, capacity: int, device: torch.device) -> None:
        heads = config.num_key_value_heads
        self.keys = torch.empty(batch, heads, capacity, config.head_dim, device=device)
        self.values = torch.empty(batch, heads, capacity, config.v_head_dim, device=device)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new positions and return all so far."""
        end = self.length + k.shape[2]
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def attention(
    config: ModelConfig, w: Layer, x: Tensor, rope: Rope, observe: Observer | None, cache: KeyValueCache | None
) -> Tensor:
    """Causal self-attention of normed `x`, output projection included."""
    B, T, _ = x.shape

    def heads(name: str, count: int, size: int) -> Tensor:
        return F.linear(x, w[name], w.get(f"{name}_bias")).view(B, T, count, size).transpose(1, 2)

    q = heads("q", config.num_attention_heads, config.head_dim)
    k = heads("k", config.num_key_value_heads, config.head_dim)
    v = heads("v", config.num_key_value_heads, config.v_head_dim)
    if observe is not None:
        observe("q", q)
        observe("k", k)
    q, k = rope(q), rope(k)
    causal = T > 1
    if cache is not None:
        k, v = cache.append(k, v)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=config.queries_per_group > 1)
    if observe is not None:
        observe("o", o)
    return F.linear(o.transpose(1, 2).reshape(B, T, -1), w["o"], w.get("o_bias"))


def mlp(w: Layer, x: Tensor, observe: Observer | None) -> Tensor:
    """Gated MLP of normed `x`."""
    m = F.silu(F.linear(x, w["gate"], w.get("gate_bias"))) * F.linear(x, w["up"], w.get("up_bias"))
    if observe is not None:
        observe("m", m)
    return F.linear(m, w["down"], w.get("down_bias"))


def block(
    config: ModelConfig,
    w: Layer,
    x: Tensor,
    rope: Rope,
    observe: Observer | None = None,
    cache: KeyValueCache | None = None,
) -> Tensor:
    """One decoder layer, `[B, T, hidden]` to the same shape. A cache may hold earlier positions only when T is 1."""
    x = x + attention(config, w, rms_norm(x, w["attn_norm"], config.rms_norm_eps), rope, observe, cache)
    return x + mlp(w, rms_norm(x, w["mlp_norm"], config.rms_norm_eps), observe)


def batches(config: ModelConfig, count: int, length: int) -> Iterator[slice]:
    """Slices of `count` sequences of `length` tokens such that a layer's widest activations fit `BATCH_BYTES`."""
    per_sequence = 4 * length * (3 * config.intermediate_size + 4 * config.num_attention_heads * config.head_dim)
    size = max(1, BATCH_BYTES // per_sequence)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


@torch.inference_mode()
def run_layer(config: ModelConfig, w: Layer, x: Tensor, rope: Rope, device: torch.device) -> None:
    """Replace the hidden states `x` `[B, T, hidden]`, kept where they are, by this layer's output, batch by batch."""
    for part in batches(config, x.shape[0], x.shape[1]):
        x[part] = block(config, w, x[part].to(device), rope).to(x.device)


@torch.inference_mode()
def hidden_states(
    model: Model, tokens: Tensor, device: torch.device, on_layer: Callable[[], None] | None = None
) -> Tensor:
    """Final, normed hidden states `[B, T, hidden]` (CPU) of `tokens` `[B, T]`; each layer is loaded once."""
    config = model.config
    x = F.embedding(tokens, model.embed)
    rope = Rope(config.frequencies, tokens.shape[1], device)
    for layer in model.layers:
        run_layer(config, to_device(layer, device), x, rope, device)
        if on_layer is not None:
            on_layer()
    return rms_norm(x, model.final_norm, config.rms_norm_eps)


@torch.inference_mode()
def output_logits(model: Model, hidden: Tensor, device: torch.device) -> Tensor:
    """Logits `[..., vocab_size]` (on `device`) of final hidden states `[..., hidden]`."""
    weight = model.embed if model.output is None else model.output
    return F.linear(hidden.to(device), weight.to(device))

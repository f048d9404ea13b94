"""The four small second moments per layer that A3 needs (see `a3q/solve`), gathered in one forward pass.

Written with `R = E[xᵀx]` (`hidden × hidden`), A3 needs large square roots; seen through the old weights, everything it
uses lives in moments of size `head_dim × head_dim` and `intermediate × intermediate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from a3q.forward import Rope, batches, block, to_device
from a3q.model import Layer, Model, ModelConfig
from a3q.store import LayerStore

DISTANCE_SEQUENCES = 16
"""Sequences whose attention is laid open for `distances`; a histogram over so many pairs is exact enough."""


@dataclass(frozen=True)
class LayerStatistics:
    """Uncentred second moments over the calibration tokens, float32 on the CPU."""

    q: Tensor
    """`[heads, head_dim, head_dim]`: E[qᵀq] of each query head before RoPE."""
    k: Tensor
    """`[kv_heads, head_dim, head_dim]`: E[kᵀk] of each key head before RoPE."""
    distances: Tensor
    """`[heads, length]`: share of attention that falls on a key Δ positions back; rows sum to 1."""
    o: Tensor
    """`[heads, head_dim, head_dim]`: E[oᵀo] at the output projection's input."""
    m: Tensor
    """`[intermediate, intermediate]`: E[mᵀm] at the down projection's input."""


def attention_distances(q: Tensor, k: Tensor, rope: Rope) -> Tensor:
    """Attention mass by distance, `[heads, T]`, summed over queries: q `[B, H, T, d]`, k `[B, G, T, d]` before RoPE."""
    B, H, T, d = q.shape
    q, k = rope(q), rope(k).repeat_interleave(H // k.shape[1], dim=1)
    mass = torch.zeros(H, T, device=q.device)
    for b in range(B):
        scores = q[b] @ k[b].transpose(-1, -2) / math.sqrt(d)
        scores.masked_fill_(torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1), -math.inf)
        probabilities = scores.softmax(-1)
        # Flipped along the keys and padded by T zeros a row, the flat array read with rows one shorter lines up the
        # diagonals as columns: column c then holds the distance (c - T + 1) of every query.
        skewed = F.pad(probabilities.flip(-1), (0, T)).flatten(1)[:, : T * (2 * T - 1)].view(H, T, 2 * T - 1)
        by_distance = skewed.sum(1)
        mass += by_distance[:, T - 1 :]
    return mass


class _Moments:
    """Sums of one layer's second moments over batches."""

    def __init__(self, config: ModelConfig, length: int, device: torch.device) -> None:
        d, H, G = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.heads = {name: torch.zeros(n, d, d, device=device) for name, n in (("q", H), ("k", G), ("o", H))}
        self.m = torch.zeros(config.intermediate_size, config.intermediate_size, device=device)
        self.distances = torch.zeros(H, length, device=device)
        self.tokens = 0
        self.sequences = 0

    def observe(self, name: str, x: Tensor) -> None:
        if name == "m":
            rows = x.flatten(0, 1)
            self.m.addmm_(rows.T, rows)
            self.tokens += rows.shape[0]
        else:
            rows = x.transpose(0, 1).flatten(1, 2)
            self.heads[name].baddbmm_(rows.transpose(1, 2), rows)

    def finish(self) -> LayerStatistics:
        def mean(x: Tensor) -> Tensor:
            return (x / self.tokens).cpu()

        distances = (self.distances / self.distances.sum(-1, keepdim=True)).cpu()
        return LayerStatistics(
            mean(self.heads["q"]), mean(self.heads["k"]), distances, mean(self.heads["o"]), mean(self.m)
        )


@torch.inference_mode()
def measure_layer(
    config: ModelConfig, w: Layer, x: Tensor, rope: Rope, device: torch.device, on_tokens: Callable[[int], None]
) -> LayerStatistics:
    """Statistics of one layer over hidden states `x` `[B, T, hidden]`, which are replaced by the layer's output."""
    moments = _Moments(config, x.shape[1], device)
    for part in batches(config, x.shape[0], x.shape[1]):
        seen: dict[str, Tensor] = {}

        def observe(name: str, value: Tensor, seen: dict[str, Tensor] = seen) -> None:
            moments.observe(name, value)
            if name in "qk":
                seen[name] = value

        x[part] = block(config, w, x[part].to(device), rope, observe).to(x.device)
        wanted = min(part.stop, DISTANCE_SEQUENCES) - part.start
        if wanted > 0:
            moments.distances += attention_distances(seen["q"][:wanted], seen["k"][:wanted], rope)
        on_tokens((part.stop - part.start) * x.shape[1])
    return moments.finish()


@torch.inference_mode()
def measure(
    model: Model,
    tokens: Tensor,
    device: torch.device,
    memory_budget: int,
    on_tokens: Callable[[int], None] = lambda _: None,
) -> LayerStore[LayerStatistics]:
    """Statistics of every layer for `tokens` `[B, T]`, layer by layer: one layer's weights are in memory at a time.

    What does not fit `memory_budget` bytes waits on disk. `on_tokens` hears of every batch (tokens × one layer).
    """
    config = model.config
    x = F.embedding(tokens, model.embed)
    rope = Rope(config.frequencies, tokens.shape[1], device)
    store: LayerStore[LayerStatistics] = LayerStore(
        memory_budget, lambda s: dict(vars(s)), lambda tensors: LayerStatistics(**tensors)
    )
    for layer in model.layers:
        store.append(measure_layer(config, to_device(layer, device), x, rope, device, on_tokens))
    return store

"""The small second moments that A3 needs, accumulated over batches of activations.

Written with `R = E[xᵀx]` (`hidden × hidden`), A3 needs large square roots. Seen through the old weights, everything it
uses lives in moments of size `head_dim × head_dim` and `intermediate × intermediate`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from a3q.forward import rope, score_bias
from a3q.model import LayerShape, ModelConfig

DISTANCE_SEQUENCES = 16
"""Sequences whose attention is laid open for the distances; a histogram over so many pairs is exact enough."""


class Moment:
    """Running `E[xᵀy]` over rows: x `[…, rows, n]`, y `[…, rows, k]` to `[…, n, k]`, float32 on the rows' device."""

    def __init__(self, *shape: int, device: torch.device) -> None:
        self.total = torch.zeros(shape, device=device)
        self.rows = 0

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Take in more rows; y is x unless given."""
        self.total += x.mT @ (x if y is None else y)
        self.rows += x.shape[-2]

    def mean(self) -> Tensor:
        """The moment so far."""
        return self.total / max(1, self.rows)


class AttentionStatistics:
    """What QK and OV need of one layer; an observer of `a3q.forward.attention`."""

    def __init__(self, config: ModelConfig, shape: LayerShape, length: int, device: torch.device) -> None:
        H, G, d = config.num_attention_heads, config.num_key_value_heads, shape.qk_head_dim
        self.q = Moment(H, d, d, device=device)
        """E[qᵀq] of each query head before RoPE."""
        self.k = Moment(G, d, d, device=device)
        """E[kᵀk] of each key head before RoPE."""
        self.o = Moment(H, shape.v_head_dim, shape.v_head_dim, device=device)
        """E[oᵀo] at the output projection's input, each head's slice."""
        self.v = Moment(G, shape.v_head_dim, shape.v_head_dim, device=device)
        """E[vᵀv] of each value head."""
        self._mass = torch.zeros(H, length, device=device)
        self._config, self._shape = config, shape
        self._left = DISTANCE_SEQUENCES if shape.pairs else 0
        self._query: Tensor | None = None

    def __call__(self, name: str, x: Tensor) -> None:
        """Take in `q`, `k`, `v` or `o` of a batch, `[B, heads, T, size]`."""
        getattr(self, name).add(x.transpose(0, 1).flatten(1, 2))
        if name == "q":
            self._query = x
        elif name == "k" and self._query is not None and self._left > 0:
            q, k = self._query[: self._left], x[: self._left]
            self._mass += attention_distances(self._config, self._shape, q, k)
            self._left -= x.shape[0]

    def distances(self) -> Tensor:
        """`[heads, T]`: share of attention that falls on a key Δ positions back; rows sum to 1."""
        return self._mass / self._mass.sum(-1, keepdim=True)


def attention_distances(config: ModelConfig, shape: LayerShape, q: Tensor, k: Tensor) -> Tensor:
    """Attention mass by distance, `[H, T]`, summed over queries: q `[B, H, T, d]`, k `[B, G, T, d]` before RoPE."""
    B, H, T, d = q.shape
    turn = rope(shape.frequencies, T, q.device)
    q, k = turn(q), turn(k).repeat_interleave(H // k.shape[1], dim=1)
    bias = score_bias(config, shape, 0, T, q.device)
    if bias is None:
        bias = torch.zeros(T, T, device=q.device).masked_fill_(
            torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1), -math.inf
        )
    mass = torch.zeros(H, T, device=q.device)
    for b in range(B):
        scores = q[b] @ k[b].mT / math.sqrt(d)
        probabilities = scores.add_(bias).softmax(-1)
        # Flipped along the keys and padded by T zeros a row, the flat array read with rows one shorter lines up the
        # diagonals as columns: column c then holds distance c - (T - 1) of every query.
        skewed = F.pad(probabilities.flip(-1), (0, T)).flatten(1)[:, : T * (2 * T - 1)].view(H, T, 2 * T - 1)
        mass += skewed.sum(1)[:, T - 1 :]
    return mass

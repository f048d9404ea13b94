"""What the methods that remove inner dimensions share: sizes at equal weights, and taking RoPE pairs out of heads."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from a3q.model import Layer, LayerShape, ModelConfig
from benchmarks.rivals.rival import matrix_parameters


@dataclass(frozen=True)
class Sizes:
    """Inner dimensions that a layer keeps."""

    pairs: int
    values: int
    units: int

    @classmethod
    def at(cls, config: ModelConfig, shape: LayerShape, ratio: float) -> Sizes:
        """The same share of each; heads have few dimensions, so the MLP takes up what their rounding leaves over."""
        keep = 1 - ratio
        pairs, values = max(1, round(keep * shape.pairs)), max(1, round(keep * shape.v_head_dim))
        attention = dataclasses.replace(shape, qk_head_dim=2 * pairs, v_head_dim=values, intermediate_size=0)
        left = keep * matrix_parameters(config, shape) - matrix_parameters(config, attention)
        units = round(left / (3 * config.hidden_size))
        return cls(pairs, values, min(max(1, units), shape.intermediate_size))

    def shape(self, old: LayerShape, pairs: Tensor) -> LayerShape:
        """The new layer's shape, each key head with the frequencies of its own `pairs` `[G, r]`."""
        (frequencies,) = old.frequencies
        kept = tuple(tuple(frequencies[i] for i in row) for row in pairs.tolist())
        # One list says the same where nothing was chosen, and runs faster.
        lists = kept if self.pairs < old.pairs else old.frequencies
        return LayerShape(2 * self.pairs, self.values, self.units, lists, old.sliding_window)


def top(scores: Tensor, count: int) -> Tensor:
    """Indices of the largest of the last dimension, in ascending order."""
    return scores.topk(count).indices.sort().values


def pair_sums(config: ModelConfig, q_rows: Tensor, k_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over each pair's two rows, `[G, m]`, a group's query heads together; arguments `[H · d]` and `[G · d]`."""
    G = config.num_key_value_heads
    q = q_rows.view(G, config.queries_per_group, 2, -1).sum((1, 2))
    return q, k_rows.view(G, 2, -1).sum(1)


def take_pairs(config: ModelConfig, shape: LayerShape, w: Layer, pairs: Tensor) -> None:
    """Leave only `pairs` `[G, r]` in q and k, in place; q is scaled, as scores are divided by the new size's root."""
    rows = torch.cat((pairs, pairs + shape.pairs), dim=-1)
    scale = math.sqrt(rows.shape[-1] / shape.qk_head_dim)
    for role, kept in (("q", rows.repeat_interleave(config.queries_per_group, dim=0)), ("k", rows)):
        heads = w[role].view(len(kept), shape.qk_head_dim, -1)
        taken = heads.gather(1, kept[:, :, None].expand(-1, -1, heads.shape[-1]))
        w[role] = (taken * scale if role == "q" else taken).flatten(0, 1)


def o_by_group(config: ModelConfig, w: Layer) -> Tensor:
    """The output projection as `[G, v_head_dim, queries_per_group · hidden]`: a value head's readers side by side."""
    hidden = w["o"].shape[0]
    heads = w["o"].view(hidden, config.num_key_value_heads, config.queries_per_group, -1)
    return heads.permute(1, 3, 2, 0).flatten(2)


def o_from_groups(config: ModelConfig, grouped: Tensor) -> Tensor:
    """Inverse of `o_by_group`, for any number of inner dimensions."""
    G, r, _ = grouped.shape
    heads = grouped.view(G, r, config.queries_per_group, -1)
    return heads.permute(3, 0, 2, 1).flatten(1).contiguous()

"""Structured pruning: the inner dimensions with the smallest scores go, nothing is refitted.

`magnitude` scores by the L2 norm of all weights of a dimension, as LLM-Pruner's data-free variant does (arXiv
2305.11627, its L2 importance, applied to the dimensions that A3 reduces). `wanda_structured` scores by Wanda's
`|W_ij| · ‖x_j‖` (arXiv 2306.11695) summed over a dimension's weights, as in the Wanda-sp baseline of FLAP (arXiv
2312.11983). Every layer and every head keeps the same number.

Counted are the smaller matrices themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from a3q.forward import to_device
from a3q.model import Layer, Model
from benchmarks.rivals.activations import layers_with_moments
from benchmarks.rivals.rival import Rival, layer_parameters, require_llama
from benchmarks.rivals.structure import Sizes, o_by_group, o_from_groups, pair_sums, take_pairs, top

Scores = tuple[Tensor, Tensor, Tensor]
"""Of RoPE pairs `[G, m]`, value dimensions `[G, v_head_dim]` and units `[intermediate]`."""


@torch.inference_mode()
def magnitude(model: Model, tokens: Tensor, ratio: float, device: torch.device) -> Rival:
    """L2 norms of weights; the tokens are not used. Parameters: the smaller matrices."""
    require_llama(model, ratio)

    def scored() -> Iterator[tuple[Layer, Scores]]:
        for layer in model.layers:
            w = to_device(layer, device)
            q, k = pair_sums(model.config, w["q"].square().sum(1), w["k"].square().sum(1))
            o = o_by_group(model.config, w).square().sum(-1)
            units = w["gate"].square().sum(1) + w["up"].square().sum(1) + w["down"].square().sum(0)
            yield w, (q + k, w["v"].square().sum(1).view(o.shape) + o, units)

    return _prune(model, ratio, scored())


@torch.inference_mode()
def wanda_structured(model: Model, tokens: Tensor, ratio: float, device: torch.device) -> Rival:
    """Weights times the norm of what they read; o and down alone score values and units. Parameters: as `magnitude`."""
    require_llama(model, ratio)
    config = model.config

    def scored() -> Iterator[tuple[Layer, Scores]]:
        for shape, w, moments in layers_with_moments(model, tokens, device):
            norms = {role: moments.of(role).diagonal().sqrt() for role in ("q", "k", "o", "down")}
            q, k = pair_sums(config, *((w[role].abs() * norms[role]).sum(1) for role in "qk"))
            o = (w["o"].abs() * norms["o"]).sum(0).view(config.num_key_value_heads, -1, shape.v_head_dim).sum(1)
            yield w, (q + k, o, (w["down"].abs() * norms["down"]).sum(0))

    return _prune(model, ratio, scored())


def _prune(model: Model, ratio: float, scored: Iterable[tuple[Layer, Scores]]) -> Rival:
    config, layers, shapes = model.config, [], []
    for shape, (w, (pair_scores, value_scores, unit_scores)) in zip(config.layers, scored, strict=True):
        sizes, new = Sizes.at(config, shape, ratio), dict(w)
        pairs, values, units = (
            top(scores, size)
            for scores, size in zip((pair_scores, value_scores, unit_scores), vars(sizes).values(), strict=True)
        )
        take_pairs(config, shape, new, pairs)
        heads = torch.arange(config.num_key_value_heads, device=values.device)[:, None]
        new["v"] = w["v"].view(len(heads), shape.v_head_dim, -1)[heads, values].flatten(0, 1)
        new["o"] = o_from_groups(config, o_by_group(config, w)[heads, values])
        new |= {"gate": w["gate"][units], "up": w["up"][units], "down": w["down"][:, units].contiguous()}
        layers.append(to_device(new, model.embed.device))
        shapes.append(sizes.shape(shape, pairs))
    smaller = dataclasses.replace(config, layers=tuple(shapes))
    return Rival(dataclasses.replace(model, config=smaller, layers=layers), layer_parameters(smaller))

"""Models as A3 leaves them: other inner dimensions in every layer, with random weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from a3q.model import Layer, LayerShape, Model


def reduced(model: Model, seed: int = 0) -> Model:
    """`model` with smaller layers, no two alike: keys and values of different sizes, frequencies for each key head."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    shapes = []
    for i, shape in enumerate(config.layers):
        pairs = max(shape.pairs - 2 - i, 0)
        rest = min(shape.qk_head_dim - 2 * shape.pairs, 2)
        lists = tuple(
            tuple(shape.frequencies[0][j] for j in torch.randperm(shape.pairs, generator=generator)[:pairs].tolist())
            for _ in range(config.num_key_value_heads if shape.pairs else 0)
        )
        qk = 2 * pairs + rest if shape.pairs else shape.qk_head_dim - 3 - i
        v, width = shape.v_head_dim - 6 + 3 * i, shape.intermediate_size - 20 - 7 * i
        shapes.append(LayerShape(qk, v, width, lists, shape.sliding_window))
    # With pairs of its own, each head has norm weights of its own.
    config = replace(config, layers=tuple(shapes), qk_norm="heads" if config.qk_norm == "head" else config.qk_norm)

    def layer(shape: LayerShape) -> Layer:
        roles = [role for role in model.family.layer if role.name in model.layer_roles]
        w = {role.name: 0.15 * torch.randn(role.expected_shape(config, shape), generator=generator) for role in roles}
        return {role: weight + 1.0 if role.endswith("norm") else weight for role, weight in w.items()}

    return replace(model, config=config, layers=[layer(shape) for shape in shapes])

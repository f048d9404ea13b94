"""A model that healing can mend, and text for it."""

from __future__ import annotations

from dataclasses import replace

import torch

from a3q.model import Layer, Model
from a3q.reduce import reduce
from a3q.reduce_layer import Dimensions
from tests.pico import VOCAB

CPU = torch.device("cpu")
LENGTH = 32
TEXT = torch.randint(VOCAB, (520, LENGTH), generator=torch.Generator().manual_seed(0))


def with_damage(original: Model) -> Model:
    """With half of each MLP, and damage that more text can mend: of a random model, a reduction leaves little."""
    sizes = [
        Dimensions(shape.qk_head_dim, shape.v_head_dim, shape.intermediate_size // 2)
        for shape in original.config.layers
    ]
    found = reduce(original, TEXT[:32], sizes, CPU, 1 << 30).model
    generator = torch.Generator().manual_seed(1)

    def damaged(layer: Layer) -> Layer:
        factors = {
            role: 1 + 0.3 * torch.randn(w.shape, generator=generator) for role, w in layer.items() if w.dim() == 2
        }
        return {role: weight * factors.get(role, 1) for role, weight in layer.items()}

    return replace(found, layers=[damaged(layer) for layer in found.layers])

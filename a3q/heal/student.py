"""What is trained of a reduced model, and the weights that its forward pass takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from a3q.forward import lowered
from a3q.model import Layer, Model
from a3q.reduce_layer import MLP

ATTENTION = ("q", "k", "v", "o")


def trained_roles(roles: Sequence[str], attention_only: bool = False) -> list[str]:
    """Of a layer's roles those that are trained: matrices and their biases.

    A norm's weight can be a part of the matrices that read what it gives, so that nothing is lost by leaving it.
    """
    matrices = ATTENTION if attention_only else ATTENTION + MLP
    return [role for role in roles if role.removesuffix("_bias") in matrices]


class Student(Protocol):
    """A model in training, on one device."""

    model: Model
    """As it was reduced; dimensions, and what is not trained."""

    def parameters(self) -> list[Tensor]:
        """What gradients are taken by, float32, in an order that stays."""
        ...

    def layer(self, index: int) -> Layer:
        """Weights of a layer for the forward pass, which gradients pass through."""
        ...

    def finished(self, index: int) -> Layer:
        """Weights of a layer as they are now, float32, without gradients."""
        ...


class FullStudent:
    """All weights of the layers are trained: float32 masters, rounded to `dtype` for the forward pass."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype, attention_only: bool = False) -> None:
        self.model, self._dtype = model, dtype
        self._layers: list[Layer] = []
        self._trained: list[Tensor] = []
        for source in model.layers:
            layer = {role: weight.to(device, torch.float32, copy=True) for role, weight in source.items()}
            # Processes may have them in another order.
            for role in sorted(trained_roles(list(layer), attention_only)):
                self._trained.append(layer[role].requires_grad_())
            self._layers.append(layer)

    def parameters(self) -> list[Tensor]:
        """See `Student`."""
        return self._trained

    def layer(self, index: int) -> Layer:
        """See `Student`."""
        return lowered(self._layers[index], self._dtype)

    def finished(self, index: int) -> Layer:
        """See `Student`."""
        return {role: weight.detach() for role, weight in self._layers[index].items()}

"""Hidden states of the calibration tokens on their way through the layers of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from a3q.forward import attention, mlp, norm
from a3q.model import Layer, LayerShape, ModelConfig


@dataclass
class Stream:
    """Hidden states `x` `[B, T, hidden]`, kept where there is room for them; `device` computes."""

    config: ModelConfig
    x: Tensor
    device: torch.device
    entry: Tensor | None = None
    """What the layer began with, where its MLP reads that."""

    def begin_layer(self) -> None:
        """Remember the layer's input if its MLP will need it."""
        self.entry = self.x.clone() if self.config.parallel_residual else None

    def part(self, part: slice) -> Tensor:
        """Some of the sequences, on the device."""
        return self.x[part].to(self.device)

    def add(self, part: slice, w: Layer, post_norm: str, y: Tensor) -> None:
        """Add a component's output to the residual, through the norm behind the component if there is one."""
        self.x[part] += norm(self.config, w, post_norm, y).to(self.x.device)

    def attention_input(self, w: Layer, part: slice) -> Tensor:
        """What a layer's attention reads for some sequences."""
        return norm(self.config, w, "attn_norm", self.part(part))

    def mlp_input(self, w: Layer, part: slice) -> Tensor:
        """What a layer's MLP reads for some sequences."""
        x = self.part(part) if self.entry is None else self.entry[part].to(self.device)
        return norm(self.config, w, "mlp_norm", x)

    def attention(
        self, shape: LayerShape, w: Layer, part: slice, observe: Callable[[str, Tensor], None] | None = None
    ) -> Tensor:
        """Output of a layer's attention for some sequences."""
        return attention(self.config, shape, w, self.attention_input(w, part), observe)

    def mlp(self, w: Layer, part: slice, observe: Callable[[str, Tensor], None] | None = None) -> Tensor:
        """Output of a layer's MLP for some sequences."""
        return mlp(self.config, w, self.mlp_input(w, part), observe)

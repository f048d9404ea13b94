"""Hidden states of the calibration tokens on their way through the layers of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from a3q.forward import attention_inner, mlp_inner, mlp_output, norm, project
from a3q.model import Layer, LayerShape, ModelConfig


@dataclass
class Stream:
    """Hidden states `x` `[B, T, hidden]` float32, kept where there is room for them; `device` computes.

    Components compute in the type of the matrices that they are given, see `a3q.forward.lowered`.
    """

    config: ModelConfig
    x: Tensor
    device: torch.device
    entry: Tensor | None = None
    """Room for what the layer began with, where its MLP reads that."""

    def begin_layer(self) -> None:
        """Remember the layer's input if its MLP will need it."""
        if self.config.parallel_residual:
            self.entry = torch.empty_like(self.x) if self.entry is None else self.entry
            self.entry.copy_(self.x)

    def some(self, rows: slice) -> Stream:
        """Some of the sequences, in the same memory."""
        return replace(self, x=self.x[rows], entry=None if self.entry is None else self.entry[rows])

    def part(self, part: slice) -> Tensor:
        """Some of the sequences, on the device."""
        return self.x[part].to(self.device)

    def after(self, w: Layer, post_norm: str, y: Tensor) -> Tensor:
        """What a component's output `y` adds to the residual: it passes the norm behind the component, if any."""
        return norm(self.config, w, post_norm, y).float()

    def add(self, part: slice, w: Layer, post_norm: str, y: Tensor) -> None:
        """Add a component's output to the residual."""
        self.x[part] += self.after(w, post_norm, y).to(self.x.device)

    def attention_input(self, w: Layer, part: slice) -> Tensor:
        """What a layer's attention reads for some sequences."""
        return norm(self.config, w, "attn_norm", self.part(part))

    def mlp_input(self, w: Layer, part: slice) -> Tensor:
        """What a layer's MLP reads for some sequences."""
        x = self.part(part) if self.entry is None else self.entry[part].to(self.device)
        return norm(self.config, w, "mlp_norm", x)

    def attention_inner(
        self, shape: LayerShape, w: Layer, part: slice, observe: Callable[[str, Tensor], None] | None = None
    ) -> Tensor:
        """What the output projection of a layer's attention reads for some sequences."""
        return attention_inner(self.config, shape, w, self.attention_input(w, part), observe)

    def attention(
        self, shape: LayerShape, w: Layer, part: slice, observe: Callable[[str, Tensor], None] | None = None
    ) -> Tensor:
        """Output of a layer's attention for some sequences."""
        return project(w, self.attention_inner(shape, w, part, observe))

    def mlp_inner(self, w: Layer, part: slice) -> Tensor:
        """What the down projection of a layer's MLP reads for some sequences."""
        return mlp_inner(self.config, w, self.mlp_input(w, part))

    def mlp(self, w: Layer, part: slice) -> Tensor:
        """Output of a layer's MLP for some sequences."""
        return mlp_output(w, self.mlp_inner(w, part))

    def pass_attention(self, shape: LayerShape, w: Layer, part: slice) -> None:
        """Move some sequences on through a layer's attention."""
        self.add(part, w, "attn_post_norm", self.attention(shape, w, part))

    def pass_mlp(self, w: Layer, part: slice) -> None:
        """Move some sequences on through a layer's MLP."""
        self.add(part, w, "mlp_post_norm", self.mlp(w, part))

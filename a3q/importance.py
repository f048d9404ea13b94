"""How strongly each input of each matrix is used on calibration text: what llama.cpp calls an importance matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from a3q.batching import batches
from a3q.errors import InputError
from a3q.forward import block, embed, norm, to_device
from a3q.model import Layer, LayerShape, Model, ModelConfig

_READERS = {"attn_in": ("q", "k", "v"), "o": ("o",), "mlp_in": ("gate", "up"), "m": ("down",)}
"""Which matrices read what an observer of the forward pass sees."""


@dataclass(frozen=True)
class Importance:
    """Mean squares of the inputs of a model's matrices, float32 `[in_features]` on the CPU."""

    layers: Sequence[Mapping[str, Tensor]]
    """Of each layer by role; roles that read the same inputs share one tensor."""
    top: Mapping[str, Tensor]
    """Of `output`, whether it has weights of its own or the embedding's."""
    windows: tuple[int, int]
    """Number and length of the token windows."""

    @property
    def tokens(self) -> int:
        """Over how many tokens the means are."""
        return self.windows[0] * self.windows[1]


@torch.inference_mode()
def measure(
    model: Model, tokens: Tensor, device: torch.device, on_layer: Callable[[], None] = lambda: None
) -> Importance:
    """Importances on `tokens` int64 `[B, T]`; one layer at a time is loaded.

    InputError where a layer's inputs are not finite.
    """
    config = model.config
    B, T = tokens.shape
    x = embed(model, tokens)
    layers = []
    for i, (shape, w) in enumerate(zip(config.layers, model.layers, strict=True)):
        sums = _through_layer(config, shape, to_device(w, device), x, device)
        means = {name: _mean(total, B * T, f"{model.source.path}: layer {i}") for name, total in sums.items()}
        layers.append({role: means[name] for name, roles in _READERS.items() for role in roles if role in w})
        on_layer()
    squares = [_squares(norm(config, model.top, "final_norm", x[part])) for part in batches(config, B, T)]
    output = _mean(torch.stack(squares).sum(0), B * T, f"{model.source.path}: output")
    return Importance(layers, {"output": output}, (B, T))


def _through_layer(
    config: ModelConfig, shape: LayerShape, w: Layer, x: Tensor, device: torch.device
) -> dict[str, Tensor]:
    """Sums of squares of a layer's inputs on hidden states `x` `[B, T, hidden]`, which move on through it."""
    sums: dict[str, Tensor] = {}

    def observe(name: str, inputs: Tensor) -> None:
        if name in _READERS:
            rows = inputs.transpose(1, 2).flatten(2) if name == "o" else inputs
            sums[name] = sums.get(name, 0.0) + _squares(rows)

    for part in batches(config, x.shape[0], x.shape[1]):
        x[part] = block(config, shape, w, x[part].to(device), observe=observe).to(x.device)
    return sums


def _squares(inputs: Tensor) -> Tensor:
    """Sum of squares over the rows, float64 `[n]`: in float32 the later rows would be rounded away."""
    return inputs.flatten(0, -2).square().sum(0, dtype=torch.float64)


def _mean(total: Tensor, rows: int, where: str) -> Tensor:
    mean = (total / rows).float().cpu()
    if not bool(torch.isfinite(mean).all()):
        raise InputError(f"{where}: the inputs on the calibration text hold values that are no numbers (NaN, infinite)")
    return mean

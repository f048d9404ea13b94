"""Second moments of what each matrix of a llama-like layer reads, in one pass over the calibration tokens.

One layer's moments exist at a time. The hidden states of all tokens stay on the device: benchmarks run small models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from a3q.batching import batches
from a3q.forward import attention, embed, mlp, norm, to_device
from a3q.model import Layer, LayerShape, Model, ModelConfig
from a3q.statistics import Moment


@dataclass(frozen=True)
class Moments:
    """E[xᵀx] of the inputs of a layer's matrices, float32 on the device."""

    attn: Tensor
    """`[hidden, hidden]`: of q, k and v."""
    attended: Tensor
    """`[heads · v_head_dim, …]`: of o."""
    mlp: Tensor
    """`[hidden, hidden]`: of gate and up."""
    units: Tensor
    """`[intermediate, intermediate]`: of down."""
    influence: float
    """Block influence, 1 − E[cos(x, y)] of the layer's input and output (ShortGPT, arXiv 2403.03853)."""

    def of(self, role: str) -> Tensor:
        """Moment of the input of the matrix called `role`."""
        return {"o": self.attended, "down": self.units, "gate": self.mlp, "up": self.mlp}.get(role, self.attn)


@torch.inference_mode()
def measure(config: ModelConfig, shape: LayerShape, w: Layer, x: Tensor, *, advance: bool = True) -> Moments:
    """Moments of one layer on hidden states `x` `[B, T, hidden]`, which then become its output if `advance`."""
    attended = config.num_attention_heads * shape.v_head_dim
    widths = (config.hidden_size, attended, config.hidden_size, shape.intermediate_size)
    moments = [Moment(width, width, device=x.device) for width in widths]
    cosine = 0.0
    for part in batches(config, x.shape[0], x.shape[1]):
        seen: dict[str, Tensor] = {}
        to_attention = norm(config, w, "attn_norm", x[part])
        y = x[part] + attention(config, shape, w, to_attention, seen.__setitem__)
        to_mlp = norm(config, w, "mlp_norm", y)
        y = y + mlp(config, w, to_mlp, seen.__setitem__)
        inputs = (to_attention, seen["o"].transpose(1, 2).flatten(2), to_mlp, seen["m"])
        for moment, rows in zip(moments, inputs, strict=True):
            moment.add(rows.flatten(0, 1))
        cosine += float(F.cosine_similarity(x[part], y, dim=-1).sum())
        if advance:
            x[part] = y
    attn, o, inner, units = (moment.mean() for moment in moments)
    return Moments(attn, o, inner, units, 1 - cosine / (x.shape[0] * x.shape[1]))


@torch.inference_mode()
def start(model: Model, tokens: Tensor, device: torch.device) -> Tensor:
    """Embedded tokens on the device, a copy that may be written to."""
    return embed(model, tokens).to(device, copy=True)


def layers_with_moments(
    model: Model, tokens: Tensor, device: torch.device
) -> Iterator[tuple[LayerShape, Layer, Moments]]:
    """Each layer's shape, its weights on the device, and the moments that the original model gives it."""
    x = start(model, tokens, device)
    for shape, layer in zip(model.config.layers, model.layers, strict=True):
        w = to_device(layer, device)
        yield shape, w, measure(model.config, shape, w, x)

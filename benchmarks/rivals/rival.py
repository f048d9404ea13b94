"""What every rival method returns, and how the weights that it would store are counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from a3q.forward import hidden_states
from a3q.model import LayerShape, Model, ModelConfig

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
"""The layer weights that the methods reduce and that are counted; norms, embedding and output stay as they are."""


@dataclass(frozen=True)
class Rival:
    """A model reduced by a published method, in a form that can be evaluated."""

    model: Model
    """Runs in `a3q.forward`; where the method stores less than these dense weights, they are its factors multiplied
    out. SliceGPT's is the original, see `run`."""
    parameters: int
    """Weights that the method stores for the seven matrices of every layer, its own additions included."""
    run: Callable[[Tensor, torch.device], Tensor] | None = None
    """Replaces the forward pass of `model` where the method changes more than the layers' weights."""

    def hidden(self, tokens: Tensor, device: torch.device) -> Tensor:
        """Final, normed hidden states `[B, T, hidden]` (CPU) of `tokens` `[B, T]`, for the original's output matrix."""
        return hidden_states(self.model, tokens, device) if self.run is None else self.run(tokens, device)


def matrix_parameters(config: ModelConfig, shape: LayerShape) -> int:
    """Weights of one layer's seven matrices."""
    heads = config.num_attention_heads + config.num_key_value_heads
    inner = heads * (shape.qk_head_dim + shape.v_head_dim) + 3 * shape.intermediate_size
    return config.hidden_size * inner


def layer_parameters(config: ModelConfig) -> int:
    """Weights of the seven matrices of all layers."""
    return sum(matrix_parameters(config, shape) for shape in config.layers)


def require_llama(model: Model, ratio: float) -> None:
    """The rivals are written for llama's layers alone: RMS norm in front, gated MLP, full RoPE, no biases."""
    config = model.config
    plain = config.norm == "rms" and config.qk_norm is None and not config.parallel_residual
    rotated = all(2 * shape.pairs == shape.qk_head_dim and len(shape.frequencies) == 1 for shape in config.layers)
    expected = {*MATRICES, "attn_norm", "mlp_norm"}
    if not plain or not rotated or model.layer_roles != expected:
        raise ValueError(f"{model.family.name}: the rivals are written for llama's layers without biases")
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio {ratio}: give the share of the layers' weights to remove, from 0 to below 1")

"""SliceGPT: compress large language models by deleting rows and columns, arXiv 2401.15024.

In front of every block (attention, MLP, output head) the residual stream is rotated to its principal axes Q and cut to
its first k; the weights around absorb `Q[:, :k]`, and the residual connection gets an adapter
`Q_{l-1}[:, :k]ᵀ Q_l[:, :k]`. RMS norm commutes with the rotation and divides by the root of the *old* size. Written in
the old axes, all this is the original model with its residual stream projected, `x → x Q_k Q_kᵀ`, in front of each
block, and so it is run here.

As in the authors' code, Q comes from the stream itself in front of the block's norm, each block's with the blocks
before it already sliced. Embedding and head are cut to the same k, as in the paper.

Counted are the layers' matrices at hidden size k and two k × k adapters a layer; embedding and output, which shrink
too, are not. Without slicing there is nothing to adapt, and nothing is counted for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from a3q.batching import batches
from a3q.forward import attention, mlp, norm, to_device
from a3q.model import Layer, LayerShape, Model, ModelConfig
from a3q.statistics import Moment
from benchmarks.rivals.activations import start
from benchmarks.rivals.rival import Rival, layer_parameters, require_llama


def kept_dimensions(config: ModelConfig, ratio: float) -> int:
    """k for which `k · P / hidden + 2 L k²` is `(1 − ratio) P`, with P the weights of all layers' matrices."""
    P, adapters = layer_parameters(config), 2 * config.num_hidden_layers
    linear = P / config.hidden_size
    k = (math.sqrt(linear**2 + 4 * adapters * (1 - ratio) * P) - linear) / (2 * adapters)
    return min(config.hidden_size, max(1, round(k)))


@torch.inference_mode()
def slicegpt(model: Model, tokens: Tensor, ratio: float, device: torch.device) -> Rival:
    """The same number of dimensions everywhere. Parameters: see the module's docstring."""
    require_llama(model, ratio)
    config = model.config
    if ratio == 0:
        return Rival(model, layer_parameters(config))
    k = kept_dimensions(config, ratio)
    axes: list[Tensor] = []

    def learn(x: Tensor) -> None:
        moment = Moment(config.hidden_size, config.hidden_size, device=device)
        for part in batches(config, x.shape[0], x.shape[1]):
            moment.add(x[part].flatten(0, 1))
        axes.append(torch.linalg.eigh(moment.mean().double()).eigenvectors[:, -k:].float())
        _project(config, x, axes[-1])

    _run(model, tokens, device, learn)
    parameters = layer_parameters(config) * k // config.hidden_size + 2 * config.num_hidden_layers * k * k
    return Rival(model, parameters, partial(sliced_hidden_states, model, axes))


def sliced_hidden_states(model: Model, axes: Sequence[Tensor], tokens: Tensor, device: torch.device) -> Tensor:
    """Final, normed hidden states `[B, T, hidden]` (CPU); `axes` `[hidden, k]` of every block, the head last."""
    rest = iter(axes)
    return _run(model, tokens, device, lambda x: _project(model.config, x, next(rest).to(device)))


def _project(config: ModelConfig, x: Tensor, Q: Tensor) -> None:
    for part in batches(config, x.shape[0], x.shape[1]):
        x[part] = x[part] @ Q @ Q.T


@torch.inference_mode()
def _run(model: Model, tokens: Tensor, device: torch.device, before_block: Callable[[Tensor], None]) -> Tensor:
    """The forward pass with `before_block` changing the hidden states in place."""
    config = model.config
    x = start(model, tokens, device)
    for shape, layer in zip(config.layers, model.layers, strict=True):
        w = to_device(layer, device)
        for block in (_attention, _mlp):
            before_block(x)
            for part in batches(config, x.shape[0], x.shape[1]):
                x[part] += block(config, shape, w, x[part])
    before_block(x)
    return norm(config, model.top, "final_norm", x.cpu())


def _attention(config: ModelConfig, shape: LayerShape, w: Layer, x: Tensor) -> Tensor:
    return attention(config, shape, w, norm(config, w, "attn_norm", x))


def _mlp(config: ModelConfig, shape: LayerShape, w: Layer, x: Tensor) -> Tensor:
    return mlp(config, w, norm(config, w, "mlp_norm", x))

"""Text that a model writes itself, for calibration without data: A3 needs activations, not labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from a3q.forward import KeyValueCache, block, compute_dtype, embed, lowered, norm, output_logits, to_device
from a3q.model import Model

_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Without cuDNN, which plans anew for every length: 10 ms a layer and token on an H200, of which the rest of the layer
takes 0.7."""


def pick(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """Sample one token id a row from logits `[B, vocab]`, the tail beyond probability mass `top_p` left out."""
    probabilities = F.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered > top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
    # By the inverse of the distribution function: one random number a row, where a race of all tokens needs as many as
    # there are tokens, which took half as long as the model itself.
    reached = probabilities.cumsum(-1, dtype=torch.float64)
    drawn = torch.rand(len(reached), 1, dtype=torch.float64, device=reached.device, generator=generator)
    found: Tensor = torch.searchsorted(reached, drawn * reached[:, -1:], right=True).squeeze(-1)
    return found.clamp_max(reached.shape[-1] - 1)


@torch.inference_mode()
def sample(
    model: Model,
    prompts: Tensor,
    length: int,
    *,
    temperature: float,
    top_p: float,
    seed: int,
    device: torch.device,
    on_tokens: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Continue `prompts` `[B, P]` to `[B, length]` token ids (CPU). All layers are held in memory meanwhile."""
    config = model.config
    B, P = prompts.shape
    dtype = compute_dtype(device, config.hidden_size)
    layers = [lowered(to_device(layer, device), dtype) for layer in model.layers]
    caches = [KeyValueCache(config, shape, B, length, device, dtype) for shape in config.layers]
    model = replace(model, top=to_device(model.top, device))
    generator = torch.Generator(device).manual_seed(seed)
    ids = torch.empty(B, length, dtype=torch.int64, device=device)
    ids[:, :P] = prompts.to(device)
    start, end = 0, P
    while True:
        x = embed(model, ids[:, start:end], start)
        with sdpa_kernel(_KERNELS):
            for shape, w, cache in zip(config.layers, layers, caches, strict=True):
                x = block(config, shape, w, x, cache)
        on_tokens((end - start) * B)
        if end == length:
            return ids.cpu()
        logits = output_logits(model, norm(config, model.top, "final_norm", x[:, -1]), device)
        ids[:, end] = pick(logits, temperature, top_p, generator)
        start, end = end, end + 1

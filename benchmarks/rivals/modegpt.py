"""MoDeGPT: modular decomposition for large language model compression, arXiv 2408.09632.

Three pairs of matrices, each reduced in its inner dimension with the moments `C = E[xᵀx]` of the original activations:

Type I, MLP (Nyström): ridge leverage scores `s_i = [C_m (C_m + λI)⁻¹]_ii` of the inputs of down choose the units S, and
`W_down' = W_down C_m[:,S] C_m[S,S]⁻¹`.

Type II, query and key (CR decomposition): `s_p = ‖C_q^{1/2}[:,p]‖ · ‖C_k^{1/2}[:,p]‖`, the largest stay. With RoPE, p
is a pair of rows; with grouped queries, `C_q` is the sum over the query heads of a key head. Each key head keeps pairs
of its own.

Type III, value and output: `C^{1/2} W_v = U Σ Vᵀ`, `Σ Vᵀ W_o = U' Σ' V'ᵀ`, then `W_v' = C^{-1/2} U U'_r` and
`W_o' = Σ'_r V'_rᵀ`. With grouped queries, `W_o` is that of all heads that read the value head, side by side. C is the
input's moment: attention is taken to be the identity.

Counted are the smaller matrices themselves: nothing is stored beside them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from a3q.forward import to_device
from a3q.model import Layer, LayerShape, Model, ModelConfig
from benchmarks.rivals.activations import Moments, layers_with_moments
from benchmarks.rivals.rival import Rival, layer_parameters, require_llama
from benchmarks.rivals.structure import Sizes, o_by_group, o_from_groups, pair_sums, take_pairs, top

LEVERAGE_RIDGE = 1.0
"""λ over the median diagonal of the moment: a few units with huge activations would make a mean mean nothing."""
SOLVE_RIDGE = 1e-4
"""Keeps `C_m[S,S]` invertible where units hardly ever fire; over the same."""
TEMPERATURE = 0.1
"""ε of the allocation."""
LARGEST_RATIO = 0.8
"""Of one layer in the allocation; the softmax alone may ask for more than there is."""


def modegpt(model: Model, tokens: Tensor, ratio: float, device: torch.device) -> Rival:
    """The same ratio for every layer and component. Parameters: the smaller matrices."""
    require_llama(model, ratio)
    return _compress(model, tokens, [ratio] * model.config.num_hidden_layers, device)


def modegpt_allocated(model: Model, tokens: Tensor, ratio: float, device: torch.device) -> Rival:
    """Layer ratios `φ = L · ratio · softmax(−s / ε)` from the layers' block influences s. Parameters: as `modegpt`."""
    require_llama(model, ratio)
    influences = [moments.influence for _, _, moments in layers_with_moments(model, tokens, device)]
    return _compress(model, tokens, allocate(influences, ratio), device)


def allocate(influences: Sequence[float], ratio: float) -> list[float]:
    """Ratio of each layer, their mean `ratio`; what `LARGEST_RATIO` takes from one is spread over the others."""
    weights = torch.softmax(-torch.tensor(influences, dtype=torch.float64) / TEMPERATURE, 0)
    limit = max(ratio, LARGEST_RATIO)
    ratios = torch.zeros_like(weights)
    free = torch.ones_like(weights, dtype=torch.bool)
    for _ in influences:
        left = ratio * len(weights) - ratios[~free].sum()
        ratios[free] = left * weights[free] / weights[free].sum()
        over = free & (ratios > limit)
        if not over.any():
            break
        ratios[over] = limit
        free &= ~over
    return ratios.tolist()


@torch.inference_mode()
def _compress(model: Model, tokens: Tensor, ratios: Sequence[float], device: torch.device) -> Rival:
    config, layers, shapes = model.config, [], []
    for ratio, (shape, w, moments) in zip(ratios, layers_with_moments(model, tokens, device), strict=True):
        sizes, new = Sizes.at(config, shape, ratio), dict(w)
        pairs = query_key_pairs(config, w, moments, sizes.pairs)
        take_pairs(config, shape, new, pairs)
        if sizes.values < shape.v_head_dim:
            new["v"], new["o"] = value_output(config, shape, w, moments, sizes.values)
        if sizes.units < shape.intermediate_size:
            new |= nystrom(w, moments, sizes.units)
        layers.append(to_device(new, model.embed.device))
        shapes.append(sizes.shape(shape, pairs))
    smaller = dataclasses.replace(config, layers=tuple(shapes))
    return Rival(dataclasses.replace(model, config=smaller, layers=layers), layer_parameters(smaller))


def nystrom(w: Layer, moments: Moments, keep: int) -> Layer:
    """Type I: gate, up and down with `keep` units."""
    C = moments.units.double()
    scale = torch.maximum(C.diagonal().median(), 1e-6 * C.diagonal().mean())
    eye = torch.eye(len(C), dtype=C.dtype, device=C.device)
    # [C (C + λI)⁻¹]_ii = 1 − λ [(C + λI)⁻¹]_ii
    kept = top(-torch.linalg.inv(C + LEVERAGE_RIDGE * scale * eye).diagonal(), keep)
    gram = C[kept][:, kept] + SOLVE_RIDGE * scale * eye[:keep, :keep]
    down = torch.linalg.solve(gram, C[kept] @ w["down"].double().T).T
    return {"gate": w["gate"][kept], "up": w["up"][kept], "down": down.float().contiguous()}


def query_key_pairs(config: ModelConfig, w: Layer, moments: Moments, keep: int) -> Tensor:
    """Type II: the pairs that each key head keeps, `[G, keep]`."""
    C = moments.attn.double()
    # Diagonal of the head's moment W C Wᵀ; a pair's sum is the same before and after RoPE.
    q, k = ((w[role].double() @ C * w[role]).sum(1) for role in "qk")
    q, k = pair_sums(config, q, k)
    return top(q * k, keep)


def value_output(
    config: ModelConfig, shape: LayerShape, w: Layer, moments: Moments, keep: int
) -> tuple[Tensor, Tensor]:
    """Type III: v and o with `keep` dimensions a value head."""
    V = w["v"].double().view(config.num_key_value_heads, shape.v_head_dim, -1)
    # Σ and V of C^{1/2} W_v from W_vᵀ C W_v, which is small.
    eigenvalues, Q = torch.linalg.eigh(V @ moments.attn.double() @ V.mT)
    floor = (eigenvalues[:, -1:] * 1e-12).clamp_min(torch.finfo(torch.float32).tiny)
    sigma = eigenvalues.maximum(floor).sqrt()
    reduced = sigma[:, :, None] * Q.mT @ o_by_group(config, w).double()
    U = torch.linalg.eigh(reduced @ reduced.mT).eigenvectors[..., -keep:]
    # C^{-1/2} U = W_v V Σ⁻¹: C's own root is not needed.
    value = (Q / sigma[:, None] @ U).mT @ V
    return value.flatten(0, 1).float(), o_from_groups(config, (U.mT @ reduced).float())

"""Low-rank pairs in place of matrices: plain truncated SVD, and SVD-LLM.

SVD-LLM: truncation-aware singular value decomposition, arXiv 2403.07378. With X the input of W (columns are tokens) and
`S Sᵀ = X Xᵀ` (Cholesky), the SVD `W S = U Σ Vᵀ` cut after r gives `W' = U_r Σ_r V_rᵀ S⁻¹`, and the truncated singular
values are exactly the error of `W X`. Because `Σ_r V_rᵀ = U_rᵀ W S`, the same weight is `U_r (U_rᵀ W)`, and nothing
needs to be inverted.

Counted are the two factors, `r (m + n)`, with the rank that `r (m + n) = (1 − ratio) m n` gives; a matrix whose pair
would not be smaller stays whole. The model holds the product.
"""

from __future__ import annotations

import dataclasses
from functools import cache

import torch
from torch import Tensor

from a3q.forward import run_layer, to_device
from a3q.model import Layer, Model
from benchmarks.rivals.activations import Moments, layers_with_moments, measure, start
from benchmarks.rivals.rival import MATRICES, Rival, require_llama

DAMPING = 1e-6
"""Added to the moment's diagonal, over its mean, so that it can be factored."""

Pair = tuple[Tensor, Tensor]
"""`A` `[m, r]` and `B` `[r, n]`, float64; the weight is `A B`."""


class Budget:
    """Ranks for one matrix after another, what rounding leaves over going to the next."""

    def __init__(self, ratio: float) -> None:
        self.stored = 0
        self._keep = 1 - ratio
        self._left = 0.0

    def rank(self, W: Tensor) -> int | None:
        """Rank to use; None: the matrix stays whole."""
        m, n = W.shape
        self._left += self._keep * m * n
        whole = self._left >= m * n - 0.5
        rank = max(1, round(self._left / (m + n)))
        cost = m * n if whole else rank * (m + n)
        self._left -= cost
        self.stored += cost
        return None if whole else rank


def root(moment: Tensor) -> Tensor:
    """`S` `[n, n]` with `S Sᵀ` the moment, damped until it can be factored."""
    C = moment.double()
    eye = torch.eye(len(C), dtype=C.dtype, device=C.device)
    damping = DAMPING * C.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    for _ in range(8):
        S: Tensor
        S, info = torch.linalg.cholesky_ex(C + damping * eye)
        if not info.any():
            return S
        damping = 10 * damping
    raise ValueError("the second moment of the activations is not positive: are there NaN among them?")


def truncate(W: Tensor, S: Tensor | None, rank: int) -> Pair:
    """Best pair of that rank for `‖(W − A B) S‖`; None is the identity."""
    W = W.double()
    M = W if S is None else W @ S
    # From the smaller Gram matrix, in float64: much faster on a GPU than an SVD.
    if M.shape[0] <= M.shape[1]:
        U = torch.linalg.eigh(M @ M.T).eigenvectors[:, -rank:]
    else:
        U = torch.linalg.qr(M @ torch.linalg.eigh(M.T @ M).eigenvectors[:, -rank:]).Q
    return U, U.T @ W


def _whitened(w: Layer, moments: Moments, budget: Budget) -> dict[str, Pair]:
    """Factors by role of the matrices that do not stay whole."""
    # q, k and v share one moment, gate and up another.
    root_of = cache(lambda source: root(moments.of(source)))
    sources = {"k": "q", "v": "q", "up": "gate"}
    ranks = {role: budget.rank(w[role]) for role in MATRICES}
    return {
        role: truncate(w[role], root_of(sources.get(role, role)), rank)
        for role, rank in ranks.items()
        if rank is not None
    }


def _multiplied(w: Layer, pairs: dict[str, Pair]) -> Layer:
    return w | {role: (A @ B).float() for role, (A, B) in pairs.items()}


@torch.inference_mode()
def truncated_svd(model: Model, tokens: Tensor, ratio: float, device: torch.device) -> Rival:
    """SVD of each matrix, cut; the tokens are not used. Parameters: see the module's docstring."""
    require_llama(model, ratio)
    budget, layers = Budget(ratio), []
    for layer in model.layers:
        w = to_device(layer, device)
        ranks = {role: budget.rank(w[role]) for role in MATRICES}
        pairs = {role: truncate(w[role], None, rank) for role, rank in ranks.items() if rank is not None}
        layers.append(to_device(_multiplied(w, pairs), model.embed.device))
    return Rival(dataclasses.replace(model, layers=layers), budget.stored)


@torch.inference_mode()
def svd_llm(model: Model, tokens: Tensor, ratio: float, device: torch.device) -> Rival:
    """The paper's SVD-LLM (W): whitening alone, on the original model's activations, the same ratio for every matrix.

    Parameters: see the module's docstring.
    """
    require_llama(model, ratio)
    budget, layers = Budget(ratio), []
    for _, w, moments in layers_with_moments(model, tokens, device):
        layers.append(to_device(_multiplied(w, _whitened(w, moments, budget)), model.embed.device))
    return Rival(dataclasses.replace(model, layers=layers), budget.stored)


@torch.inference_mode()
def svd_llm_updated(model: Model, tokens: Tensor, ratio: float, device: torch.device) -> Rival:
    """SVD-LLM with its closed-form update: layer by layer, the left factor is refitted to the compressed prefix.

    With `C'` the moment of the original layer's inputs behind the layers compressed so far,
    `A = W C' Bᵀ (B C' Bᵀ)⁻¹`, B as in `svd_llm`. Parameters: see the module's docstring.
    """
    require_llama(model, ratio)
    config, budget, layers = model.config, Budget(ratio), []
    x = start(model, tokens, device)
    for shape, w, moments in layers_with_moments(model, tokens, device):
        prefix = measure(config, shape, w, x, advance=False)
        pairs = {}
        for role, (_, B) in _whitened(w, moments, budget).items():
            BC = B @ prefix.of(role).double()
            gram = BC @ B.T
            gram.diagonal().add_(DAMPING * gram.diagonal().mean())
            pairs[role] = (torch.linalg.solve(gram, BC @ w[role].double().T).T, B)
        new = _multiplied(w, pairs)
        run_layer(config, shape, new, x, device)
        layers.append(to_device(new, model.embed.device))
    return Rival(dataclasses.replace(model, layers=layers), budget.stored)

"""Refit an output weight by least squares, held back towards a given one where the data say little."""

from __future__ import annotations

import torch
from torch import Tensor


def refit(gram: Tensor, cross: Tensor, prior: Tensor, ridge: float) -> Tensor:
    """`argmin_W E‖xW − y‖² + λ‖W − prior‖²`, float64, by its normal equations.

    `gram` `[n, n]` is E[xᵀx], `cross` `[n, out]` is E[xᵀy], `prior` `[n, out]`; λ is `ridge` times gram's mean
    diagonal, so that a dead input keeps its prior.
    """
    gram, prior = gram.double(), prior.double()
    strength = ridge * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    damped = gram + strength * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    weight: Tensor = torch.linalg.solve(damped, cross.double() + strength * prior)
    return weight

"""Cholesky factors of second moments, which float32 sums may leave a little indefinite."""

from __future__ import annotations

import torch
from torch import Tensor


def damped_cholesky(gram: Tensor, ridge: Tensor) -> Tensor:
    """Lower factor of `gram + ridge · I`, `[n, n]` float64; the ridge grows until it factors.

    ValueError where it never does.
    """
    damped = gram.clone()
    for added in (ridge, *(9 * 10**i * ridge for i in range(7))):
        damped.diagonal().add_(added)
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(damped)
        if not info.any():
            return factor
    raise ValueError("the second moment of the activations is not positive: are there NaN among them?")

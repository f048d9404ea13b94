"""Refit an output weight by least squares, held back towards a given one where the data say little."""

from __future__ import annotations

import torch
from torch import Tensor

from a3q.solve.cholesky import damped_cholesky


def refit(gram: Tensor, cross: Tensor, prior: Tensor, ridge: float) -> Tensor:
    """`argmin_W E‖xW − y‖² + λ‖W − prior‖²`, float64, by its normal equations.

    `gram` `[n, n]` is E[xᵀx], `cross` `[n, out]` is E[xᵀy], `prior` `[n, out]`; λ is `ridge` times gram's mean
    diagonal, so that a dead input keeps its prior.
    """
    gram, prior = gram.double(), prior.double()
    strength = ridge * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    factor = damped_cholesky(gram, strength)
    weight: Tensor = torch.cholesky_solve(cross.double() + strength * prior, factor)
    return weight


def refit_with_bias(
    gram: Tensor, cross: Tensor, x_mean: Tensor, y_mean: Tensor, prior: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """The same with an intercept: `argmin E‖xW + b − y‖² + λ‖W − prior‖²` as `(W, b)`.

    At the optimum `b = E[y] − E[x] W`, which leaves the plain problem on moments about the means `[n]`, `[out]`.
    """
    x_mean, y_mean = x_mean.double(), y_mean.double()
    centred, crossed = gram.double() - x_mean.outer(x_mean), cross.double() - x_mean.outer(y_mean)
    weight = refit(centred, crossed, prior, ridge)
    return weight, y_mean - x_mean @ weight

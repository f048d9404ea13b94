"""MLP: keep the most important units and refit the down projection to the old output.

Selection by A3's CUR score (arXiv 2505.12942, MLP component), `sqrt(C[i,i]) · ‖W_down[:,i]‖`; then least squares on the
kept units, `W_down' = W_down C[:,S] (C[S,S] + λI)^{-1}`, which A3 does not do and which recovers most of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-4
"""λ over the mean diagonal of C[S,S]: larger than rounding in float32 solves, small against any live unit."""


@dataclass(frozen=True)
class MLPSolution:
    """`kept` `[F']` unit indices in ascending order, `down` `[hidden, F']` float64; `loss` is relative."""

    kept: Tensor
    down: Tensor
    loss: float


def unit_scores(m_moment: Tensor, w_down: Tensor) -> Tensor:
    """A3's importance of each unit, `[F]`."""
    scores: Tensor = m_moment.diagonal().clamp_min(0).sqrt() * w_down.norm(dim=0)
    return scores


def damped_cholesky(gram: Tensor, ridge: Tensor) -> Tensor:
    """Lower factor of `gram + ridge · I`. Where float32 sums left gram indefinite, the ridge grows until it factors."""
    eye = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    for _ in range(8):
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(gram + ridge * eye)
        if not info.any():
            return factor
        ridge = 10 * ridge
    raise ValueError("the second moment of the MLP activations is not positive: are there NaN among them?")


def _ridge(gram: Tensor) -> Tensor:
    return RIDGE * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)


def solve_mlp(m_moment: Tensor, w_down: Tensor, keep: int, refit: bool = True) -> MLPSolution:
    """Reduce to `keep` units: `m_moment` `[F, F]` is E[mᵀm], `w_down` `[hidden, F]`; without `refit` as A3 does."""
    C, W = m_moment.double(), w_down.double()
    kept = unit_scores(C, W).topk(keep).indices.sort().values
    C_S = C[kept]
    gram = C_S[:, kept]
    target = C_S @ W.T
    down = torch.cholesky_solve(target, damped_cholesky(gram, _ridge(gram))).T if refit else W[:, kept]
    total = (W * (W @ C)).sum()
    lost = total - 2 * (down * target.T).sum() + (down * (down @ gram)).sum()
    return MLPSolution(kept, down, float(lost.clamp_min(0) / total.clamp_min(torch.finfo(torch.float32).tiny)))


def mlp_losses(m_moment: Tensor, w_down: Tensor, keeps: Sequence[int], refit: bool = True) -> list[float]:
    """The relative loss of `solve_mlp` at each of `keeps`, from one factorization.

    With the units in order of importance and `C = L Lᵀ`, the k leading ones explain the energy of the k leading rows of
    `Lᵀ W_downᵀ`, because leading blocks of a Cholesky factor are the factors of leading blocks. Without `refit`, what
    the other units put out together is lost.
    """
    C, W = m_moment.double(), w_down.double()
    order = unit_scores(C, W).argsort(descending=True)
    gram = C[order][:, order]
    if not refit:
        output = (gram * (W.T @ W)[order][:, order]).flip(0, 1).cumsum(0).cumsum(1).diagonal()
        lost = torch.cat((output.new_zeros(1), output)).flip(0)
        return [max(0.0, float(lost[k] / lost[0].clamp_min(torch.finfo(torch.float32).tiny))) for k in keeps]
    explained = (damped_cholesky(gram, _ridge(gram)).T @ W[:, order].T).square().sum(1)
    tail = explained.sum() - torch.cat((explained.new_zeros(1), explained.cumsum(0)))
    return [max(0.0, float(tail[k] / explained.sum().clamp_min(torch.finfo(torch.float32).tiny))) for k in keeps]

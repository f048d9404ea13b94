"""MLP: keep the most important units and refit the down projection to the old output.

Selection by A3's CUR score (arXiv 2505.12942, MLP component), `sqrt(C[i,i]) · ‖W_down[:,i]‖`; then least squares on the
kept units, `W_down' = W_down C[:,S] (C[S,S] + λI)^{-1}`, which A3 does not do and which recovers most of the loss.
"""

from __future__ import annotations

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


def solve_mlp(m_moment: Tensor, w_down: Tensor, keep: int) -> MLPSolution:
    """Reduce to `keep` units: `m_moment` `[F, F]` is E[mᵀm], `w_down` `[hidden, F]`."""
    C, W = m_moment.double(), w_down.double()
    kept = unit_scores(C, W).topk(keep).indices.sort().values
    C_S = C[kept]
    gram = C_S[:, kept]
    ridge = RIDGE * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    target = C_S @ W.T
    down = torch.cholesky_solve(target, damped_cholesky(gram, ridge)).T
    total = (W * (W @ C)).sum()
    lost = total - 2 * (down * target.T).sum() + (down * (down @ gram)).sum()
    return MLPSolution(kept, down, float(lost.clamp_min(0) / total.clamp_min(torch.finfo(torch.float32).tiny)))

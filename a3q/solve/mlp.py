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
    return m_moment.diagonal().clamp_min(0).sqrt() * w_down.norm(dim=0)


def solve_mlp(m_moment: Tensor, w_down: Tensor, keep: int) -> MLPSolution:
    """Reduce to `keep` units: `m_moment` `[F, F]` is E[mᵀm], `w_down` `[hidden, F]`."""
    C, W = m_moment.double(), w_down.double()
    kept = unit_scores(C, W).topk(keep).indices.sort().values
    C_S = C[kept]
    gram = C_S[:, kept]
    ridge = RIDGE * gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    target = C_S @ W.T
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(keep, dtype=gram.dtype, device=gram.device))
    down = torch.cholesky_solve(target, factor).T
    total = (W * (W @ C)).sum().clamp_min(torch.finfo(torch.float64).tiny)
    lost = total - 2 * (down * target.T).sum() + (down * (down @ gram)).sum()
    return MLPSolution(kept, down, float(lost.clamp_min(0) / total))

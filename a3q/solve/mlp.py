"""MLP: keep the most important units and refit the down projection to the old output.

Selection by A3's CUR score (arXiv 2505.12942, MLP component), `sqrt(C[i,i]) · ‖W_down[:,i]‖`; then least squares on the
kept units, `W_down' = W_down C[:,S] (C[S,S] + λI)^{-1}`, which A3 does not do and which recovers most of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from a3q.solve.cholesky import damped_cholesky

RIDGE = 1e-4
"""λ over the mean diagonal of C[S,S]: larger than rounding in float32 solves, small against any live unit."""
_ROWS = 2048


@dataclass(frozen=True)
class MLPSolution:
    """`kept` `[F']` unit indices in ascending order, `down` `[outputs, F']` float64.

    `lost` is the expected squared error of the outputs, `energy` that of the outputs themselves.
    """

    kept: Tensor
    down: Tensor
    lost: float
    energy: float

    @property
    def loss(self) -> float:
        """Lost energy over all."""
        return self.lost / max(self.energy, torch.finfo(torch.float32).tiny)


def unit_scores(m_moment: Tensor, w_down: Tensor) -> Tensor:
    """A3's importance of each unit, `[F]`."""
    scores: Tensor = m_moment.diagonal().double().clamp_min(0).sqrt() * w_down.norm(dim=0)
    return scores


def _ridge(gram: Tensor) -> Tensor:
    return RIDGE * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)


def select_units(m_moment: Tensor, w_down: Tensor, keep: int) -> Tensor:
    """Indices of the `keep` most important units, ascending."""
    return unit_scores(m_moment, w_down.double()).topk(keep).indices.sort().values


def solve_mlp(m_moment: Tensor, w_down: Tensor, keep: int | Tensor, refit: bool = True) -> MLPSolution:
    """Reduce to `keep` units: `m_moment` `[F, F]` is E[mᵀm], `w_down` `[hidden, F]`; without `refit` as A3 does.

    With the units themselves given as `keep`, `w_down` may be some of the outputs only: each is solved for itself.
    """
    W = w_down.double()
    kept = keep if isinstance(keep, Tensor) else select_units(m_moment, W, keep)
    # In double precision a whole moment is by far the largest matrix here, so that it is only converted in parts.
    output = torch.cat([rows.double() @ W.T for rows in torch.split(m_moment, _ROWS)])
    energy = float((W.T * output).sum())
    target = output[kept]
    gram = m_moment[kept][:, kept].double()
    if refit:
        ridge = _ridge(gram)
        down = torch.cholesky_solve(target, damped_cholesky(gram, ridge)).T
    else:
        down = W[:, kept]
    lost = energy - 2 * (down * target.T).sum() + (down * (down @ gram)).sum()
    return MLPSolution(kept, down, max(0.0, float(lost)), energy)


def mlp_losses(m_moment: Tensor, w_down: Tensor, keeps: Sequence[int], refit: bool = True) -> list[float]:
    """The relative loss of `solve_mlp` at each of `keeps`, from one factorization.

    With the units in order of importance and `C = L Lᵀ`, the k leading ones explain the energy of the k leading rows of
    `Lᵀ W_downᵀ`, because leading blocks of a Cholesky factor are the factors of leading blocks. Without `refit`, what
    the other units put out together is lost.
    """
    W = w_down.double()
    order = unit_scores(m_moment, W).argsort(descending=True)
    gram, W = m_moment[order][:, order].double(), W[:, order]
    if not refit:
        output = (gram * (W.T @ W)).flip(0, 1).cumsum(0).cumsum(1).diagonal()
        lost = torch.cat((output.new_zeros(1), output)).flip(0)
        return [max(0.0, float(lost[k] / lost[0].clamp_min(torch.finfo(torch.float32).tiny))) for k in keeps]
    explained = (damped_cholesky(gram, _ridge(gram)).T @ W.T).square().sum(1)
    tail = explained.sum() - torch.cat((explained.new_zeros(1), explained.cumsum(0)))
    return [max(0.0, float(tail[k] / explained.sum().clamp_min(torch.finfo(torch.float32).tiny))) for k in keeps]

"""OV: values and the output projection meet in `d` inner dimensions; keep `r` of them.

A3's optimum (arXiv 2505.12942, OV component) through a second moment: with `S = C^{1/2}`, the SVD of `S W_o` gives the
subspace, `P = S^{-1} U_r`, and `W_o` becomes `U_rᵀ S W_o`. `C` is the moment of the attention-averaged values for one
query head a value head; with several, A3 takes the values' own moment and the heads' weights side by side.

a3q keeps the attention-averaged moments for several heads too: `S` from their mean, and each head's output weight
refitted to its own moment, `Q_h = (PᵀC_hP)^{-1} PᵀC_h`. For one head that is the same as A3's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-7
"""Relative floor of eigenvalues and ridge of the refit; a dead head has an all-zero moment."""


@dataclass(frozen=True)
class OVSolution:
    """`value` `[G, d, r]` (v → v P) and `output` `[H, r, d]` (W_o → Q W_o), float64.

    `lost` is the expected squared error of the output, summed over heads, `energy` that of the output itself.
    """

    value: Tensor
    output: Tensor
    lost: float
    energy: float

    @property
    def loss(self) -> float:
        """Lost energy over all."""
        return self.lost / max(self.energy, torch.finfo(torch.float32).tiny)


def solve_ov(o_moment: Tensor, w_o: Tensor, groups: int, r: int, v_moment: Tensor | None = None) -> OVSolution:
    """Projections for `o_moment` `[H, d, d]` and `w_o` `[H, d, hidden]` (head h's slice, inputs first).

    With `v_moment` `[G, d, d]`, A3's own solution: the subspace from the values, no refit. The loss is under `o_moment`
    either way.
    """
    return _Problem(o_moment, w_o, groups, v_moment).solve(r)


def solve_ov_sizes(
    o_moment: Tensor, w_o: Tensor, groups: int, sizes: Sequence[int], v_moment: Tensor | None = None
) -> list[OVSolution]:
    """`solve_ov` for several sizes, which have all but the last step in common."""
    problem = _Problem(o_moment, w_o, groups, v_moment)
    return [problem.solve(r) for r in sizes]


class _Problem:
    """What is the same for every size."""

    def __init__(self, o_moment: Tensor, w_o: Tensor, groups: int, v_moment: Tensor | None) -> None:
        H, d, _ = o_moment.shape
        self._C = o_moment.double().view(groups, H // groups, d, d)
        self._W = w_o.double().view(groups, H // groups, d, -1)
        self._fitted = v_moment is None
        eigenvalues, Q = torch.linalg.eigh(self._C.mean(1) if v_moment is None else v_moment.double())
        floor = (eigenvalues[:, -1:] * RIDGE).clamp_min(torch.finfo(torch.float32).tiny)
        root = eigenvalues.clamp_min(0).maximum(floor).sqrt()[:, None]
        self._S, self._S_inverse = (Q * root) @ Q.mT, (Q / root) @ Q.mT
        # Left singular vectors of the wide [d, heads · hidden] matrix, from its d × d Gram matrix; the largest last.
        self._gram = self._W @ self._W.mT
        _, self._U = torch.linalg.eigh((self._S[:, None] @ self._gram @ self._S[:, None]).sum(1))

    def solve(self, r: int) -> OVSolution:
        C, W = self._C, self._W
        groups, heads, d, _ = W.shape
        U = self._U[..., -r:].flip(-1)
        P = self._S_inverse @ U
        fit = _refit(P, C, r) if self._fitted else (U.mT @ self._S)[:, None].expand(-1, heads, -1, -1)
        # The error is (I − P Q) W; its energy needs no more of W than W Wᵀ.
        left = torch.eye(d, dtype=W.dtype, device=W.device) - P[:, None] @ fit
        lost = ((left.mT @ C @ left) * self._gram).sum().clamp_min(0)
        energy = (C * self._gram).sum()
        P, fit = _balance(P, fit, W)
        return OVSolution(P, fit.reshape(groups * heads, r, d), float(lost), float(energy))


def _refit(P: Tensor, C: Tensor, r: int) -> Tensor:
    """`(PᵀC_hP)^{-1} PᵀC_h` for P `[G, d, r]` and C `[G, heads, d, d]`."""
    PC = P.mT[:, None] @ C
    gram = PC @ P[:, None]
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    eye = torch.eye(r, dtype=gram.dtype, device=gram.device)
    fit: Tensor = torch.linalg.solve(gram + RIDGE * scale[..., None, None] * eye, PC)
    return fit


def _balance(P: Tensor, fit: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """Scale the inner dimensions so that the output weights have equal norm in each: block grids round them alike."""
    norm = (fit @ W).square().sum(-1).mean(1).sqrt()
    norm = torch.where(norm > 0, norm / norm.mean(-1, keepdim=True), torch.ones_like(norm))
    return P * norm[:, None, :], fit / norm[:, None, :, None]

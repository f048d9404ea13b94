"""QK with RoPE on a shared frequency list.

Pair `p` of a head is one complex number `q_p = q[p] + i q[p + d/2]`, and
`score(Δ) = Re Σ_p q_p conj(k_p) exp(i w_p Δ)`. Each head mixes its `m = d/2` old pairs into `R` new ones,
`a = A q` and `b = B k`, that turn at the shared frequencies `ω_s`, fitted to the old scores under the measured moments
of q and k and the measured distribution `P(Δ)` of attention distances:

    minimise  E | Σ_p q_p conj(k_p) exp(i w_p Δ)  −  Σ_s a_s conj(b_s) exp(i ω_s Δ) |²

The problem is bilinear; `A` and `B` take turns, each half in closed form. It extends the QK step of A3
(arXiv 2505.12942, section on RoPE, which selects pairs per head) to runtimes that hold one frequency list.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-6
"""Relative ridge on the normal equations: it settles dead heads and repeated directions without moving live ones."""


@dataclass(frozen=True)
class QKSolution:
    """`query` `[H, R, m]` and `key` `[G, R, m]`, complex128; `loss` is the functional loss over the score's energy."""

    query: Tensor
    key: Tensor
    loss: float


def select_frequencies(count: int, keep: int) -> list[int]:
    """Indices of the `keep` of `count` frequencies that are kept: evenly spaced, first and last among them."""
    return [round(float(i)) for i in torch.linspace(0, count - 1, keep, dtype=torch.float64)]


def complex_moment(real: Tensor) -> Tensor:
    """E[z zᴴ] `[…, m, m]` of the pairs, from E[xᵀx] `[…, d, d]` of their half-split real rows."""
    re, im = real.double().chunk(2, dim=-2)
    (rr, ri), (ir, ii) = re.chunk(2, dim=-1), im.chunk(2, dim=-1)
    return torch.complex(rr + ii, ir - ri)


def characteristic(distances: Tensor, frequencies: Tensor) -> Tensor:
    """`Φ(w_p − w_s) = Σ_Δ P(Δ) exp(i (w_p − w_s) Δ)`, `[H, s, p]`, for P `[H, T]` and frequencies `[m]`."""
    delta = torch.arange(distances.shape[-1], dtype=torch.float64, device=distances.device)
    wave = torch.exp(1j * frequencies[:, None] * delta)
    # One head at a time: the product over all pairs of frequencies is m² T numbers a head otherwise.
    return torch.stack([(wave.conj() * p) @ wave.T for p in distances.double()])


def _solve(lhs: Tensor, rhs: Tensor) -> Tensor:
    scale = lhs.diagonal(dim1=-2, dim2=-1).real.mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    eye = torch.eye(lhs.shape[-1], dtype=lhs.dtype, device=lhs.device)
    solution: Tensor = torch.linalg.solve(lhs + RIDGE * scale[..., None, None] * eye, rhs)
    return solution


def solve_qk(
    q_moment: Tensor, k_moment: Tensor, distances: Tensor, frequencies: Tensor, kept: list[int], sweeps: int = 12
) -> QKSolution:
    """Mixing matrices for the frequencies `kept`.

    `q_moment` `[H, d, d]`, `k_moment` `[G, d, d]`: E[qᵀq], E[kᵀk] before RoPE, half-split; `distances` `[H, T]`;
    `frequencies` `[m]` in radians per token. Query head `h` belongs to key head `h // (H / G)`.
    """
    H, G, m = q_moment.shape[0], k_moment.shape[0], frequencies.shape[0]
    C_q, C_k = complex_moment(q_moment).view(G, H // G, m, m), complex_moment(k_moment)[:, None]
    phi = characteristic(distances, frequencies.double()).view(G, H // G, m, m)
    phi_new = phi[..., kept, :][..., kept]
    phi_old = phi[..., kept, :]

    B = torch.eye(m, dtype=torch.complex128, device=C_k.device)[kept].expand(G, 1, -1, -1)
    A = B
    for _ in range(sweeps):
        BC = B @ C_k
        A = _solve((BC @ B.mH) * phi_new, BC * phi_old)
        AC = A @ C_q
        lhs, rhs = (AC @ A.mH) * phi_new.conj(), AC * phi_old.conj()
        B = _solve(lhs.sum(1, keepdim=True), rhs.sum(1, keepdim=True))
    A, B = _balance(A, B, C_q, C_k)
    loss = functional_loss(A, B, C_q, C_k, phi, kept)
    return QKSolution(A.reshape(H, len(kept), m), B.reshape(G, len(kept), m), loss)


def _balance(A: Tensor, B: Tensor, C_q: Tensor, C_k: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each new pair so that queries (mean over the group) and keys have equal energy; scores do not change."""
    energy_q = torch.einsum("ghsp,ghpt,ghst->gs", A, C_q, A.conj()).real / A.shape[1]
    energy_k = torch.einsum("gzsp,gzpt,gzst->gs", B, C_k, B.conj()).real
    ratio = (energy_q / energy_k).pow(0.25)
    ratio = torch.where(ratio.isfinite() & (ratio > 0), ratio, torch.ones_like(ratio))[:, None, :, None]
    return A / ratio, B * ratio


def functional_loss(A: Tensor, B: Tensor, C_q: Tensor, C_k: Tensor, phi: Tensor, kept: list[int]) -> float:
    """The objective over the old score's energy, summed over heads; shapes as in `solve_qk`, grouped `[G, H/G, …]`."""
    BCB, BC = B @ C_k @ B.mH, B @ C_k
    ACA, AC = A @ C_q @ A.mH, A @ C_q
    phi_new, phi_old = phi[..., kept, :][..., kept], phi[..., kept, :]
    old = (C_q * C_k.mT * phi.mT).sum().real
    new = (ACA * (BCB * phi_new).mT).sum().real
    cross = (AC * (BC * phi_old).conj()).sum().real
    return float((old - 2 * cross + new) / old.clamp_min(torch.finfo(torch.float32).tiny))


def mix_rows(mix: Tensor, rows: Tensor) -> Tensor:
    """Apply complex mixes `[heads, R, m]` to half-split rows `[heads, 2m, n]`, giving `[heads, 2R, n]`."""
    re, im = mix.real, mix.imag
    real = torch.cat((torch.cat((re, -im), -1), torch.cat((im, re), -1)), -2)
    return real @ rows.to(real)

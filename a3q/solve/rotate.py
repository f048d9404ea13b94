"""The transform inside each head that is left free, chosen so that the key/value cache is rounded well.

Scores stay the same when a rotated pair of a key is divided by a number and that of its queries multiplied; the output
stays the same when the values of a head go through any invertible matrix and the output projection through its inverse.
Numbers that share a scale all get the error that the largest of them asks for. Measured on SmolLM2 with a `q4_0` cache,
as the share of energy that rounding costs: keys 0.0150, divided by the root of their sizes 0.0107 (by the sizes 0.0229,
by the root of key over query 0.0140); values 0.0085, with a scale half way between equal values and equal columns of
the output projection 0.0065, and with a spreading rotation after that 0.0064.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LEAST = 1e-3
"""Sizes below this share of a head's mean are not evened out."""


def spreading(n: int, device: torch.device) -> Tensor:
    """An orthogonal `[n, n]` matrix whose entries are alike in size: Hadamard's for powers of 2, else the cosine
    transform."""
    if n & (n - 1) == 0:
        H = torch.ones(1, 1, device=device)
        while len(H) < n:
            H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
        return H / math.sqrt(n)
    k, i = torch.arange(n, device=device)[:, None], torch.arange(n, device=device)
    C = torch.cos(math.pi * (i + 0.5) * k / n) * math.sqrt(2 / n)
    C[0] /= math.sqrt(2)
    return C


def key_scales(energy: Tensor, pairs: int) -> Tensor:
    """Divisors `[heads, d]` of keys, the root of each pair's size, from E[k²] `[heads, d]`; mean 1 in a head.

    The two parts of a rotated pair have one divisor; `pairs` of them stand in front, real parts first.
    """
    joint = (energy[:, :pairs] + energy[:, pairs : 2 * pairs]) / 2
    return _evened(torch.cat((joint, joint, energy[:, 2 * pairs :]), 1).pow(0.25))


def value_transforms(energy: Tensor, column_norms: Tensor) -> tuple[Tensor, Tensor]:
    """`T` and its inverse `[heads, d, d]` for values: `v → v T`, from E[v²] and the norms of the output projection's
    columns, both `[heads, d]`."""
    size = _evened((energy.sqrt() / column_norms.clamp_min(1e-12)).sqrt())
    Q = spreading(energy.shape[-1], energy.device)
    return Q / size[..., None], (Q * size[..., None]).mT


def _evened(size: Tensor) -> Tensor:
    mean = size.mean(-1, keepdim=True)
    usable = torch.isfinite(size) & (size > _LEAST * mean)
    return torch.where(usable, size / mean, 1.0)

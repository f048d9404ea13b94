"""What of a layer is neither product nor attention: each operation a pass over memory, unless kernels are fused.

A step of SmolLM2-135M at 25 % on 32,768 tokens keeps an H200 busy for 167 ms, in fused kernels for 115 ms; 8192 texts
written side by side come at 443k tokens a second instead of 364k. What torch.compile made of whole layers, which differ
in their sizes, was slower than they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from a3q.compiled import compiled

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def _rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(dtype)


def _rms_norm_in_words(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The same of operations that can be fused."""
    x = x.float()
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * scale * weight).to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    m = cos.shape[-1]
    # The gradient of one split is one tensor, that of three slices three of them, mostly zeros.
    re, im, rest = x.split_with_sizes((m, m, x.shape[-1] - 2 * m), dim=-1)
    return torch.cat((re * cos - im * sin, im * cos + re * sin, rest), dim=-1).to(dtype)


def _rotate_as_stored(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """The same with the heads of a position side by side, as products give `x` and take its gradient."""
    x, cos, sin = (one.transpose(-3, -2) for one in (x, cos, sin))
    return _rotate(x, cos, sin, dtype).transpose(-3, -2)


def _add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def _block_sums(logits: Tensor, most: Tensor) -> Tensor:
    return (logits.float() - most).exp().sum(-1)


def activated(activation: str, x: Tensor) -> Tensor:
    """What an MLP's activation, by name, makes of `x`."""
    return _ACTIVATIONS[activation](x)


def _gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    return activated(activation, gate) * up


@dataclass(frozen=True)
class Pieces:
    """How they are computed."""

    rms_norm: Callable[[Tensor, Tensor, float, torch.dtype], Tensor] = _rms_norm
    """RMS norm over the last dimension of `x`, by `weight` and `eps`, in float32; the result is of `dtype`."""
    rotate: Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor] = _rotate
    """`[B, heads, T, d]` turned by `cos` and `sin` `[lists, T, m]`, pair `p` being (`p`, `p + m`), in `dtype`."""
    gated: Callable[[str, Tensor, Tensor], Tensor] = _gated
    """What `activated` makes of `gate`, times `up`."""
    add: Callable[[Tensor, Tensor], Tensor] = _add
    """Sum of hidden states and what is added to them, which may be of another type."""
    block_sums: Callable[[Tensor, Tensor], Tensor] = _block_sums
    """Sums over the last dimension of `exp(logits − most)` of logits `[B, blocks, n]` and `most` `[B, 1, 1]`."""


_used = Pieces()


def pieces() -> Pieces:
    """As they are computed now."""
    return _used


def fusing() -> Pieces:
    """In fused kernels, which are made at first use: seconds for each."""
    gated = compiled(_gated)

    def flat(activation: str, gate: Tensor, up: Tensor) -> Tensor:
        # One size that differs from layer to layer is soon any size.
        return gated(activation, gate.flatten(), up.flatten()).view_as(up)

    return Pieces(
        compiled(_rms_norm_in_words), compiled(_rotate_as_stored), flat, compiled(_add), compiled(_block_sums)
    )


@contextmanager
def using(other: Pieces) -> Iterator[None]:
    """Compute them as `other` says meanwhile, in all threads: a backward pass is in another."""
    global _used
    before, _used = _used, other
    try:
        yield
    finally:
        _used = before

"""Fit output projections to the stream that they really add to: what went before, reduced or rounded, has led it away
from the original's, and they can lead it half of the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from a3q.forward import norm
from a3q.model import Layer
from a3q.solve.refit import refit, refit_with_bias
from a3q.statistics import Moment
from a3q.stream import Stream

CORRECTION = 0.5
"""Share of the gap between the two streams that a refit tries to close: 0 only copies the layer, 1 trusts the
calibration text entirely. Measured on held-out text, for reduction: 0, 0.25, 0.5, 0.75 gave a perplexity of 55.8, 51.4,
50.9, 51.6; for rounding to Q4_0 alone: 0, 0.5, 1 gave a KL of 0.095, 0.093, 0.111. Weights that read the hidden states
gain nothing from the like."""
RIDGE = 0.03
"""Pull towards A3's own solution over the mean diagonal of the moment; 0.01 to 0.1 differ by 1 % in perplexity."""
FAINT = 1e-3
"""A norm's weight below this share of their mean is not divided by."""


class InputMoments:
    """What the weights that read the hidden states see."""

    def __init__(self, hidden: int, device: torch.device) -> None:
        self._gram = Moment(hidden, hidden, device=device)
        self._sum = torch.zeros(hidden, device=device)

    def add(self, x: Tensor) -> None:
        """Take in normed states `[B, T, hidden]`."""
        x = x.flatten(0, 1)
        self._gram.add(x)
        self._sum += x.sum(0)

    def gram(self) -> Tensor:
        """E[xᵀx] `[hidden, hidden]`."""
        return self._gram.mean()

    def mean(self) -> Tensor:
        """E[x] `[hidden]`."""
        return self._sum / max(1, self._gram.rows)


class OutputFit:
    """Sums for the least-squares fit of an output projection, with its bias where it has one."""

    def __init__(self, width: int, hidden: int, device: torch.device) -> None:
        self.gram = Moment(width, width, device=device)
        self.cross = Moment(width, hidden, device=device)
        self._x, self._y = torch.zeros(width, device=device), torch.zeros(hidden, device=device)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in inputs `[rows, width]` and what they should become `[rows, hidden]`, the bias included."""
        self.gram.add(x)
        self.cross.add(x, y)
        self._x += x.sum(0)
        self._y += y.sum(0)

    def apply(self, w: Layer, role: str, kept: Tensor | None = None) -> None:
        """Refit the weight called `role` in place, held back towards what it is, on the `kept` inputs."""
        gram, cross, rows = self.gram.mean(), self.cross.mean(), max(1, self.gram.rows)
        x, y = self._x / rows, self._y / rows
        if kept is not None:
            gram, cross, x = gram[kept][:, kept], cross[kept], x[kept]
        bias = f"{role}_bias"
        if bias in w:
            weight, intercept = refit_with_bias(gram, cross, x, y, w[role].T, RIDGE)
            w[bias] = intercept.float()
        else:
            weight = refit(gram, cross, w[role].T, RIDGE)
        w[role] = weight.float().T.contiguous()


def target(reference: Stream, reduced: Stream, part: slice, w: Layer, post_norm: str, local: Tensor) -> Tensor:
    """What a component should put out on the reduced stream, `[B, T, hidden]`, before the norm behind it.

    The reference is past the component already; `local` is what the original makes of the reduced stream.
    """
    gap = reference.part(part) - reduced.part(part)
    weight = w.get(post_norm)
    if weight is None:
        return CORRECTION * gap + (1 - CORRECTION) * local
    # Through the norm backwards, at the scale of the original's output; where the norm passes next to nothing on, any
    # error is as good.
    normed = norm(reduced.config, w, post_norm, local)
    wanted = CORRECTION * gap + (1 - CORRECTION) * normed
    scale = (local.square().mean(-1, keepdim=True) + reduced.config.norm_eps).sqrt()
    clear = weight.abs() > FAINT * weight.abs().mean()
    return torch.where(clear, wanted / torch.where(clear, weight, 1.0) * scale, local)

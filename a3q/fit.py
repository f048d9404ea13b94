"""Fit output projections to the stream that they really add to: what went before, reduced or rounded, has led it away
from the original's, and they can lead it half of the way back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from a3q import ranks
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


class _Sum:
    """Running mean of rows `[rows, n]`, float32, over all processes."""

    def __init__(self, n: int, device: torch.device) -> None:
        self._total, self._rows = torch.zeros(n, device=device), 0
        self._done = False

    def prepared(self, x: Tensor) -> Callable[[], None]:
        """Adds rows when it is called, and needs no memory then."""
        added, rows = x.sum(0, dtype=torch.float32), len(x)

        def take() -> None:
            self._total += added
            self._rows += rows

        return take

    def mean(self) -> Tensor:
        """`[n]`."""
        if not self._done:
            rows = torch.tensor(self._rows, device=self._total.device)
            ranks.add_up(self._total, rows)
            self._total /= max(1, int(rows))
            self._done = True
        return self._total


class InputMoments:
    """What the weights that read the hidden states see."""

    def __init__(self, hidden: int, device: torch.device) -> None:
        self.moment = Moment(hidden, hidden, device=device)
        self._mean = _Sum(hidden, device)

    def add(self, x: Tensor) -> None:
        """Take in normed states `[B, T, hidden]`."""
        self.prepared(x)()

    def prepared(self, x: Tensor) -> Callable[[], None]:
        """Takes them in when it is called, and needs no memory then."""
        x = x.flatten(0, 1)
        mean = self._mean.prepared(x)

        def take() -> None:
            mean()
            self.moment.add(x)

        return take

    def gram(self) -> Tensor:
        """E[xᵀx] `[hidden, hidden]`."""
        return self.moment.mean()

    def mean(self) -> Tensor:
        """E[x] `[hidden]`."""
        return self._mean.mean()


class OutputFit:
    """Sums for the least-squares fit of an output projection, with its bias where it has one."""

    def __init__(self, width: int, hidden: int, device: torch.device) -> None:
        self.gram = Moment(width, width, device=device)
        self.cross = Moment(width, hidden, device=device)
        self._x, self._y = _Sum(width, device), _Sum(hidden, device)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in inputs `[rows, width]` and what they should become `[rows, hidden]`, the bias included."""
        rounded, means = y.to(x.dtype), (self._x.prepared(x), self._y.prepared(y))
        # Whatever may run out of memory is behind us.
        for mean in means:
            mean()
        self.gram.add(x)
        self.cross.add(x, rounded)

    def apply(self, w: Layer, role: str, kept: Tensor | None = None) -> None:
        """Refit the weight called `role` in place, held back towards what it is, on the `kept` inputs.

        Every process solves for its share of the outputs.
        """
        gram, cross = self.gram.mean(), self.cross.mean()
        if kept is not None:
            gram, cross = gram[kept][:, kept], cross[kept]
        bias, own = f"{role}_bias", ranks.share(cross.shape[1])
        prior = w[role][own].T
        if bias in w:
            x, y = self._x.mean(), self._y.mean()
            x = x if kept is None else x[kept]
            weight, intercept = refit_with_bias(gram, cross[:, own], x, y[own], prior, RIDGE)
            w[bias] = ranks.joined_rows(intercept.float(), len(y))
        else:
            weight = refit(gram, cross[:, own], prior, RIDGE)
        w[role] = ranks.joined_rows(weight.float().T.contiguous(), cross.shape[1])


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

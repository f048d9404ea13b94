"""Train weights that are on GGUF grids with the rounding in the loop: what is learned is what is packed, bit for bit.

The forward pass takes `step · level − base` with `level` the nearest to a latent number `u`. The gradient passes
straight through the rounding to `u`; that by the scales is the true one, with the levels as they are. LSQ (arXiv
1902.08153), which holds `step · u` fixed instead, has no gradient by the scales where `u` is a level, and all are at
the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from a3q.forward import lowered
from a3q.model import Layer, Model
from a3q.solve.grid import Blocks, Grid
from a3q.solve.scales import HALF_MAX, codes, levels


class RoundedWeight:
    """A matrix `[rows, n]` on a grid in training.

    Adam moves every parameter by about its learning rate, however large the parameter. So all of these say how far
    something has moved since the start, 0 then, in a unit that makes equal moves count alike: with a rate of 0.01 a
    weight moves by at most 1 % of a step in an update, and a scale by 1 % of itself. Weight decay pulls back to the
    start, so that of the weights, unlike their rate, it says which change their level at all: those whose gradient is
    steady, its mean above half the decay times its root mean square. Gradients are as small as the steps, so Adam's
    `eps` has to be small as well. Whole numbers of a super-block, and zeros, stay as they are.
    """

    weight: Tensor
    """`[rows, n]`, in steps; where levels are a table, in mean distances between them."""
    d: Tensor
    """`[rows, n / block]`, in the size of the scale at the start: one of 0 stays."""
    m: Tensor | None
    """`[rows, n / block]`, in the size of the scale `d` times the middle level: a base may be near 0, or far from it,
    and what counts is how far it moves beside the step."""

    def __init__(self, blocks: Blocks, device: torch.device) -> None:
        self._start = blocks.to(device)
        self.weight = torch.zeros(blocks.codes.shape, device=device).requires_grad_()
        self.d = torch.zeros(blocks.d.shape, device=device).requires_grad_()
        self.m = None if blocks.m is None else torch.zeros(blocks.m.shape, device=device).requires_grad_()

    @property
    def scales(self) -> list[Tensor]:
        """The parameters other than `weight`."""
        return [self.d] if self.m is None else [self.d, self.m]

    def value(self) -> Tensor:
        """The rounded matrix, float32 `[rows, n]`, differentiable."""
        step, base = (one[..., None] for one in self._scaled().steps())
        found: Tensor = _Rounding.apply(self.weight, step, base, self._start)  # type: ignore[no-untyped-call]
        return found.view(self.weight.shape)

    @torch.no_grad()
    def blocks(self) -> Blocks:
        """The same as it is stored: `dequantize` gives `value`, bit for bit."""
        now = self._scaled()
        level = _nearest(self._start.grid, _latent(self.weight, self._start)).view(self.weight.shape)
        m = None if now.m is None else now.m.half()
        return replace(now, codes=codes(now.grid, level), d=now.d.half(), m=m)

    def _scaled(self) -> Blocks:
        """The start with its scales as they are now: half floats in float32, differentiable."""
        start, d, m = self._start, self._start.d.float(), None
        if self.m is not None and start.m is not None:
            m = _half(start.m.float() + self.m * d * (start.grid.highest / 2))
        return replace(start, d=_half(d * (1 + self.d)), m=m)


class _Half(torch.autograd.Function):
    """The nearest finite half float; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(-HALF_MAX, HALF_MAX).half().float()

    @staticmethod
    def backward(ctx: Any, *by_value: Tensor) -> Tensor:
        return by_value[0]


def _half(x: Tensor) -> Tensor:
    found: Tensor = _Half.apply(x)  # type: ignore[no-untyped-call]
    return found


class _Rounding(torch.autograd.Function):
    """What has moved since `start`, with steps and bases `[rows, n / sub, 1]` → values `[rows, n / sub, sub]`.

    Rounds anew in the backward pass: nothing of a matrix's size is kept for it but the parameter.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, base: Tensor, start: Blocks) -> Tensor:
        ctx.save_for_backward(weight, step)
        ctx.start = start
        # In the order of `Blocks.dequantize`.
        return step * _nearest(start.grid, _latent(weight, start)) - base

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        (by_value,), (weight, step), grid = gradient, ctx.saved_tensors, ctx.start.grid
        latent, distance = _latent(weight, ctx.start), _distance(grid)
        # Beyond the last level by less than half a step a weight is not out of reach: many are at the end.
        within = (latent >= grid.lowest - distance / 2) & (latent <= grid.highest + distance / 2)
        by_weight = torch.where(within, by_value, 0.0) * (step * distance)
        by_step = (by_value * _nearest(grid, latent)).sum(-1, keepdim=True)
        return by_weight.view_as(weight), by_step, -by_value.sum(-1, keepdim=True), None


def _latent(weight: Tensor, start: Blocks) -> Tensor:
    """The levels at the start and how far they have moved, float32 `[rows, n / sub, sub]`."""
    grid, device = start.grid, start.codes.device
    if grid.levels is None:
        level = start.codes.float() - grid.offset
    else:
        level = torch.tensor(grid.levels, dtype=torch.float32, device=device)[start.codes.int()]
    return torch.add(level, weight, alpha=_distance(grid)).view(len(weight), -1, grid.sub)


def _nearest(grid: Grid, latent: Tensor) -> Tensor:
    """The nearest levels; with no −0, which no code stands for."""
    return levels(grid, latent, torch.ones_like(latent[:1, :1, :1]), None) + 0.0


def _distance(grid: Grid) -> float:
    """Mean distance between levels, in steps."""
    return (grid.highest - grid.lowest) / (len(grid.levels) - 1) if grid.levels else 1.0


class RoundedStudent:
    """The weights that are on grids are trained there; all others stay. A `Student`."""

    def __init__(
        self, model: Model, blocks: Sequence[Mapping[str, Blocks]], device: torch.device, dtype: torch.dtype
    ) -> None:
        """`blocks`: each layer's rounded weights by role."""
        self.model, self._dtype = model, dtype
        self._kept: list[Layer] = []
        self._rounded: list[dict[str, RoundedWeight]] = []
        for layer, known in zip(model.layers, blocks, strict=True):
            kept = {role: weight for role, weight in layer.items() if role not in known}
            self._kept.append({role: weight.to(device, torch.float32, copy=True) for role, weight in kept.items()})
            # A run that goes on may have them in another order.
            self._rounded.append({role: RoundedWeight(known[role], device) for role in sorted(known)})

    def parameters(self) -> list[Tensor]:
        """See `Student`."""
        return [one for weight in self._all() for one in (weight.weight, *weight.scales)]

    def groups(self) -> tuple[list[Tensor], list[Tensor]]:
        """The same apart, since they want other learning rates: weights, and scales."""
        return [weight.weight for weight in self._all()], [one for weight in self._all() for one in weight.scales]

    def layer(self, index: int) -> Layer:
        """See `Student`."""
        return lowered(self._layer(index), self._dtype)

    @torch.no_grad()
    def finished(self, index: int) -> Layer:
        """See `Student`."""
        return self._layer(index)

    def rounded(self, index: int) -> dict[str, Blocks]:
        """The weights of a layer that are on grids, as they are stored, on the CPU."""
        return {role: weight.blocks().to(torch.device("cpu")) for role, weight in self._rounded[index].items()}

    def _layer(self, index: int) -> Layer:
        return self._kept[index] | {role: weight.value() for role, weight in self._rounded[index].items()}

    def _all(self) -> list[RoundedWeight]:
        return [weight for layer in self._rounded for weight in layer.values()]

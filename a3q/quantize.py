"""Round the weights of a layer to the grids that a file stores, for the inputs that they will really see."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from a3q import ranks
from a3q.errors import InputError
from a3q.model import Layer
from a3q.solve.gptq import quantize
from a3q.solve.grid import Blocks, Grid
from a3q.solve.scales import HALF_MAX

_ROWS = 1 << 14
"""Rows that are rounded at once."""

Encoder = Callable[[Tensor, Grid, Tensor], Blocks]
"""Rounds a weight `[rows, n]` with the importance `[n]` of its inputs."""


@dataclass(frozen=True)
class Quantization:
    """Which weights are rounded to what, and how."""

    layers: Sequence[Mapping[str, Grid]]
    """Grid of each role of each layer; what is absent is not rounded."""
    top: Mapping[str, Grid] = field(default_factory=dict)
    """The same for `embed` and `output`."""
    nearest: Encoder | None = None
    """Rounds to the nearest, weighted by importance; None: GPTQ."""


@dataclass
class LayerRounding:
    """The rounding of one layer's weights, or of those outside the layers."""

    grids: Mapping[str, Grid]
    nearest: Encoder | None
    where: str
    """Names the place in errors."""
    blocks: dict[str, Blocks] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    """Share of each weight's output energy that rounding costs."""

    def apply(self, w: Layer, roles: Sequence[str], gram: Tensor) -> None:
        """Replace weights by their rounded values; they share inputs with moment `gram` `[n, n]`.

        InputError names the weights that cannot be rounded.
        """
        together: dict[Grid, list[str]] = defaultdict(list)
        for role in roles:
            if role in w and role in self.grids:
                together[self.grids[role]].append(role)
        for grid, names in together.items():
            weight = torch.cat([w[name] for name in names])
            where = f"{self.where}, {', '.join(names)}"
            _check(weight, gram, where)
            # Rows are independent: every process rounds its share, and not too many at once, since that takes memory.
            own = ranks.share(len(weight))
            # One row where none is left for this process: encoders and kernels expect some.
            parts = torch.split(weight[own] if own.stop > own.start else weight[:1], _ROWS)
            rounded = Blocks.joined([self._round(rows, gram, grid, where) for rows in parts])
            blocks = _of_all(rounded.rows(slice(own.stop - own.start)), len(weight))
            # As it is read back, bit for bit: a run that is continued goes on with what was stored.
            values = blocks.dequantize()
            if not bool(torch.isfinite(values).all()):
                raise InputError(f"{where}: too large for the half-float scales of {grid.name}; write bf16 or f32")
            loss = _loss(weight, values, gram)
            sizes = [len(w[name]) for name in names]
            for name, part, value in zip(names, blocks.split(sizes), torch.split(values, sizes), strict=True):
                self.blocks[name], self.losses[name] = part.to(torch.device("cpu")), loss
                w[name] = value

    def _round(self, rows: Tensor, gram: Tensor, grid: Grid, where: str) -> Blocks:
        if self.nearest is not None:
            return self.nearest(rows, grid, gram.diagonal()).to(rows.device)
        try:
            return quantize(rows, gram, grid).blocks
        except ValueError as error:
            raise InputError(f"{where}: {error}; more or other calibration text may help") from error


def _of_all(own: Blocks, rows: int) -> Blocks:
    """The whole matrix out of every process's rows."""
    tensors = own.tensors().items()
    return Blocks.of(own.grid, {name: ranks.joined_rows(value, rows) for name, value in tensors})


def _check(weight: Tensor, gram: Tensor, where: str) -> None:
    largest = float(weight.abs().max())
    if not math.isfinite(largest):
        raise InputError(f"{where}: holds values that are no numbers (NaN or infinite)")
    if largest > HALF_MAX:
        raise InputError(f"{where}: holds {largest:g}, too large for scales in half floats; write bf16 or f32")
    if not bool(torch.isfinite(gram).all()):
        raise InputError(f"{where}: its inputs on the calibration text are no numbers (NaN or infinite)")


def _loss(weight: Tensor, values: Tensor, gram: Tensor) -> float:
    """Share of the output energy `tr W H Wᵀ` that the error costs."""
    left, energy = weight - values, float((weight @ gram * weight).sum())
    return float((left @ gram * left).sum()) / energy if energy > 0 else 0.0

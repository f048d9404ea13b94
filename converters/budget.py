"""Which type each tensor of a GGUF file gets so that it stays within a size at the least predicted loss.

The loss of a tensor stored as a type is its cost (see `a3q.noise`) times the type's relative squared rounding error.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType
from torch import Tensor

from a3q.allocate import Curve, allocate
from a3q.errors import InputError
from a3q.model import Layer, Model
from a3q.noise import Costs, rounding_error
from a3q.solve.grid import GRIDS
from converters.assignment import RoundingError, Types
from converters.entries import Entry
from converters.types import TENSOR_TYPES, block_size

_T = GGMLQuantizationType
_ROWS = 64
"""Rows of a tensor whose rounding stands for all."""
_LEAST_SHARE = 1e-3
"""Least cost of a tensor, as a share of the mean: one that the probes happen not to touch is used by other texts."""


@dataclass(frozen=True)
class Limit:
    """How large a file may be: one of the two is given."""

    size: int | None = None
    """Bytes of the whole file."""
    bits: float | None = None
    """Mean storage of a weight, over all tensors whose type is free."""

    def __str__(self) -> str:
        return f"{self.size / 1e6:g} MB" if self.size is not None else f"{self.bits:g} bits per weight"


@dataclass(frozen=True)
class Chosen(Types):
    """Types that were chosen to fit a limit."""

    limit: Limit
    free: tuple[str, ...]
    """Names of the tensors whose type was free."""
    predicted_kl: float
    """KL divergence (nats) from the model before rounding to the nearest; what is rounded better comes out lower."""

    @property
    def notes(self) -> tuple[str, ...]:
        """How many tensors have which type, in words."""
        counts = Counter(self.kinds[name].name.lower() for name in self.free)
        parts = ", ".join(f"{kind} {count} tensor{'s' if count > 1 else ''}" for kind, count in counts.most_common())
        return (*super().notes, f"types under {self.limit}: {parts}")


def choose(entries: Sequence[Entry], costs: Costs, error: RoundingError, limit: Limit, overhead: int = 0) -> Chosen:
    """The type of each of `entries`, which are all of a file, within `limit` at the least predicted KL.

    Matrices take any type of `GRIDS` that their rows divide into, or F16; the rest, and positions, are F32. `overhead`:
    bytes of the file before its first tensor. InputError where not even the smallest types fit.
    """
    free = [entry for entry in entries if _is_free(entry)]
    fixed = [entry for entry in entries if not _is_free(entry)]
    curves, kinds = [], []
    for entry, cost in zip(free, _floored([costs.of(e.layer, (r.name for r in e.roles)) for e in free]), strict=True):
        losses = {kind: 0.0 if kind is _T.F16 else cost * error(entry, kind) for kind in _fitting(entry)}
        curve, by_size = _curve(entry, losses, limit)
        curves.append(curve)
        kinds.append(by_size)
    if limit.bits is not None:
        budget = math.floor(limit.bits * sum(entry.weights for entry in free) / 8)
    else:
        assert limit.size is not None
        budget = limit.size - overhead - sum(_stored(entry, _T.F32, limit) for entry in fixed)
    least = sum(curve.sizes[0] for curve in curves)
    if least > budget:
        raise InputError(_too_small(limit, least - budget, sum(entry.weights for entry in free)))
    sizes = allocate(curves, budget)
    chosen = {entry.name: by_size[size] for entry, by_size, size in zip(free, kinds, sizes, strict=True)}
    return Chosen(
        {entry.name: chosen.get(entry.name, _T.F32) for entry in entries},
        (),
        limit,
        tuple(chosen),
        sum(curve.loss_at(size) for curve, size in zip(curves, sizes, strict=True)),
    )


def _is_free(entry: Entry) -> bool:
    # llama.cpp's own programs leave positions as they are, too.
    return len(entry.shape) > 1 and all(role.name != "positions" for role in entry.roles)


def _fitting(entry: Entry) -> list[GGMLQuantizationType]:
    kinds = [*(TENSOR_TYPES[name] for name in GRIDS), _T.F16]
    return [kind for kind in kinds if entry.shape[-1] % block_size(kind) == 0]


def _floored(costs: list[float]) -> list[float]:
    least = _LEAST_SHARE * sum(costs) / max(1, len(costs))
    return [max(cost, least) for cost in costs]


def _curve(
    entry: Entry, losses: Mapping[GGMLQuantizationType, float], limit: Limit
) -> tuple[Curve, dict[int, GGMLQuantizationType]]:
    """Predicted loss by bytes, and the type that each number of bytes stands for: the best of that size."""
    by_size: dict[int, GGMLQuantizationType] = {}
    for kind, loss in losses.items():
        size = _stored(entry, kind, limit)
        if size not in by_size or loss < losses[by_size[size]]:
            by_size[size] = kind
    sizes = tuple(sorted(by_size))
    return Curve(sizes, tuple(losses[by_size[size]] for size in sizes), 1), by_size


def _stored(entry: Entry, kind: GGMLQuantizationType, limit: Limit) -> int:
    """Bytes that count: in a file each tensor is filled up to a multiple of the alignment."""
    size = entry.bytes(kind)
    alignment = 1 if limit.size is None else int(GGUF_DEFAULT_ALIGNMENT)
    return -(-size // alignment) * alignment


def _too_small(limit: Limit, missing: int, weights: int) -> str:
    """What to say where `missing` bytes more would be the smallest that is possible."""
    if limit.size is not None:
        return f"--size {limit}: the smallest possible file has {_megabytes(limit.size + missing)} MB"
    assert limit.bits is not None
    # `missing` follows from a budget rounded down, and what is named must do when given.
    least = math.ceil((math.floor(limit.bits * weights / 8) + missing) * 800 / weights) / 100
    return f"--bits {limit.bits:g}: the smallest possible is {least:g} bits per weight with the rows of this model"


def _megabytes(size: int) -> str:
    """Millions of bytes, rounded up to one decimal."""
    return f"{math.ceil(size / 100_000) / 10:g}"


@dataclass
class SampledError:
    """Rounding errors of the tensors of `model`, measured on a few of their rows; a `RoundingError`.

    `moved`: roles whose weights will no longer be those of `model` when they are rounded. If these lie on a grid
    already, as those of a quantized source do, it would look free of loss for them.
    """

    model: Model
    moved: frozenset[str] = frozenset()
    _layer: tuple[int, Layer] | None = field(default=None, init=False)

    def __call__(self, entry: Entry, kind: GGMLQuantizationType) -> float:
        """Relative squared error of `entry` as `kind`, one of `GRIDS`."""
        grid = GRIDS[kind.name.lower()]
        rows = torch.cat([self._sample(entry.layer, role.name, -(-_ROWS // len(entry.roles))) for role in entry.roles])
        # Reduced rows may divide into blocks that the source's own do not.
        return rounding_error(rows[:, : rows.shape[1] // grid.block * grid.block], grid)

    def _sample(self, layer: int | None, role: str, count: int) -> Tensor:
        """About `count` rows, evenly spaced; sums of two of them where they will be moved."""
        if layer is None:
            weight = self.model.output if role == "output" else self.model.top[role]
        else:
            if self._layer is None or self._layer[0] != layer:
                self._layer = layer, self.model.layers[layer]
            weight = self._layer[1][role]
        pick = torch.linspace(0, len(weight) - 1, min(count, len(weight))).long()
        rows = weight[pick].float()
        return rows + rows.roll(1, 0) if role in self.moved else rows

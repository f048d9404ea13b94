"""What rounding to a type is expected to cost, known before any weight is read.

A plan thereby settles the same types as the run that follows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from gguf.constants import GGMLQuantizationType

from a3q.noise import rounding_error
from a3q.solve.grid import GRIDS
from converters.entries import Entry

_SAMPLE = (64, 1024)


@dataclass(frozen=True)
class ExpectedError:
    """A `RoundingError` by type alone: that of normally distributed weights, and none for weights that already lie on
    the type's grid."""

    stored: Mapping[str, str]
    """GGML type name of each tensor of the source, by its name."""
    moved: frozenset[str]
    """Roles whose weights will no longer be the source's when they are rounded."""

    def __call__(self, entry: Entry, kind: GGMLQuantizationType) -> float:
        """Relative squared error of `entry` as `kind`, one of `GRIDS`."""
        if self.stored.get(entry.name) == kind.name and self.moved.isdisjoint(role.name for role in entry.roles):
            return 0.0
        return _of_normal_weights(kind.name.lower())


@cache
def _of_normal_weights(grid: str) -> float:
    sample = torch.randn(_SAMPLE, generator=torch.Generator().manual_seed(0))
    return rounding_error(sample, GRIDS[grid])

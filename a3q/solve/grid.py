"""The number formats that block quantization stores, as data: which values a weight may take, and what shares a scale.

A weight is `step · level − base`. `level` is its code less `offset`, or an entry of `levels`. Step and base are shared
by `sub` weights of a row; in the K formats they are small integers times two half floats, `d` and `m`, of a
super-block of `block` weights: `step = d · scale`, `base = m · min`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """One block format."""

    name: str
    """As ggml calls the type."""
    bits: int
    """Of a code."""
    block: int
    """Weights of a row that are stored together."""
    sub: int
    """Weights that share step and base; `block` unless the format has super-blocks."""
    offset: int = 0
    """A code stands for the level `code − offset`."""
    has_base: bool = False
    """Whether `base` may differ from 0."""
    scales: tuple[int, int] | None = None
    """Range of the integer scales of a super-block; None where `d` is the step itself."""
    mins: tuple[int, int] | None = None
    """Range of the integer minima of a super-block; None where `m` is the base itself."""
    levels: tuple[int, ...] | None = None
    """Level of each code where they are not evenly spaced."""
    spare: int = 0
    """Lowest codes that are not used."""
    zero: bool = False
    """`base` is `step` times a whole number from 0 to the highest code, kept in `Blocks.mins`, with no `m`."""

    @property
    def shifted(self) -> bool:
        """Whether levels need not lie about 0."""
        return self.has_base or self.zero

    @property
    def lowest(self) -> int:
        """The lowest level."""
        return self.levels[0] if self.levels else self.spare - self.offset

    @property
    def highest(self) -> int:
        """The highest level."""
        return self.levels[-1] if self.levels else (1 << self.bits) - 1 - self.offset


@dataclass
class Blocks:
    """A matrix `[rows, n]` on a grid. Scales that a format lacks are None."""

    grid: Grid
    codes: Tensor
    """uint8 `[rows, n]`."""
    d: Tensor
    """float16 `[rows, n / block]`."""
    m: Tensor | None
    """float16 `[rows, n / block]`; what is subtracted, so q4_1 and q5_1 store its negative."""
    scales: Tensor | None
    """int8 `[rows, n / sub]`."""
    mins: Tensor | None
    """uint8 `[rows, n / sub]`."""

    def steps(self) -> tuple[Tensor, Tensor]:
        """Step and base of every sub-block, float32 `[rows, n / sub]`; products as the runtime's own, in float32."""
        per = self.grid.block // self.grid.sub
        step = self.d.float().repeat_interleave(per, dim=1)
        if self.scales is not None:
            step = step * self.scales.float()
        if self.grid.zero:
            assert self.mins is not None
            return step, step * self.mins.float()
        if self.m is None:
            return step, torch.zeros_like(step)
        base = self.m.float().repeat_interleave(per, dim=1)
        return step, base if self.mins is None else base * self.mins.float()

    def tensors(self) -> dict[str, Tensor]:
        """The fields that the format has, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    @classmethod
    def of(cls, grid: Grid, tensors: Mapping[str, Tensor]) -> Blocks:
        """From the fields by name."""
        m, scales, mins = (tensors.get(name) for name in ("m", "scales", "mins"))
        return cls(grid, tensors["codes"], tensors["d"], m, scales, mins)

    def split(self, sizes: Sequence[int]) -> list[Blocks]:
        """Consecutive rows, `sizes` of them each."""
        ends = list(accumulate(sizes, initial=0))
        return [self.rows(slice(first, last)) for first, last in pairwise(ends)]

    def rows(self, rows: slice | Tensor) -> Blocks:
        """Some of the rows, by their indices in any order."""
        return Blocks.of(self.grid, {name: value[rows] for name, value in self.tensors().items()})

    @classmethod
    def joined(cls, parts: Sequence[Blocks]) -> Blocks:
        """The rows of all `parts`, which are on one grid."""
        together = {name: torch.cat([part.tensors()[name] for part in parts]) for name in parts[0].tensors()}
        return cls.of(parts[0].grid, together)

    def to(self, device: torch.device) -> Blocks:
        """The same on `device`."""
        return Blocks.of(self.grid, {name: value.to(device) for name, value in self.tensors().items()})

    def dequantize(self) -> Tensor:
        """The weights, float32 `[rows, n]`."""
        rows, n = self.codes.shape
        step, base = (one[..., None] for one in self.steps())
        level = self.codes.float() - self.grid.offset
        if self.grid.levels is not None:
            table = torch.tensor(self.grid.levels, dtype=torch.float32, device=self.codes.device)
            level = table[self.codes.int()]
        return (step * level.view(rows, -1, self.grid.sub) - base).view(rows, n)


_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_K_RANGE = (0, 63)

GRIDS: Mapping[str, Grid] = {
    grid.name: grid
    for grid in (
        Grid("q4_0", 4, 32, 32, offset=8),
        Grid("q4_1", 4, 32, 32, has_base=True),
        Grid("q5_0", 5, 32, 32, offset=16),
        Grid("q5_1", 5, 32, 32, has_base=True),
        # Runtimes multiply int8 by int8 and want them symmetric.
        Grid("q8_0", 8, 32, 32, offset=128, spare=1),
        Grid("iq4_nl", 4, 32, 32, levels=_IQ4_NL),
        Grid("q2_k", 2, 256, 16, has_base=True, scales=(0, 15), mins=(0, 15)),
        Grid("q3_k", 3, 256, 16, offset=4, scales=(-32, 31)),
        Grid("q4_k", 4, 256, 32, has_base=True, scales=_K_RANGE, mins=_K_RANGE),
        Grid("q5_k", 5, 256, 32, has_base=True, scales=_K_RANGE, mins=_K_RANGE),
        Grid("q6_k", 6, 256, 16, offset=32, scales=(-128, 127)),
    )
}
"""The GGUF types that a3q quantizes to by itself."""

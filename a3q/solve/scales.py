"""Choose the scales of one block so that the weighted squared rounding error is least.

For given levels the best step (and base) has a closed form, so a search over a few starting steps, each rounded once,
finds the levels, and the closed form the scales. Super-blocks then need whole numbers under two half floats: these are
found by turns, the numbers for given half floats and the half floats for given numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from a3q.solve.grid import Grid

HALF_MAX = 65504.0
TINY = 1e-30
"""Divides nothing that is not 0."""
_SYMMETRIC = (0.80, 1.35)
_ASYMMETRIC = (0.70, 1.10)
"""Range of starting steps over the one with which the extreme weights just fit, on grids without and with a base; for
symmetric grids, of their inverse."""
_STARTS = 16
"""Starting steps tried for each sub-block."""
_AGAIN = 6
"""The same when it is chosen anew inside its super-block."""
_FEW = 5
"""Bits of a code up to which the whole range is worth trying; each bit more halves what clipping can gain."""
_WIDE = 2.0
"""Times the range that 2 bits need."""
_FEWER = 3
"""Bits up to which it is worth trying whole when a sub-block is chosen anew, too; half of it does for more."""
_ROUNDS = 2
"""Turns between whole numbers and half floats."""
_NEAR = (0.88, 0.94, 1.0, 1.06, 1.12)
"""Integer scales tried when a sub-block is chosen anew, over the best one without rounding."""


@dataclass
class Scales:
    """Scales of one block: `d`, `m` `[R]` with half-float values; `scales`, `mins` `[S, R]` whole; all float32."""

    d: Tensor
    m: Tensor | None
    scales: Tensor | None
    mins: Tensor | None

    def of(self, grid: Grid, s: int) -> tuple[Tensor, Tensor | None]:
        """Step and base `[R]` of sub-block `s`."""
        step = self.d if self.scales is None else self.d * self.scales[s]
        if grid.zero:
            assert self.mins is not None
            return step, step * self.mins[s]
        if self.m is None:
            return step, None
        return step, self.m if self.mins is None else self.m * self.mins[s]


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is 0."""
    return torch.where(x == 0, 0.0, x.reciprocal())


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    nothing = b == 0
    return torch.where(nothing, 0.0, a / torch.where(nothing, 1.0, b))


def levels(grid: Grid, x: Tensor, step: Tensor, base: Tensor | None) -> Tensor:
    """Nearest levels of weights `x` for steps and bases that broadcast to it; level 0 where the step is 0."""
    inverse = _inverse(step)
    scaled = (x if base is None else x + base) * inverse
    if grid.levels is None:
        return scaled.round_().clamp_(grid.lowest, grid.highest)
    return _table(grid, x.device)[_codes_in_table(grid, scaled)]


class Rounding:
    """Rounds weights one column after another to the same steps and bases `[R]`."""

    def __init__(self, grid: Grid, step: Tensor, base: Tensor | None) -> None:
        self._grid, self._step, self._base = grid, step, base
        self._inverse = _inverse(step)
        self._shift = None if base is None else base * self._inverse

    def __call__(self, x: Tensor, level: Tensor, value: Tensor) -> None:
        """Put the nearest levels and values of weights `x` `[R]` into `level` and `value`."""
        grid = self._grid
        if self._shift is None:
            torch.mul(x, self._inverse, out=level)
        else:
            torch.addcmul(self._shift, x, self._inverse, out=level)
        if grid.levels is None:
            level.round_().clamp_(grid.lowest, grid.highest)
        else:
            level.copy_(_table(grid, x.device)[_codes_in_table(grid, level)])
        torch.mul(self._step, level, out=value)
        if self._base is not None:
            value -= self._base


@lru_cache(maxsize=8)
def _table(grid: Grid, device: torch.device) -> Tensor:
    return torch.tensor(grid.levels, dtype=torch.float32, device=device)


@lru_cache(maxsize=8)
def _boundaries(grid: Grid, device: torch.device) -> Tensor:
    table = _table(grid, device)
    return (table[1:] + table[:-1]) / 2


def _codes_in_table(grid: Grid, scaled: Tensor) -> Tensor:
    return torch.bucketize(scaled, _boundaries(grid, scaled.device))


def codes(grid: Grid, level: Tensor) -> Tensor:
    """uint8 codes of levels."""
    if grid.levels is None:
        return (level + grid.offset).to(torch.uint8)
    return _codes_in_table(grid, level).to(torch.uint8)


def search(grid: Grid, x: Tensor, weight: Tensor) -> Scales:
    """Scales for one block of weights `x` `[block, R]` with errors weighted by `weight` `[block]`."""
    x, weight = x.view(-1, grid.sub, x.shape[1]), _shares(weight).view(-1, grid.sub, 1)
    step, base = _free(grid, x, weight)
    if grid.zero:
        return _whole_zero(grid, x, weight, step[0], base[0])
    if grid.scales is None:
        return _halves(grid, x, weight, step[0], base[0] if grid.has_base else None)
    return _super(grid, x, weight, step, base)


def _shares(weight: Tensor) -> Tensor:
    """Weights of mean 1, so that sums of them are numbers of ordinary size; all alike where there are none."""
    mean = weight.mean()
    return torch.where(mean > 0, weight / mean.clamp_min(TINY), 1.0)


def _half(x: Tensor) -> Tensor:
    return x.clamp(-HALF_MAX, HALF_MAX).half().float()


def _free(grid: Grid, x: Tensor, weight: Tensor, again: bool = False) -> tuple[Tensor, Tensor]:
    """Best step and base `[S, R]` of each sub-block, any real numbers; base is 0 on grids without one."""
    best = torch.full((x.shape[0], x.shape[2]), -1.0, device=x.device)
    step, base = torch.zeros_like(best), torch.zeros_like(best)
    wx = weight * x
    for start, offset in _starts(grid, x, again):
        level = levels(grid, x, start[:, None], offset[:, None] if grid.shifted else None)
        s, b, gain = _fit(grid, x, weight, wx, level)
        better = gain > best
        best, step, base = (torch.where(better, new, old) for new, old in ((gain, best), (s, step), (b, base)))
    return step, base


def _starts(grid: Grid, x: Tensor, again: bool) -> list[tuple[Tensor, Tensor]]:
    """Starting steps and bases `[S, R]`."""
    low, high = x.amin(1), x.amax(1)
    found = []
    first, last = _ASYMMETRIC if grid.shifted else _SYMMETRIC
    count = _AGAIN if again else _STARTS
    width = _WIDE if grid.bits == 2 else 0.5 ** (max(0, grid.bits - _FEW) + (again and grid.bits > _FEWER))
    first, last = 1 - width * (1 - first), 1 + width * (last - 1)
    if grid.shifted:
        if grid.zero or grid.mins is not None:
            low = low.clamp_max(0)
        if grid.zero:
            high = high.clamp_min(0)
        for f in torch.linspace(first, last, count).tolist():
            found.append(((high - low) / grid.highest * f, -low * (f if f < 1 else 1.0)))
        return found
    extreme = torch.where(high > -low, high, low)
    # The levels reach one further down than up, so that the extreme weight may go to either end.
    for end, share in ((grid.lowest, 0.6), (grid.highest, 0.4)):
        for f in torch.linspace(first, last, round(share * count)).tolist():
            found.append((extreme / (end * f), extreme))
    return found


def _fit(grid: Grid, x: Tensor, weight: Tensor, wx: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For given levels: best step and base `[S, R]`, and by how much the weighted error is less than with all 0."""
    wl = weight * level
    ll, xl = (wl * level).sum(1), (wx * level).sum(1)
    plain = _ratio(xl, ll)
    gain = plain * xl
    if not (grid.shifted):
        return plain, torch.zeros_like(plain), gain
    w, sl, sx = weight.sum(1).expand_as(ll), wl.sum(1), wx.sum(1)
    determinant = w * ll - sl * sl
    solvable = determinant > 1e-6 * w * ll
    safe = torch.where(solvable, determinant, 1.0)
    # Where all weights have one level, the base alone holds them.
    mean = sx / w.clamp_min(TINY)
    step = torch.where(solvable, (w * xl - sl * sx) / safe, 0.0)
    offset = torch.where(solvable, (ll * sx - sl * xl) / safe, mean)
    if grid.mins is not None or grid.zero:
        allowed = offset <= 0
        step, offset = torch.where(allowed, step, plain), torch.where(allowed, offset, 0.0)
        return step, -offset, torch.where(allowed, step * xl + offset * sx, gain)
    return step, -offset, step * xl + offset * sx


def _halves(grid: Grid, x: Tensor, weight: Tensor, step: Tensor, base: Tensor | None) -> Scales:
    """Step and base of a block as half floats, each fitted once more to the levels that the other's rounding gives."""
    wx = weight * x
    for _ in range(_ROUNDS):
        level = levels(grid, x, step[None, None], None if base is None else base[None, None])
        step, offset, _ = (one[0] for one in _fit(grid, x, weight, wx, level))
        base = None if base is None else offset
    step = _half(step)
    if base is None:
        # Among the smallest half floats the next one is another size altogether.
        bits = step.half().view(torch.int16)
        best = _error(grid, x, weight, step, None)
        for shift in (-1, 1):
            near = (bits + shift).view(torch.float16).float()
            error = torch.where(torch.isfinite(near), _error(grid, x, weight, near, None), torch.inf)
            step, best = torch.where(error < best, near, step), torch.minimum(error, best)
    else:
        level = levels(grid, x, step[None, None], base[None, None])
        total = weight.sum()
        base = _half((weight * (step * level - x)).sum((0, 1)) / total.clamp_min(TINY))
    return Scales(step, base, None, None)


def _whole_zero(grid: Grid, x: Tensor, weight: Tensor, step: Tensor, base: Tensor) -> Scales:
    """Half-float step and a whole zero between the codes."""
    best = torch.full_like(step, torch.inf)
    chosen = Scales(step, None, None, torch.zeros_like(step)[None])
    top = float(grid.highest)
    ideal = _ratio(base, step)
    for shift in (-1.0, 0.0, 1.0):
        zero = (ideal + shift).round().clamp(0, top)
        s = step
        for _ in range(_ROUNDS):
            level = levels(grid, x, s, s * zero) - zero
            ll = (weight * level * level).sum((0, 1))
            s = _half(torch.where(ll > 0, (weight * x * level).sum((0, 1)) / ll.clamp_min(TINY), 0.0))
        error = _error(grid, x, weight, s, s * zero)
        better = error < best
        best = torch.where(better, error, best)
        assert chosen.mins is not None
        chosen = Scales(torch.where(better, s, chosen.d), None, None, torch.where(better, zero, chosen.mins[0])[None])
    return chosen


def _error(grid: Grid, x: Tensor, weight: Tensor, step: Tensor, base: Tensor | None) -> Tensor:
    """Weighted squared error `[…, R]`, summed over the weights and, where there is one, the sub-blocks in front."""
    level = levels(grid, x, step, base)
    left = step * level - x if base is None else step * level - base - x
    return (weight * left.square_()).sum((0, 1) if step.dim() == 1 else 1)


def _super(grid: Grid, x: Tensor, weight: Tensor, step: Tensor, base: Tensor) -> Scales:
    """Whole numbers and half floats for a super-block from the best free steps and bases `[S, R]`."""
    assert grid.scales is not None
    low, high = grid.scales
    if low < 0:
        extreme = torch.where(step.amax(0) > -step.amin(0), step.amax(0), step.amin(0))
        d = extreme / low
    else:
        d = step.amax(0) / high
    d = _half(d)
    m = _half(base.amax(0) / grid.mins[1]) if grid.mins is not None else None
    found = _integers(grid, x, weight, step, base, d, m)
    for _ in range(_ROUNDS):
        d, m = _refit_halves(grid, x, weight, found)
        found = _integers(grid, x, weight, step, base, d, m)
    return found


def _integers(grid: Grid, x: Tensor, weight: Tensor, step: Tensor, base: Tensor, d: Tensor, m: Tensor | None) -> Scales:
    """The integer scales and minima of all sub-blocks for given half floats, near the free steps and bases."""
    assert grid.scales is not None
    low, high = grid.scales
    ideal = _ratio(step, d)
    best = torch.full_like(step, torch.inf)
    scale, least = torch.zeros_like(step), torch.zeros_like(step)
    usable = None if m is None else _inverse(m)
    total = weight.sum(1)
    for f in _NEAR:
        whole = (ideal * f).round().clamp(low, high)
        s = d * whole
        if m is None or usable is None or grid.mins is None:
            error = _error(grid, x, weight, s[:, None], None)
            smallest = least
        else:
            smallest = (base * usable).round().clamp(*grid.mins)
            level = levels(grid, x, s[:, None], (m * smallest)[:, None])
            # The base that suits the levels, weighted mean of what it must make up for.
            wanted = (weight * (s[:, None] * level - x)).sum(1) / total.clamp_min(TINY)
            smallest = (wanted * usable).round().clamp(*grid.mins)
            error = _error(grid, x, weight, s[:, None], (m * smallest)[:, None])
        better = error < best
        best, scale, least = (
            torch.where(better, new, old) for new, old in ((error, best), (whole, scale), (smallest, least))
        )
    return Scales(d, m, scale, None if m is None else least)


def _refit_halves(grid: Grid, x: Tensor, weight: Tensor, found: Scales) -> tuple[Tensor, Tensor | None]:
    """The half floats that suit the levels and whole numbers, by least squares over the super-block."""
    assert found.scales is not None
    step = found.d * found.scales
    base = None if found.m is None or found.mins is None else found.m * found.mins
    level = levels(grid, x, step[:, None], None if base is None else base[:, None])
    a = found.scales[:, None] * level
    aa, ax = (weight * a * a).sum((0, 1)), (weight * a * x).sum((0, 1))
    if found.m is None or found.mins is None:
        return _half(torch.where(aa > 0, ax / aa.clamp_min(TINY), found.d)), None
    b = -found.mins[:, None].expand_as(a)
    bb, ab, bx = (weight * b * b).sum((0, 1)), (weight * a * b).sum((0, 1)), (weight * b * x).sum((0, 1))
    determinant = aa * bb - ab * ab
    solvable = determinant > 1e-6 * aa * bb
    safe = torch.where(solvable, determinant, 1.0)
    d = torch.where(solvable, (bb * ax - ab * bx) / safe, found.d)
    m = torch.where(solvable, (aa * bx - ab * ax) / safe, found.m)
    kept = solvable & (m >= 0) & (d > 0)
    return _half(torch.where(kept, d, found.d)), _half(torch.where(kept, m, found.m))


def refresh(grid: Grid, x: Tensor, weight: Tensor, found: Scales, s: int) -> None:
    """Choose scale and minimum of sub-block `s` of a super-block anew, for its present weights `x` `[sub, R]`."""
    assert found.scales is not None
    x, weight = x[None], _shares(weight).view(1, -1, 1)
    step, base = _free(grid, x, weight, again=True)
    new = _integers(grid, x, weight, step, base, found.d, found.m)
    assert new.scales is not None
    found.scales[s] = new.scales[0]
    if found.mins is not None and new.mins is not None:
        found.mins[s] = new.mins[0]

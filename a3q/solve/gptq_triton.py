# Triton has no stubs, its kernels no types, and it is not there everywhere.
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"
"""One block of GPTQ in few launches: Triton kernels that do what `a3q.solve.scales` and the loop over the columns of
`a3q.solve.gptq` do in thousands of operations on vectors, which stay the reference.

A program has `ROWS` rows of the matrix to itself and a sub-block's weights `[SUB, ROWS]` in registers. Where a rounding
is decided the arithmetic is PyTorch's; sums are in another order, so of scales that are all but equally good another
one may be chosen.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from a3q.solve import scales as plain
from a3q.solve.grid import Grid
from a3q.solve.scales import Scales

_ROWS = 8
"""Of a program, which is one warp: few, so that there are many of them."""
_PIECE = 32
"""Columns rounded in one launch at most; sub-blocks of more are done in pieces."""
_SUBS = (16, 32, 64, 128)
_MAGIC = tl.constexpr(1.5 * 2**23)
"""Added and subtracted again it leaves whole numbers, halves to even, as `torch.round` does; good up to 2²²."""
_TINY = tl.constexpr(plain.TINY)
_HALF_MAX = tl.constexpr(plain.HALF_MAX)


def fits(grid: Grid) -> bool:
    """Whether the kernels know the size of this grid's sub-blocks."""
    return grid.sub in _SUBS


@triton.jit
def _probe_kernel(found):
    tl.store(found, 1.0)


def probe() -> None:
    """OSError, RuntimeError or SubprocessError where Triton cannot build a kernel for the present GPU."""
    _probe_kernel[(1,)](torch.empty(1, device="cuda"), enable_fp_fusion=True)


@triton.jit
def _whole(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The nearest whole numbers from LOW to HIGH."""
    return tl.minimum(tl.maximum(x, LOW), HIGH) + _MAGIC - _MAGIC


@triton.jit
def _ratio(a, b):
    """a / b, and 0 where b is 0."""
    nothing = b == 0.0
    return tl.where(nothing, 0.0, tl.div_rn(a, tl.where(nothing, 1.0, b)))


@triton.jit
def _inverse(x):
    """1 / x, and 0 where x is 0."""
    return _ratio(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def _nearest(scaled, table, LOW: tl.constexpr, HIGH: tl.constexpr, LEVELS: tl.constexpr):
    """The nearest levels: whole numbers, or where there are LEVELS in the `table`, of those."""
    if LEVELS == 0:
        level = _whole(scaled, LOW, HIGH)
    else:
        level = tl.full(scaled.shape, LOW, tl.float32)
        for i in tl.static_range(LEVELS - 1):
            above = tl.load(table + i + 1)
            level = tl.where(scaled > (tl.load(table + i) + above) * 0.5, above, level)
    return level


@triton.jit
def _levels(x, step, base, table, LOW: tl.constexpr, HIGH: tl.constexpr, LEVELS: tl.constexpr):
    """`scales.levels` for `x` `[SUB, ROWS]`, `step` and `base` `[ROWS]`."""
    return _nearest((x + base[None, :]) * _inverse(step)[None, :], table, LOW, HIGH, LEVELS)


@triton.jit
def _error(x, weight, step, base, table, LOW: tl.constexpr, HIGH: tl.constexpr, LEVELS: tl.constexpr):
    """Weighted squared error `[ROWS]`."""
    left = step[None, :] * _levels(x, step, base, table, LOW, HIGH, LEVELS) - base[None, :] - x
    return tl.sum(weight * (left * left), 0)


@triton.jit
def _half(x):
    """The nearest half floats, as float32."""
    return tl.minimum(tl.maximum(x, -_HALF_MAX), _HALF_MAX).to(tl.float16).to(tl.float32)


@triton.jit
def _shares(weight, SUB: tl.constexpr):
    mean = tl.sum(weight, 0) / SUB
    return tl.where(mean > 0.0, weight / tl.maximum(mean, _TINY), 1.0)


@triton.jit
def _fit(x, weight, level, SHIFTED: tl.constexpr, BELOW: tl.constexpr):
    """`scales._fit`: for given levels the best step and base `[ROWS]`, and how much less the error is than with 0."""
    wx, wl = weight * x, weight * level
    ll, xl = tl.sum(wl * level, 0), tl.sum(wx * level, 0)
    step = _ratio(xl, ll)
    gain = step * xl
    base = tl.zeros_like(step)
    if SHIFTED:
        w, sl, sx = tl.sum(weight, 0), tl.sum(wl, 0), tl.sum(wx, 0)
        determinant = w * ll - sl * sl
        solvable = determinant > 1e-6 * w * ll
        safe = tl.where(solvable, determinant, 1.0)
        # Where all weights have one level, the base alone holds them.
        fitted = tl.where(solvable, (w * xl - sl * sx) / safe, 0.0)
        offset = tl.where(solvable, (ll * sx - sl * xl) / safe, sx / tl.maximum(w, _TINY))
        if BELOW:
            allowed = offset <= 0.0
            gain = tl.where(allowed, fitted * xl + offset * sx, gain)
            step, base = tl.where(allowed, fitted, step), tl.where(allowed, -offset, 0.0)
        else:
            gain = fitted * xl + offset * sx
            step, base = fitted, -offset
    return step, base, gain


@triton.jit
def _free(
    x, weight, table,
    LOW: tl.constexpr, HIGH: tl.constexpr, LEVELS: tl.constexpr,
    SHIFTED: tl.constexpr, BELOW: tl.constexpr, ZERO: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, DOWN: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """`scales._free`: the best step and base `[ROWS]` for weights `x` `[SUB, ROWS]` that count by `weight` `[SUB, 1]`.

    DOWN starts from FIRST to LAST, and without a base, where these fit the lowest level, UP more for the highest.
    """
    lowest, highest = tl.min(x, 0), tl.max(x, 0)
    if BELOW:
        lowest = tl.minimum(lowest, 0.0)
    if ZERO:
        highest = tl.maximum(highest, 0.0)
    extreme = tl.where(highest > -lowest, highest, lowest)
    best = tl.full(lowest.shape, -1.0, tl.float32)
    step, base = tl.zeros_like(best), tl.zeros_like(best)
    for i in range(DOWN + UP):
        if SHIFTED:
            f = FIRST + i * ((LAST - FIRST) / (DOWN - 1))
            offset = -lowest * tl.minimum(f, 1.0)
            inverse = _inverse((highest - lowest) / HIGH * f)
            level = _nearest((x + offset[None, :]) * inverse[None, :], table, LOW, HIGH, LEVELS)
        else:
            # The levels reach one further down than up, so that the extreme weight may go to either end.
            down = FIRST + i * ((LAST - FIRST) / (DOWN - 1))
            up = FIRST + (i - DOWN) * ((LAST - FIRST) / (UP - 1))
            inverse = _inverse(extreme / tl.where(i < DOWN, LOW * down, HIGH * up))
            level = _nearest(x * inverse[None, :], table, LOW, HIGH, LEVELS)
        new, shift, gain = _fit(x, weight, level, SHIFTED, BELOW)
        better = gain > best
        best, step, base = tl.where(better, gain, best), tl.where(better, new, step), tl.where(better, shift, base)
    return step, base


@triton.jit
def _integers(
    x, weight, step, base, d, m, table,
    LOW: tl.constexpr, HIGH: tl.constexpr, LEVELS: tl.constexpr, MINS: tl.constexpr,
    SCALE_LOW: tl.constexpr, SCALE_HIGH: tl.constexpr, MIN_LOW: tl.constexpr, MIN_HIGH: tl.constexpr,
    NEAR: tl.constexpr, APART: tl.constexpr, TRIED: tl.constexpr,
):  # fmt: skip
    """`scales._integers`: scale and minimum `[ROWS]` for half floats `d` and `m`, near a free step and base.

    TRIED scales from NEAR times the best one, each APART from the last.
    """
    ideal, usable = _ratio(step, d), _inverse(m)
    total = tl.maximum(tl.sum(weight, 0), _TINY)
    best = tl.full(step.shape, float("inf"), tl.float32)
    scale, least = tl.zeros_like(step), tl.zeros_like(step)
    for i in range(TRIED):
        whole = _whole(ideal * (NEAR + i * APART), SCALE_LOW, SCALE_HIGH)
        s = d * whole
        inverse = _inverse(s)
        smallest = tl.zeros_like(step)
        if MINS:
            shift = m * _whole(base * usable, MIN_LOW, MIN_HIGH)
            level = _nearest((x + shift[None, :]) * inverse[None, :], table, LOW, HIGH, LEVELS)
            # The base that suits the levels, weighted mean of what it must make up for.
            wanted = tl.sum(weight * (s[None, :] * level - x), 0) / total
            smallest = _whole(wanted * usable, MIN_LOW, MIN_HIGH)
            shift = m * smallest
            level = _nearest((x + shift[None, :]) * inverse[None, :], table, LOW, HIGH, LEVELS)
            left = s[None, :] * level - shift[None, :] - x
        else:
            level = _nearest(x * inverse[None, :], table, LOW, HIGH, LEVELS)
            left = s[None, :] * level - x
        error = tl.sum(weight * (left * left), 0)
        better = error < best
        best = tl.where(better, error, best)
        scale, least = tl.where(better, whole, scale), tl.where(better, smallest, least)
    return scale, least


@triton.jit
def _halves(
    x, weight, step, base, table, LOW: tl.constexpr, HIGH: tl.constexpr, LEVELS: tl.constexpr, SHIFTED: tl.constexpr,
    TURNS: tl.constexpr,
):  # fmt: skip
    """`scales._halves`: step and base as half floats."""
    for _ in range(TURNS):
        step, base, _gain = _fit(x, weight, _levels(x, step, base, table, LOW, HIGH, LEVELS), SHIFTED, False)
    step = _half(step)
    if SHIFTED:
        left = step[None, :] * _levels(x, step, base, table, LOW, HIGH, LEVELS) - x
        base = _half(tl.sum(weight * left, 0) / tl.maximum(tl.sum(weight, 0), _TINY))
    else:
        # Among the smallest half floats the next one is another size altogether.
        bits = step.to(tl.float16).to(tl.int16, bitcast=True)
        best = _error(x, weight, step, base, table, LOW, HIGH, LEVELS)
        for k in tl.static_range(2):
            near = (bits + (2 * k - 1)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            finite = tl.abs(near) <= _HALF_MAX
            error = _error(x, weight, tl.where(finite, near, 0.0), base, table, LOW, HIGH, LEVELS)
            better = finite & (error < best)
            step, best = tl.where(better, near, step), tl.where(better, error, best)
    return step, base


@triton.jit
def _whole_zero(
    x, weight, step, base, table, LOW: tl.constexpr, HIGH: tl.constexpr, LEVELS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """`scales._whole_zero`: half-float step and a whole zero between the codes."""
    ideal = _ratio(base, step)
    best = tl.full(step.shape, float("inf"), tl.float32)
    chosen, between = step, tl.zeros_like(step)
    for k in range(3):
        zero = _whole(ideal + (k - 1), 0.0, HIGH)
        s = step
        for _ in range(TURNS):
            level = _levels(x, s, s * zero, table, LOW, HIGH, LEVELS) - zero[None, :]
            ll, xl = tl.sum(weight * level * level, 0), tl.sum(weight * x * level, 0)
            s = _half(tl.where(ll > 0.0, xl / tl.maximum(ll, _TINY), 0.0))
        error = _error(x, weight, s, s * zero, table, LOW, HIGH, LEVELS)
        better = error < best
        best = tl.where(better, error, best)
        chosen, between = tl.where(better, s, chosen), tl.where(better, zero, between)
    return chosen, between


@triton.jit(do_not_specialize=["rows"])
def _search_kernel(
    T, weight, table, step, base, rows,
    SUB: tl.constexpr, ROWS: tl.constexpr, SUPER: tl.constexpr, TURNS: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, LEVELS: tl.constexpr,
    SHIFTED: tl.constexpr, BELOW: tl.constexpr, ZERO: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, DOWN: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Into `step` and `base` `[S, rows]` those of every sub-block of `T` `[S SUB, rows]`.

    Of super-blocks they are any real numbers, of other blocks half floats, and the base may be a whole zero.
    """
    s = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = row < rows
    column = s * SUB + tl.arange(0, SUB)
    x = tl.load(T + column[:, None] * rows + row[None, :], mask=own[None, :], other=0.0)
    w = tl.load(weight + column)[:, None]
    one, shift = _free(x, w, table, LOW, HIGH, LEVELS, SHIFTED, BELOW, ZERO, FIRST, LAST, DOWN, UP)
    if ZERO:
        one, shift = _whole_zero(x, w, one, shift, table, LOW, HIGH, LEVELS, TURNS)
    elif not SUPER:
        one, shift = _halves(x, w, one, shift, table, LOW, HIGH, LEVELS, SHIFTED, TURNS)
    tl.store(step + s * rows + row, one, mask=own)
    tl.store(base + s * rows + row, shift, mask=own)


@triton.jit(do_not_specialize=["rows"])
def _integers_kernel(
    T, weight, table, step, base, d, m, scale, least, rows,
    SUB: tl.constexpr, ROWS: tl.constexpr, SUPER: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, LEVELS: tl.constexpr, MINS: tl.constexpr,
    SCALE_LOW: tl.constexpr, SCALE_HIGH: tl.constexpr, MIN_LOW: tl.constexpr, MIN_HIGH: tl.constexpr,
    NEAR: tl.constexpr, APART: tl.constexpr, TRIED: tl.constexpr,
):  # fmt: skip
    """`_integers` of every sub-block of `T` `[S SUB, rows]`, into `scale` and `least` `[S, rows]`."""
    s = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = row < rows
    column = s * SUB + tl.arange(0, SUB)
    x = tl.load(T + column[:, None] * rows + row[None, :], mask=own[None, :], other=0.0)
    w = tl.load(weight + column)[:, None]
    here = s * rows + row
    free, shift = tl.load(step + here, mask=own, other=0.0), tl.load(base + here, mask=own, other=0.0)
    half = tl.load(d + row, mask=own, other=0.0)
    low = tl.zeros_like(half)
    if MINS:
        low = tl.load(m + row, mask=own, other=0.0)
    whole, smallest = _integers(
        x, w, free, shift, half, low, table, LOW, HIGH, LEVELS, MINS,
        SCALE_LOW, SCALE_HIGH, MIN_LOW, MIN_HIGH, NEAR, APART, TRIED,
    )  # fmt: skip
    tl.store(scale + here, whole, mask=own)
    if MINS:
        tl.store(least + here, smallest, mask=own)


@triton.jit(do_not_specialize=["rows"])
def _columns_kernel(
    T, U, u_row, u_column, inverse, weight, table, d, m, scale, least, values, levels, errors, rows,
    SUB: tl.constexpr, ROWS: tl.constexpr, SUPER: tl.constexpr, HAS_M: tl.constexpr, AGAIN: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, LEVELS: tl.constexpr,
    SHIFTED: tl.constexpr, BELOW: tl.constexpr, ZERO: tl.constexpr, MINS: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, DOWN: tl.constexpr, UP: tl.constexpr,
    SCALE_LOW: tl.constexpr, SCALE_HIGH: tl.constexpr, MIN_LOW: tl.constexpr, MIN_HIGH: tl.constexpr,
    NEAR: tl.constexpr, APART: tl.constexpr, TRIED: tl.constexpr,
):  # fmt: skip
    """Round columns `T` `[SUB, rows]` of one sub-block one after another; AGAIN: after choosing its scale anew."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = row < rows
    column = tl.arange(0, SUB)
    x = tl.load(T + column[:, None] * rows + row[None, :], mask=own[None, :], other=0.0)
    step = tl.load(d + row, mask=own, other=0.0)
    base = tl.zeros_like(step)
    if HAS_M:
        base = tl.load(m + row, mask=own, other=0.0)
    if AGAIN:
        w = _shares(tl.load(weight + column), SUB)[:, None]
        free, shift = _free(x, w, table, LOW, HIGH, LEVELS, SHIFTED, BELOW, ZERO, FIRST, LAST, DOWN, UP)
        whole, smallest = _integers(
            x, w, free, shift, step, base, table, LOW, HIGH, LEVELS, MINS,
            SCALE_LOW, SCALE_HIGH, MIN_LOW, MIN_HIGH, NEAR, APART, TRIED,
        )  # fmt: skip
        tl.store(scale + row, whole, mask=own)
        step *= whole
        if MINS:
            tl.store(least + row, smallest, mask=own)
            base *= smallest
    else:
        if SUPER:
            step *= tl.load(scale + row, mask=own, other=0.0)
        if MINS:
            base *= tl.load(least + row, mask=own, other=0.0)
        if ZERO:
            base = step * tl.load(least + row, mask=own, other=0.0)
    usable = _inverse(step)
    shift = base * usable
    for j in range(SUB):
        weights = tl.sum(tl.where(column[:, None] == j, x, 0.0), 0)
        level = _nearest(tl.fma(weights, usable, shift), table, LOW, HIGH, LEVELS)
        value = step * level - base
        error = (weights - value) * tl.load(inverse + j)
        here = j * rows + row
        tl.store(levels + here, level, mask=own)
        tl.store(values + here, value, mask=own)
        tl.store(errors + here, error, mask=own)
        u = tl.load(U + j * u_row + column * u_column, mask=column > j, other=0.0)
        x -= u[:, None] * error[None, :]


_Constants = dict[str, Any]


@cache
def _constants(grid: Grid) -> _Constants:
    """What every kernel must know of a grid."""
    return {
        "LOW": float(grid.lowest),
        "HIGH": float(grid.highest),
        "LEVELS": len(grid.levels or ()),
        "SUPER": grid.scales is not None,
        "ROWS": _ROWS,
        "num_warps": 1,
        "enable_fp_fusion": True,
    }


@cache
def _starts(grid: Grid, again: bool) -> _Constants:
    """What `_free` must know, too; see `scales._starts`."""
    width = 0.5 ** (max(0, grid.bits - plain._FEW) + (again and grid.bits > plain._FEWER))
    if grid.bits == 2:
        width = plain._WIDE
    first, last = plain._ASYMMETRIC if grid.shifted else plain._SYMMETRIC
    count = plain._AGAIN if again else plain._STARTS
    return {
        "SHIFTED": grid.shifted,
        "BELOW": grid.zero or grid.mins is not None,
        "ZERO": grid.zero,
        "FIRST": 1 - width * (1 - first),
        "LAST": 1 + width * (last - 1),
        "DOWN": count if grid.shifted else round(0.6 * count),
        "UP": 0 if grid.shifted else round(0.4 * count),
    }


@cache
def _whole_numbers(grid: Grid) -> _Constants:
    """What `_integers` must know, too."""
    low, high = grid.scales or (0, 0)
    least, most = grid.mins or (0, 0)
    near = plain._NEAR
    return {
        "MINS": grid.mins is not None,
        "SCALE_LOW": float(low),
        "SCALE_HIGH": float(high),
        "MIN_LOW": float(least),
        "MIN_HIGH": float(most),
        "NEAR": near[0],
        "APART": (near[-1] - near[0]) / (len(near) - 1),
        "TRIED": len(near),
    }


@cache
def _table(grid: Grid, device: torch.device) -> Tensor:
    """Kept for good, since recorded graphs read it."""
    return torch.tensor(grid.levels or (0,), dtype=torch.float32, device=device)


def search(grid: Grid, x: Tensor, weight: Tensor) -> Scales:
    """`scales.search`."""
    subs, rows = len(x) // grid.sub, x.shape[1]
    weight, table = plain._shares(weight), _table(grid, x.device)
    step, base = (torch.empty(subs, rows, device=x.device) for _ in range(2))
    launch = (triton.cdiv(rows, _ROWS), subs)
    sizes = _constants(grid) | {"SUB": grid.sub}
    _search_kernel[launch](
        x, weight, table, step, base, rows, TURNS=plain._ROUNDS, **sizes, **_starts(grid, False)
    )  # fmt: skip
    if grid.scales is None:
        return Scales(step[0], base[0] if grid.has_base else None, None, base if grid.zero else None)

    def integers(d: Tensor, m: Tensor | None) -> Scales:
        found = Scales(d, m, torch.empty_like(step), None if m is None else torch.empty_like(step))
        _integers_kernel[launch](
            x, weight, table, step, base, d, m, found.scales, found.mins, rows, **sizes, **_whole_numbers(grid)
        )  # fmt: skip
        return found

    low, high = grid.scales
    extreme = step.amax(0) if low == 0 else torch.where(step.amax(0) > -step.amin(0), step.amax(0), step.amin(0))
    d = plain._half(extreme / (low or high))
    m = plain._half(base.amax(0) / grid.mins[1]) if grid.mins is not None else None
    parts, shares = x.view(subs, grid.sub, rows), weight.view(subs, grid.sub, 1)
    found = integers(d, m)
    for _ in range(plain._ROUNDS):
        found = integers(*plain._refit_halves(grid, parts, shares, found))
    return found


def round_columns(grid: Grid, T: Tensor, U: Tensor) -> tuple[Scales, Tensor, Tensor, Tensor]:
    """`gptq._round_columns`."""
    diagonal = U.diagonal()
    weight, inverse = diagonal.pow(-2), diagonal.reciprocal()
    scales = search(grid, T, weight)
    values, level, errors = torch.empty_like(T), torch.empty_like(T), torch.empty_like(T)
    rows, piece = T.shape[1], min(grid.sub, _PIECE)
    constants = _constants(grid) | _starts(grid, True) | _whole_numbers(grid)
    constants |= {"SUB": piece, "HAS_M": grid.has_base}
    for first in range(0, grid.block, piece):
        s, last = first // grid.sub, first + piece
        here = slice(first, last)
        _columns_kernel[(triton.cdiv(rows, _ROWS),)](
            T[here], U[here, here], *U.stride(), inverse[here], weight[here], _table(grid, T.device),
            scales.d, scales.m, *(None if one is None else one[s] for one in (scales.scales, scales.mins)),
            values[here], level[here], errors[here], rows, AGAIN=grid.scales is not None and s > 0, **constants,
        )  # fmt: skip
        if last < grid.block:
            T[last:].addmm_(U[here, last:].T, errors[here], alpha=-1)
    return scales, values, level, errors

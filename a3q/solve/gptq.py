"""GPTQ (arXiv 2210.17323) on the block grids of `a3q.solve.grid`: round column after column, each error made up for by
the columns that are still free.

The loss is `tr (W − Q) H (W − Q)ᵀ` with `H = E[xᵀx]`. A sweep needs `U` with `H⁻¹ = UᵀU`, U upper triangular: rounding
column j with error `e_j = (w_j − q_j) / U_jj` moves the later columns by `−e_j U_j,`, and the loss grows by `e_j²`. So
`1 / U_jj²` is what an error of column j really costs, and with these weights the scales of a block are chosen when the
sweep enters it. After the sweep each block is chosen once more with all the others fixed, which can only help.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from subprocess import SubprocessError
from typing import Any

import torch
from torch import Tensor

from a3q.graphs import recording
from a3q.solve.grid import Blocks, Grid
from a3q.solve.scales import Rounding, Scales, codes, refresh, search

DAMPING = 0.01
"""Added to H's diagonal, as a share of its mean."""
_LADDER = 10.0
"""Factor on the damping when H is not positive definite with it."""
_TRIES = 5
_CHUNK = 256
"""Columns after whose rounding the rest of the matrix is updated at once."""


@dataclass(frozen=True)
class Rounded:
    """A matrix on a grid."""

    blocks: Blocks
    weight: Tensor
    """The dequantized matrix, float32 `[rows, n]`."""


def damped(hessian: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """H with damping enough to be inverted, and U with `H⁻¹ = UᵀU`, float32 `[n, n]`.

    Dead inputs get the mean of the diagonal. ValueError where H holds no numbers or cannot be inverted.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the Hessian holds values that are no numbers")
    H = hessian.float().clone()
    diagonal = H.diagonal()
    mean = diagonal.mean()
    diagonal[diagonal <= 0] = torch.where(mean > 0, mean, 1.0)
    share = damping * float(diagonal.mean())
    for _ in range(_TRIES):
        D = H.clone()
        D.diagonal().add_(share)
        if (U := _inverse_factor(D)) is not None:
            return D, U
        share *= _LADDER
    raise ValueError("the Hessian is not positive definite, even with strong damping")


def _inverse_factor(H: Tensor) -> Tensor | None:
    """Upper triangular U with `H⁻¹ = UᵀU` for `[…, n, n]`; None where H is not positive definite.

    With rows and columns in reversed order the Cholesky factor of H is upper triangular, `H = R Rᵀ`, and U its inverse.
    """
    lower, failed = torch.linalg.cholesky_ex(H.flip(-2, -1))
    if bool(failed.any()):
        return None
    identity = torch.eye(H.shape[-1], device=H.device).expand_as(H)
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.flip(-2, -1)


def sweep_order(hessian: Tensor, grid: Grid) -> Tensor:
    """Columns in the order of their sweep: blocks, sub-blocks in them and columns in those by falling importance."""
    importance = hessian.diagonal()
    blocks = importance.view(-1, grid.block).sum(1).argsort(descending=True, stable=True)
    subs = importance.view(-1, grid.block // grid.sub, grid.sub).sum(2)[blocks]
    subs = subs.argsort(dim=1, descending=True, stable=True) + blocks[:, None] * (grid.block // grid.sub)
    columns = importance.view(-1, grid.sub)[subs.flatten()].argsort(dim=1, descending=True, stable=True)
    return (columns + subs.flatten()[:, None] * grid.sub).flatten()


def quantize(weight: Tensor, hessian: Tensor, grid: Grid, passes: int = 1, damping: float = DAMPING) -> Rounded:
    """`weight` `[rows, n]` on `grid`, n a multiple of its block, for inputs with moment `hessian` `[n, n]`.

    `passes`: times that every block is chosen anew after the sweep. ValueError for values that are no numbers.
    """
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("holds values that are no numbers")
    order = sweep_order(hessian, grid)
    H, U = damped(hessian[order][:, order], damping)
    # Columns of the matrix are rows here, since the sweep works on one at a time.
    W = weight.float().T[order].contiguous()
    state = _State(grid, W)
    _sweep(W.clone(), U, state)
    for _ in range(passes):
        _choose_anew(W, H, state)
    back = order.argsort()
    return Rounded(state.blocks(back), state.values[back].T.contiguous())


def nearest(weight: Tensor, grid: Grid, importance: Tensor) -> Blocks:
    """`weight` `[rows, n]` on `grid`, each weight by itself; errors count by `importance` `[n]` of their column."""
    W = weight.float().T.contiguous()
    state = _State(grid, W)
    for b in range(len(W) // grid.block):
        here = slice(b * grid.block, (b + 1) * grid.block)
        scales = search(grid, W[here], importance[here])
        values, level = torch.empty_like(W[here]), torch.empty_like(W[here])
        for s in range(grid.block // grid.sub):
            rows = slice(s * grid.sub, (s + 1) * grid.sub)
            Rounding(grid, *scales.of(grid, s))(W[here][rows], level[rows], values[rows])
        state.keep(b, scales, values, level)
    return state.blocks(torch.arange(len(W), device=W.device))


class _State:
    """What is chosen so far, columns first and in the order of the sweep."""

    def __init__(self, grid: Grid, W: Tensor) -> None:
        (n, rows), device = W.shape, W.device
        self.grid = grid
        self.values = torch.zeros_like(W)
        self.codes = torch.zeros(n, rows, dtype=torch.uint8, device=device)
        self.d = torch.zeros(n // grid.block, rows, device=device)
        self.m = torch.zeros_like(self.d) if grid.has_base else None
        subs = n // grid.sub
        self.scales = torch.zeros(subs, rows, device=device) if grid.scales else None
        self.mins = torch.zeros(subs, rows, device=device) if grid.mins or grid.zero else None

    def keep(self, block: int, scales: Scales, values: Tensor, level: Tensor, where: Tensor | None = None) -> None:
        """Take over a block's scales, values and levels `[block, R]`; only of the rows `where`, if given."""
        grid = self.grid
        columns = slice(block * grid.block, (block + 1) * grid.block)
        subs = slice(columns.start // grid.sub, columns.stop // grid.sub)
        pairs = [
            (self.values[columns], values),
            (self.codes[columns], codes(grid, level)),
            (self.d[block], scales.d),
            *((old[block], new) for old, new in ((self.m, scales.m),) if old is not None and new is not None),
            *(
                (old[subs], new)
                for old, new in ((self.scales, scales.scales), (self.mins, scales.mins))
                if old is not None and new is not None
            ),
        ]
        for old, new in pairs:
            old.copy_(new if where is None else torch.where(where, new, old))

    def blocks(self, back: Tensor) -> Blocks:
        """As stored, with columns in the matrix's own order; `back` says where each column stands in the sweep."""
        grid = self.grid

        def stored(x: Tensor | None, size: int, dtype: torch.dtype) -> Tensor | None:
            return None if x is None else x[back[::size] // size].T.contiguous().to(dtype)

        d = stored(self.d, grid.block, torch.float16)
        assert d is not None
        return Blocks(
            grid,
            self.codes[back].T.contiguous(),
            d,
            stored(self.m, grid.block, torch.float16),
            stored(self.scales, grid.sub, torch.int8),
            stored(self.mins, grid.sub, torch.uint8),
        )


_Found = tuple[Scales, Tensor, Tensor, Tensor]


def _round_block(grid: Grid, T: Tensor, U: Tensor) -> _Found:
    """Round one block `T` `[block, R]`: its scales, values, levels, and errors over `U_jj`."""
    if T.is_cuda:
        return _recorded(grid, T.shape[1], T.device)(T, U)
    return _round_columns(grid, T.clone(), U)


def _round_columns(grid: Grid, T: Tensor, U: Tensor) -> _Found:
    """The same, with `T` used up."""
    if T.is_cuda and (own := kernels()) is not None and own.fits(grid):
        found: _Found = own.round_columns(grid, T, U)
        return found
    diagonal = U.diagonal()
    weight, inverse = diagonal.pow(-2), diagonal.reciprocal()
    scales = search(grid, T, weight)
    values, level, errors = torch.empty_like(T), torch.empty_like(T), torch.empty_like(T)
    for s in range(grid.block // grid.sub):
        first, last = s * grid.sub, (s + 1) * grid.sub
        if grid.scales is not None and s > 0:
            refresh(grid, T[first:last], weight[first:last], scales, s)
        step, base = scales.of(grid, s)
        rounding = Rounding(grid, step, base)
        for j in range(first, last):
            rounding(T[j], level[j], values[j])
            torch.sub(T[j], values[j], out=errors[j]).mul_(inverse[j])
            if j + 1 < last:
                T[j + 1 : last].addr_(U[j, j + 1 : last], errors[j], alpha=-1)
        if last < grid.block:
            T[last:].addmm_(U[first:last, last:].T, errors[first:last], alpha=-1)
    return scales, values, level, errors


@cache
def kernels() -> Any:
    """`a3q.solve.gptq_triton`, where Triton is installed and finds the C compiler that it wants on a GPU; else None."""
    try:
        from a3q.solve import gptq_triton

        gptq_triton.probe()
    except (ImportError, OSError, RuntimeError, SubprocessError):
        return None
    return gptq_triton


class _Recorded:
    """`_round_columns` as one CUDA graph: its many tiny kernels take longer to launch than to run."""

    def __init__(self, grid: Grid, rows: int, device: torch.device) -> None:
        self._grid = grid
        self._T = torch.zeros(grid.block, rows, device=device)
        self._U = torch.eye(grid.block, device=device)
        stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            # Libraries set themselves up in a first run, which cannot be recorded.
            self._run()
        torch.cuda.current_stream(device).wait_stream(stream)
        with recording() as self._graph:
            self._found = self._run()

    def _run(self) -> _Found:
        return _round_columns(self._grid, self._T, self._U)

    def __call__(self, T: Tensor, U: Tensor) -> _Found:
        """Like `_round_block`; the result is good until the next call."""
        self._T.copy_(T)
        self._U.copy_(U)
        self._graph.replay()
        return self._found


@lru_cache(maxsize=8)
def _recorded(grid: Grid, rows: int, device: torch.device) -> _Recorded:
    return _Recorded(grid, rows, device)


def _sweep(W: Tensor, U: Tensor, state: _State) -> None:
    """GPTQ's sweep over `W` `[n, R]`, which is used up."""
    grid, n = state.grid, len(W)
    chunk = max(_CHUNK, grid.block)
    for begin in range(0, n, chunk):
        end = min(begin + chunk, n)
        errors = torch.empty_like(W[begin:end])
        for first in range(begin, end, grid.block):
            last = first + grid.block
            scales, values, level, error = _round_block(grid, W[first:last], U[first:last, first:last])
            state.keep(first // grid.block, scales, values, level)
            errors[first - begin : last - begin] = error
            W[last:end].addmm_(U[first:last, last:end].T, error, alpha=-1)
        W[end:].addmm_(U[begin:end, end:].T, errors, alpha=-1)


def _choose_anew(W: Tensor, H: Tensor, state: _State) -> None:
    """Give each block in turn the values that suit all the others best, row by row where that is better."""
    grid, n = state.grid, len(W)
    own = torch.stack([H[i : i + grid.block, i : i + grid.block] for i in range(0, n, grid.block)])
    factors = _inverse_factor(own)
    if factors is None:
        return
    gradient = H @ (W - state.values)
    for b, (H_b, U_b) in enumerate(zip(own, factors, strict=True)):
        here = slice(b * grid.block, (b + 1) * grid.block)
        now = state.values[here].clone()
        left = U_b.T @ (U_b @ gradient[here])
        best = now + left
        scales, values, level, _ = _round_block(grid, best, U_b)
        new = best - values
        better = (new * (H_b @ new)).sum(0) < (left * gradient[here]).sum(0)
        state.keep(b, scales, values, level, better)
        gradient.addmm_(H[:, here], state.values[here] - now, alpha=-1)

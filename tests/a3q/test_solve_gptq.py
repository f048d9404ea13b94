"""GPTQ on grids, against a plain reference in float64, and what its result promises."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from gguf import quants
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from a3q.solve.gptq import Rounded, damped, nearest, quantize, sweep_order
from a3q.solve.grid import GRIDS, Grid
from a3q.solve.scales import Rounding, refresh, search
from converters.ggml_pack import pack
from converters.gptq import gptq_grid
from tests.a3q.test_solve_grid import ALL, EVERY, called

ONE_LEVEL = [grid for grid in ALL if grid.scales is None and grid.block == 32]


@lru_cache
def problem(rows: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights, and the moment of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator) / n**0.5 + torch.eye(n)
    x = torch.randn(3 * n, n, generator=generator) @ mix * torch.logspace(-0.5, 0.5, n)[torch.randperm(n)]
    return torch.randn(rows, n, generator=generator) * 0.05, x.T @ x / len(x)


def loss(weight: Tensor, values: Tensor, H: Tensor) -> Tensor:
    """Of each row."""
    left = (weight - values).double()
    return (left @ H.double() * left).sum(1)


def reference(weight: Tensor, hessian: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Codes and values, column by column, with an inverse Hessian from which each column done is eliminated."""
    order = sweep_order(hessian, grid)
    H = hessian.double()[order][:, order]
    H += 0.01 * H.diagonal().mean() * torch.eye(len(H))
    T, inverse = weight.double().T[order].contiguous(), torch.linalg.inv(H)
    codes, values = torch.zeros(T.shape, dtype=torch.uint8), torch.zeros_like(T)
    for first in range(0, len(T), grid.block):
        ahead, costs = inverse[first : first + grid.block, first : first + grid.block].clone(), []
        for j in range(grid.block):
            costs.append(1 / ahead[j, j])
            ahead -= torch.outer(ahead[:, j], ahead[j]) / ahead[j, j]
        weights = torch.stack(costs).float()
        scales = search(grid, T[first : first + grid.block].float(), weights)
        for j in range(first, first + grid.block):
            s, within = divmod(j - first, grid.sub)
            if within == 0 and s > 0 and grid.scales is not None:
                refresh(grid, T[j : j + grid.sub].float(), weights[j - first : j - first + grid.sub], scales, s)
            step, base = scales.of(grid, s)
            level = torch.tensor(grid.levels or range(grid.lowest, grid.highest + 1), dtype=torch.float64)
            possible = step.double()[:, None] * level - (0 if base is None else base.double()[:, None])
            chosen = (possible - T[j][:, None]).abs().argmin(1)
            codes[j] = chosen.to(torch.uint8)
            values[j] = possible.gather(1, chosen[:, None])[:, 0]
            error = (T[j] - values[j]) / inverse[j, j]
            T[j + 1 :] -= inverse[j + 1 :, j, None] * error
            inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    back = order.argsort()
    return codes[back].T, values[back].T


@pytest.mark.parametrize(
    "grid",
    [GRIDS[name] for name in ("q4_0", "q4_1", "iq4_nl", "q2_k", "q3_k", "q4_k")] + [gptq_grid(4, 32, False)],
    ids=called,
)
def test_the_sweep_is_column_by_column_elimination(grid: Grid) -> None:
    weight, H = problem(12, max(96, 2 * grid.block))
    found = quantize(weight, H, grid, passes=0)
    codes, values = reference(weight, H, grid)
    same = (found.blocks.codes == codes).double().mean(1)
    # Where two starting steps are all but equally good, float32 may choose the other, and all that follows differs.
    assert float((same > 0.995).double().mean()) > 0.75
    assert float(loss(weight, found.weight, H).sum()) == pytest.approx(float(loss(weight, values, H).sum()), rel=1e-2)


@EVERY
def test_better_than_rounding_and_no_pass_makes_it_worse(grid: Grid) -> None:
    weight, H = problem(16, 2 * grid.block)
    D = damped(H)[0]
    plain = loss(weight, nearest(weight, grid, D.diagonal()).dequantize(), D)
    losses = [loss(weight, quantize(weight, H, grid, passes).weight, D) for passes in range(4)]
    assert float(losses[0].sum()) < 0.9 * float(plain.sum())
    for before, after in pairwise(losses):
        assert bool((after <= before * (1 + 1e-4)).all()), "every row of its own"
    assert float(losses[1].sum()) < 0.995 * float(losses[0].sum())


@pytest.mark.parametrize("grid", ONE_LEVEL, ids=called)
def test_without_correlation_it_is_rounding(grid: Grid) -> None:
    weight, _ = problem(16, 96)
    diagonal = torch.rand(96, generator=torch.Generator().manual_seed(1)) + 0.1
    D = damped(diagonal.diag())[0]
    rounded = nearest(weight, grid, D.diagonal())
    plain = float(loss(weight, rounded.dequantize(), D).sum())
    for passes in (0, 2):
        found = quantize(weight, diagonal.diag(), grid, passes)
        # With 256 levels many steps are all but equally good.
        assert float((found.blocks.codes == rounded.codes).double().mean()) > (0.9 if grid.bits == 8 else 0.98)
        assert float(loss(weight, found.weight, D).sum()) == pytest.approx(plain, rel=5e-3)


@pytest.mark.parametrize("name", GRIDS)
def test_the_runtime_reads_the_very_same_weights(name: str) -> None:
    weight, H = problem(16, 512)
    found = quantize(weight, H, GRIDS[name])
    read = quants.dequantize(pack(found.blocks), GGMLQuantizationType[name.upper()])
    np.testing.assert_array_equal(found.weight.numpy(), read)


@EVERY
def test_weight_and_blocks_agree(grid: Grid) -> None:
    for rows, n in ((1, grid.block), (3, 3 * grid.block), (2, 256 + grid.block)):
        weight, H = problem(rows, n)
        found = quantize(weight, H, grid)
        assert found.weight.shape == found.blocks.codes.shape == (rows, n)
        assert torch.equal(found.weight, found.blocks.dequantize())
        assert int(found.blocks.codes.max()) < 1 << grid.bits
        if grid.zero:
            assert found.blocks.mins is not None and int(found.blocks.mins.max()) <= grid.highest


def test_rows_are_independent() -> None:
    weight, H = problem(12, 288)
    whole, one = quantize(weight, H, GRIDS["q4_0"]), quantize(weight[7:8], H, GRIDS["q4_0"])
    assert float((whole.blocks.codes[7:8] == one.blocks.codes).double().mean()) > 0.99


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of the matrix is updated once a chunk; one of all columns and one of a block are the same."""
    weight, H = problem(8, 320)
    found: list[Rounded] = []
    for chunk in (32, 256, 1024):
        monkeypatch.setattr("a3q.solve.gptq._CHUNK", chunk)
        found.append(quantize(weight, H, GRIDS["q4_0"], passes=0))
    for other in found[1:]:
        assert float((other.blocks.codes == found[0].blocks.codes).double().mean()) > 0.99


def test_q8_0_has_no_code_0() -> None:
    """Runtimes want its levels symmetric."""
    weight, H = problem(64, 96)
    assert bool(quantize(weight, H, GRIDS["q8_0"]).blocks.codes.all())


def test_the_inverse_factor() -> None:
    _, H = problem(1, 96)
    D, U = damped(H)
    assert torch.equal(U, U.triu()) and bool((U.diagonal() > 0).all())
    exact = H.double() + 0.01 * H.double().diagonal().mean() * torch.eye(96)
    torch.testing.assert_close(D.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(U.double().T @ U.double() @ exact, torch.eye(96, dtype=torch.float64), rtol=0, atol=1e-4)


def test_dead_inputs_count_as_the_mean() -> None:
    _, H = problem(1, 64)
    H = H.clone()
    dead = [3, 40]
    H[dead], H[:, dead] = 0, 0
    D, U = damped(H)
    mean = float(H.diagonal().mean())
    assert U.isfinite().all()
    for j in dead:
        assert float(D[j, j]) == pytest.approx(mean * 1.01, rel=0.01)
        assert float(U[j, j]) == pytest.approx(float(D[j, j]) ** -0.5, rel=1e-4)
        assert not D[j, [i for i in range(64) if i != j]].any()


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "iq4_nl", "q3_k", "q4_k"])
@pytest.mark.parametrize("used", [0, 1, 16])
def test_few_used_inputs(name: str, used: int) -> None:
    """Of a layer with all inputs dead, too, the weights are kept: other text may use them."""
    grid = GRIDS[name]
    weight, H = problem(8, grid.block)
    H = H.clone()
    H[used:], H[:, used:] = 0, 0
    found = quantize(weight, H, grid)
    assert found.weight.isfinite().all()
    share = float((found.weight - weight).square().sum() / weight.square().sum())
    assert share < 0.06


@pytest.mark.parametrize("damping", [0.01, 0.0001])
def test_singular_hessians(damping: float) -> None:
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)) * 100
    D, U = damped(x.T @ x, damping)
    # Rounding of float32 is what is left.
    assert U.isfinite().all()
    torch.testing.assert_close(U.T @ U @ D, torch.eye(96), rtol=0, atol=0.05)


def test_more_damping_where_it_is_not_enough() -> None:
    """An eigenvalue of −0.5 of the mean diagonal: 0.01 and 0.1 do not do, 1 does."""
    H = torch.eye(64)
    H[0, 1] = H[1, 0] = 1.5
    D, U = damped(H)
    assert float(D[5, 5]) == pytest.approx(2.0) and U.isfinite().all()
    H[0, 1] = H[1, 0] = 1e6
    with pytest.raises(ValueError, match="not positive definite"):
        damped(H)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(bad: float) -> None:
    weight, H = problem(4, 32)
    for matrix, where in ((weight, "weight"), (H, "hessian")):
        broken = matrix.clone()
        broken[2, 2] = bad
        with pytest.raises(ValueError, match="no numbers"):
            quantize(*((broken, H) if where == "weight" else (weight, broken)), GRIDS["q4_0"])


@EVERY
def test_the_order_keeps_blocks_and_their_parts_together(grid: Grid) -> None:
    importance = torch.rand(3 * grid.block, generator=torch.Generator().manual_seed(0))
    order = sweep_order(importance.diag(), grid)
    assert torch.equal(order.sort().values, torch.arange(3 * grid.block))
    for size in (grid.block, grid.sub):
        parts = order.view(-1, size) // size
        assert bool((parts == parts[:, :1]).all())
        sums = importance[order].view(-1, size).sum(1).view(-1, 1 if size == grid.block else grid.block // grid.sub)
        falling = sums.flatten() if size == grid.block else sums
        assert bool((falling.diff(dim=-1) <= 1e-4).all())
    assert bool((importance[order].view(-1, grid.sub).diff(dim=1) <= 0).all())


def test_rounding_takes_the_nearest_level() -> None:
    for name in ("q4_1", "iq4_nl"):
        grid = GRIDS[name]
        x = torch.randn(50, generator=torch.Generator().manual_seed(0))
        step = torch.full_like(x, -0.02 if grid.levels else 0.2)
        base = None if grid.levels else torch.full_like(x, 1.3)
        level, value = torch.empty_like(x), torch.empty_like(x)
        Rounding(grid, step, base)(x, level, value)
        levels = torch.tensor(grid.levels or range(16), dtype=torch.float32)
        possible = step[:, None] * levels - (0 if base is None else base[:, None])
        torch.testing.assert_close((value - x).abs(), (possible - x[:, None]).abs().amin(1))

"""The Triton kernels against PyTorch: in Triton's interpreter, and compiled where there is a GPU."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from a3q.solve import gptq
from a3q.solve.gptq import damped, quantize
from a3q.solve.grid import GRIDS, Grid
from a3q.solve.scales import Rounding, Scales, codes, levels
from tests.a3q.test_solve_gptq import loss, problem
from tests.a3q.test_solve_grid import ALL, EVERY, called
from tests.interpreter import interpreted

pytest.importorskip("triton")

WHOLE = [GRIDS[name] for name in ("q4_0", "q4_1", "iq4_nl", "q4_k")] + [grid for grid in ALL if grid.zero][1:2]
"""Quantized from beginning to end."""
Results = dict[str, Any]


def one_block(grid: Grid) -> tuple[Tensor, Tensor]:
    """A block's weights and U, stored column by column; rows that fill no tile, the one of most grids a second one."""
    rows = 5 if grid.scales is not None and grid.name != "q4_k" else 11
    weight, H = problem(rows, grid.block)
    weight[2] = 0
    return weight.T.contiguous(), damped(H)[1].T.contiguous().T


def halves() -> Tensor:
    """What lies between two levels of a q8_0 with the step 1/64."""
    return ((torch.arange(32 * 7).view(32, 7) - 100) + 0.5) / 64


def run(device: str) -> Results:
    """What the kernels make of all that the tests look at, after what they were given."""
    from a3q.solve import gptq_triton

    found: Results = {}
    for grid in ALL:
        T, U = (x.to(device) for x in one_block(grid))
        found[called(grid)] = T, U, gptq_triton.round_columns(grid, T.clone(), U)
    patch = pytest.MonkeyPatch()
    with patch.context() as with_:
        with_.setattr(gptq, "_round_block", lambda grid, T, U: gptq_triton.round_columns(grid, T.clone(), U))
        for grid in WHOLE:
            weight, H = (x.to(device) for x in problem(11, grid.block, seed=1))
            found["whole " + called(grid)] = weight, H, quantize(weight, H, grid)
    with patch.context() as with_:
        T = halves().to(device)
        step = torch.full((T.shape[1],), 1 / 64, device=device)
        with_.setattr(gptq_triton, "search", lambda *_: Scales(step, None, None, None))
        found["halves"] = gptq_triton.round_columns(GRIDS["q8_0"], T, torch.eye(32, device=device))
    return found


@pytest.fixture(
    scope="module",
    params=[
        "interpreter",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")),
    ],
)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    if request.param == "cuda":
        return run("cuda")
    found: Results = interpreted("tests.a3q.test_gptq_triton", tmp_path_factory.mktemp("triton") / "results.pt")
    return found


@EVERY
def test_columns_are_rounded_one_after_another(grid: Grid, results: Results) -> None:
    """Whatever the scales: each column to the nearest levels, with the errors of those before made up for."""
    T, U, (scales, values, level, errors) = results[called(grid)]
    for s in range(grid.block // grid.sub):
        step, base = scales.of(grid, s)
        for j in range(s * grid.sub, (s + 1) * grid.sub):
            weights = (T[j].double() - U[:j, j].double() @ errors[:j].double()).float()
            expected, value = torch.empty_like(weights), torch.empty_like(weights)
            Rounding(grid, step, base)(weights, expected, value)
            # Elsewhere the sum decides.
            near = [levels(grid, weights + shift * step, step, base) == expected for shift in (-1e-3, 1e-3)]
            clear = near[0] & near[1] if j else torch.ones_like(near[0])
            assert torch.equal(level[j][clear], expected[clear])
            own = step * level[j]
            assert torch.equal(values[j], own if base is None else own - base)
            torch.testing.assert_close(errors[j], (weights - values[j]) / U[j, j], rtol=1e-3, atol=1e-5)
    assert int(codes(grid, level).max()) < 1 << grid.bits and (not grid.spare or bool(codes(grid, level).all()))


@EVERY
def test_scales_are_as_good(grid: Grid, results: Results) -> None:
    T, U, (scales, values, _, errors) = results[called(grid)]
    expected = gptq._round_columns(grid, T.cpu().clone(), U.cpu())
    assert {name for name, x in vars(scales).items() if x is None} == {
        name for name, x in vars(expected[0]).items() if x is None
    }
    for one in (scales.d, scales.m):
        assert one is None or torch.equal(one, one.half().float())
    for one, limits in ((scales.scales, grid.scales), (scales.mins, grid.mins or (0, grid.highest))):
        assert one is None or torch.equal(one, one.round().clamp(*limits or (0, 0)))
    errors, other = errors.cpu().square().sum(0), expected[3].square().sum(0)
    torch.testing.assert_close(errors.sum(), other.sum(), rtol=0.15 if grid.bits == 8 else 0.03, atol=0)
    same = torch.isclose(errors, other, rtol=1e-3)
    # Where two starts are all but equally good, sums in another order choose the other; of 256 levels more are.
    assert float(same.double().mean()) >= (0.5 if grid.bits == 8 else 0.75)
    assert not values[:, 2].any()


@pytest.mark.parametrize("grid", WHOLE, ids=called)
def test_a_matrix(grid: Grid, results: Results) -> None:
    weight, H, found = results["whole " + called(grid)]
    assert torch.equal(found.weight, found.blocks.dequantize())
    weight, H = weight.cpu(), H.cpu()
    expected = float(loss(weight, quantize(weight, H, grid).weight, H).sum())
    assert float(loss(weight, found.weight.cpu(), H).sum()) == pytest.approx(expected, rel=0.02)


def test_halves_go_to_the_even_level(results: Results) -> None:
    _, values, level, _ = results["halves"]
    expected = (halves() * 64).round().clamp(-127, 127)
    assert torch.equal(level.cpu(), expected) and torch.equal(values.cpu(), expected / 64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    own = gptq.kernels()
    assert own is not None
    used: list[str] = []

    def counted(grid: Grid, *args: Tensor) -> Any:
        used.append(grid.name)
        return round_columns(grid, *args)

    round_columns = own.round_columns
    monkeypatch.setattr(own, "round_columns", counted)
    gptq._recorded.cache_clear()
    for grid in ALL:
        weight, H = problem(100, 2 * grid.block)
        expected = float(loss(weight, quantize(weight, H, grid).weight, H).sum())
        found = quantize(weight.cuda(), H.cuda(), grid)
        assert torch.equal(found.weight, found.blocks.dequantize())
        assert float(loss(weight, found.weight.cpu(), H).sum()) == pytest.approx(expected, rel=0.02)
    assert set(used) == {grid.name for grid in ALL}


def test_without_a_compiler_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from a3q.solve import gptq_triton

    def probe() -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(gptq_triton, "probe", probe)
    gptq.kernels.cache_clear()
    assert gptq.kernels() is None
    gptq.kernels.cache_clear()


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.save(run("cpu"), sys.argv[1])

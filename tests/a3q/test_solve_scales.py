"""The search for block scales, against the plain rules, brute force and the awkward cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import quants
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from a3q.solve.gptq import nearest
from a3q.solve.grid import GRIDS, Blocks, Grid
from a3q.solve.scales import search
from tests.a3q.test_solve_grid import EVERY, SYMMETRIC, ZERO, called

N = 256
SIMPLE = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
"""Those that gguf encodes itself, by the extreme weights alone."""
EXACT = 1e-6
"""Share of the energy that half-float scales may cost where the levels could hold all weights."""


def cases(rows: int = 16, n: int = N) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def rand() -> Tensor:
        return torch.rand(rows, n, generator=generator)

    gauss = torch.randn(rows, n, generator=generator) * 0.02
    single = torch.zeros(rows, n)
    single[torch.arange(rows), torch.randint(n, (rows,), generator=generator)] = torch.randn(rows, generator=generator)
    sign = torch.where(rand() < 0.5, 1.0, -1.0)
    return {
        "gauss": gauss,
        "heavy": torch.where(rand() < 0.01, 100 * gauss, gauss),
        "positive": gauss.abs(),
        "negative": -gauss.abs(),
        "shifted up": gauss + 0.1,
        "shifted down": gauss - 0.1,
        "single": single,
        "equal": torch.full((rows, n), 0.37),
        "equal negative": torch.full((rows, n), -0.37),
        "equal per row": torch.randn(rows, 1, generator=generator).expand(rows, n).clone(),
        "two values": torch.where(rand() < 0.5, 0.3, -0.1),
        "tiny": gauss * 5e-6,
        "large": (2 * rand() - 1) * 65504,
        "largest": sign * 65504,
        "zeros": torch.zeros(rows, n),
    }


CASES = cases()


def even(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> Blocks:
    return nearest(weight, grid, torch.ones(weight.shape[1]) if importance is None else importance)


def lost(weight: Tensor, values: Tensor) -> float:
    """Share of the energy."""
    energy = float(weight.double().square().sum())
    return float((weight.double() - values.double()).square().sum()) / energy if energy else float(values.abs().sum())


def plain(weight: Tensor, grid: Grid) -> Tensor:
    """Rounding by the extreme weights of each block."""
    if grid.name in SIMPLE:
        kind = GGMLQuantizationType[grid.name.upper()]
        # gguf divides by steps of 0.
        with np.errstate(all="ignore"):
            return torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), kind), kind))
    x = weight.view(len(weight), -1, grid.block)
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    reach = (high - low) if grid.zero else x.abs().amax(-1, keepdim=True)
    step = (reach / grid.highest).half().float()
    inverse = torch.where(step > 0, 1 / step, 0.0)
    zero = (-low * inverse).round().clamp(0, grid.highest) if grid.zero else torch.zeros_like(low)
    return (step * ((x * inverse).round().add(zero).clamp(grid.lowest, grid.highest) - zero)).view_as(weight)


@EVERY
@pytest.mark.parametrize("case", CASES)
def test_finite_and_in_range(grid: Grid, case: str) -> None:
    blocks = even(CASES[case], grid)
    assert all(bool(field.isfinite().all()) for field in (*blocks.tensors().values(), blocks.dequantize()))
    assert int(blocks.codes.max()) < 1 << grid.bits
    found = lost(CASES[case], blocks.dequantize())
    assert found <= 1


@EVERY
def test_zeros_stay_zeros(grid: Grid) -> None:
    """In whole rows and in one block beside others."""
    assert not even(CASES["zeros"], grid).dequantize().any()
    if grid.block < N:
        weight = CASES["gauss"].clone()
        weight[:, : grid.block] = 0
        assert not even(weight, grid).dequantize()[:, : grid.block].any()


@pytest.mark.parametrize("grid", [GRIDS[name] for name in SIMPLE] + ZERO + SYMMETRIC, ids=called)
@pytest.mark.parametrize("case", CASES)
def test_no_worse_than_the_extreme_weights_alone(grid: Grid, case: str) -> None:
    weight = CASES[case]
    found, simple = lost(weight, even(weight, grid).dequantize()), lost(weight, plain(weight, grid))
    assert found <= simple * (1 + 1e-5) + EXACT


@pytest.mark.parametrize(
    ("name", "share"), [("q4_0", 0.92), ("q4_1", 0.85), ("q5_0", 0.95), ("q5_1", 0.85), ("q8_0", 0.99)]
)
def test_clearly_better_on_gaussian_weights(name: str, share: float) -> None:
    weight = CASES["gauss"]
    found, simple = lost(weight, even(weight, GRIDS[name]).dequantize()), lost(weight, plain(weight, GRIDS[name]))
    assert found < share * simple


@EVERY
@pytest.mark.parametrize("case", ["equal", "equal negative", "equal per row"])
def test_equal_weights_are_held_exactly(grid: Grid, case: str) -> None:
    found = lost(CASES[case], even(CASES[case], grid).dequantize())
    assert found < EXACT


@EVERY
def test_a_single_weight_is_held(grid: Grid) -> None:
    # One level of iq4_nl is never 0: the zeros beside it cost.
    found = lost(CASES["single"], even(CASES["single"], grid).dequantize())
    assert found < (5e-3 if grid.levels else 1e-5)


@EVERY
def test_the_scale_of_the_weights_does_not_matter(grid: Grid) -> None:
    """A power of two moves the half-float scales by as much, and nothing else."""
    weight = torch.randn(4, N, generator=torch.Generator().manual_seed(1))
    small, large = even(weight, grid), even(64 * weight, grid)
    assert torch.equal(small.codes, large.codes)
    # The steps of super-blocks may be subnormal.
    torch.testing.assert_close(64 * small.dequantize(), large.dequantize(), rtol=1e-4, atol=1e-3)


@EVERY
def test_the_scale_of_the_importances_does_not_matter(grid: Grid) -> None:
    """Activations may be small."""
    weight, importance = CASES["gauss"], torch.rand(N, generator=torch.Generator().manual_seed(1)) + 0.1
    assert torch.equal(even(weight, grid, importance).codes, even(weight, grid, importance * 2.0**-40).codes)


@EVERY
def test_importances_count(grid: Grid) -> None:
    weight = CASES["gauss"]
    importance = torch.ones(N)
    importance[::8] = 100.0

    def error(blocks: Blocks) -> float:
        return float(((blocks.dequantize() - weight).square() * importance).sum())

    heeded, ignored = error(even(weight, grid, importance)), error(even(weight, grid))
    assert heeded < (0.99 if grid.bits == 8 else 0.97) * ignored


@pytest.mark.parametrize("middle", [0.37, -0.37])
@pytest.mark.parametrize("name", [name for name, grid in GRIDS.items() if grid.has_base])
def test_a_base_holds_weights_that_are_almost_alike(name: str, middle: float) -> None:
    weight = middle + 0.1 * CASES["gauss"]
    found = lost(weight, even(weight, GRIDS[name]).dequantize())
    # The variance alone, were all weights put on one value; K grids have no base above 0 but enough levels.
    assert found < (1e-4 if middle < 0 or GRIDS[name].mins is None else 1e-3)


@pytest.mark.parametrize(
    "grid", [Grid("q2", 2, 32, 32, offset=2), GRIDS["q4_0"], GRIDS["iq4_nl"], GRIDS["q5_0"]], ids=called
)
def test_near_the_best_of_all_steps(grid: Grid) -> None:
    """Brute force over 4001 steps for each row, weighted; single rows may miss the best by more."""
    generator = torch.Generator().manual_seed(3)
    weight, importance = torch.randn(100, 32, generator=generator), torch.rand(32, generator=generator) + 0.05
    level = torch.tensor(grid.levels or range(grid.lowest, grid.highest + 1), dtype=torch.float32)
    found = float(((even(weight, grid, importance).dequantize() - weight).square() * importance).sum())
    best = 0.0
    for row in weight:
        most = 1.6 * row.abs().max() / min(-grid.lowest, grid.highest)
        steps = torch.linspace(-float(most), float(most), 4001)
        values = steps[:, None] * level
        best += float(((values[:, None, :] - row[:, None]).square().amin(-1) * importance).sum(1).min())
    assert 0.999 * best <= found <= (1.06 if grid.bits == 2 else 1.03) * best


@EVERY
def test_scales_are_half_floats_and_whole_numbers(grid: Grid) -> None:
    x = torch.randn(grid.block, 5, generator=torch.Generator().manual_seed(4))
    scales = search(grid, x, torch.ones(grid.block))
    for half in (scales.d, scales.m):
        assert half is None or torch.equal(half.half().float(), half)
    for whole in (scales.scales, scales.mins):
        assert whole is None or torch.equal(whole.round(), whole)
    for s in range(grid.block // grid.sub):
        step, base = scales.of(grid, s)
        assert step.shape == (5,) and (base is None) is not (grid.has_base or grid.zero)


@pytest.mark.parametrize("case", ["gauss", "heavy", "equal per row", "single", "largest"])
def test_q8_0_has_no_code_0(case: str) -> None:
    """Runtimes want its levels symmetric."""
    assert even(CASES[case], GRIDS["q8_0"]).codes.all()

"""Grids and `Blocks`: what codes and scales stand for, and that rows can be taken apart and put together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from a3q.solve.gptq import nearest
from a3q.solve.grid import GRIDS, Blocks, Grid
from converters.gptq import Form, gptq_grid, pack, unpack

SIZES = ((2, 128), (4, 32), (8, 128))
ZERO = [gptq_grid(*size, symmetric=False) for size in SIZES]
SYMMETRIC = [gptq_grid(*size, symmetric=True) for size in SIZES]
ALL = [*GRIDS.values(), *ZERO, *SYMMETRIC]


def called(grid: Grid) -> str:
    return f"{grid.name}-{grid.block}{'-zero' * grid.zero}"


EVERY = pytest.mark.parametrize("grid", ALL, ids=called)


def rounded(grid: Grid, rows: int = 6, n: int = 512, seed: int = 0) -> tuple[Tensor, Blocks]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, n, generator=generator) * 0.05 + 0.02
    return weight, nearest(weight, grid, torch.rand(n, generator=generator) + 0.1)


def by_hand(blocks: Blocks, row: int, column: int) -> float:
    """One weight from the fields, as the formats are described."""
    grid, sub, block = blocks.grid, column // blocks.grid.sub, column // blocks.grid.block
    code = int(blocks.codes[row, column])
    level = code - grid.offset if grid.levels is None else grid.levels[code]
    step, base = float(blocks.d[row, block]), 0.0
    if blocks.scales is not None:
        step *= int(blocks.scales[row, sub])
    if grid.zero:
        assert blocks.mins is not None
        base = step * int(blocks.mins[row, sub])
    elif blocks.m is not None:
        base = float(blocks.m[row, block]) * (1 if blocks.mins is None else int(blocks.mins[row, sub]))
    return step * level - base


@EVERY
def test_weights_are_what_the_fields_say(grid: Grid) -> None:
    weight, blocks = rounded(grid)
    found = blocks.dequantize()
    assert found.shape == weight.shape and found.dtype == torch.float32
    for row, column in ((0, 0), (5, 511), (3, 31), (2, 32), (1, 255), (4, 256), (2, 300)):
        assert float(found[row, column]) == pytest.approx(by_hand(blocks, row, column), rel=1e-5, abs=1e-7)


@EVERY
def test_fields_have_the_types_and_ranges_of_the_format(grid: Grid) -> None:
    _, blocks = rounded(grid)
    assert blocks.codes.dtype == torch.uint8 and int(blocks.codes.max()) < 1 << grid.bits
    assert blocks.d.dtype == torch.float16 and blocks.d.shape == (6, 512 // grid.block)
    assert (blocks.m is not None) is grid.has_base and (blocks.scales is not None) is (grid.scales is not None)
    if blocks.m is not None:
        assert blocks.m.dtype == torch.float16 and blocks.m.shape == blocks.d.shape
    for field, limits, dtype in (
        (blocks.scales, grid.scales, torch.int8),
        (blocks.mins, (0, grid.highest) if grid.zero else grid.mins, torch.uint8),
    ):
        assert (field is None) is (limits is None)
        if field is not None and limits is not None:
            assert field.dtype == dtype and field.shape == (6, 512 // grid.sub)
            assert limits[0] <= int(field.min()) and int(field.max()) <= limits[1]


@EVERY
def test_rows_come_apart_and_together(grid: Grid) -> None:
    _, blocks = rounded(grid)
    parts = blocks.split([1, 0, 3, 2])
    assert [len(part.codes) for part in parts] == [1, 0, 3, 2]
    assert torch.equal(parts[2].dequantize(), blocks.dequantize()[1:4])
    again = Blocks.of(grid, Blocks.joined(parts).to(torch.device("cpu")).tensors())
    assert again.grid is grid and again.tensors().keys() == blocks.tensors().keys()
    for name, field in blocks.tensors().items():
        assert torch.equal(again.tensors()[name], field) and again.tensors()[name].dtype == field.dtype


@pytest.mark.parametrize(
    ("name", "lowest", "highest"),
    [("q4_0", -8, 7), ("q5_1", 0, 31), ("iq4_nl", -127, 113), ("q3_k", -4, 3), ("q6_k", -32, 31)],
)
def test_levels_reach_from_to(name: str, lowest: int, highest: int) -> None:
    assert (GRIDS[name].lowest, GRIDS[name].highest) == (lowest, highest)


def test_all_levels_of_a_table_are_taken() -> None:
    grid = GRIDS["iq4_nl"]
    assert grid.levels is not None
    weight = torch.tensor([grid.levels], dtype=torch.float32).repeat(1, 2) / 64
    blocks = nearest(weight, grid, torch.ones(32))
    assert blocks.codes[0].tolist() == [*range(16), *range(16)]
    torch.testing.assert_close(blocks.dequantize(), weight)


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("grid", [*ZERO, *SYMMETRIC], ids=called)
def test_gptq_files_hold_the_blocks(grid: Grid, v2: bool) -> None:
    _, blocks = rounded(grid, rows=32)
    if grid.zero:
        assert blocks.mins is not None
        if not v2:
            # A zero point of 0 has no place there.
            kept = blocks.mins.clamp_min(1)
            blocks = Blocks(grid, blocks.codes, blocks.d, None, None, kept)
    back = unpack(pack(blocks, v2), Form(grid.bits, grid.block, v2), "here")
    assert torch.equal(back.dequantize(), blocks.dequantize())
    again = back.blocks()
    assert again is not None and again.grid == grid
    for name, field in blocks.tensors().items():
        assert torch.equal(again.tensors()[name], field)

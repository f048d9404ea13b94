"""ggml's bytes: both other decoders read from them what `Blocks` means, and nothing is lost either way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from a3q.solve.grid import GRIDS, Blocks, Grid
from converters.ggml_encode import decode, encode
from converters.ggml_pack import pack, unpack

SHAPES = [(1, 256), (7, 256), (3, 1280)]


def bits(array: NDArray[np.float32]) -> NDArray[np.int32]:
    """For comparisons in which 0 and −0 differ."""
    return array.view(np.int32)


def random_blocks(grid: Grid, rows: int, n: int) -> Blocks:
    """Every field over all that it can hold; half floats of every magnitude, subnormal ones among them."""
    rng = np.random.default_rng(rows * n)

    def integers(limits: tuple[int, int] | None, dtype: type) -> torch.Tensor | None:
        if limits is None:
            return None
        return torch.from_numpy(rng.integers(*limits, size=(rows, n // grid.sub), endpoint=True).astype(dtype))

    def halves() -> torch.Tensor:
        infinity = 0x7C00
        size = (rows, n // grid.block)
        patterns = rng.integers(infinity, size=size) | rng.integers(2, size=size) << 15
        patterns[0, 0] = rng.choice([0x0000, 0x8000, 0x0001, 0x7BFF])
        return torch.from_numpy(patterns.astype(np.uint16).view(np.float16))

    codes = torch.from_numpy(rng.integers(1 << grid.bits, size=(rows, n), dtype=np.uint8))
    m = halves() if grid.has_base else None
    return Blocks(grid, codes, halves(), m, integers(grid.scales, np.int8), integers(grid.mins, np.uint8))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", GRIDS)
def test_other_decoders_read_the_same_weights(name: str, shape: tuple[int, int]) -> None:
    kind = GGMLQuantizationType[name.upper()]
    blocks = random_blocks(GRIDS[name], *shape)
    data = pack(blocks)
    block, size = GGML_QUANT_SIZES[kind]
    assert data.dtype == np.uint8 and data.shape == (shape[0], shape[1] // block * size)
    weights = bits(blocks.dequantize().numpy())
    np.testing.assert_array_equal(weights, bits(quants.dequantize(data, kind)))
    np.testing.assert_array_equal(weights, bits(decode(data, kind)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", GRIDS)
def test_what_was_packed_comes_back(name: str, shape: tuple[int, int]) -> None:
    blocks = random_blocks(GRIDS[name], *shape)
    back = unpack(pack(blocks), GRIDS[name])
    assert back.grid is GRIDS[name]
    for field in ("codes", "d", "m", "scales", "mins"):
        meant, found = getattr(blocks, field), getattr(back, field)
        if meant is None:
            assert found is None
        else:
            assert found.dtype == meant.dtype
            assert torch.equal(found.view(torch.uint8), meant.view(torch.uint8)), field


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", GRIDS)
def test_bytes_of_ggml_s_encoders_survive(name: str, weighted: bool) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((5, 512)).astype(np.float32)
    weight[1], weight[2, :256] = 0, 0
    importance = rng.random(512).astype(np.float32) if weighted else None
    data = encode(weight, GGMLQuantizationType[name.upper()], importance)
    np.testing.assert_array_equal(pack(unpack(data, GRIDS[name])), data)


def test_what_is_not_ggml_s_is_refused() -> None:
    with pytest.raises(ValueError, match="not a format of ggml's"):
        unpack(np.zeros((1, 18), dtype=np.uint8), Grid("q3_0", 3, 32, 32))
    with pytest.raises(ValueError, match="19 bytes are not whole q4_0 blocks of 18"):
        unpack(np.zeros((1, 19), dtype=np.uint8), GRIDS["q4_0"])

"""Bytes of ggml's quantized tensors ↔ `Blocks`, bit by bit.

A block is a sequence of parts. Most are bit planes: some bits of every code or scale, several to a byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from a3q.solve.grid import Blocks, Grid

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class _Part:
    """Successive bytes of a block. Each holds one field's numbers `lanes` apart, the first in the lowest bits."""

    field: str
    """`codes`, `scales` (counted from the lowest possible, then the minima), or the bytes of `d` or `m`."""
    width: int
    """Bytes."""
    bits: int = 8
    """How many of each number's bits are here."""
    shift: int = 0
    """How many of its bits are below these."""
    lanes: int = 1
    flip: int = 0
    """Bits that are stored inverted: 128 turns a number counted from −128 into two's complement."""

    @property
    def _mask(self) -> np.uint8:
        return np.uint8((1 << self.bits) - 1)

    @property
    def _places(self) -> Bytes:
        """Lowest bit of each number of a byte, `[numbers of a byte, 1]`."""
        return np.arange(0, 8, self.bits, dtype=np.uint8)[:, None]

    def store(self, numbers: Bytes) -> Bytes:
        """`[blocks, numbers]` → `[blocks, width]`."""
        planes = (numbers >> np.uint8(self.shift) & self._mask).reshape(len(numbers), -1, 8 // self.bits, self.lanes)
        stored: Bytes = np.bitwise_or.reduce(planes << self._places, axis=2).reshape(len(numbers), self.width)
        return stored ^ np.uint8(self.flip)

    def load(self, stored: Bytes) -> Bytes:
        """`[blocks, width]` → `[blocks, numbers]`, with only the bits that are here."""
        lanes = (stored ^ np.uint8(self.flip)).reshape(len(stored), -1, 1, self.lanes)
        planes = lanes >> self._places & self._mask
        return planes.reshape(len(stored), -1) << np.uint8(self.shift)


_D, _M = _Part("d", 2), _Part("m", 2)
_NIBBLES = _Part("codes", 16, bits=4, lanes=16)
_FIFTH_BITS = _Part("codes", 4, bits=1, shift=4)
_K_SCALES = _Part("scales", 12)
_K_NIBBLES = _Part("codes", 128, bits=4, lanes=32)
_K_TWO_BITS = _Part("codes", 64, bits=2, lanes=32)

_SIX_BITS = (0, 63)

_LAYOUTS: Mapping[str, tuple[_Part, ...]] = {
    "q4_0": (_D, _NIBBLES),
    "q4_1": (_D, _M, _NIBBLES),
    "q5_0": (_D, _FIFTH_BITS, _NIBBLES),
    "q5_1": (_D, _M, _FIFTH_BITS, _NIBBLES),
    "q8_0": (_D, _Part("codes", 32, flip=128)),
    "iq4_nl": (_D, _NIBBLES),
    "q2_k": (_Part("scales", 16, bits=4, lanes=16), _K_TWO_BITS, _D, _M),
    "q3_k": (
        _Part("codes", 32, bits=1, shift=2, lanes=32),
        _K_TWO_BITS,
        _Part("scales", 8, bits=4, lanes=8),
        _Part("scales", 4, bits=2, shift=4, lanes=4),
        _D,
    ),
    "q4_k": (_D, _M, _K_SCALES, _K_NIBBLES),
    "q5_k": (_D, _M, _K_SCALES, _Part("codes", 32, bits=1, shift=4, lanes=32), _K_NIBBLES),
    "q6_k": (
        _Part("codes", 128, bits=4, lanes=64),
        _Part("codes", 64, bits=2, shift=4, lanes=32),
        _Part("scales", 16, flip=128),
        _D,
    ),
}


def pack(blocks: Blocks) -> Bytes:
    """The rows of a tensor as a GGUF file holds them, uint8 `[rows, bytes]`; ValueError: not one of ggml's formats."""
    layout = _layout(blocks.grid)
    fields = _fields(blocks)
    return np.concatenate([part.store(fields[part.field]) for part in layout], axis=1).reshape(len(blocks.codes), -1)


def unpack(data: Bytes, grid: Grid) -> Blocks:
    """What `pack` makes the bytes `[rows, bytes]` of; ValueError: not one of ggml's formats, or not whole blocks."""
    layout = _layout(grid)
    rows, size = data.shape
    width = sum(part.width for part in layout)
    if size % width:
        raise ValueError(f"rows of {size} bytes are not whole {grid.name} blocks of {width}")
    stored = np.split(data.reshape(-1, width), np.cumsum([part.width for part in layout])[:-1], axis=1)
    fields: dict[str, Bytes] = {}
    for part, its in zip(layout, stored, strict=True):
        numbers = part.load(its)
        fields[part.field] = fields[part.field] | numbers if part.field in fields else numbers
    return _blocks(fields, grid, rows)


def _layout(grid: Grid) -> tuple[_Part, ...]:
    if grid.name not in _LAYOUTS:
        raise ValueError(f"{grid.name} is not a format of ggml's")
    return _LAYOUTS[grid.name]


def _fields(blocks: Blocks) -> dict[str, Bytes]:
    """The fields that parts are made of, each `[blocks, numbers]`."""
    grid = blocks.grid
    codes: Bytes = _array(blocks.codes).reshape(-1, grid.block)
    fields = {"codes": codes, "d": _half_bytes(blocks.d)}
    if blocks.m is not None:
        # Without integer minima the file holds what is added.
        fields["m"] = _half_bytes(-blocks.m if grid.mins is None else blocks.m)
    if blocks.scales is not None and grid.scales is not None:
        shared = (_array(blocks.scales).astype(np.int16) - grid.scales[0]).astype(np.uint8)
        shared = shared.reshape(-1, grid.block // grid.sub)
        if blocks.mins is not None:
            shared = np.concatenate([shared, _array(blocks.mins).reshape(shared.shape)], axis=1)
        fields["scales"] = _join_six_bits(shared) if grid.mins == _SIX_BITS else shared
    return fields


def _blocks(fields: Mapping[str, Bytes], grid: Grid, rows: int) -> Blocks:
    """Inverse of `_fields`."""
    scales, mins, m = None, None, None
    if "m" in fields:
        m = _halves(fields["m"], rows)
        m = -m if grid.mins is None else m
    if grid.scales is not None:
        shared = _split_six_bits(fields["scales"]) if grid.mins == _SIX_BITS else fields["scales"]
        per = grid.block // grid.sub
        scales = _tensor((shared[:, :per].astype(np.int16) + grid.scales[0]).astype(np.int8), rows)
        mins = None if grid.mins is None else _tensor(shared[:, per:], rows)
    return Blocks(grid, _tensor(fields["codes"], rows), _halves(fields["d"], rows), m, scales, mins)


def _join_six_bits(shared: Bytes) -> Bytes:
    """Eight scales and eight minima of six bits, `[blocks, 16]` → `[blocks, 12]`.

    The first four of either have a byte each, whose upper two bits are the upper ones of the last four; the lower four
    bits of a last scale and of its minimum share a byte.
    """
    first, last = shared.reshape(-1, 2, 2, 4).transpose(2, 0, 1, 3)
    own = (first | last >> np.uint8(4) << np.uint8(6)).reshape(-1, 8)
    low = last & np.uint8(15)
    return np.concatenate([own, low[:, 0] | low[:, 1] << np.uint8(4)], axis=1)


def _split_six_bits(stored: Bytes) -> Bytes:
    """Inverse of `_join_six_bits`."""
    own, low = stored[:, :8].reshape(-1, 2, 4), stored[:, 8:]
    low = np.stack([low & np.uint8(15), low >> np.uint8(4)], axis=1)
    last = own >> np.uint8(6) << np.uint8(4) | low
    return np.stack([own & np.uint8(63), last], axis=2).reshape(-1, 16)


def _array(tensor: Tensor) -> NDArray[Any]:
    return np.ascontiguousarray(tensor.cpu().numpy())


def _tensor(array: NDArray[Any], rows: int) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array).reshape(rows, -1))


def _half_bytes(halves: Tensor) -> Bytes:
    """float16 of any shape → `[blocks, 2]`."""
    return _array(halves).view(np.uint8).reshape(-1, 2)


def _halves(stored: Bytes, rows: int) -> Tensor:
    """Inverse of `_half_bytes`: `[rows, blocks of a row]`."""
    return _tensor(np.ascontiguousarray(stored).view(np.float16), rows)

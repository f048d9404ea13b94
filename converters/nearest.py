"""Rounding by ggml's own encoders, weighted by importance, to the blocks that a3q keeps."""

from __future__ import annotations

from gguf.constants import GGMLQuantizationType
from torch import Tensor

from a3q.solve.grid import Blocks, Grid
from converters.ggml_encode import encode
from converters.ggml_pack import unpack


def nearest(weight: Tensor, grid: Grid, importance: Tensor) -> Blocks:
    """Weights `[rows, n]` with the importance `[n]` of their inputs on a GGUF type's `grid`, on the CPU.

    An `a3q.quantize.Encoder`; InputError and ValueError as `encode`.
    """
    kind = GGMLQuantizationType[grid.name.upper()]
    rows, columns = (tensor.detach().float().cpu().numpy() for tensor in (weight, importance))
    return unpack(encode(rows, kind, columns), grid)

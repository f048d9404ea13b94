"""GPTQ's layout of a quantized matrix ↔ `Blocks`, bit by bit, and what of it ggml's formats hold without loss.

A matrix `[rows, n]` called `NAME` is four tensors. A word is an int32 that holds `32 / bits` numbers, the first in its
lowest bits:

- `NAME.qweight` `[n · bits / 32, rows]`: words of codes, successive along the input.
- `NAME.qzeros` `[groups, rows · bits / 32]`: words of zero points, successive along the output; with the format `gptq`
  less one each, with `gptq_v2` as they are.
- `NAME.scales` `[groups, rows]`: float16.
- `NAME.g_idx` `[n]`: the group of each input.

The weight is `scale · (code − zero)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from a3q.errors import InputError
from a3q.solve.grid import GRIDS, Blocks, Grid

TENSORS = ("qweight", "qzeros", "scales", "g_idx")
BITS = (2, 4, 8)
"""Widths of which a word holds a whole number."""
ALIGNED = 32
"""Kernels want a multiple of it for the rows and for the inputs."""


@dataclass(frozen=True)
class Form:
    """How the quantized matrices of a folder are stored."""

    bits: int
    group_size: int
    """Inputs that share a scale; −1: all of a matrix."""
    v2: bool = False
    """Zero points are stored as they are, not less one."""

    @property
    def type_name(self) -> str:
        """What people call weights that are stored so."""
        return f"GPTQ {self.bits}bit {'one group' if self.group_size == -1 else f'g{self.group_size}'}"

    def shapes(self, rows: int, n: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that hold a matrix `[rows, n]`."""
        per, groups = 32 // self.bits, 1 if self.group_size == -1 else -(-n // self.group_size)
        return {
            "qweight": (-(-n // per), rows),
            "qzeros": (groups, -(-rows // per)),
            "scales": (groups, rows),
            "g_idx": (n,),
        }

    def matrix(self, shapes: Mapping[str, tuple[int, ...]], origin: object) -> tuple[int, int]:
        """Rows and inputs of the matrix whose tensors have `shapes`; InputError names the tensor that cannot be."""
        for name, dimensions in (("scales", 2), ("g_idx", 1)):
            if len(shapes[name]) != dimensions or 0 in shapes[name]:
                raise InputError(f"{origin}.{name} has shape {list(shapes[name])}; {_AGAIN}")
        rows, n = shapes["scales"][1], shapes["g_idx"][0]
        for name, wanted in self.shapes(rows, n).items():
            if shapes[name] != wanted:
                raise InputError(
                    f"{origin}.{name} has shape {list(shapes[name])}, but a matrix of {rows} by {n} with {self.bits} "
                    f"bits and groups of {self.group_size} asks for {list(wanted)}; a3q reads one size for all matrices"
                )
        return rows, n


_AGAIN = "the file is damaged; download it again"


@dataclass(frozen=True)
class Packed:
    """A matrix as it was stored, its words taken apart."""

    form: Form
    codes: Tensor
    """uint8 `[rows, n]`."""
    scales: Tensor
    """`[rows, groups]`, in the stored type."""
    zeros: Tensor
    """uint8 `[rows, groups]`."""
    g_idx: Tensor
    """int64 `[n]`: column of `scales` and `zeros` for each input."""

    def dequantize(self) -> Tensor:
        """The weights, float32 `[rows, n]`."""
        level = self.codes.float() - self.zeros.float()[:, self.g_idx]
        return level.mul_(self.scales.float()[:, self.g_idx])

    def blocks(self) -> Blocks | None:
        """The same on a grid; None where groups are not successive inputs, all as many, with a float16 scale."""
        n = self.codes.shape[1]
        size = n if self.form.group_size == -1 else self.form.group_size
        in_order = n % size == 0 and torch.equal(self.g_idx, torch.arange(n) // size)
        if not in_order or self.scales.dtype != torch.float16:
            return None
        symmetric = bool((self.zeros == 1 << self.form.bits - 1).all())
        grid = gptq_grid(self.form.bits, size, symmetric)
        return Blocks(grid, self.codes, self.scales, None, None, None if symmetric else self.zeros)


def gptq_grid(bits: int, group_size: int, symmetric: bool) -> Grid:
    """The values of a weight: with `symmetric` the zero point is the middle of the codes."""
    if symmetric:
        # A q8_0 has no code 0, so that without it the weights are on that grid as well.
        return Grid(f"gptq{bits}", bits, group_size, group_size, offset=1 << bits - 1, spare=int(bits == 8))
    return Grid(f"gptq{bits}", bits, group_size, group_size, zero=True)


def fits(rows: int, n: int, grid: Grid) -> bool:
    """Whether GPTQ has this grid, and kernels take a matrix of this size on it."""
    known = grid.bits in BITS and grid.block == grid.sub and not grid.has_base and grid.levels is None
    return known and rows % ALIGNED == 0 and n % ALIGNED == 0 and n % grid.block == 0


def zero_points(blocks: Blocks) -> Tensor:
    """Of each group, uint8 `[rows, groups]`."""
    if blocks.mins is not None:
        return blocks.mins
    return torch.full(blocks.d.shape, blocks.grid.offset, dtype=torch.uint8)


def pack(blocks: Blocks, v2: bool = False) -> dict[str, Tensor]:
    """The four tensors. InputError: a zero point of 0 without `v2`.

    It would be −1, of which some readers make the highest code plus one, and others a carry into the next number.
    """
    grid, zeros = blocks.grid, zero_points(blocks)
    if not v2 and not bool(zeros.all()):
        raise InputError("a zero point of 0 cannot be stored with checkpoint_format gptq; store it as gptq_v2")
    n = blocks.codes.shape[1]
    return {
        "qweight": _to_words(blocks.codes.T, grid.bits),
        "qzeros": _to_words(zeros if v2 else zeros - 1, grid.bits).T.contiguous(),
        "scales": blocks.d.T.contiguous(),
        "g_idx": (torch.arange(n) // grid.block).to(torch.int32),
    }


def unpack(tensors: Mapping[str, Tensor], form: Form, origin: object) -> Packed:
    """The inverse. InputError names `origin` and the tensor that cannot be."""
    rows, n = form.matrix({name: tuple(tensor.shape) for name, tensor in tensors.items()}, origin)
    for name in ("qweight", "qzeros", "g_idx"):
        if tensors[name].dtype != torch.int32:
            raise InputError(f"{origin}.{name} holds {tensors[name].dtype} and not torch.int32; {_AGAIN}")
    scales, g_idx = tensors["scales"], tensors["g_idx"].long()
    if not scales.is_floating_point() or not bool(torch.isfinite(scales).all()):
        raise InputError(f"{origin}.scales holds values that are not finite numbers; {_AGAIN}")
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= len(scales):
        raise InputError(
            f"{origin}.g_idx holds {int(g_idx.min())} to {int(g_idx.max())}, but there are {len(scales)} groups; "
            f"{_AGAIN}"
        )
    zeros = tensors["qzeros"]
    if not form.v2:
        # Whole words, as GPTQModel takes the ones away: a zero point of 0 has borrowed from its neighbour.
        zeros = zeros + sum(1 << bit for bit in range(0, 32, form.bits))
    return Packed(
        form,
        _from_words(tensors["qweight"], form.bits, n).T.contiguous(),
        scales.T.contiguous(),
        _from_words(zeros.T, form.bits, rows).contiguous(),
        g_idx,
    )


def dequantize(tensors: Mapping[str, Tensor], form: Form, origin: object) -> Tensor:
    """The weights that the four tensors stand for, float32 `[rows, n]`; InputError as `unpack`."""
    return unpack(tensors, form, origin).dequantize()


def to_ggml(blocks: Blocks) -> Blocks | None:
    """The same weights as q4_0, q4_1 or q8_0; None where none of them has the levels.

    q4_0 and q8_0 are exact. q4_1 stores `step · zero` rounded to float16, which moves the weights of a group by at most
    `zero / 2048`, less than 0.01, of a step.
    """
    grid, zeros = blocks.grid, zero_points(blocks)
    if grid.block % 32:
        return None
    d, zeros = (one.repeat_interleave(grid.block // 32, dim=1) for one in (blocks.d, zeros))
    if grid.bits == 8 and bool((zeros == 128).all()) and bool(blocks.codes.all()):
        return Blocks(GRIDS["q8_0"], blocks.codes, d, None, None, None)
    if grid.bits != 4:
        return None
    if bool((zeros == 8).all()):
        return Blocks(GRIDS["q4_0"], blocks.codes, d, None, None, None)
    base = (d.float() * zeros.float()).half()
    return Blocks(GRIDS["q4_1"], blocks.codes, d, base, None, None) if bool(base.isfinite().all()) else None


def _to_words(numbers: Tensor, bits: int) -> Tensor:
    """uint8 `[k, columns]` → int32 `[⌈k · bits / 32⌉, columns]`; what is left of the last word is 0."""
    per = 32 // bits
    words = torch.zeros(-(-len(numbers) // per), numbers.shape[1], dtype=torch.int32)
    for i in range(per):
        some = numbers[i::per].to(torch.int32)
        words[: len(some)] |= some << bits * i
    return words


def _from_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse, for `count` numbers."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)[None, :, None]
    # The sign that the shift draws in is cut off.
    numbers = (words[:, None] >> shifts & (1 << bits) - 1).to(torch.uint8)
    return numbers.reshape(-1, words.shape[1])[:count]

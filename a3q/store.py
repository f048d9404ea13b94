"""A list of layers that keeps what fits a memory budget and puts the rest on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import overload

from safetensors.torch import load_file, save_file
from torch import Tensor

from a3q.model import Layer
from a3q.solve.grid import Blocks, Grid


class LayerStore(Sequence[Layer]):
    """Append-only sequence; layers beyond `memory_budget` bytes live in a temporary folder that goes with the store.

    Rounded weights are kept as they will be stored, and dequantized when their layer is asked for.
    """

    def __init__(self, memory_budget: int) -> None:
        self._kept: list[dict[str, Tensor] | Path] = []
        self._grids: list[dict[str, Grid]] = []
        self._left = memory_budget
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._rounded: tuple[int, dict[str, Blocks]] | None = None

    def append(self, layer: Layer, blocks: Mapping[str, Blocks] | None = None) -> None:
        """Keep `layer`, in memory while the budget lasts; `blocks` stand in for the weights under their roles."""
        blocks = blocks or {}
        kept = {role: weight for role, weight in layer.items() if role not in blocks}
        for role, one in blocks.items():
            kept |= {f"{role}.{name}": value for name, value in one.tensors().items()}
        self._grids.append({role: one.grid for role, one in blocks.items()})
        size = sum(tensor.nbytes for tensor in kept.values())
        if size <= self._left:
            self._left -= size
            self._kept.append(kept)
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="a3q-")
        path = Path(self._folder.name) / f"{len(self._kept)}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in kept.items()}, path)
        self._kept.append(path)

    def blocks(self, index: int) -> dict[str, Blocks]:
        """The rounded weights of a layer by role; those of the last layer are held, since they are asked for singly."""
        if self._rounded is None or self._rounded[0] != index:
            self._rounded = index, self._blocks(index, self._load(index))
        return self._rounded[1]

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Layer]: ...
    def __getitem__(self, index: int | slice) -> Layer | Sequence[Layer]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        kept = self._load(index)
        layer = {name: tensor for name, tensor in kept.items() if "." not in name}
        return layer | {role: one.dequantize() for role, one in self._blocks(index, kept).items()}

    def _load(self, index: int) -> dict[str, Tensor]:
        kept = self._kept[index]
        return load_file(kept) if isinstance(kept, Path) else kept

    def _blocks(self, index: int, kept: Mapping[str, Tensor]) -> dict[str, Blocks]:
        found = {}
        for role, grid in self._grids[index].items():
            start = f"{role}."
            fields = {name.removeprefix(start): x for name, x in kept.items() if name.startswith(start)}
            found[role] = Blocks.of(grid, fields)
        return found

"""A list of layers that keeps what fits a memory budget and puts the rest on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import overload

from safetensors.torch import load_file, save_file

from a3q.model import Layer


class LayerStore(Sequence[Layer]):
    """Append-only sequence; layers beyond `memory_budget` bytes live in a temporary folder that goes with the store."""

    def __init__(self, memory_budget: int) -> None:
        self._layers: list[Layer | Path] = []
        self._left = memory_budget
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def append(self, layer: Layer) -> None:
        """Keep `layer`, in memory while the budget lasts."""
        size = sum(tensor.nbytes for tensor in layer.values())
        if size <= self._left:
            self._left -= size
            self._layers.append(layer)
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="a3q-")
        path = Path(self._folder.name) / f"{len(self._layers)}.safetensors"
        save_file({role: tensor.contiguous() for role, tensor in layer.items()}, path)
        self._layers.append(path)

    def __len__(self) -> int:
        return len(self._layers)

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Layer]: ...
    def __getitem__(self, index: int | slice) -> Layer | Sequence[Layer]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        layer = self._layers[index]
        return load_file(layer) if isinstance(layer, Path) else layer

"""A list of per-layer tensors that keeps what fits a memory budget and puts the rest on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar, overload

from safetensors.torch import load_file, save_file
from torch import Tensor

T = TypeVar("T")


class LayerStore(Sequence[T], Generic[T]):
    """Append-only sequence of items made of tensors; items beyond `memory_budget` bytes live in a temporary folder.

    `pack` and `unpack` turn an item into tensors by name and back. The folder goes away with the store.
    """

    def __init__(
        self, memory_budget: int, pack: Callable[[T], dict[str, Tensor]], unpack: Callable[[dict[str, Tensor]], T]
    ) -> None:
        self._items: list[T | Path] = []
        self._left = memory_budget
        self._pack, self._unpack = pack, unpack
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def append(self, item: T) -> None:
        """Keep `item`, in memory while the budget lasts."""
        tensors = self._pack(item)
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size <= self._left:
            self._left -= size
            self._items.append(item)
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="a3q-")
        path = Path(self._folder.name) / f"{len(self._items)}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        self._items.append(path)

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        item = self._items[index]
        return self._unpack(load_file(item)) if isinstance(item, Path) else item

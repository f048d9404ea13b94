"""A list of finished layers: what fits a memory budget is in memory and the rest on disk, or all of it in a folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, overload

from torch import Tensor

from a3q.errors import InputError, named
from a3q.files import kept, read_tensors, remove_parts, write_tensors
from a3q.model import Layer, LayerShape
from a3q.solve.grid import GRIDS, Blocks, Grid

_SUFFIX = ".safetensors"
_ABOUT = "a3q"
"""Key in the metadata of a file; what is no tensor is there, as JSON."""


@dataclass(frozen=True)
class LayerLosses:
    """Share of each component's functional energy that one layer lost before the refit; 0 if it was left alone."""

    qk: float = 0.0
    ov: float = 0.0
    mlp: float = 0.0
    before_healing: float = 0.0
    """Relative squared distance of the layer's output to what it should be, on sequences that healing did not see."""
    after_healing: float = 0.0
    before_predictions: float = 0.0
    """KL divergence (nats) of the predictions on them, where the last layer was trained by these in the end."""
    after_predictions: float = 0.0


@dataclass(frozen=True)
class Finished:
    """A layer that is done."""

    layer: Layer
    """Weights by role, on the CPU; rounded ones dequantized."""
    shape: LayerShape
    losses: LayerLosses = LayerLosses()
    blocks: Mapping[str, Blocks] = field(default_factory=dict)
    """Rounded weights by role, on the CPU."""
    rounding_losses: Mapping[str, float] = field(default_factory=dict)
    """Share of the output energy that rounding cost each of them."""


class LayerStore(Sequence[Layer]):
    """Append-only sequence; layers beyond `memory_budget` bytes live in a temporary folder that goes with the store.

    With a `folder`, which exists, every layer is a file there instead, and the store begins with the layers that an
    earlier one has left. Rounded weights are kept as they will be stored, and dequantized when their layer is asked
    for. InputError for a full disk, and for files of the `folder` that are damaged.
    """

    def __init__(self, memory_budget: int, folder: Path | None = None) -> None:
        self._kept: dict[str, _Kept | Path] = {}
        self._count = 0
        self._left = memory_budget
        self._folder = folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._rounded: tuple[str, dict[str, Blocks]] | None = None
        if folder is not None:
            self._reopen(folder)

    def _reopen(self, folder: Path) -> None:
        remove_parts(folder)
        while (path := folder / f"{_name(self._count)}{_SUFFIX}").exists():
            self._kept[path.stem] = path
            self._count += 1
        for path in folder.glob(f"[0-9]*{_SUFFIX}"):
            if path.stem not in self._kept:
                # It was fitted behind a layer that is made anew, and would pass for the one that follows it then.
                path.unlink()
        self._kept |= {path.stem: path for path in folder.glob(f"{_top('*')}{_SUFFIX}")}
        for name in self._kept:
            # Hours later would be too late to find one damaged.
            self._load(name)

    def append(self, finished: Finished) -> None:
        """Keep the next layer; its `blocks` stand in for the weights under their roles."""
        plain = {role: weight for role, weight in finished.layer.items() if role not in finished.blocks}
        one = _Kept(plain, dict(finished.blocks), finished.shape, finished.losses, dict(finished.rounding_losses))
        self._keep(_name(self._count), one)
        self._count += 1

    def keep_top(self, role: str, blocks: Blocks) -> None:
        """Keep a rounded weight outside the layers, on the CPU."""
        self._keep(_top(role), _Kept({}, {role: blocks}))

    def top(self, role: str) -> Blocks | None:
        """A rounded weight outside the layers; None: not kept."""
        return self._load(_top(role)).blocks[role] if _top(role) in self._kept else None

    def finished(self, index: int) -> Finished:
        """All that was kept of a layer."""
        one = self._load(self._name(index))
        assert one.shape is not None
        return Finished(one.layer(), one.shape, one.losses, one.blocks, one.rounding_losses)

    def blocks(self, index: int) -> dict[str, Blocks]:
        """The rounded weights of a layer by role; those of the last layer are held, since they are asked for singly."""
        name = self._name(index)
        if self._rounded is None or self._rounded[0] != name:
            self._rounded = name, self._load(name).blocks
        return self._rounded[1]

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Layer]: ...
    def __getitem__(self, index: int | slice) -> Layer | Sequence[Layer]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._load(self._name(index)).layer()

    def _name(self, index: int) -> str:
        """Of a layer that is there, counted from the end where `index` is negative."""
        return _name(range(self._count)[index])

    def _load(self, name: str) -> _Kept:
        one = self._kept[name]
        if isinstance(one, _Kept):
            return one
        with kept(one):
            return _Kept.read(one)

    def _keep(self, name: str, one: _Kept) -> None:
        if self._folder is not None:
            path = self._folder / f"{name}{_SUFFIX}"
            write_tensors(path, one.tensors(), one.metadata())
            self._kept[name] = path
            return
        size = sum(tensor.nbytes for tensor in one.tensors().values())
        if size <= self._left:
            self._left -= size
            self._kept[name] = one
            return
        if self._temporary is None:
            self._temporary = _temporary_folder()
        folder = Path(self._temporary.name)
        # That folder is gone when the message is read.
        with named(folder, folder.parent):
            write_tensors(folder / f"{name}{_SUFFIX}", one.tensors(), one.metadata(), temporary=True)
        self._kept[name] = folder / f"{name}{_SUFFIX}"


def _name(index: int) -> str:
    return f"{index:05d}"


def _top(role: str) -> str:
    return f"top-{role}"


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="a3q-")
    except OSError as error:
        raise InputError(
            f"no temporary folder for layers can be made: {error.strerror or error}; set TMPDIR to a folder with room"
        ) from error


@dataclass(frozen=True)
class _Kept:
    """What is stored of a layer, or of a weight outside the layers."""

    plain: Layer
    """Weights that are not rounded."""
    blocks: dict[str, Blocks]
    shape: LayerShape | None = None
    """None outside the layers."""
    losses: LayerLosses = LayerLosses()
    rounding_losses: Mapping[str, float] = field(default_factory=dict)

    def layer(self) -> Layer:
        """All weights."""
        return self.plain | {role: one.dequantize() for role, one in self.blocks.items()}

    def tensors(self) -> dict[str, Tensor]:
        """By `ROLE`, or `ROLE.FIELD` of a rounded weight."""
        found = dict(self.plain)
        for role, one in self.blocks.items():
            found |= {f"{role}.{name}": value for name, value in one.tensors().items()}
        return found

    def metadata(self) -> dict[str, str]:
        """All else."""
        about = {
            "shape": None if self.shape is None else asdict(self.shape),
            "losses": asdict(self.losses),
            "rounding_losses": dict(self.rounding_losses),
            "grids": {role: _described(one.grid) for role, one in self.blocks.items()},
        }
        return {_ABOUT: json.dumps(about)}

    @classmethod
    def read(cls, path: Path) -> _Kept:
        """From a file; see `a3q.files.kept` for what it raises."""
        tensors, metadata = read_tensors(path)
        about = json.loads(metadata[_ABOUT])
        blocks = {}
        for role, described in about["grids"].items():
            start = f"{role}."
            fields = {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)}
            blocks[role] = Blocks.of(_grid(described), fields)
        plain = {name: tensor for name, tensor in tensors.items() if "." not in name}
        shape = None if about["shape"] is None else _shape(about["shape"])
        return cls(plain, blocks, shape, LayerLosses(**about["losses"]), about["rounding_losses"])


def _shape(described: dict[str, Any]) -> LayerShape:
    frequencies = tuple(tuple(one) for one in described.pop("frequencies"))
    return LayerShape(frequencies=frequencies, **described)


def _described(grid: Grid) -> str | dict[str, Any]:
    return grid.name if GRIDS.get(grid.name) == grid else asdict(grid)


def _grid(described: str | dict[str, Any]) -> Grid:
    if isinstance(described, str):
        return GRIDS[described]
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in described.items()
    }
    return Grid(**fields)

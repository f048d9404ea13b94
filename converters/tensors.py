"""What both readers share: layers loaded at access, and tensors held against the table of families."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from a3q.errors import InputError
from a3q.families import Family, Role
from a3q.model import Layer, LayerShape, ModelConfig
from a3q.solve.grid import Blocks

Format = Literal["hf", "gguf"]


class LazyLayers(Sequence[Layer]):
    """Layers that are read from their file anew at every access, so that one at a time is in memory."""

    def __init__(
        self,
        count: int,
        load: Callable[[int], Layer],
        blocks: Callable[[int], dict[str, Blocks]] | None = None,
        top_blocks: Callable[[], dict[str, Blocks]] = dict,
    ) -> None:
        self._count = count
        self._load = load
        self._blocks = blocks
        self.top_blocks = top_blocks
        """The same as `blocks`, of the weights outside the layers."""

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Layer]: ...
    def __getitem__(self, index: int | slice) -> Layer | Sequence[Layer]:
        if isinstance(index, slice):
            return [self._load(i) for i in range(self._count)[index]]
        return self._load(range(self._count)[index])

    def blocks(self, index: int) -> dict[str, Blocks]:
        """Weights of a layer that the file holds quantized, by role, on the grid where they are: the very same weights.

        A quantized weight is absent where its layout is no grid's.
        """
        return {} if self._blocks is None else self._blocks(range(self._count)[index])


def shape_only(shape: Sequence[int]) -> Tensor:
    """A tensor without content, for a model of which only the headers are read."""
    return torch.empty(tuple(shape), device="meta")


def layer_names(family: Family, fmt: Format, i: int) -> Iterator[tuple[Role, str]]:
    """Roles of layer `i` with their names in a format."""
    for role in family.layer:
        yield role, getattr(role, fmt).format(i=i)


def stored_roles(family: Family, fmt: Format, i: int) -> dict[str, list[Role]]:
    """Names of the tensors of layer `i` in a format; several roles are parts of one tensor."""
    stored: dict[str, list[Role]] = {}
    for role, name in layer_names(family, fmt, i):
        stored.setdefault(name, []).append(role)
    return stored


def check_tensors(
    family: Family, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], fmt: Format, origin: object
) -> None:
    """Every tensor is there, has the shape that the config asks for, and none is left over; else InputError.

    `shapes` are those of the file, in the order of Hugging Face.
    """
    # A count from a damaged file must not decide how long the loop below runs.
    if config.num_hidden_layers > len(shapes):
        raise InputError(
            f"{origin}: {len(shapes)} tensors cannot make {config.num_hidden_layers} layers; the file is damaged or cut"
        )
    expected: dict[str, tuple[int, ...]] = {}
    needed: set[str] = set()
    for role in family.top:
        name = getattr(role, fmt)
        expected[name] = _top_shape(family, config, role, fmt)
        # Only a tied output may be absent, though the table says that it need not be there.
        if role.required or (role.name == "output" and not config.tie_word_embeddings):
            needed.add(name)
    layers = [stored_roles(family, fmt, i) for i in range(config.num_hidden_layers)]
    # Layers are alike: an optional weight is in all of them or in none.
    used = {
        role for layer in layers for name, roles in layer.items() for role in roles if role.required or name in shapes
    }
    for shape, layer in zip(config.layers, layers, strict=True):
        kept = {name: roles for name, roles in layer.items() if not used.isdisjoint(roles)}
        expected |= {name: _layer_shape(family, config, shape, roles, fmt) for name, roles in kept.items()}
        needed.update(kept)
    missing = [name for name in expected if name in needed and name not in shapes]
    if missing:
        raise InputError(f"{origin}: tensor {_some(missing)} is missing")
    unknown = [name for name in shapes if name not in expected]
    if unknown:
        raise InputError(f"{origin}: tensor {_some(unknown)} is not part of a {family.name} model as a3q knows it")
    for name, wanted in expected.items():
        if shapes.get(name, wanted) != wanted:
            raise InputError(
                f"{origin}: tensor {name} has shape {list(shapes[name])} and contradicts its metadata, "
                f"which asks for {list(wanted)}"
            )


def _top_shape(family: Family, config: ModelConfig, role: Role, fmt: Format) -> tuple[int, ...]:
    """Shape of a weight outside the layers as a format stores it."""
    rows, *rest = role.expected_shape(config, config.layers[0])
    if fmt == "hf" and role.name == "positions":
        rows += family.hf_position_offset
    return rows, *rest


def _layer_shape(
    family: Family, config: ModelConfig, shape: LayerShape, roles: Sequence[Role], fmt: Format
) -> tuple[int, ...]:
    """Shape of a layer's tensor, which holds one role or several, as a format stores it."""
    parts = [role.expected_shape(config, shape) for role in roles]
    wanted = (sum(part[0] for part in parts), *parts[0][1:])
    return wanted[::-1] if fmt == "hf" and family.hf_transposed else wanted


def _some(names: Sequence[str]) -> str:
    """The first few names, and how many more."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} (and {len(names) - 3} more)"


def check_finite(tensor: Tensor, name: str, origin: object) -> Tensor:
    """`tensor` itself; InputError names it when it holds NaN or infinity."""
    low, high = torch.aminmax(tensor)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise InputError(f"{origin}: tensor {name} holds NaN or infinite weights; the model itself is broken")
    return tensor

"""What both readers share: layers loaded at access, and tensors held against the table of families."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from a3q.errors import InputError
from a3q.families import Family, Role
from a3q.model import Layer, ModelConfig

Format = Literal["hf", "gguf"]


class LazyLayers(Sequence[Layer]):
    """Layers that are read from their file anew at every access, so that one at a time is in memory."""

    def __init__(self, count: int, load: Callable[[int], Layer]) -> None:
        self._count = count
        self._load = load

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


def layer_names(family: Family, fmt: Format, i: int) -> Iterator[tuple[Role, str]]:
    """Roles of layer `i` with their names in a format."""
    for role in family.layer:
        yield role, getattr(role, fmt).format(i=i)


def check_tensors(
    family: Family, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], fmt: Format, origin: object
) -> None:
    """Every tensor is there, has the shape that the config asks for, and none is left over; else InputError."""
    # A count from a damaged file must not decide how long the loop below runs.
    if config.num_hidden_layers > len(shapes):
        raise InputError(
            f"{origin}: {len(shapes)} tensors cannot make {config.num_hidden_layers} layers; the file is damaged or cut"
        )
    expected = {getattr(role, fmt): role for role in family.top}
    layers = [(role, name) for i in range(config.num_hidden_layers) for role, name in layer_names(family, fmt, i)]
    # Layers are alike: an optional weight is in all of them or in none.
    used = {role.name for role, name in layers if role.required or name in shapes}
    expected |= {name: role for role, name in layers if role.name in used}
    missing = [name for name, role in expected.items() if name not in shapes and not _may_lack(role, config)]
    if missing:
        raise InputError(f"{origin}: tensor {_some(missing)} is missing")
    unknown = [name for name in shapes if name not in expected]
    if unknown:
        raise InputError(f"{origin}: tensor {_some(unknown)} is not part of a {family.name} model as a3q knows it")
    for name, role in expected.items():
        wanted = role.expected_shape(config)
        if shapes.get(name, wanted) != wanted:
            raise InputError(
                f"{origin}: tensor {name} has shape {list(shapes[name])} and contradicts its metadata, "
                f"which asks for {list(wanted)}"
            )


def _may_lack(role: Role, config: ModelConfig) -> bool:
    return role.name == "output" and config.tie_word_embeddings


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

"""The tensors of a GGUF file before any weight is read: names, shapes, and the roles that make each of them up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from a3q.families import Role
from a3q.model import LayerShape, Model
from converters.gguf_reader import ROPE_FACTORS
from converters.gguf_target import Target, factors_for
from converters.tensors import stored_roles


@dataclass(frozen=True)
class Entry:
    """One tensor to be written."""

    name: str
    roles: tuple[Role, ...]
    """Whose rows follow one another in it; none: the RoPE factors."""
    shape: tuple[int, ...]
    """As Hugging Face orders it, `[rows, row length]`."""
    layer: int | None
    """None: outside the layers."""

    @property
    def weights(self) -> int:
        """How many it holds."""
        return prod(self.shape)

    @property
    def short_name(self) -> str:
        """What it is called in every layer, such as `attn_q`."""
        return self.name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]

    def bytes(self, kind: GGMLQuantizationType) -> int:
        """Its size when stored as `kind`, whose blocks its rows must divide into."""
        block, size = GGML_QUANT_SIZES[kind]
        return self.weights // int(block) * int(size)


def entries(model: Model, target: Target) -> list[Entry]:
    """All tensors of `model` in the order of the file.

    Only its configuration and the names of its weights are read, so a model whose configuration already says the
    reduced dimensions does, though its weights are not reduced yet; `target` must be the one for that configuration.
    """
    config = model.config
    found: list[Entry] = []

    def add(name: str, roles: Sequence[Role], shape: LayerShape, layer: int | None) -> None:
        parts = [role.expected_shape(config, shape) for role in roles]
        found.append(Entry(name, tuple(roles), (sum(part[0] for part in parts), *parts[0][1:]), layer))

    for role in target.family.top:
        if (role.name in model.top and role.name != "output") or (role.name == "output" and not target.tied):
            add(role.gguf, [role], config.layers[0], None)
    if (factors := factors_for(target, config)) is not None:
        found.append(Entry(ROPE_FACTORS, (), (len(factors),), None))
    for i, shape in enumerate(config.layers):
        for name, roles in stored_roles(target.family, "gguf", i).items():
            if roles[0].name in model.layer_roles:
                add(name, roles, shape, i)
    return found

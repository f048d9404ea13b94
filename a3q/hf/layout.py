"""Names and shapes of the tensors in a folder of `model_type` a3q: those of the modules in `modeling_a3q`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from a3q.families import Family, Role
from a3q.model import LayerShape, ModelConfig

Fused = Literal["qkv", "gate_up"]

_TOP = {
    "embed": "model.embed_tokens",
    "positions": "model.embed_positions",
    "final_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "attn_norm",
    "mlp_norm": "mlp_norm",
    "attn_post_norm": "attn_post_norm",
    "mlp_post_norm": "mlp_post_norm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_FUSED: dict[Fused, tuple[str, tuple[str, ...]]] = {
    "qkv": ("self_attn.qkv_proj", ("q", "k", "v")),
    "gate_up": ("mlp.gate_up_proj", ("gate", "up")),
}


@dataclass(frozen=True)
class Part:
    """One stored tensor: the weights of one role, or of several one below the other."""

    name: str
    roles: tuple[Role, ...]

    def shapes(self, config: ModelConfig, layer: LayerShape) -> list[tuple[int, ...]]:
        """Shape of each role's weight."""
        return [role.expected_shape(config, layer) for role in self.roles]

    def shape(self, config: ModelConfig, layer: LayerShape) -> tuple[int, ...]:
        """Shape of the tensor."""
        shapes = self.shapes(config, layer)
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def fused_in(family: Family) -> list[Fused]:
    """Which projections the family computes in one matrix product."""
    return [name for name, (_, roles) in _FUSED.items() if set(roles) <= family.fused]


def norm_offset(family: Family, role: str) -> float:
    """What the model adds to the stored weight of `role`; what it stores is the finer for it in 16 bits."""
    return family.hf_norm_offset if role.endswith("norm") else 0.0


def top_parts(family: Family, roles: Collection[str]) -> list[Part]:
    """Tensors outside the layers."""
    return [Part(_named(_TOP, role.name), (role,)) for role in family.top if role.name in roles]


def layer_parts(family: Family, roles: Collection[str], i: int) -> Iterator[Part]:
    """Tensors of layer `i`."""
    prefix, present = f"model.layers.{i}.", {role.name: role for role in family.layer if role.name in roles}
    together: dict[str, tuple[str, tuple[str, ...]]] = {}
    for fused in fused_in(family):
        module, members = _FUSED[fused]
        for suffix, kind in (("", "weight"), ("_bias", "bias")):
            together |= {f"{role}{suffix}": (f"{module}.{kind}", members) for role in members}
    for name, role in present.items():
        if name not in together:
            yield Part(prefix + _named(_LAYER, name), (role,))
            continue
        tensor, members = together[name]
        suffix = "_bias" if name.endswith("_bias") else ""
        if name == members[0] + suffix:
            yield Part(prefix + tensor, tuple(present[member + suffix] for member in members))


def _named(modules: dict[str, str], role: str) -> str:
    module = role.removesuffix("_bias")
    return f"{modules[module]}.{'weight' if module == role else 'bias'}"

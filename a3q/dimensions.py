"""Choose inner dimensions for an asked ratio on the grid that the tensor types and the runtime allow."""

from __future__ import annotations

from dataclasses import dataclass

from a3q.families import COMPONENTS, Family
from a3q.model import ModelConfig
from a3q.reduce import Dimensions, reduced_config

HEAD_STEP = 8
"""Head sizes are multiples of this: what Vulkan's flash attention wants, and what SIMD kernels like."""
UNIT_STEP = 32
"""MLP sizes are multiples of this even where no block grid asks for it."""


@dataclass(frozen=True)
class Choice:
    """Dimensions, and the share of parameters they take away: per component, of all components, asked and achieved."""

    dimensions: Dimensions
    asked: float
    achieved: float
    per_component: dict[str, float]
    notes: tuple[str, ...] = ()


def component_parameters(family: Family, config: ModelConfig) -> dict[str, int]:
    """Weights of each A3 component in one layer, biases left out."""
    counts = {}
    for component, roles in COMPONENTS.items():
        shapes = [role.expected_shape(config) for role in family.layer if role.name in roles]
        counts[component] = sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)
    return counts


def head_grid(config: ModelConfig, block: int) -> list[int]:
    """Head sizes that can be written, descending: the original one, and those whose output rows divide into blocks."""
    smaller = range(HEAD_STEP, config.head_dim, HEAD_STEP)
    fitting = [r for r in smaller if config.num_attention_heads * r % block == 0]
    return [config.head_dim, *reversed(fitting)]


def make_choice(family: Family, config: ModelConfig, dimensions: Dimensions, asked: float) -> Choice:
    """What `dimensions` achieve."""
    before = component_parameters(family, config)
    after = component_parameters(family, reduced_config(config, dimensions)[0])
    per_component = {name: 1 - after[name] / before[name] for name in before}
    return Choice(dimensions, asked, 1 - sum(after.values()) / sum(before.values()), per_component)


def candidates(family: Family, config: ModelConfig, ratio: float, block: int) -> list[Choice]:
    """Dimensions that come to `ratio` on the grid of `block` weights a row: the uniform ones alone where they fit.

    Otherwise one for the next head size on either side of the uniform one, with the MLP making up the difference.
    """
    step = max(UNIT_STEP, block)
    units = config.intermediate_size
    unit_grid = [units, *(n for n in range(units // step * step, 0, -step) if n < units)]
    grid = head_grid(config, block)
    # Rounded, since 1 - ratio is seldom exact: 640 * (1 - 0.9) must be 64.
    uniform_head, uniform_units = round(config.head_dim * (1 - ratio), 6), round(units * (1 - ratio), 6)
    if uniform_head in grid and uniform_units in unit_grid:
        return [
            make_choice(family, config, Dimensions(int(uniform_head), int(uniform_head), int(uniform_units)), ratio)
        ]

    heads = {min(r for r in grid if r >= uniform_head), max((r for r in grid if r <= uniform_head), default=grid[-1])}
    before = component_parameters(family, config)
    total = sum(before.values())
    found = []
    for r in sorted(heads, reverse=True):
        attention = (before["QK"] + before["OV"]) * r / config.head_dim
        wanted = units * ((1 - ratio) * total - attention) / before["MLP"]
        found.append(Dimensions(r, r, min(unit_grid, key=lambda n: abs(n - wanted))))
    choices = [make_choice(family, config, dimensions, ratio) for dimensions in found]
    # A head size with which the MLP cannot make up the difference is no way to the asked ratio.
    tolerance = max(0.01, before["MLP"] / total * step / units / 2)
    fitting = [choice for choice in choices if abs(choice.achieved - ratio) <= tolerance]
    return fitting or [min(choices, key=lambda choice: abs(choice.achieved - ratio))]

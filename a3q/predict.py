"""How much a choice is predicted to cost, in nats of KL divergence from the original, before anything is computed.

The parts are taken to add up. What a reduction costs follows from the functional losses that an earlier run measured on
the same model; where there are none, from a rule. The rule, and the costs of rounding weights and cache, are what
SmolLM2-135M-Instruct showed on WikiText-2 (README): a larger model is taken to lose less of everything, but in about
the same proportions, and it is proportions that decide between one choice and another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from a3q.dimensions import Plan, size_of
from a3q.families import Component
from a3q.model import ModelConfig
from a3q.sensitivity import Sensitivity, Sizes

_AT = 0.25
_REDUCTION: Mapping[Component, float] = {"QK": 0.070, "OV": 0.089, "MLP": 0.389}
"""Cost of taking a quarter of one component of all layers (perplexity 29.19 → 31.3, 31.9, 43.1)."""
_POWER = 1.4
"""Of the share that goes: 10 % of all components cost 0.11, 25 % 0.41, 50 % 1.07."""

ROUNDING: Mapping[str, float] = {
    "F32": 0.0,
    "F16": 0.0,
    "BF16": 0.0,
    "Q8_0": 0.0003,
    "Q6_K": 0.010,
    "Q5_1": 0.011,
    "Q5_K_M": 0.016,
    "Q5_0": 0.018,
    "Q5_K_S": 0.019,
    "Q4_K_M": 0.044,
    "Q4_1": 0.047,
    "IQ4_NL": 0.049,
    "Q4_K_S": 0.053,
    "Q4_0": 0.066,
    "Q3_K_L": 0.120,
    "Q3_K_M": 0.147,
    "Q3_K_S": 0.213,
    "Q2_K": 0.380,
    "Q2_K_S": 0.500,
}
"""Cost of a mix of types with error feedback (`benchmarks.quantization`); Q5_K_M, Q3_K_L and Q2_K_S are guessed from
their neighbours."""
CACHE: Mapping[str, float] = {"f16": 0.0, "q8_0": 0.0006, "q4_0": 0.04}
"""Cost of a KV cache of this type (`benchmarks.kv_cache`)."""


def by_rule(config: ModelConfig, sizes: Sequence[Sizes]) -> list[dict[Component, Sensitivity]]:
    """What a reduction is taken to cost where nothing was measured: in all layers alike, a power of what goes."""
    found = []
    for shape, options in zip(config.layers, sizes, strict=True):
        layer: dict[Component, Sensitivity] = {}
        for component, grid in options.items():
            whole = size_of(shape, component)
            losses = tuple((1 - size / whole) ** _POWER for size in grid)
            kl = _REDUCTION[component] * losses[0] / _AT**_POWER / config.num_hidden_layers
            layer[component] = Sensitivity(tuple(grid), losses, grid[0], kl)
        found.append(layer)
    return found


def reduction_cost(plan: Plan, config: ModelConfig, known: Sequence[Mapping[Component, Sensitivity]]) -> float:
    """Of the dimensions of `plan`, all of whose sizes `known` has."""
    total = 0.0
    for shape, dimensions, layer in zip(config.layers, plan.dimensions, known, strict=True):
        new: dict[Component, int] = {
            "QK": dimensions.qk_head_dim,
            "OV": dimensions.v_head_dim,
            "MLP": dimensions.intermediate_size,
        }
        for component, size in new.items():
            if size != size_of(shape, component):
                total += layer[component].curve(1).loss_at(size)
    return total

"""Choose inner dimensions for what is asked, on the grid that the output can hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from a3q.allocate import Curve, allocate
from a3q.errors import InputError
from a3q.families import COMPONENTS, Component, Family
from a3q.footprint import CACHE_BLOCK
from a3q.model import LayerShape, ModelConfig
from a3q.reduce_layer import Dimensions
from a3q.sensitivity import Sensitivity

ALL: frozenset[Component] = frozenset(COMPONENTS)
HEADS: frozenset[Component] = frozenset(("QK", "OV"))
"""Those whose sizes the KV cache has."""
SMALLEST = 0.25
"""Share of a size that mixed ranks leave at least, or half of the asked one: predictions far from what was measured
are worth little."""
DISTRUST = 0.75
"""Predicted losses enter the allocation with this power, so that layers differ less than predicted, since predictions
come from one text. At 1, SmolLM2 (25 %, one head size) had a perplexity of 44.9 on held-out text and 27.3 on another
domain, at 0.75 of 43.9 and 25.1; 0.5 lost on held-out text."""


NEAR = 0.15
"""Plans whose predicted losses differ by no more than this share are tried out before one is taken."""
MOST_TRIED = 2


SUPER_BLOCK = 256
"""Weights of a row that the K types store together."""
HEAD_STEP = 8
"""Of head sizes in a GGUF: what Vulkan's flash attention wants, and what SIMD kernels like."""
UNIT_STEP = 32
"""Of MLP sizes in a GGUF: the block of the simplest types."""
FEWEST_SIZES = 8
"""MLP sizes in steps of a super-block below which the smaller step is worth more than the K types."""


@dataclass(frozen=True)
class Request:
    """How much is to go: `ratio` of the parameters of `components` together; those in `own` have their own ratios."""

    ratio: float
    components: frozenset[Component] = ALL
    own: Mapping[Component, float] = field(default_factory=dict)
    kv: float | None = None
    """Share of the KV cache, which is that of the parameters of QK and OV, that is to go; None: they share `ratio`."""

    def groups(self) -> list[tuple[frozenset[Component], float]]:
        """Components that share a budget, and the share of their parameters that goes; nothing where nothing goes."""
        joint = self.components - self.own.keys()
        heads = joint & HEADS if self.kv is not None else frozenset[Component]()
        groups = [(joint - heads, self.ratio)] if joint - heads else []
        groups += [(heads, self.kv)] if heads and self.kv is not None else []
        groups += [(frozenset((component,)), ratio) for component, ratio in self.own.items()]
        return [(members, ratio) for members, ratio in groups if ratio > 0]

    def share_of(self, component: Component) -> float:
        """Share of a component's parameters that is asked to go, alone or with others."""
        return next((ratio for members, ratio in self.groups() if component in members), 0.0)

    @property
    def cache_only(self) -> bool:
        """Whether the KV cache is to shrink and nothing else: all other weights stay as they are."""
        return self.kv is not None and "MLP" not in self.reduced

    @property
    def largest(self) -> float:
        """The greatest share that goes of any component; 0 where nothing goes."""
        return max((ratio for _, ratio in self.groups()), default=0.0)

    @property
    def reduced(self) -> frozenset[Component]:
        """Components of which something goes."""
        return frozenset().union(*(members for members, _ in self.groups()))


@dataclass(frozen=True)
class Grid:
    """Sizes that the output can hold."""

    components: frozenset[Component]
    """What may shrink at all."""
    head_step: int
    unit_step: int
    block: int = 1
    """The output projection's rows must be a multiple of it."""
    unit_block: int = 1
    """The down projection's rows must be a multiple of it."""
    cache_block: int = 1
    """Head sizes must be a multiple of it, the present one too if there is any other."""
    head_size: int | None = None
    """The only size of heads, if it is possible."""
    one_head_size: bool = False
    """Query, key and value heads of all layers have one size."""
    mixed_units: bool = True
    """MLP sizes may differ between layers."""

    def sizes(self, config: ModelConfig, shape: LayerShape, component: Component) -> tuple[int, ...]:
        """Possible sizes of a component, ascending; the last is the present one, if that is possible."""
        if component == "MLP":
            step = max(self.unit_step, self.unit_block)
            return *range(step, shape.intermediate_size, step), shape.intermediate_size
        size = size_of(shape, component)
        heads = config.num_attention_heads
        steps = range(self.head_step, size, self.head_step)
        smaller = [r for r in steps if heads * r % self.block == 0 and r % self.cache_block == 0]
        possible = *smaller, *([size] if size % self.cache_block == 0 or not smaller else [])
        return (self.head_size,) if self.head_size in possible else possible


def gguf_grid(family: Family, config: ModelConfig, block: int, cache_type: str = "f16") -> Grid:
    """What stock llama.cpp can hold, with most tensors in blocks of `block` weights a row, and start with such a cache.

    Super-blocks bind the sizes only where all tensors can be in them and enough sizes are left; otherwise the rows that
    do not fit take a type with blocks of 32.
    """
    form = family.gguf
    if form is None:
        return Grid(frozenset(), 1, 1)
    heads = units = block
    if block == SUPER_BLOCK:
        fine = config.hidden_size % block == 0
        heads = block if fine and config.num_attention_heads * HEAD_STEP % block == 0 else UNIT_STEP
        units = block if fine and config.widest.intermediate_size >= FEWEST_SIZES * block else UNIT_STEP
    cache = 1 if cache_type == "f16" else CACHE_BLOCK
    mixed = form.mixed is not None
    return Grid(form.reduces, HEAD_STEP, UNIT_STEP, heads, units, cache, one_head_size=True, mixed_units=mixed)


def folder_grid(config: ModelConfig) -> Grid:
    """What PyTorch can hold is anything; a step of a sixteenth of a head, and 32 units, keeps kernels fast."""
    head, units = config.widest.qk_head_dim, config.widest.intermediate_size
    return Grid(ALL, max(2, head // 16 // 2 * 2), 32 if units >= 512 else 8)


def size_of(shape: LayerShape, component: Component) -> int:
    """Present size of a component."""
    return {"QK": shape.qk_head_dim, "OV": shape.v_head_dim, "MLP": shape.intermediate_size}[component]


def all_sizes(
    config: ModelConfig, grid: Grid, components: Iterable[Component]
) -> list[dict[Component, tuple[int, ...]]]:
    """Of each layer, the sizes at which its components are measured, which serve all types of weights and cache."""
    every = Grid(grid.components, grid.head_step, grid.unit_step)
    wanted = [c for c in COMPONENTS if c in set(components)]
    return [{c: every.sizes(config, shape, c) for c in wanted} for shape in config.layers]


@dataclass(frozen=True)
class Plan:
    """Dimensions of each layer, and the share of parameters that goes: of each component and of all that were asked."""

    dimensions: tuple[Dimensions, ...]
    request: Request
    asked: float
    achieved: float
    per_component: Mapping[Component, float]
    predicted_kl: float | None = None
    """Sum over layers and components of what each is predicted to cost alone, in nats; None where not predicted."""


def unit_costs(family: Family, config: ModelConfig) -> dict[Component, int]:
    """Parameters that one unit of a component's size takes in a layer, biases left out."""
    gate = any(role.name == "gate" for role in family.layer)
    heads = config.num_attention_heads + config.num_key_value_heads
    return {
        "QK": heads * config.hidden_size,
        "OV": heads * config.hidden_size,
        "MLP": (3 if gate else 2) * config.hidden_size,
    }


def make_plan(
    family: Family,
    config: ModelConfig,
    request: Request,
    sizes: Sequence[Mapping[Component, int]],
    predicted_kl: float | None = None,
) -> Plan:
    """The plan of layers with these sizes; components that are not named stay as they are."""
    costs = unit_costs(family, config)
    before = {c: sum(size_of(shape, c) for shape in config.layers) * costs[c] for c in costs}
    full = [{c: one.get(c, size_of(shape, c)) for c in costs} for shape, one in zip(config.layers, sizes, strict=True)]
    after = {c: sum(one[c] for one in full) * costs[c] for c in costs}
    concerned = request.reduced or request.components
    asked = sum(ratio * sum(before[c] for c in members) for members, ratio in request.groups())
    total = sum(before[c] for c in concerned)
    return Plan(
        tuple(Dimensions(one["QK"], one["OV"], one["MLP"]) for one in full),
        request,
        asked / total if total else 0.0,
        1 - sum(after[c] for c in concerned) / total if total else 0.0,
        {c: 1 - after[c] / before[c] for c in COMPONENTS},
        predicted_kl,
    )


def unreduced(family: Family, config: ModelConfig, request: Request) -> Plan:
    """Every layer as it is."""
    return make_plan(family, config, request, [{}] * config.num_hidden_layers)


def settle(request: Request, grid: Grid, family: Family, explicit: bool) -> tuple[Request, str | None]:
    """What of `request` the output can hold, with a note about the rest; InputError where it was named (`explicit`)."""
    impossible = request.reduced - grid.components
    named = impossible & (request.own.keys() | (HEADS if request.kv is not None else frozenset()))
    if impossible and (explicit or named or not grid.components):
        names = " and ".join(sorted(impossible)).lower()
        raise InputError(
            f"--components, --ratio-…, --kv-ratio: stock llama.cpp cannot hold {names} of {family.name} reduced; "
            + ("take --components mlp, or " if "MLP" in grid.components else "")
            + "write a Hugging Face folder with a3q reduce"
        )
    note = None
    normed = any(role.name == "q_norm" for role in family.layer)
    if normed and "QK" in request.reduced - impossible and not explicit and "QK" not in request.own and not request.kv:
        note = (
            f"queries and keys of {family.name} pass a norm, and reducing the rest alone measured better: QK stays; "
            "--components qk,ov,mlp takes it too"
        )
        request = replace(request, components=request.components - {"QK"})
    if impossible:
        names = " and ".join(sorted(impossible))
        note = (
            f"stock llama.cpp runs {family.name} only with heads as they are: {names} stay, the ratio is of MLP; "
            "a3q reduce takes all"
        )
        request = replace(request, components=request.components - impossible)
    heads = {c: request.share_of(c) for c in sorted(HEADS)}
    if grid.one_head_size and len(set(heads.values())) > 1:
        asked = ", ".join(f"{c} {ratio:g}" for c, ratio in heads.items())
        raise InputError(
            f"--components, --ratio-qk, --ratio-ov: stock llama.cpp needs one size for keys and values ({asked}); "
            "reduce QK and OV alike, or write a Hugging Face folder with a3q reduce --frequencies per_head"
        )
    if grid.one_head_size and request.own.keys() & request.reduced & HEADS:
        # Sharing a budget with the MLP, the other one would come to another size.
        request = replace(request, own={**request.own, **heads})
    return request, note


def _nearest(sizes: Iterable[int], wanted: float) -> int:
    return min(sizes, key=lambda size: (abs(size - wanted), size))


def uniform(family: Family, config: ModelConfig, grid: Grid, request: Request) -> list[Plan]:
    """Plans in which every layer is reduced alike.

    One where the even split fits the grid; otherwise one for the next head size on either side of it, with the MLP
    making up the difference.
    """
    costs, layers = unit_costs(family, config), config.layers
    sizes: list[dict[Component, int]] = [{} for _ in layers]
    options: list[list[dict[Component, int]]] = [sizes]
    for members, ratio in request.groups():
        even = [
            {c: _nearest(grid.sizes(config, shape, c), (1 - ratio) * size_of(shape, c)) for c in members}
            for shape in layers
        ]
        # Rounded, since 1 - ratio is seldom exact: 640 * (1 - 0.9) must be 64.
        exact = all(
            one[c] == round((1 - ratio) * size_of(shape, c), 6)
            for shape, one in zip(layers, even, strict=True)
            for c in members
        )
        if exact or "MLP" not in members or not members & HEADS:
            ways = [even]
        else:
            ways = [_with_heads(config, grid, costs, members, ratio, up) for up in (True, False)]
        options = [[{**a, **b} for a, b in zip(option, way, strict=True)] for option in options for way in ways if way]
    plans = [make_plan(family, config, request, option) for option in options]
    # A head size with which the MLP cannot make up the difference is no way to the asked ratio.
    fitting = [plan for plan in plans if abs(plan.achieved - plan.asked) <= _tolerance(config, grid, costs)]
    distinct = {plan.dimensions: plan for plan in fitting or [min(plans, key=lambda p: abs(p.achieved - p.asked))]}
    return list(distinct.values())


def _tolerance(config: ModelConfig, grid: Grid, costs: Mapping[Component, int]) -> float:
    """Half a step of the MLP, as a share of all."""
    shape = config.layers[0]
    total = sum(costs[c] * size_of(shape, c) for c in costs)
    return max(0.01, costs["MLP"] * max(grid.unit_step, grid.unit_block) / total / 2)


def _with_heads(
    config: ModelConfig,
    grid: Grid,
    costs: Mapping[Component, int],
    members: frozenset[Component],
    ratio: float,
    up: bool,
) -> list[dict[Component, int]]:
    """Head sizes next above (or below) the even split, and MLP sizes that make up the difference."""
    sizes: list[dict[Component, int]] = []
    for shape in config.layers:
        one: dict[Component, int] = {}
        for c in members & HEADS:
            options, wanted = grid.sizes(config, shape, c), round((1 - ratio) * size_of(shape, c), 6)
            larger, smaller = [r for r in options if r >= wanted], [r for r in options if r <= wanted]
            one[c] = min(larger or options[-1:]) if up else max(smaller or options)
        sizes.append(one)
    total = sum(costs[c] * size_of(shape, c) for shape in config.layers for c in members)
    spent = sum(costs[c] * r for one in sizes for c, r in one.items())
    share = ((1 - ratio) * total - spent) / sum(costs["MLP"] * shape.intermediate_size for shape in config.layers)
    for shape, one in zip(config.layers, sizes, strict=True):
        one["MLP"] = _nearest(grid.sizes(config, shape, "MLP"), share * shape.intermediate_size)
    return sizes


def mixed(
    family: Family,
    config: ModelConfig,
    grid: Grid,
    request: Request,
    sensitivities: Sequence[Mapping[Component, Sensitivity]],
) -> list[Plan]:
    """The plans with the least predicted loss for the parameters that stay, the best first.

    More than one where head sizes are predicted nearly alike: what heads and MLP cost together is not the sum of what
    each costs alone.
    """
    costs = unit_costs(family, config)
    options: list[_Way] = [([{} for _ in config.layers], 0.0)]
    for members, ratio in request.groups():
        total = sum(costs[c] * size_of(shape, c) for shape in config.layers for c in members)
        budget, smallest = (1 - ratio) * total, min(SMALLEST, (1 - ratio) / 2)
        table = _Curves(config, grid, costs, sensitivities, smallest)
        heads = members & HEADS
        if heads and grid.one_head_size:
            ways = table.with_one_head_size(heads, members - heads, budget, ratio)
        else:
            way = table.allocated(members, budget)
            ways = [] if way is None else [way]
        ways = sorted(ways or [table.least(members)], key=lambda way: way[1])
        near = [way for way in ways if way[1] <= (1 + NEAR) * ways[0][1]][:MOST_TRIED]
        options = [
            ([{**one, **more} for one, more in zip(sizes, others, strict=True)], loss + added)
            for sizes, loss in options
            for others, added in near
        ]
    return [make_plan(family, config, request, sizes, loss) for sizes, loss in options]


_Way = tuple[list[dict[Component, int]], float]
"""Sizes by component for each layer, and the predicted KL."""


@dataclass(frozen=True)
class _Curves:
    """Predicted losses of all components on the grid."""

    config: ModelConfig
    grid: Grid
    costs: Mapping[Component, int]
    sensitivities: Sequence[Mapping[Component, Sensitivity]]
    smallest: float
    """Share of each size that stays at least, if the budget allows it."""

    def curve(self, i: int, component: Component, smallest: float) -> Curve:
        """Predicted KL of a component of layer `i` at the sizes it may have, of which at least `smallest` stays."""
        shape = self.config.layers[i]
        whole = self.sensitivities[i][component].curve(self.costs[component])
        lowest = smallest * size_of(shape, component)
        allowed = set(self.grid.sizes(self.config, shape, component))
        points = [(n, loss) for n, loss in zip(whole.sizes, whole.losses, strict=True) if n in allowed and n >= lowest]
        return Curve(tuple(n for n, _ in points), tuple(loss for _, loss in points), whole.unit_cost)

    def allocated(self, members: frozenset[Component], budget: float) -> _Way | None:
        """Sizes of `members` in each layer for at most `budget` parameters, and the predicted KL; None if none fit."""
        where = [(i, c) for i in range(self.config.num_hidden_layers) for c in sorted(members)]
        total = sum(self.costs[c] * size_of(self.config.layers[i], c) for i, c in where)
        for smallest in (self.smallest, budget / total / 2, 0.0):
            curves = [self.curve(i, c, smallest) for i, c in where]
            tempered = [replace(curve, losses=tuple(loss**DISTRUST for loss in curve.losses)) for curve in curves]
            try:
                # Rounded, since 1 - ratio is seldom exact: a tenth of 640 must be 64.
                found = allocate(tempered, int(round(budget, 3)))
            except ValueError:
                continue
            return self._way(where, curves, found)
        return None

    def least(self, members: frozenset[Component]) -> _Way:
        """The smallest sizes that there are."""
        where = [(i, c) for i in range(self.config.num_hidden_layers) for c in sorted(members)]
        curves = [self.curve(i, c, 0.0) for i, c in where]
        return self._way(where, curves, [curve.sizes[0] for curve in curves])

    def _way(self, where: Sequence[tuple[int, Component]], curves: Sequence[Curve], found: Sequence[int]) -> _Way:
        sizes: list[dict[Component, int]] = [{} for _ in self.config.layers]
        for (i, c), size in zip(where, found, strict=True):
            sizes[i][c] = size
        return sizes, sum(curve.loss_at(size) for curve, size in zip(curves, found, strict=True))

    def with_one_head_size(
        self, heads: frozenset[Component], others: frozenset[Component], budget: float, ratio: float
    ) -> list[_Way]:
        """One way for each head size that leaves the MLP enough; without an MLP to make up, the nearest head size."""
        first = self.config.layers[0]
        options = list(self.curve(0, min(heads), self.smallest).sizes)
        if not others:
            options = [_nearest(options, (1 - ratio) * size_of(first, min(heads)))]
        layers = range(len(self.config.layers))
        ways = []
        for r in options:
            left = budget - sum(self.costs[c] * r for c in heads) * len(layers)
            loss = sum(self.curve(i, c, self.smallest).loss_at(r) for i in layers for c in heads)
            sizes: list[dict[Component, int]] = [{} for _ in layers]
            if others and self.grid.mixed_units:
                found = self.allocated(others, left)
                if found is None:
                    continue
                sizes, loss = found[0], loss + found[1]
            ways.append(([{**one, **dict.fromkeys(heads, r)} for one in sizes], loss))
        return ways

"""Which inner dimensions every layer gets: candidates by predicted loss, and trials where predictions are close."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from a3q import cache, ranks
from a3q.calibration import Calibration
from a3q.components import Method
from a3q.dimensions import Grid, Plan, Request, all_sizes, make_plan, uniform
from a3q.dimensions import mixed as mixed_plan
from a3q.families import COMPONENTS, Component, Family
from a3q.model import Model, ModelConfig
from a3q.perplexity import compare, logits_of
from a3q.progress import Advance, Stages, for_each
from a3q.reduce import reduce
from a3q.sensitivity import Sizes, measure
from a3q.work import WorkFolder

PROBE_SEQUENCES = 4
"""Sequences on which candidate dimensions are tried; few do, since only their order matters."""
MOMENT_SEQUENCES = 16
"""Sequences from which the sensitivities' functional losses come."""
PROBES = {"cpu": (2, 256), "cuda": (4, 512)}
"""Sequences, and their length, that carry each component's own reduction to the end of the model."""
PROBED_RATIOS = (0.1, 0.25, 0.5)
"""Reductions at which sensitivities are measured; the nearest to the asked one serves it."""


@dataclass(frozen=True)
class Choice:
    """What the choice of dimensions needs."""

    model: Model
    request: Request
    grid: Grid
    method: Method
    calibration: Calibration
    digests: list[str]
    device: torch.device
    budget: int
    stages: Stages


def candidates(
    family: Family,
    config: ModelConfig,
    grid: Grid,
    request: Request,
    mixed_ranks: bool,
    sensitivities: Callable[[], cache.Sensitivities],
) -> list[Plan]:
    """The plans that come into question, the most promising first; sensitivities are asked for where they count."""
    # One head size alone, or one MLP size, leaves nothing to weigh.
    free = grid.mixed_units and "MLP" in request.reduced if grid.one_head_size else True
    if mixed_ranks and free:
        return mixed_plan(family, config, grid, request, sensitivities())
    return uniform(family, config, grid, request)


def choose(choice: Choice, mixed_ranks: bool, folder: WorkFolder | None) -> tuple[Plan, tuple[tuple[Plan, float], ...]]:
    """The dimensions of every layer, and what candidates were tried for them; an earlier run may have left both."""
    model = choice.model
    left = ranks.same_object(None if folder is None else folder.recall(_PLAN))
    if left is not None:
        return _recalled(model, choice.request, left)
    options = candidates(
        model.family, model.config, choice.grid, choice.request, mixed_ranks, lambda: _sensitivities(choice)
    )
    tried: tuple[tuple[Plan, float], ...] = ()
    if len(options) == 1:
        plan = options[0]
    else:
        tried = _try(choice, options)
        plan = min(tried, key=lambda pair: pair[1])[0]
    found: object = {"plan": _described(plan), "tried": [[_described(one), kl] for one, kl in tried]}
    if folder is not None:
        folder.keep(_PLAN, found)
    # The first alone has measured what the candidates do.
    return _recalled(model, choice.request, ranks.same_object(found))


_PLAN = "plan"


def _described(plan: Plan) -> dict[str, object]:
    """A plan for `_recalled`, in what JSON can hold."""
    sizes = [[one.qk_head_dim, one.v_head_dim, one.intermediate_size] for one in plan.dimensions]
    return {"sizes": sizes, "predicted_kl": plan.predicted_kl}


def _recalled(model: Model, request: Request, found: Any) -> tuple[Plan, tuple[tuple[Plan, float], ...]]:
    def plan(described: Any) -> Plan:
        sizes: list[dict[Component, int]] = [dict(zip(COMPONENTS, one, strict=True)) for one in described["sizes"]]
        return make_plan(model.family, model.config, request, sizes, described["predicted_kl"])

    return plan(found["plan"]), tuple((plan(one), kl) for one, kl in found["tried"])


def _sensitivities(choice: Choice) -> cache.Sensitivities:
    config, request, grid = choice.model.config, choice.request, choice.grid
    # Any type's blocks are multiples of the steps, so that one measurement serves them all.
    sizes: list[Sizes] = [*all_sizes(config, grid, request.reduced)]
    count, length = PROBES[choice.device.type]
    tokens, probes = spread(choice.calibration.tokens, MOMENT_SEQUENCES), spread(choice.calibration.tokens, count)
    probes = probes[:, :length]
    ratio = min(PROBED_RATIOS, key=lambda probed: abs(probed - request.largest))
    file = cache.cache_file(choice.digests, config, tokens, probes, sizes, ratio, choice.method)
    known = ranks.same_object(cache.load(file, sizes))
    if known is None:
        with choice.stages("weigh the layers", config.num_hidden_layers**2) as advance:
            known = measure(
                choice.model,
                tokens,
                probes,
                sizes,
                ratio,
                choice.device,
                choice.method,
                growing(advance),
                choice.budget,
            )
        if ranks.first():
            cache.save(file, known)
    if ranks.first():
        cache.remember(file, choice.model.source, config, ratio, choice.method)
    return ranks.same_object(known)


def growing(advance: Advance) -> Callable[[], None]:
    """Progress of a pass in which the branches of all layers before run along: layer i takes 2 i + 1."""
    done = 0

    def on_layer() -> None:
        nonlocal done
        advance(2 * done + 1)
        done += 1

    return on_layer


def spread(tokens: Tensor, count: int) -> Tensor:
    """`count` of the sequences, evenly spaced: text of several sources stands one after another."""
    stride = max(1, len(tokens) // count)
    return tokens[::stride][:count]


def _try(choice: Choice, options: list[Plan]) -> tuple[tuple[Plan, float], ...]:
    """Reduce to each candidate on a few sequences and measure the KL to the original on held-out ones."""
    model, sequences = choice.model, choice.calibration.held_out
    tokens = spread(choice.calibration.tokens, PROBE_SEQUENCES)
    with choice.stages("choose dimensions", len(options) * model.config.num_hidden_layers) as advance:
        reference = logits_of(model, sequences, choice.device) if ranks.first() else None

        # A function, so that one candidate is gone before the next takes the memory budget.
        def mean_kl(option: Plan) -> float:
            dimensions, mlp_stays = option.dimensions, choice.request.cache_only
            of = reduce(
                model,
                tokens,
                dimensions,
                choice.device,
                choice.budget,
                choice.method,
                for_each(advance),
                None,
                mlp_stays,
            ).model
            if reference is None:
                return 0.0
            logits = {"reduced": logits_of(of, sequences, choice.device)}
            return compare(reference, logits, sequences)["reduced"].mean_kl

        return tuple((option, mean_kl(option)) for option in options)

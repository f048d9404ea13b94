"""The best predicted choice of dimensions, types and cache type that fits a memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from a3q import predict
from a3q.cache import Sensitivities
from a3q.choosing import candidates
from a3q.dimensions import HEADS, SMALLEST, Grid, Request, size_of
from a3q.errors import InputError
from a3q.families import Component
from a3q.footprint import CACHE_BLOCK, CACHE_TYPES, Use, cache_bytes
from a3q.forecast import Forecast, Forecaster, check_cache, grid_for
from a3q.gguf_types import TypeRequest
from a3q.model import ModelConfig
from a3q.reduce import planned
from a3q.settings import RATIO, Settings
from a3q.units import megabytes
from converters.mixes import MIXES
from converters.types import BITS, bits_per_weight, resolve_quant

MLP_SHARES = tuple(step / 20 for step in range(13))
"""Of the MLP that may go: what is taken beyond is predicted to cost more than any rounding."""


@dataclass(frozen=True)
class _Candidate:
    own: dict[Component, float]
    quant: str
    cache_type: str
    loss: float

    @property
    def bits(self) -> float:
        """Of most weights."""
        return bits_per_weight(resolve_quant(self.quant).matrix)


def fit(
    forecaster: Forecaster,
    settings: Settings,
    types: TypeRequest,
    use: Use,
    memory: int,
    quant: str | None,
    cache_type: str | None,
) -> Forecast:
    """The choice of least predicted loss that runs in `memory` bytes: file, cache and compute buffer together.

    Every head size on the grid that leaves a quarter, every twentieth of the MLP, and unless given every type of
    weights in `BITS`, F16 and the source's own, and every cache. InputError names the least that is possible.
    """
    model = forecaster.header.model
    allowed = settings.request().components & grid_for(model, types, "f16").components
    known = forecaster.sensitivities(grid_for(model, types, "f16"), sorted(allowed), RATIO)
    found = sorted(
        _candidates(forecaster, settings, allowed, known[0], quant, cache_type), key=lambda one: (one.loss, one.bits)
    )
    if not found:
        check_cache(model.config, cache_type or "f16", allowed >= HEADS)

    def forecast(one: _Candidate) -> Forecast:
        chosen = replace(settings, ratio=0.0, own_ratios=one.own, kv_ratio=None)
        plan = replace(types.plan, name=resolve_quant(one.quant).name)
        return forecaster.forecast(chosen, replace(types, plan=plan), replace(use, cache_type=one.cache_type), known)

    # Of candidates that differ only in their cache, one forecast tells what all of them take.
    rest: dict[tuple[object, ...], tuple[int, ModelConfig]] = {}

    def takes(one: _Candidate) -> int:
        key = one.quant, *one.own.items()
        if key not in rest:
            result = forecast(one)
            rest[key] = result.after.memory - result.after.kv_bytes, planned(model.config, result.plan.dimensions)
        size, config = rest[key]
        return size + cache_bytes(config, use.context, one.cache_type, use.parallel)

    best = next((one for one in found if takes(one) <= memory), None)
    if best is not None:
        return forecast(best)
    least = forecast(min(found, key=takes)).after
    raise InputError(
        f"--fit {megabytes(memory)}: the least that is possible for {use.context:,} tokens"
        f"{f' × {use.parallel}' if use.parallel > 1 else ''} is {megabytes(least.memory)} "
        f"(file {megabytes(least.file_bytes)}, cache {megabytes(least.kv_bytes)}, compute buffer "
        f"{megabytes(least.compute_bytes)}); take a shorter --ctx, or a smaller model"
    )


def _candidates(
    forecaster: Forecaster,
    settings: Settings,
    allowed: frozenset[Component],
    known: Sensitivities,
    quant: str | None,
    cache_type: str | None,
) -> Iterator[_Candidate]:
    model = forecaster.header.model
    config, family, shape = model.config, model.family, model.config.layers[0]
    shares = MLP_SHARES if "MLP" in allowed else (0.0,)

    @cache
    def grid(quant: str) -> Grid:
        return grid_for(model, TypeRequest(resolve_quant(quant)), "f16")

    @cache
    def reduction(component: Component, share: float, quant: str) -> float:
        """Predicted loss of one component alone; components do not share a budget here."""
        request = Request(0.0, frozenset((component,)), {component: share})
        plan = candidates(family, config, grid(quant), request, settings.mixed(), lambda: known)[0]
        return predict.reduction_cost(plan, config, known)

    own_types = [name.lower() for name in MIXES if forecaster.keeps(resolve_quant(name))]
    quants = [quant] if quant is not None else list(dict.fromkeys(["f16", *BITS, *own_types]))
    caches = [cache_type] if cache_type is not None else list(CACHE_TYPES)
    for name, share, kind in product(quants, shares, caches):
        heads = grid(name).sizes(config, shape, "QK") if allowed >= HEADS else (shape.qk_head_dim,)
        for head in heads:
            if head < SMALLEST * shape.qk_head_dim or (kind != "f16" and head % CACHE_BLOCK):
                continue
            own: dict[Component, float] = {}
            if head != shape.qk_head_dim:
                own |= {c: 1 - head / size_of(shape, c) for c in sorted(HEADS)}
            if share:
                own["MLP"] = share
            rounding = forecaster.rounding(TypeRequest(resolve_quant(name)), bool(own)) or 0.0
            loss = rounding + predict.CACHE[kind] + sum(reduction(c, ratio, name) for c, ratio in own.items())
            yield _Candidate(own, name, kind, loss)

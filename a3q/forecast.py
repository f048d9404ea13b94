"""What a conversion will come to, from headers alone: dimensions, types, bytes, arithmetic, and what it may cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from a3q import cache, predict
from a3q.choosing import candidates
from a3q.components import Method
from a3q.dimensions import HEADS, UNIT_STEP, Grid, Plan, Request, all_sizes, gguf_grid, settle, unreduced
from a3q.errors import InputError
from a3q.families import COMPONENTS, Component
from a3q.footprint import CACHE_BLOCK, Footprint, Speedup, TensorInfo, Use, can_quantize_cache, footprint, limits
from a3q.gguf_types import MOVED, TypeRequest
from a3q.model import Model, ModelConfig
from a3q.noise import Costs, matrices_of
from a3q.reduce import planned
from a3q.reduce_layer import MLP
from a3q.settings import Settings
from converters.assignment import Types, assign
from converters.budget import choose
from converters.entries import Entry, entries
from converters.expected_error import ExpectedError
from converters.gguf_target import check_runtime, target_for
from converters.gguf_writer import header_size, padded
from converters.headers import Header
from converters.types import QuantPlan, block_size

_SAID = 4 << 10
"""Bytes that a file says about its making."""
KV_TOLERANCE = 0.13
"""Of the share of the cache that is to go: what is possible may differ from what is asked by so much."""
_TOKEN_BYTES = 48
"""Of a file for a token of the vocabulary, where the tokenizer is not known: SmolLM2's takes 36, Llama 3's 61."""


@dataclass(frozen=True)
class Prediction:
    """KL divergence from the original (nats) that is expected of each part; see `a3q.predict`."""

    reduction: float
    rounding: float | None
    """None where types are chosen within a limit."""
    cache: float
    measured: bool
    """Whether the reduction's is what an earlier run measured on this model, or the rule."""

    @property
    def total(self) -> float:
        """The parts together."""
        return self.reduction + (self.rounding or 0.0) + self.cache


@dataclass(frozen=True)
class Forecast:
    """A conversion that was not carried out."""

    model: Model
    """Without weights, as it is read."""
    settings: Settings
    types: TypeRequest
    use: Use
    plan: Plan
    before: Footprint
    """With a float16 cache."""
    after: Footprint
    prediction: Prediction
    grid: str
    """The sizes that the file may have, in words."""
    notes: tuple[str, ...]

    @property
    def speedup(self) -> Speedup:
        """How much faster it may become."""
        return Speedup.of(self.before, self.after)


@dataclass
class Forecaster:
    """Forecasts for one model; what was measured of it is looked up once."""

    header: Header
    method: Method = Method()  # noqa: RUF009 (immutable)

    def __post_init__(self) -> None:
        check_runtime(self.header.model)
        self._known: dict[float, cache.Sensitivities | None] = {}
        self._kept: dict[str, bool] = {}
        model = self.header.model
        self._overhead = header_size(model, _SAID)
        if not model.tokenizer.metadata:
            self._overhead += _TOKEN_BYTES * model.config.vocab_size

    def sensitivities(
        self, grid: Grid, components: Sequence[Component], ratio: float
    ) -> tuple[cache.Sensitivities, bool]:
        """Of `components` at all sizes on `grid`, and whether they were measured."""
        model = self.header.model
        if ratio not in self._known:
            self._known[ratio] = cache.recall(model.source, model.config, ratio, self.method)
        known, sizes = self._known[ratio], all_sizes(model.config, grid, components)
        if known is not None and all(
            set(one) <= set(layer) and all(set(options) <= set(layer[c].sizes) for c, options in one.items())
            for one, layer in zip(sizes, known, strict=True)
        ):
            return known, True
        return predict.by_rule(model.config, [*sizes]), False

    def keeps(self, plan: QuantPlan) -> bool:
        """Whether the layers' weights, with nothing reduced, are taken over from the source as they are stored."""
        if plan.name not in self._kept:
            model = self.header.model
            target = target_for(model)
            matrices = [entry for entry in entries(model, target) if entry.layer is not None and len(entry.shape) > 1]
            types, _ = self._stored(model, TypeRequest(plan), False)
            stored = model.source.stored
            self._kept[plan.name] = all(stored.get(e.name) == types.kinds[e.name].name for e in matrices)
        return self._kept[plan.name]

    def forecast(
        self,
        settings: Settings,
        types: TypeRequest,
        use: Use,
        known: tuple[cache.Sensitivities, bool] | None = None,
    ) -> Forecast:
        """What `a3q.convert` comes to; InputError for what it would refuse.

        `known`: the `sensitivities` to go by; those measured next to what is asked unless given.
        """
        model, config = self.header.model, self.header.model.config
        grid = settings.on(grid_for(model, types, use.cache_type))
        request, note = settle(settings.request(), grid, model.family, settings.components is not None)
        check_kv_ratio(model, request, grid)
        notes = [note] if note is not None and request.ratio > 0 else []
        reduced = [c for c in COMPONENTS if c in request.reduced]
        found, measured = known or self.sensitivities(grid, reduced, request.largest)
        if request.groups():
            plan = candidates(model.family, config, grid, request, settings.mixed(), lambda: found)[0]
        else:
            plan = unreduced(model.family, config, request)
        smaller = replace(model, config=planned(config, plan.dimensions))
        check_cache(smaller.config, use.cache_type, grid.components >= HEADS)
        settled, stored = self._stored(smaller, types, request.cache_only)
        size = sum(padded(tensor.bytes) for tensor in stored) + self._overhead
        before = before_conversion(self.header, use)
        after = footprint(model.family, smaller.config, stored, size, smaller.parameters(), use)
        prediction = Prediction(
            predict.reduction_cost(plan, config, found),
            self.rounding(types, bool(request.groups())),
            predict.CACHE[use.cache_type],
            measured,
        )
        if abs(plan.achieved - plan.asked) > 0.01:
            notes.append(f"asked for {plan.asked:.1%}, possible is {plan.achieved:.1%} on this grid")
        return Forecast(
            model=model,
            settings=settings,
            types=types,
            use=use,
            plan=plan,
            before=before,
            after=after,
            prediction=prediction,
            grid=_grid_in_words(config, grid),
            notes=(*notes, *settled.notes, *limits(before, after), *self._source_notes(use)),
        )

    def rounding(self, types: TypeRequest, reducing: bool) -> float | None:
        """Predicted cost of these types; None where it is not known."""
        if types.limit is not None:
            return None
        return 0.0 if not reducing and self.keeps(types.plan) else predict.ROUNDING.get(types.plan.name.upper())

    def _source_notes(self, use: Use) -> list[str]:
        """What the user should know of the model and of how it is to be run."""
        model, notes = self.header.model, []
        if not self.header.has_weights:
            notes.append(f"no weights are there: the size before is that of {self.header.tensors[0].type} ones")
        if not model.tokenizer.metadata:
            notes.append("no tokenizer is there: what it takes of the file is a guess")
        if use.context > model.config.max_position_embeddings:
            notes.append(f"the model was trained for {model.config.max_position_embeddings:,} tokens of context only")
        return notes

    def _stored(self, model: Model, request: TypeRequest, cache_only: bool) -> tuple[Types, list[TensorInfo]]:
        """Types and tensors of the file of `model`, of which only the configuration is the reduced one's."""
        target = target_for(model)
        tensors = entries(model, target)
        error = ExpectedError(model.source.stored, MOVED - frozenset(MLP) if cache_only else MOVED)
        if request.limit is None:
            types = assign(request.plan, tensors, model.config, target.tied, error, request.strict)
        else:
            layer = dict.fromkeys(matrices_of(model), 1.0)
            costs = Costs((layer,) * model.config.num_hidden_layers, {"embed": 1.0, "output": 1.0})
            types = choose(tensors, costs, error, request.limit, self._overhead)
        return types, [stored_as(entry, types) for entry in tensors]


def before_conversion(header: Header, use: Use) -> Footprint:
    """Of a model as it is, with a float16 cache."""
    model, default = header.model, replace(use, cache_type="f16")
    return footprint(model.family, model.config, header.tensors, header.file_bytes, model.parameters(), default)


def grid_for(model: Model, types: TypeRequest, cache_type: str) -> Grid:
    """The sizes that a GGUF of these types can hold, to run with such a cache."""
    # A type chosen within a limit may be any, of which most have blocks of 32.
    block = UNIT_STEP if types.limit else block_size(types.plan.matrix)
    return gguf_grid(model.family, model.config, block, cache_type)


def check_cache(config: ModelConfig, cache_type: str, shrinkable: bool = True) -> None:
    """InputError where llama.cpp would not start with such a cache; `shrinkable`: the heads could be smaller."""
    if cache_type == "f16" or can_quantize_cache(config):
        return
    size = next(n for one in config.layers for n in (one.qk_head_dim, one.v_head_dim) if n % CACHE_BLOCK)
    possible = " or ".join(f"{1 - n / size:.2g}" for n in range(CACHE_BLOCK, size, CACHE_BLOCK) if n >= size / 10)
    advice = f"shrink them with --kv-ratio {possible}, or " if possible and shrinkable else ""
    raise InputError(
        f"--kv-type {cache_type}: heads of size {size} are no multiple of {CACHE_BLOCK}, so that llama.cpp would not "
        f"start; {advice}take --kv-type f16"
    )


def check_kv_ratio(model: Model, request: Request, grid: Grid) -> None:
    """InputError where no head size of the grid comes near the share of the cache that is to go."""
    if request.kv is None or not grid.one_head_size or "QK" not in grid.components:
        return
    shape = model.config.layers[0]
    shares = [1 - size / shape.qk_head_dim for size in grid.sizes(model.config, shape, "QK")]
    if min(abs(share - request.kv) for share in shares) > KV_TOLERANCE:
        raise InputError(
            f"--kv-ratio {request.kv:g}: with these types of weights and cache the ratio can be "
            f"{', '.join(f'{share:.2g}' for share in reversed(shares))}; --quant f16 leaves the most choice"
        )


def stored_as(entry: Entry, types: Types) -> TensorInfo:
    """A tensor of a file as its type makes it."""
    kind = types.kinds[entry.name]
    return TensorInfo(entry.name, kind.name, entry.shape, entry.bytes(kind))


def _grid_in_words(config: ModelConfig, grid: Grid) -> str:
    shape = config.widest
    parts = []
    if "QK" in grid.components:
        sizes = grid.sizes(config, shape, "QK")
        parts.append(f"heads of {', '.join(map(str, sizes))}")
    else:
        parts.append(f"heads stay at {shape.qk_head_dim}")
    step = max(grid.unit_step, grid.unit_block)
    parts.append(f"MLP in steps of {step}{'' if grid.mixed_units else ', all layers alike'}")
    return "; ".join(parts)

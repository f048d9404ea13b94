"""The stages that every output shares: read → calibrate → choose dimensions → reduce. What they do is shown through the
caller's callback."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from a3q import cache
from a3q.calibration import HELD_OUT, SELF, Calibration, calibration_tokens, mixed
from a3q.components import Method
from a3q.dimensions import ALL, HEADS, Grid, Plan, Request, all_sizes, settle, uniform, unreduced
from a3q.dimensions import mixed as mixed_plan
from a3q.errors import InputError
from a3q.families import COMPONENTS, Component, Family
from a3q.model import Model, ModelConfig, Source, free_memory, pick_device
from a3q.perplexity import compare, logits_of
from a3q.progress import Advance, Stages
from a3q.quantize import Quantization
from a3q.reduce import Dimensions, Reduction, planned, reduce
from a3q.sensitivity import Sizes, measure

RATIO = 0.25
"""Of what is reduced unless told."""
MAX_RATIO = 0.9
WINDOWS = {"cpu": (40, 1024), "cuda": (128, 2048)}
"""Calibration sequences and their length where the user names no number of tokens."""
CHECK_ONLY = (1, 256)
"""The same where nothing is reduced and the text only serves the check."""
PROBE_SEQUENCES = 4
"""Sequences on which candidate dimensions are tried; few do, since only their order matters."""
MOMENT_SEQUENCES = 16
"""Sequences from which the sensitivities' functional losses come."""
PROBES = {"cpu": (2, 256), "cuda": (4, 512)}
"""Sequences, and their length, that carry each component's own reduction to the end of the model."""
PROBED_RATIOS = (0.1, 0.25, 0.5)
"""Reductions at which sensitivities are measured; the nearest to the asked one serves it."""


FEW_TOKENS = 8
"""Calibration tokens for each MLP unit below which the user is warned. SmolLM2 at 25 %, 1536 units: perplexity 69 on
8192 tokens, 50 on 65536."""


@dataclass(frozen=True)
class Settings:
    """What the user asked for, whatever the output."""

    ratio: float = RATIO
    components: frozenset[Component] | None = None
    """None: all that the output can hold reduced."""
    own_ratios: Mapping[Component, float] = field(default_factory=dict)
    """Components with a ratio of their own."""
    kv_ratio: float | None = None
    """Share of the KV cache that is to go; None: keys and values are components like the others."""
    ranks: str | None = None
    """`mixed`: sizes differ between layers and components by what each matters; `uniform`: all layers alike, as the
    paper has them. None: as the method has them."""
    head_size: int | None = None
    """Of all heads that shrink, where a plan has settled it."""
    method: str = "a3q"
    calib: Sequence[str] = (SELF,)
    calib_tokens: int | None = None
    seed: int = 0
    device: str = "auto"
    memory_budget: int | None = None
    """Bytes that reduced layers may take before they wait on disk; half of the free memory unless told."""

    @classmethod
    def of(
        cls,
        *,
        ratio: float | None = None,
        components: Iterable[Component] | None = None,
        own_ratios: Mapping[Component, float] | None = None,
        kv_ratio: float | None = None,
        ranks: str | None = None,
        method: str = "a3q",
        calib: str | Sequence[str] = SELF,
        calib_tokens: int | None = None,
        seed: int = 0,
        device: str = "auto",
        memory_budget: int | None = None,
    ) -> Settings:
        """From what a caller of `a3q.convert` and the like may give; InputError for a value out of range.

        `ratio` is RATIO unless told, and nothing beside a `kv_ratio`.
        """
        if ratio is None:
            ratio = RATIO if kv_ratio is None else 0.0
        settings = cls(
            ratio,
            None if components is None else frozenset(components),
            own_ratios or {},
            kv_ratio,
            ranks,
            None,
            method,
            [calib] if isinstance(calib, str) else list(calib),
            calib_tokens,
            seed,
            device,
            memory_budget,
        )
        settings.check()
        return settings

    def request(self) -> Request:
        """The reduction that is asked for."""
        components = ALL if self.components is None else self.components
        if self.kv_ratio is not None:
            components |= HEADS
        return Request(self.ratio, components | self.own_ratios.keys(), self.own_ratios, self.kv_ratio)

    def on(self, grid: Grid) -> Grid:
        """The grid with no more than what is asked for."""
        return grid if self.head_size is None else replace(grid, head_size=self.head_size)

    def mixed(self) -> bool:
        """Whether sizes may differ between layers."""
        return self.ranks == "mixed" or (self.ranks is None and self.method == "a3q")

    def check(self) -> None:
        """InputError for a value out of range."""
        if unknown := sorted(((self.components or frozenset()) | self.own_ratios.keys()) - ALL):
            raise InputError(f"component {unknown[0]!r}: give {', '.join(COMPONENTS)}")
        ratios = {
            "--ratio": self.ratio,
            "--kv-ratio": self.kv_ratio or 0.0,
            **{f"--ratio-{c.lower()}": r for c, r in self.own_ratios.items()},
        }
        for option, ratio in ratios.items():
            if not 0 <= ratio <= MAX_RATIO:
                raise InputError(f"{option} {ratio:g} is out of range; give a number from 0 (untouched) to {MAX_RATIO}")
        if self.ranks not in (None, "mixed", "uniform"):
            raise InputError(f"--ranks {self.ranks}: give mixed or uniform")
        if self.method not in ("a3q", "paper"):
            raise InputError(f"--method {self.method}: give a3q or paper")
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"--seed {self.seed}: give a number from 0 to {(1 << 32) - 1}")
        if self.calib_tokens is not None and self.calib_tokens < 1:
            raise InputError(f"--calib-tokens {self.calib_tokens}: give a positive number of tokens")


def parse_components(text: str | None) -> frozenset[Component] | None:
    """`qk,ov,mlp` in any order and case; InputError for any other name."""
    if text is None:
        return None
    known = {c.lower(): c for c in COMPONENTS}
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise InputError(f"--components {text}: give one or more of qk, ov, mlp, with commas between")
    return frozenset(known[name] for name in names)


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def parse_size(option: str, text: str) -> int:
    """Bytes in `80MB`, `1.5GiB` and the like, in any case; InputError for anything else."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+) *([kmg]?i?)b?", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise InputError(f"{option} {text}: give a size such as 80MB or 1.5GiB")
    return int(float(match[1]) * _UNITS[match[2]])


@dataclass(frozen=True)
class Reduced:
    """A reduced model and how it came about."""

    original: Model
    reduction: Reduction
    plan: Plan
    method: Method
    tried: tuple[tuple[Plan, float], ...]
    """Candidate plans with the mean KL to the original (nats) measured for each; empty if there was one only."""
    calibration: Calibration | None
    digests: list[str]
    """sha256 of each weight file of the original."""
    notes: tuple[str, ...]

    @property
    def model(self) -> Model:
        """The reduced model; the original itself where nothing was reduced."""
        return self.reduction.model


@dataclass(frozen=True)
class Prepared:
    """What runs on one model can share."""

    digests: list[str]
    """sha256 of each weight file."""
    calibration: Calibration | None


def prepare(
    original: Model,
    settings: Settings,
    device: torch.device,
    stages: Stages,
    needed: bool = True,
    held_out: bool = True,
) -> Prepared:
    """Hash the source and get calibration text: a little where it is only `held_out` for the check, or none."""
    digests = _hash(original.source, stages)
    if not needed and not held_out:
        return Prepared(digests, None)
    size = windows(original, device, settings.calib_tokens)
    if not needed:
        size = CHECK_ONLY[0], min(CHECK_ONLY[1], size[1])
    return Prepared(digests, calibrate(original, settings.calib, size, settings.seed, device, stages))


@dataclass(frozen=True)
class Calibrated:
    """What else than weights is known when types are settled."""

    calibration: Calibration
    digests: list[str]
    """sha256 of each weight file of the original."""
    device: torch.device
    stages: Stages


class Rounding(Protocol):
    """Settles, for known dimensions, what each weight is rounded to."""

    @property
    def needs_calibration(self) -> bool:
        """Whether rounding alone, with nothing to reduce, is reason enough to calibrate."""
        ...

    def __call__(self, config: ModelConfig, calibrated: Calibrated | None) -> Quantization | None:
        """For a model of `config`; None: nothing is to be rounded in the pass over the layers."""
        ...


def run(
    original: Model,
    settings: Settings,
    grid: Grid,
    method: Method,
    held_out: bool,
    stages: Stages,
    rounding: Rounding | None = None,
    prepared: Prepared | None = None,
) -> Reduced:
    """Reduce `original` as `settings` ask, on `grid`, and round it in the same pass if so told.

    With `held_out`, calibration text is there even if not needed. What is `prepared` need not be done.
    """
    device = pick_device(settings.device)
    grid = settings.on(grid)
    request, note = settle(settings.request(), grid, original.family, settings.components is not None)
    notes = [note] if note is not None and request.ratio > 0 else []
    needed = bool(request.groups()) or (rounding is not None and rounding.needs_calibration)
    prepared = prepared or prepare(original, settings, device, stages, needed, held_out)
    digests, calibration = prepared.digests, prepared.calibration
    if not needed or calibration is None:
        plan = unreduced(original.family, original.config, request)
        if rounding is not None:
            rounding(original.config, None)
        return Reduced(original, Reduction(original, []), plan, method, (), calibration, digests, tuple(notes))
    budget = settings.memory_budget if settings.memory_budget is not None else free_memory() // 2
    tried: tuple[tuple[Plan, float], ...] = ()
    if request.groups():
        work = _Work(original, request, grid, method, calibration, digests, device, budget, stages)
        plan, tried = _choose(work, settings.mixed())
    else:
        plan = unreduced(original.family, original.config, request)
    known = Calibrated(calibration, digests, device, stages)
    quantization = None if rounding is None else rounding(planned(original.config, plan.dimensions), known)
    reduction = _carry_out(original, plan, method, quantization, known, budget)
    notes += [*_shortfall(plan), *_advice(original, reduction.model, plan, calibration)]
    return Reduced(original, reduction, plan, method, tried, calibration, digests, tuple(notes))


def _carry_out(
    original: Model, plan: Plan, method: Method, quantization: Quantization | None, known: Calibrated, budget: int
) -> Reduction:
    """Reduce and round in one pass over the layers; after the paper's method, which fits nothing, in two."""
    model, tokens, layers = original, known.calibration.tokens, original.config.num_hidden_layers
    shrinks, mlp_stays = bool(plan.request.groups()), plan.request.cache_only
    dimensions: Sequence[Dimensions] = plan.dimensions
    losses = None
    if not shrinks and quantization is None:
        return Reduction(original, [])
    if shrinks and (quantization is None or not method.fitted):
        with known.stages("reduce", layers) as advance:
            reduction = reduce(model, tokens, dimensions, known.device, budget, method, _one(advance), None, mlp_stays)
        if quantization is None:
            return reduction
        model, losses = reduction.model, reduction.losses
        dimensions, shrinks = [Dimensions.of(shape) for shape in model.config.layers], False
    fitted = replace(method, name="a3q")
    with known.stages("reduce and quantize" if shrinks else "quantize", layers) as advance:
        found = reduce(model, tokens, dimensions, known.device, budget, fitted, _one(advance), quantization, mlp_stays)
    return found if losses is None else replace(found, losses=losses)


@dataclass(frozen=True)
class _Work:
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


def _choose(work: _Work, mixed_ranks: bool) -> tuple[Plan, tuple[tuple[Plan, float], ...]]:
    """The dimensions of every layer, and what candidates were tried for them."""
    model = work.model
    options = candidates(model.family, model.config, work.grid, work.request, mixed_ranks, lambda: _sensitivities(work))
    if len(options) == 1:
        return options[0], ()
    tried = _try(work, options)
    return min(tried, key=lambda pair: pair[1])[0], tried


def _sensitivities(work: _Work) -> cache.Sensitivities:
    config, request, grid = work.model.config, work.request, work.grid
    # Any type's blocks are multiples of the steps, so that one measurement serves them all.
    sizes: list[Sizes] = [*all_sizes(config, grid, request.reduced)]
    count, length = PROBES[work.device.type]
    tokens, probes = spread(work.calibration.tokens, MOMENT_SEQUENCES), spread(work.calibration.tokens, count)
    probes = probes[:, :length]
    ratio = min(PROBED_RATIOS, key=lambda probed: abs(probed - request.largest))
    file = cache.cache_file(work.digests, config, tokens, probes, sizes, ratio, work.method)
    known = cache.load(file, sizes)
    if known is None:
        with work.stages("weigh the layers", config.num_hidden_layers**2) as advance:
            known = measure(work.model, tokens, probes, sizes, ratio, work.device, work.method, growing(advance))
        cache.save(file, known)
    cache.remember(file, work.model.source, config, ratio, work.method)
    return known


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


def _one(advance: Advance) -> Callable[[], None]:
    return lambda: advance(1)


def timed(stages: Stages, seconds: dict[str, float]) -> Stages:
    """The same stages, with the time of each noted under its title."""

    @contextmanager
    def stage(title: str, total: float) -> Iterator[Advance]:
        start = time.monotonic()
        with stages(title, total) as advance:
            yield advance
        seconds[title] = seconds.get(title, 0.0) + time.monotonic() - start

    return stage


def _hash(source: Source, stages: Stages) -> list[str]:
    """sha256 of each weight file."""
    digests = []
    with stages("hash the source", source.file_size) as advance:
        for path in source.weight_files:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
                    advance(len(chunk))
            digests.append(digest.hexdigest())
    return digests


def windows(model: Model, device: torch.device, tokens: int | None) -> tuple[int, int]:
    """Number and length of calibration sequences."""
    count, length = WINDOWS[device.type]
    length = min(length, model.config.max_position_embeddings)
    if tokens is not None:
        count = -(-tokens // length)
    return count, length


def calibrate(
    model: Model, sources: Sequence[str], size: tuple[int, int], seed: int, device: torch.device, stages: Stages
) -> Calibration:
    """Text of all `sources` together, `size` sequences and tokens in each."""
    total, length = size
    parts = []
    for i, source in enumerate(sources):
        count = max(1, total * (i + 1) // len(sources) - total * i // len(sources))
        by_itself = source == SELF
        title = "write calibration text" if by_itself else "read calibration text"
        with stages(title, (count + HELD_OUT) * length if by_itself else 1.0) as advance:
            parts.append(calibration_tokens(model, source, count, length, seed=seed, device=device, on_tokens=advance))
    calibration = mixed(parts)
    # Learned positions end where the context does.
    return replace(calibration, held_out=calibration.held_out[:, : model.config.max_position_embeddings].contiguous())


def _try(work: _Work, options: list[Plan]) -> tuple[tuple[Plan, float], ...]:
    """Reduce to each candidate on a few sequences and measure the KL to the original on held-out ones."""
    model, sequences = work.model, work.calibration.held_out
    tokens = spread(work.calibration.tokens, PROBE_SEQUENCES)
    with work.stages("choose dimensions", len(options) * model.config.num_hidden_layers) as advance:
        reference = logits_of(model, sequences, work.device)

        # A function, so that one candidate is gone before the next takes the memory budget.
        def mean_kl(option: Plan) -> float:
            dimensions, mlp_stays = option.dimensions, work.request.cache_only
            of = reduce(
                model, tokens, dimensions, work.device, work.budget, work.method, _one(advance), None, mlp_stays
            ).model
            logits = {"reduced": logits_of(of, sequences, work.device)}
            return compare(reference, logits, sequences)["reduced"].mean_kl

        return tuple((option, mean_kl(option)) for option in options)


def provenance(reduced: Reduced, settings: Settings, version: str) -> dict[str, object]:
    """What a written model says about its making: plain values, keys without a prefix."""
    original, plan = reduced.original, reduced.plan
    known = original.metadata.get("general.name")
    facts: dict[str, object] = {
        "version": version,
        "source.name": str(known.value) if known is not None else original.source.path.stem,
        "source.files": [file.name for file in original.source.weight_files],
        "source.sha256": reduced.digests,
    }
    # A reduced model that is only rewritten keeps the record of its reduction, which `metadata` carries.
    if plan.asked > 0 or "a3q.ratio" not in original.metadata:
        facts |= {"ratio": float(plan.asked), "ratio_achieved": float(plan.achieved)}
    if plan.asked == 0 or reduced.calibration is None:
        return facts
    shapes = reduced.model.config.layers
    facts |= {
        "method": reduced.method.name,
        "ranks": "mixed" if settings.mixed() else "uniform",
        "components": [c.lower() for c in COMPONENTS if c in plan.request.reduced],
        "qk_head_dim": _per_layer([shape.qk_head_dim for shape in shapes]),
        "v_head_dim": _per_layer([shape.v_head_dim for shape in shapes]),
        "intermediate_size": _per_layer([shape.intermediate_size for shape in shapes]),
        "calibration.source": reduced.calibration.source,
        "calibration.tokens": reduced.calibration.tokens.numel(),
        "calibration.seed": settings.seed,
    }
    return facts


def rounding_facts(reduced: Reduced, settings: Settings) -> dict[str, object]:
    """What a written model says about the text that its rounding was calibrated on."""
    if reduced.calibration is None or reduced.reduction.layers is None:
        return {}
    return {
        "quantizer.calibration.source": reduced.calibration.source,
        "quantizer.calibration.tokens": reduced.calibration.tokens.numel(),
        "quantizer.calibration.seed": settings.seed,
    }


def is_about_rounding(key: str) -> bool:
    """Whether a key of provenance, without its prefix, is about how the weights of one file were rounded."""
    return key.partition(".")[0] in ("quantization", "quantizer", "bits", "group_size")


def _per_layer(sizes: list[int]) -> int | list[int]:
    return sizes[0] if len(set(sizes)) == 1 else sizes


def _shortfall(plan: Plan) -> list[str]:
    if abs(plan.achieved - plan.asked) <= 0.01:
        return []
    return [
        f"asked for {plan.asked:.1%}, achieved {plan.achieved:.1%}: the sizes taken are the closest that the output's "
        "grid has"
    ]


def _advice(original: Model, reduced: Model, plan: Plan, calibration: Calibration) -> list[str]:
    """What the user might have expected otherwise."""
    advice = []
    tokens, units = calibration.tokens.numel(), original.config.widest.intermediate_size
    if "MLP" in plan.request.reduced and tokens < FEW_TOKENS * units:
        advice.append(
            f"{tokens} calibration tokens are few for {units} MLP units; from {FEW_TOKENS * units} on the result is "
            "much better (--calib-tokens, or more text)"
        )
    heads = {"QK", "OV"} & plan.request.reduced
    if heads and reduced.config.kv_bytes_per_token() == original.config.kv_bytes_per_token():
        advice.append(
            "the KV cache stays as large: the parameters were saved elsewhere than in the heads; --kv-ratio makes "
            "it shrink"
        )
    return advice

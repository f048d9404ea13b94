"""The stages that every output shares: read → calibrate → choose dimensions → reduce. What they do is shown through the
caller's callback."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from a3q import ranks
from a3q.calibration import HELD_OUT, HELD_OUT_LENGTH, SELF, Calibration, calibration_tokens, mixed
from a3q.choosing import Choice, choose
from a3q.components import Method
from a3q.dimensions import Grid, Plan, settle, unreduced
from a3q.errors import InputError
from a3q.heal.blocks import BlockLimit
from a3q.heal.settings import BLOCK_PASSES, Healing
from a3q.heal.stage import Healed, HealJob, heal, heal_rounded, healing_text
from a3q.heal.text import own_calibration
from a3q.model import Model, ModelConfig, Source, free_memory, pick_device
from a3q.progress import Advance, Stages, for_each
from a3q.quantize import Quantization
from a3q.reduce import OnFinished, Reduction, planned, reduce
from a3q.reduce_layer import Dimensions
from a3q.settings import Settings
from a3q.work import WorkFolder

WINDOWS = {"cpu": (40, 1024), "cuda": (128, 2048)}
"""Calibration sequences and their length where the user names no number of tokens."""
TRAINED_ON = {"cpu": (240, 1024), "cuda": (128, 2048)}
"""The same where layers are trained on them: one of SmolLM2's in as many steps came 0.6 % further away from what it
should put out on text that it did not see, 2.3 % nearer and 3.7 % nearer with 26, 52 and 105 × 1024 tokens."""
CHECK_ONLY = (1, 256)
"""The same where nothing is reduced and the text only serves the check."""
FEW_TOKENS = 8
"""Calibration tokens for each MLP unit below which the user is warned. SmolLM2 at 25 %, 1536 units: perplexity 69 on
8192 tokens, 50 on 65536."""


@dataclass(frozen=True)
class Settled:
    """What is to become of a model."""

    original: Model
    plan: Plan
    method: Method
    tried: tuple[tuple[Plan, float], ...]
    """Candidate plans with the mean KL to the original (nats) measured for each; empty if there was one only."""
    calibration: Calibration | None
    digests: list[str]
    """sha256 of each weight file of the original."""

    @property
    def config(self) -> ModelConfig:
        """With the new dimensions; which RoPE frequencies stay is not known yet."""
        return planned(self.original.config, self.plan.dimensions)


@dataclass(frozen=True)
class Reduced(Settled):
    """A reduced model and how it came about."""

    reduction: Reduction
    notes: tuple[str, ...]
    healed: tuple[Healed, ...] = ()
    """What each phase of healing the whole model did."""

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
    digests: list[str] | None = None,
    work: WorkFolder | None = None,
) -> Prepared:
    """Hash the source, unless its `digests` are known, and get calibration text: a little where it is only `held_out`
    for the check, or none, or what an earlier run has left in `work`."""
    digests = digests or hash_source(original.source, stages)
    if not needed and not held_out:
        return Prepared(digests, None)
    trained_on = settings.healing.blocks
    size = windows(original, device, settings.calib_tokens, trained_on)
    if not needed:
        size = CHECK_ONLY[0], min(CHECK_ONLY[1], size[1])

    def text() -> Calibration:
        known = None if work is None else work.calibration()
        if known is None:
            known = calibrate(original, settings.calib, size, settings.seed, device, stages, trained_on)
            if work is not None:
                work.keep_calibration(known)
        return known

    return Prepared(digests, ranks.by_first(text))


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


Writer = Callable[[Settled], OnFinished]
"""Opens an output once all is settled but the weights, and takes the layers as they are finished."""


def run(
    original: Model,
    settings: Settings,
    grid: Grid,
    method: Method,
    held_out: bool,
    stages: Stages,
    rounding: Rounding | None = None,
    prepared: Prepared | None = None,
    work: WorkFolder | None = None,
    writer: Writer | None = None,
    digests: list[str] | None = None,
) -> Reduced:
    """Reduce `original` as `settings` ask, on `grid`, and round it in the same pass if so told.

    With `held_out`, calibration text is there even if not needed. What is `prepared`, or known of the `digests`, need
    not be done, nor what an earlier run has left in `work`. Over several processes, the first alone has the layers.
    """
    device = pick_device(settings.device)
    grid = settings.on(grid)
    request, note = settle(settings.request(), grid, original.family, settings.components is not None)
    notes = [note] if note is not None and request.ratio > 0 else []
    if settings.healing.any and not request.groups():
        raise InputError("--heal: nothing is reduced, so there is nothing to heal; give --ratio or leave --heal out")
    needed = bool(request.groups()) or (rounding is not None and rounding.needs_calibration)
    prepared = prepared or prepare(original, settings, device, stages, needed, held_out, digests, work)
    calibration = prepared.calibration if needed else None
    budget = settings.memory_budget if settings.memory_budget is not None else free_memory() // 2
    budget //= ranks.neighbours()
    plan = unreduced(original.family, original.config, request)
    tried: tuple[tuple[Plan, float], ...] = ()
    quantization, known = None, None
    if calibration is not None:
        known = Calibrated(calibration, prepared.digests, device, stages)
        if request.groups():
            job = Choice(original, request, grid, method, calibration, prepared.digests, device, budget, stages)
            plan, tried = choose(job, settings.mixed(), work)
    settled = Settled(original, plan, method, tried, prepared.calibration, prepared.digests)
    if rounding is not None:
        quantization = rounding(settled.config if known is not None else original.config, known)
    if settings.healing.quant and quantization is None:
        raise InputError("--heal-quant: no weight is rounded to a grid that a3q trains on; leave it out")
    on_finished = None if writer is None else ranks.alone(partial(writer, settled))
    healed: tuple[Healed, ...] = ()
    if known is not None:
        reduction, healed = _carry_out(settled, settings, quantization, known, budget, work, on_finished)
        notes += [*_shortfall(plan), *_advice(original, reduction.model, plan, known.calibration), *reduction.notes]
    else:
        reduction = Reduction(original, [])
    ranks.meet()
    return Reduced(**vars(settled), reduction=reduction, notes=tuple(notes), healed=healed)


def _carry_out(
    settled: Settled,
    settings: Settings,
    quantization: Quantization | None,
    known: Calibrated,
    budget: int,
    work: WorkFolder | None,
    on_finished: OnFinished | None,
) -> tuple[Reduction, tuple[Healed, ...]]:
    """Reduce and round in one pass over the layers; after the paper's method, which fits nothing, and after healing in
    two."""
    model, plan, method, healing = settled.original, settled.plan, settled.method, settings.healing
    shrinks, mlp_stays = bool(plan.request.groups()), plan.request.cache_only
    if not shrinks and quantization is None:
        return Reduction(model, []), ()

    def one_pass(
        title: str,
        model: Model,
        dimensions: Sequence[Dimensions],
        method: Method,
        last: bool,
        rounding: Quantization | None = None,
        limit: BlockLimit | None = None,
    ) -> Reduction:
        with known.stages(title, model.config.num_hidden_layers) as advance:
            return reduce(
                model,
                known.calibration.tokens,
                dimensions,
                known.device,
                budget,
                method,
                for_each(advance),
                rounding,
                mlp_stays,
                limit,
                settings.seed,
                folder=None if work is None else work.layers(title.replace(" ", "-")),
                on_finished=on_finished if last and on_finished is not None else lambda i, finished: None,
                for_all=not last,
            )

    fitted = replace(method, name="a3q")
    if not healing.any:
        if quantization is None:
            return one_pass("reduce", model, plan.dimensions, method, True), ()
        if not shrinks:
            return one_pass("quantize", model, plan.dimensions, fitted, True, quantization), ()
        if method.fitted:
            return one_pass("reduce and quantize", model, plan.dimensions, fitted, True, quantization), ()
    limit = _block_limit(healing, known) if healing.blocks else None
    title = "reduce and heal" if healing.blocks else "reduce"
    first = one_pass(title, model, plan.dimensions, method, False, None, limit)
    job = HealJob(
        original=model,
        healing=healing,
        sources=settings.calib,
        length=known.calibration.tokens.shape[1],
        seed=settings.seed,
        device=known.device,
        budget=budget,
        stages=known.stages,
        work=work,
        held_out=known.calibration.held_out,
        attention_only=mlp_stays,
    )
    text = healing_text(job) if healing.full or healing.quant else None
    healed: list[Healed] = []
    if healing.full and text is not None:
        first, one = heal(job, first, text)
        healed.append(one)
    found = first
    if quantization is not None:
        same = [Dimensions.of(shape) for shape in first.model.config.layers]
        found = one_pass("quantize", first.model, same, fitted, not healing.quant, quantization)
        found = replace(found, losses=first.losses, notes=(*first.notes, *found.notes))
    if healing.quant and text is not None:
        found, one = heal_rounded(job, found, text)
        healed.append(one)
    if on_finished is not None and (quantization is None or healing.quant):
        assert found.layers is not None
        for i in range(len(found.layers)):
            on_finished(i, found.layers.finished(i))
    return found, tuple(healed)


def _block_limit(healing: Healing, known: Calibrated) -> BlockLimit:
    tokens = healing.tokens or BLOCK_PASSES * known.calibration.tokens.numel()
    return BlockLimit(tokens, healing.block_seconds())


def timed(stages: Stages, seconds: dict[str, float]) -> Stages:
    """The same stages, with the time of each noted under its title."""

    @contextmanager
    def stage(title: str, total: float) -> Iterator[Advance]:
        start = time.monotonic()
        with stages(title, total) as advance:
            yield advance
        seconds[title] = seconds.get(title, 0.0) + time.monotonic() - start

    return stage


_AT_ONCE = 4
"""Weight files that are hashed at the same time, at the most."""


def hash_source(source: Source, stages: Stages) -> list[str]:
    """sha256 of each weight file. InputError where one cannot be read to its end."""
    # Whoever ends the run need not wait for files of many gigabytes.
    ended = threading.Event()
    with stages("hash the source", source.file_size) as advance:

        def digest(path: Path) -> str:
            found = hashlib.sha256()
            try:
                with path.open("rb") as file:
                    while not ended.is_set() and (chunk := file.read(1 << 22)):
                        found.update(chunk)
                        advance(len(chunk))
            except OSError as error:
                raise InputError(f"{path}: cannot be read: {error.strerror}; copy or download it again") from error
            return found.hexdigest()

        def digests() -> list[str]:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                try:
                    return list(pool.map(digest, source.weight_files))
                finally:
                    ended.set()

        return ranks.by_first(digests)


def windows(model: Model, device: torch.device, tokens: int | None, trained_on: bool = False) -> tuple[int, int]:
    """Number and length of calibration sequences, more of them where layers are to be trained on them."""
    count, length = (TRAINED_ON if trained_on else WINDOWS)[device.type]
    length = min(length, model.config.max_position_embeddings)
    if tokens is not None:
        count = -(-tokens // length)
    return count, length


def calibrate(
    model: Model,
    sources: Sequence[str],
    size: tuple[int, int],
    seed: int,
    device: torch.device,
    stages: Stages,
    trained_on: bool = False,
) -> Calibration:
    """Text of all `sources` together, `size` sequences and tokens in each.

    What layers are to be trained on the model writes as for healing end to end.
    """
    total, length = size
    parts = []
    for i, source in enumerate(sources):
        count = max(1, total * (i + 1) // len(sources) - total * i // len(sources))
        by_itself = source == SELF
        title = "write calibration text" if by_itself else "read calibration text"
        with stages(title, _to_write(count, length, trained_on) if by_itself else 1.0) as advance:
            write = own_calibration if by_itself and trained_on else partial(calibration_tokens, source=source)
            parts.append(write(model, count=count, length=length, seed=seed, device=device, on_tokens=advance))
    calibration = mixed(parts)
    # Learned positions end where the context does.
    return replace(calibration, held_out=calibration.held_out[:, : model.config.max_position_embeddings].contiguous())


def _to_write(count: int, length: int, trained_on: bool) -> int:
    """Tokens."""
    return count * length + HELD_OUT * (min(HELD_OUT_LENGTH, length) if trained_on else length)


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

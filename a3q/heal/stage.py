"""Healing as a stage of a run: text, training, and the layers as they come out of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from a3q import ranks
from a3q.calibration import SELF
from a3q.forward import compute_dtype, to_device
from a3q.heal.adapters import LowRankStudent, free_on, student_for
from a3q.heal.checkpoint import keeper, restore, save
from a3q.heal.distill import Distillation, Group, Point, Recipe, Teacher
from a3q.heal.fused import pays
from a3q.heal.rounding import RoundedStudent
from a3q.heal.schedule import Limit
from a3q.heal.settings import Healing
from a3q.heal.student import FullStudent, Student
from a3q.heal.text import healing_text as written
from a3q.heal.text import without
from a3q.model import Model
from a3q.pieces import fusing, pieces, using
from a3q.progress import Stages, to_share
from a3q.reduce import Reduction
from a3q.solve.grid import Blocks
from a3q.store import Finished, LayerStore
from a3q.work import WorkFolder

PEAK = 1e-3
"""Learning rate."""
ADAPTERS_PEAK = 2e-3
"""The same of low-rank adapters. Not tuned."""
ROUNDED_PEAK = 2e-2
"""The same of weights that are rounded, in steps of their grid."""
ROUNDED_DECAY = 0.5
"""Pull of these back to where GPTQ has left them: without it Adam, whose steps are as large for noise as for a slope,
carries every weight over the next threshold sooner or later."""
SCALES_PEAK = 1e-3
"""The same of their scales, as a share of each."""
STEP_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Of one step of the optimizer. Tokens matter less than steps: SmolLM2-135M at 25 % went from a perplexity of 51.9 to
42.2 in 202 steps of 16,384 tokens and to 41.9 in 176 of 32,768 (Muon in both; AdamW in 178 of these to 42.2)."""
LENGTH = 1024
"""Tokens of a sequence, at most."""
PASSES = {"cpu": 3, "cuda": 1}
"""Over the text, where the model writes it. In a second pass the loss on what is known is a fifth lower at once, on
other text not; but on a CPU to write a token takes longer than to train on it, on a GPU two thirds as long."""
_MOST = 1 << 28
"""Tokens of text, at most."""
_FEWEST = 16
"""Sequences of text, at least."""
_WRITING = 0.35
"""Of a time limit, what writing text may take; the rest is for training."""
_STUDENT = "heal-adapters"
"""Name of the document that tells whether low-rank adapters are trained."""
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Healed:
    """What healing end to end did."""

    tokens: int
    """Trained on."""
    text_tokens: int
    """Of different text."""
    seconds: float
    """Of the training itself."""
    before: float
    """KL to the original (nats) on sequences that were not trained on."""
    after: float
    curve: tuple[Point, ...]
    rounded: bool = False
    """Whether with rounding in the loop."""

    @property
    def kept(self) -> bool:
        """Whether the weights are those that it has trained: only where that helped on what it had not seen."""
        return self.after < self.before


@dataclass(frozen=True)
class HealJob:
    """What the reduced model is to learn from, and how."""

    original: Model
    healing: Healing
    sources: Sequence[str]
    """Of text, as for calibration."""
    length: int
    """Of the calibration's sequences."""
    seed: int
    device: torch.device
    budget: int
    """Bytes of main memory for finished layers."""
    stages: Stages
    work: WorkFolder | None
    held_out: Tensor | None = None
    """Text `[n, T]` that the result is checked on, and which must not be trained on."""
    attention_only: bool = False
    """Leave the MLPs as they are."""

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return compute_dtype(self.device, self.original.config.hidden_size)


def heal(job: HealJob, reduction: Reduction, text: Tensor) -> tuple[Reduction, Healed]:
    """Train the reduced model end to end on `text` `[N, T]`; where it is no better on what is held out, it stays.

    The layers are there on all processes. InputError where memory or disk are not enough.
    """
    student, about = _student(job, reduction.model)
    peak = PEAK if isinstance(student, FullStudent) else ADAPTERS_PEAK
    healed, notes = _train(job, student, [Group(student.parameters(), peak)], text, rounded=False)

    def layer(i: int) -> Finished:
        weights = student.finished(i) if healed.kept else reduction.model.layers[i]
        return Finished(to_device(weights, _CPU), reduction.model.config.layers[i], reduction.losses[i])

    store = _stored(job, "heal", layer, len(reduction.losses))
    model = replace(reduction.model, layers=store)
    return replace(reduction, model=model, layers=store, notes=(*reduction.notes, *about, *notes)), healed


def _student(job: HealJob, model: Model) -> tuple[FullStudent | LowRankStudent, list[str]]:
    """All weights in training or low-rank adapters, as memory allows; a run that goes on stays with what it began."""
    work = job.work
    known = ranks.by_first(lambda: None if work is None else work.recall(_STUDENT))
    adapted = None if known is None else bool(known)
    free = free_on(job.device)
    student, notes = student_for(
        model, job.original, job.device, job.dtype, job.attention_only, free, job.seed, adapted
    )
    if work is not None and known is None:
        work.keep(_STUDENT, isinstance(student, LowRankStudent))
    return student, notes


def heal_rounded(job: HealJob, reduction: Reduction, text: Tensor) -> tuple[Reduction, Healed]:
    """The same with the weights of `reduction`, which are rounded, on their grids all the while."""
    layers = reduction.layers
    assert layers is not None
    blocks = [{role: _trainable(one) for role, one in layers.blocks(i).items()} for i in range(len(layers))]
    student = RoundedStudent(reduction.model, blocks, job.device, job.dtype)
    weights, scales = student.groups()
    groups = [Group(weights, ROUNDED_PEAK, ROUNDED_DECAY), Group(scales, SCALES_PEAK)]
    healed, notes = _train(job, student, groups, text, rounded=True)

    def layer(i: int) -> Finished:
        known = layers.finished(i)
        if not healed.kept:
            return known
        return replace(known, layer=to_device(student.finished(i), _CPU), blocks=student.rounded(i))

    store = _stored(job, "heal-rounded", layer, len(layers))
    model = replace(reduction.model, layers=store)
    return replace(reduction, model=model, layers=store, notes=(*reduction.notes, *notes)), healed


def _limit(job: HealJob, rounded: bool) -> Limit:
    """Of a training's own tokens and time."""
    tokens, seconds = job.healing.end_to_end(rounded)
    return Limit(tokens, seconds if seconds is None or SELF not in job.sources else (1 - _WRITING) * seconds)


def _trainable(blocks: Blocks) -> Blocks:
    """Copies of tensors that come from a pass in which nothing is recorded for gradients."""
    return Blocks.of(blocks.grid, {name: tensor.clone() for name, tensor in blocks.tensors().items()})


def _train(
    job: HealJob, student: Student, groups: list[Group], text: Tensor, rounded: bool
) -> tuple[Healed, list[str]]:
    """Train, and go on with what an earlier run has left in the work folder."""
    limit = _limit(job, rounded)
    title = "heal rounded" if rounded else "heal"
    recipe = Recipe(step_tokens=STEP_TOKENS[job.device.type])
    teacher = Teacher(job.original, job.device, job.dtype)
    fused = pays(limit, job.device)
    run = Distillation(teacher, student, groups, text, limit, job.device, job.dtype, job.seed, recipe, fused)
    # On the other processes the path says only that there is one.
    path = ranks.same_object(None if job.work is None else job.work.path / f"{title.replace(' ', '-')}.safetensors")
    with job.stages(title, 1.0) as advance:
        if path is not None:
            restore(run, path)
        run.train(to_share(advance), keeper(run, path if ranks.first() else None))
        if path is not None and ranks.first():
            save(run, path)
        after = run.held_out_loss()
    state = run.state
    notes = list(run.portions.notes)
    if state.left_out:
        notes.append(f"{state.left_out} steps of healing were left out, since gradients were no numbers")
    healed = Healed(state.tokens, text.numel(), state.seconds, state.before, after, tuple(state.curve), rounded)
    if not healed.kept:
        how = "with the rounding in the loop" if rounded else "end to end"
        notes.append(f"healing {how} did not help on text that it had not seen, so the weights stay as they were")
    return healed, notes


def _stored(job: HealJob, title: str, layer: Callable[[int], Finished], count: int) -> LayerStore:
    """All layers on every process; in the work folder, those that are not there yet."""
    folder = None if job.work is None else job.work.layers(title)
    store = LayerStore(job.budget, folder)
    for i in range(len(store), count):
        store.append(layer(i))
    return store


def healing_text(job: HealJob) -> Tensor:
    """Text to train on, int64 `[N, T]`; what an earlier run has left in the work folder, if there is any."""
    healing = job.healing
    phases = [rounded for rounded, wanted in ((False, healing.full), (True, healing.quant)) if wanted]
    tokens, seconds = zip(*(healing.end_to_end(rounded) for rounded in phases), strict=True)
    length = min(LENGTH, job.length)
    wanted = _MOST if None in tokens else min(_MOST, sum(tokens) // PASSES[job.device.type])
    wanted = max(_FEWEST, -(-wanted // length)) * length
    most = math.inf if None in seconds else _WRITING * sum(seconds)
    end, fused = time.monotonic() + most, pays(Limit(wanted, most), job.device)

    def text() -> Tensor:
        known = None if job.work is None else job.work.tokens("healing-text")
        if known is None:
            title = "write healing text" if SELF in job.sources else "read healing text"
            with job.stages(title, wanted) as advance, using(fusing() if fused else pieces()):
                known = written(
                    job.original,
                    job.sources,
                    wanted,
                    length,
                    seed=job.seed,
                    device=job.device,
                    on_tokens=advance,
                    over=lambda: time.monotonic() > end,
                )
            if job.held_out is not None and any(source != SELF for source in job.sources):
                known = without(known, job.held_out)
            if job.work is not None:
                job.work.keep_tokens("healing-text", known)
        return known

    return ranks.by_first(text)

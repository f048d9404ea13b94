"""End-to-end distillation: the reduced model learns the original's predictions, token by token, from any text.

The loss is KL(original ‖ reduced) of the next token in nats, at temperature 1, averaged over all positions. There are
no labels: the text only says where to look.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from a3q import ranks
from a3q.compiled import compiled
from a3q.errors import InputError
from a3q.forward import block, embed, norm
from a3q.heal.divergence import Slice, divergence, slice_divergence
from a3q.heal.portions import Portions, discard
from a3q.heal.recorded import Recorded, add_gradients
from a3q.heal.schedule import Limit, rate
from a3q.heal.student import Student
from a3q.model import Layer, LayerShape, Model, ModelConfig
from a3q.pieces import fusing, pieces, using

HELD_OUT = 16
"""Sequences that are not trained on, at most; of few, an eighth."""
_EPS = 1e-15
"""Of AdamW: gradients by weights in steps of a grid are as small as the steps."""
BROKEN = 8
"""Steps one after another whose gradient may be no number, and which are left out, before healing is given up."""


@dataclass(frozen=True)
class Group:
    """Parameters with a learning rate of their own."""

    parameters: list[Tensor]
    peak: float
    """Learning rate after the warm-up."""
    decay: float = 0.0
    """Weight decay of AdamW: the pull to 0, over the learning rate."""


@dataclass(frozen=True)
class Recipe:
    """How a student is trained."""

    step_tokens: int = 32768
    """Of one step of the optimizer, as far as there are so many."""
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    """Largest norm of all gradients together."""
    points: int = 100
    """Of the loss curve, at the most."""


@dataclass(frozen=True)
class Point:
    """A point of the loss curve."""

    tokens: int
    """Trained on so far."""
    seconds: float
    loss: float
    """Mean KL (nats) of the steps since the point before."""


@dataclass
class State:
    """How far a run is."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[Point] = field(default_factory=list)
    before: float = math.nan
    """KL (nats) on the held-out sequences before the first step."""
    since: list[float] = field(default_factory=list)
    """Losses of the steps since the curve's last point."""
    left_out: int = 0
    """Steps whose gradient was no number."""
    broken: int = 0
    """How many of them were the last ones."""


@dataclass(frozen=True)
class _Step:
    """A step of the optimizer, maybe still on its way."""

    figures: Tensor
    """Loss, and norm of the gradient."""
    tokens: int
    """Trained on with it."""


def split(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Training and held-out sequences of `[N, T]`; InputError where there are not two."""
    if len(tokens) < 2:
        raise InputError(
            "--heal: one sequence of text is too little to train on and to judge by; give more text (--calib)"
        )
    held = min(HELD_OUT, max(1, len(tokens) // 8))
    return tokens[held:], tokens[:held]


def picked(count: int, size: int, seed: int, step: int) -> Tensor:
    """Indices `[size]` of a step's sequences: one shuffled pass after another over all of them.

    They follow from the step's number alone, so that an interrupted run goes on as it would have.
    """
    first, last = step * size, (step + 1) * size - 1
    passes = range(first // count, last // count + 1)
    return torch.cat([_shuffled(count, (seed << 20) + i) for i in passes])[first - passes[0] * count :][:size]


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int) -> Tensor:
    """A pass, kept for the steps that share it: that many numbers take as long as a small model's step."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


class Teacher:
    """The original, all of it on the device in the type that it computes in."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype) -> None:
        self._source = model.top
        self.model = replace(model, top={role: w.to(device).to(torch.float32) for role, w in model.top.items()})
        self._layers = [
            {role: w.to(device, dtype if w.dim() == 2 else torch.float32) for role, w in layer.items()}
            for layer in model.layers
        ]

    def layer(self, index: int) -> Layer:
        """Weights for the forward pass."""
        return self._layers[index]

    def shared(self, top: Layer) -> Layer:
        """Another model's weights outside the layers on the same device; those that are the teacher's own only once."""
        return {
            role: own if weight is self._source.get(role) else weight.to(own.device, torch.float32, copy=True)
            for role, weight in top.items()
            for own in [self.model.top[role]]
        }


def final_states(model: Model, layer: Callable[[int], Layer], tokens: Tensor, recompute: bool = False) -> Tensor:
    """Final, normed hidden states `[B, T, hidden]` of `tokens` `[B, T]`, differentiable in the layers' weights.

    With `recompute` only what goes into each layer is kept for the backward pass.
    """
    config, x = model.config, embed(model, tokens)
    for i, shape in enumerate(config.layers):
        through = partial(_through, config, shape, layer, i)
        x = checkpoint(through, x, use_reentrant=False) if recompute else through(x)
    return norm(config, model.top, "final_norm", x)


def _through(config: ModelConfig, shape: LayerShape, layer: Callable[[int], Layer], i: int, x: Tensor) -> Tensor:
    return block(config, shape, layer(i), x)


class Distillation:
    """A student in training. Over several processes each takes its share of every step's sequences."""

    def __init__(
        self,
        teacher: Teacher,
        student: Student,
        groups: list[Group],
        tokens: Tensor,
        limit: Limit,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        recipe: Recipe = Recipe(),
        fused: bool = False,
    ) -> None:
        """`tokens` `[N, T]`, of which some are held out. `fused`: in kernels that take a while to make."""
        self.state = State()
        self._tokens, self._held = split(tokens)
        self._teacher, self._student, self._groups = teacher, student, groups
        self._limit, self._seed, self._recipe = limit, seed, recipe
        self._device, self._dtype = device, dtype
        self._of_slice = compiled(slice_divergence) if fused else slice_divergence
        self._pieces = fusing() if fused else pieces()
        self._reduced = replace(student.model, top=teacher.shared(student.model.top))
        self._output, self._teacher_output = (one.output.to(device, dtype) for one in (self._reduced, teacher.model))
        step = recipe.step_tokens if limit.tokens is None else min(recipe.step_tokens, limit.tokens)
        self._size = min(len(self._tokens), max(1, step // tokens.shape[1]))
        advice = "free some memory, give shorter text, or take --heal blocks"
        self.portions = Portions(self._size, device, True, advice)
        self.parameters = [parameter for group in groups for parameter in group.parameters]
        self._recorded = Recorded(self._loss, self.parameters)
        self._last: _Step | None = None
        """What was not waited for."""
        self.optimizer = torch.optim.AdamW(
            [{"params": group.parameters, "weight_decay": group.decay} for group in groups],
            betas=recipe.betas,
            eps=_EPS,
            weight_decay=0.0,
            fused=True,
        )

    def train(self, on_progress: Callable[[float], None], on_step: Callable[[], None] = lambda: None) -> None:
        """Train until the limit is reached; `on_step` after each step, when all is there to go on from.

        InputError where memory is not enough for one sequence, and where gradients are no numbers time and again.
        """
        if math.isnan(self.state.before):
            self.state.before = self.held_out_loss()
        clock, spent = time.monotonic(), self.state.seconds
        while (share := self._share()) < 1:
            self._step(share)
            self.state.seconds = spent + time.monotonic() - clock
            on_progress(self._share())
            on_step()
        self.settle()

    def settle(self) -> None:
        """Wait for the last step, so that `state` and parameters are those of one time."""
        if self._last is not None:
            last, self._last = self._last, None
            self._judge(last)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean KL (nats) on the held-out sequences."""
        own = self._held[ranks.share(len(self._held))]

        def all_parts() -> Tensor:
            total = torch.zeros((), device=self._device)
            for part in self.portions.of(own):
                # Not what is compiled, which follows the shapes that come first: a run that goes on begins with others.
                total += self._divergence(part, slice_divergence) * len(part)
            return total

        total = self.portions.run(all_parts, lambda: discard(self.parameters))
        ranks.add_up(total)
        return float(total) / len(self._held)

    def _share(self) -> float:
        share = torch.tensor(self._limit.progress(self.state.tokens, self.state.seconds), dtype=torch.float64)
        return float(ranks.agreed(share))

    def _step(self, share: float) -> None:
        """One step of the optimizer, of which a GPU knows before it is through with the one before."""
        rows = picked(len(self._tokens), self._size, self._seed, self.state.steps)
        mean = self._gradients(self._tokens[rows])
        size = torch.nn.utils.clip_grad_norm_(self.parameters, self._recipe.clip)
        for known, group in zip(self.optimizer.param_groups, self._groups, strict=True):
            known["lr"] = rate(group.peak, share, self.state.steps)
        figures = torch.stack((mean, size))
        # Where they are no numbers it does nothing, and finds that out on the GPU, which need not be waited for.
        self.optimizer.found_inf = (~figures.isfinite().all()).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.state.steps += 1
        self.state.tokens += rows.numel() * self._tokens.shape[1]
        last, self._last = self._last, _Step(figures, self.state.tokens)
        if last is not None:
            self._judge(last)

    def _judge(self, step: _Step) -> None:
        """What came out of a step."""
        loss, length = step.figures.tolist()
        self._note(loss, step.tokens)
        if math.isfinite(loss) and math.isfinite(length):
            self.state.broken = 0
            return
        self.state.left_out += 1
        self.state.broken += 1
        if self.state.broken == BROKEN:
            raise InputError(
                f"--heal: loss or gradient were no numbers in {BROKEN} steps one after another; other text, or less "
                "reduction, may help, or do without (--heal none)"
            )

    def _gradients(self, tokens: Tensor) -> Tensor:
        """Mean loss on `tokens` `[B, T]`, with its gradient in the parameters."""
        own = tokens[ranks.share(len(tokens))]
        with using(self._pieces):
            return self.portions.gradients(self.parameters, own, self._add)

    def _add(self, part: Tensor) -> Tensor:
        # Layers that are computed twice keep track of random numbers, which no graph allows.
        if self._device.type != "cuda" or self.portions.recompute:
            return add_gradients(self._loss, part)
        return self._recorded(part.pin_memory().to(self._device, non_blocking=True))

    def _loss(self, part: Tensor) -> Tensor:
        """What some of a step's sequences add to its loss."""
        return self._divergence(part, self._of_slice) * (len(part) / self._size)

    def _divergence(self, tokens: Tensor, of_slice: Slice) -> Tensor:
        tokens = tokens.to(self._device)
        with torch.no_grad():
            wanted = final_states(self._teacher.model, self._teacher.layer, tokens)
        states = final_states(self._reduced, self._student.layer, tokens, self.portions.recompute)
        flat, wanted = (x.to(self._dtype).flatten(0, 1) for x in (states, wanted))
        return divergence(flat, self._output, wanted, self._teacher_output, of_slice)

    def _note(self, loss: float, tokens: int) -> None:
        """Add to the curve, in even distances of the whole run."""
        state, points = self.state, self._recipe.points
        state.since.append(loss)
        if len(state.curve) < math.floor(points * self._limit.progress(tokens, state.seconds)):
            known = [one for one in state.since if math.isfinite(one)]
            if known:
                state.curve.append(Point(tokens, state.seconds, sum(known) / len(known)))
            state.since = []

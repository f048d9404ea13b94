"""Block-wise healing: a reduced layer learns to put out what the original would have, on the inputs it will really see.

Memory of one layer, and no backward pass through any other. The loss is the squared distance of each token's hidden
state to what it should be, over that one's energy, averaged over the tokens: what follows norms its input, so that a
token counts the same however large it is. The last layer can also learn by what its output is for, the predictions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from a3q import ranks
from a3q.forward import block, lowered, norm
from a3q.heal.distill import BROKEN, picked
from a3q.heal.divergence import divergence
from a3q.heal.portions import Portions, discard
from a3q.heal.recorded import add_gradients
from a3q.heal.schedule import Limit, rate
from a3q.heal.student import trained_roles
from a3q.model import Layer, LayerShape, Model, ModelConfig

PEAK = 1e-3
"""Learning rate."""
STEP_TOKENS = {"cpu": 1024, "cuda": 4096}
"""Of one step of the optimizer. A layer of SmolLM2 at 25 %, 72 × 1024 tokens, 70 s on 2 cores: its distance to what it
should put out fell by 3.9 % in steps of 4096 tokens, 4.4 % in steps of 2048, 4.6 % in steps of 1024; at a learning rate
of 4e-4 by 2.8 % and 3.4 % in the first two, at 2e-3 by 4.0 % in the second. On GPUs it was not tuned."""
CHECKS = 12
"""How often the held-out sequences are looked at."""
PATIENCE = 3
"""Looks without a gain after which a layer is done, in the second half of its time: a fitted layer first gets worse,
as long as steps are large."""
_LEAST = 1e-3
"""Seconds that are always left for what is still to be trained."""
_EXACT = 1e-5
"""Distance below which there is nothing to win: that of a layer which stays, behind others that do, in bfloat16."""
_EVERY = 4
"""Of tokens whose predictions are compared."""
_FAINT = 1e-6
"""Energy of a hidden state, over the mean one, that a distance is at least divided by."""


@dataclass(frozen=True)
class BlockLimit:
    """How long the layers of a model are trained."""

    tokens: int
    """Each of them."""
    seconds: float | None = None
    """All of them together."""


class Shares:
    """Divides a limit among trainings that follow one another: what one does not use is for those behind it.

    Layers that stay as they are, and have nothing to learn, are often a third of all.
    """

    def __init__(self, limit: BlockLimit, count: int) -> None:
        self._tokens, self._seconds, self._count = limit.tokens, limit.seconds, count

    @contextmanager
    def next(self) -> Iterator[Limit]:
        """The limit of the next training, which is what happens meanwhile."""
        start = time.monotonic()
        yield self._even()
        self._take(time.monotonic() - start)

    def pass_over(self) -> None:
        """Count the next training as if it had used its share: an earlier run has done it."""
        self._take(self._even().seconds or 0.0)

    def _even(self) -> Limit:
        return Limit(self._tokens, None if self._seconds is None else self._seconds / self._count)

    def _take(self, seconds: float) -> None:
        self._count -= 1
        if self._seconds is not None:
            # The last look at the held-out sequences can be beyond the limit.
            self._seconds = max(_LEAST, self._seconds - seconds)


@dataclass(frozen=True)
class BlockLoss:
    """Mean distance on the held-out sequences of a layer before and after it was trained."""

    before: float
    after: float
    tokens: int
    """Trained on."""


class Distance(Protocol):
    """How far outputs of a layer `[B, T, hidden]` are from those that are wanted."""

    def __call__(self, y: Tensor, wanted: Tensor, step: int | None) -> Tensor:
        """Sum over sequences of the mean over tokens; `step` of the training, None: of those held out."""
        ...


def relative_distance(y: Tensor, wanted: Tensor, step: int | None) -> Tensor:
    """Squared distance of each token's state over the energy of the wanted one."""
    energy = wanted.square().sum(-1)
    energy = energy.clamp_min(_FAINT * float(energy.mean()))
    return ((y - wanted).square().sum(-1) / energy).mean(-1).sum()


class PredictionDistance:
    """KL divergence (nats) of the next tokens that follow from a last layer's outputs.

    Of every fourth token, from another one on in each step: on a CPU softmaxes over the vocabulary take longer than the
    layer. SmolLM2-135M at 25 %, healed layer by layer: perplexity 48.6, and 47.8 when the last one learned by this too.
    """

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype) -> None:
        """`model` has the norm and the output weight behind the layer."""
        self._config, self._dtype = model.config, dtype
        # The layers come in a pass without gradients, whose tensors nothing may keep for a backward pass.
        with torch.inference_mode(False):
            final = {role: weight for role, weight in model.top.items() if role.startswith("final_norm")}
            self._top = {role: weight.to(device, torch.float32, copy=True) for role, weight in final.items()}
            self._output = model.output.to(device, dtype)

    def __call__(self, y: Tensor, wanted: Tensor, step: int | None) -> Tensor:
        """See `Distance`."""
        first = 0 if step is None else step % min(_EVERY, y.shape[1])
        states = (norm(self._config, self._top, "final_norm", x[:, first::_EVERY]) for x in (y, wanted))
        found, known = (x.to(self._dtype).flatten(0, 1) for x in states)
        return divergence(found, self._output, known, self._output) * len(y)


def heal_block(
    config: ModelConfig,
    shape: LayerShape,
    w: Layer,
    entry: Tensor,
    wanted: Tensor,
    limit: Limit,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    attention_only: bool = False,
    distance: Distance = relative_distance,
) -> tuple[Layer, BlockLoss, list[str]]:
    """The weights `w` of a layer trained to make `wanted` of `entry`, both `[B, T, hidden]`; no worse than before.

    Over several processes each has its own sequences, and may have none. The notes say what the user should know.
    """
    # Where a reduction runs nothing is recorded for gradients.
    with torch.inference_mode(False), torch.enable_grad():
        return _Block(config, shape, w, entry, wanted, device, dtype, seed, attention_only, distance).train(limit)


class _Block:
    def __init__(
        self,
        config: ModelConfig,
        shape: LayerShape,
        w: Layer,
        entry: Tensor,
        wanted: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        attention_only: bool,
        distance: Distance,
    ) -> None:
        self._config, self._shape, self._device, self._dtype, self._seed = config, shape, device, dtype, seed
        self._between = distance
        self._entry, self._wanted = entry, wanted
        self._w = {role: weight.to(device, torch.float32, copy=True) for role, weight in w.items()}
        for role in trained_roles(list(w), attention_only):
            self._w[role].requires_grad_()
        self._trained = {role: weight for role, weight in self._w.items() if weight.requires_grad}
        # Every process holds out some of its own, those at the front.
        held = max(1, len(entry) // 8) if len(entry) > 1 else 0
        indices = torch.arange(len(entry))
        self._held, self._own = indices[:held], indices[held:]
        everyones = torch.tensor([len(self._held), len(self._own)], device=device)
        ranks.add_up(everyones)
        self._held_count, self._count = (int(one) for one in everyones.tolist())
        self._size = min(self._count, max(1, STEP_TOKENS[device.type] // entry.shape[1]))
        self._portions = Portions(self._size, device, True, "free some memory, or give shorter text")

    def train(self, limit: Limit) -> tuple[Layer, BlockLoss, list[str]]:
        """Train, with the held-out sequences as judges."""
        best = before = self._held_loss()
        state = {role: weight.detach().clone() for role, weight in self._trained.items()}
        optimizer = torch.optim.AdamW(self._trained.values(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        clock = time.monotonic()
        tokens = step = waited = looks = broken = 0
        while self._count and best > _EXACT and waited < PATIENCE and (share := self._share(limit, tokens, clock)) < 1:
            for group in optimizer.param_groups:
                group["lr"] = rate(PEAK, share, step)
            broken = 0 if self._step(step) else broken + 1
            if broken == BROKEN:
                self._portions.notes.append("a layer's healing was ended early, since gradients were no numbers")
                break
            if not broken:
                optimizer.step()
            step += 1
            tokens += self._size * self._entry.shape[1]
            share = self._share(limit, tokens, clock)
            if math.floor(share * CHECKS) > looks:
                looks = math.floor(share * CHECKS)
                loss = self._held_loss()
                waited = 0 if loss < best else waited + (share > 0.5)
                if loss < best:
                    best = loss
                    state = {role: weight.detach().clone() for role, weight in self._trained.items()}
        return {**self._w, **state}, BlockLoss(before, best, tokens), self._portions.notes

    def _share(self, limit: Limit, tokens: int, clock: float) -> float:
        share = torch.tensor(limit.progress(tokens, time.monotonic() - clock), dtype=torch.float64)
        return float(ranks.agreed(share))

    def _step(self, step: int) -> bool:
        """Gradients of one step in the weights; whether they are numbers."""
        mine = len(range(ranks.rank(), self._size, ranks.count())) if len(self._own) else 0
        rows = self._own[picked(len(self._own), mine, self._seed, step)] if mine else self._own[:0]
        used = torch.tensor(len(rows), device=self._device)
        ranks.add_up(used)

        def loss(part: Tensor) -> Tensor:
            return self._distance(part, step) / int(used)

        weights = list(self._trained.values())
        self._portions.gradients(weights, rows, partial(add_gradients, loss))
        return bool(torch.isfinite(torch.nn.utils.clip_grad_norm_(weights, 1.0)))

    @torch.no_grad()
    def _held_loss(self) -> float:
        def all_parts() -> Tensor:
            total = torch.zeros((), device=self._device)
            for part in self._portions.of(self._held):
                total += self._distance(part, None)
            return total

        total = self._portions.run(all_parts, lambda: discard(self._trained.values()))
        ranks.add_up(total)
        return float(total) / max(1, self._held_count)

    def _distance(self, rows: Tensor, step: int | None) -> Tensor:
        """Of what the layer makes of some sequences."""
        x, wanted = (kept[rows].to(self._device) for kept in (self._entry, self._wanted))
        through = partial(block, self._config, self._shape)
        w = lowered(self._w, self._dtype)
        y = checkpoint(through, w, x, use_reentrant=False) if self._portions.recompute else through(w, x)
        return self._between(y, wanted, step)

"""How long healing goes on, and how the learning rate rises and falls meanwhile."""

from __future__ import annotations

import math
from dataclasses import dataclass

WARM_UP = 0.05
"""Share of the run in which the learning rate rises. Adam's first steps are all sign and no size: at once at 1e-3,
SmolLM2-135M at 25 % went from a perplexity of 51 to 2500 in 20 steps."""
WARM_UP_STEPS = 20
"""In which it rises at the least: where a run on a CPU has 30 steps, its share is one of them."""


@dataclass(frozen=True)
class Limit:
    """Healing ends with the first that is reached; at least one is set."""

    tokens: int | None
    """Trained on."""
    seconds: float | None

    def __post_init__(self) -> None:
        if self.tokens is None and self.seconds is None:
            raise ValueError("no limit")

    def progress(self, tokens: int, seconds: float) -> float:
        """From 0 to 1."""
        shares = [0.0]
        if self.tokens is not None:
            shares.append(tokens / self.tokens)
        if self.seconds is not None:
            shares.append(seconds / self.seconds)
        return min(1.0, max(shares))


def rate(peak: float, progress: float, steps: int) -> float:
    """Learning rate after that share of the run and `steps` of the optimizer: a straight rise, then half a cosine down
    to 0."""
    # Not 0 at the very beginning, which would be a step for nothing.
    risen = min(1.0, max(progress, 0.02 * WARM_UP) / WARM_UP, (steps + 1) / WARM_UP_STEPS)
    fallen = max(0.0, progress - WARM_UP) / (1 - WARM_UP)
    return peak * risen * 0.5 * (1 + math.cos(math.pi * fallen))

"""Share a budget of parameters among inner dimensions so that the sum of predicted losses is least.

Each dimension has a curve of loss against size. On the curves' lower convex hulls, taking the step with the greatest
gain for its cost until the budget is spent solves the Lagrangian relaxation, and the integer problem up to the last
step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Curve:
    """Predicted `losses` of one inner dimension at its possible `sizes`, ascending; a size costs `unit_cost` each."""

    sizes: tuple[int, ...]
    losses: tuple[float, ...]
    unit_cost: int

    def loss_at(self, size: int) -> float:
        """Predicted loss at one of `sizes`."""
        return self.losses[self.sizes.index(size)]


def hull(curve: Curve) -> list[int]:
    """Indices of the points on the lower convex hull, ascending in size and falling in loss."""
    points: list[int] = []
    for i, (size, loss) in enumerate(zip(curve.sizes, curve.losses, strict=True)):
        if points and loss >= curve.losses[points[-1]]:
            continue  # larger and no better
        while len(points) > 1:
            a, b = points[-2], points[-1]
            rise = (curve.losses[b] - curve.losses[a]) * (size - curve.sizes[a])
            if rise < (loss - curve.losses[a]) * (curve.sizes[b] - curve.sizes[a]):
                break
            points.pop()
        points.append(i)
    return points


def allocate(curves: Sequence[Curve], budget: int) -> list[int]:
    """A size for each curve, costing at most `budget` together; ValueError if even the smallest cost more."""
    chosen = [0] * len(curves)
    left = budget - sum(curve.sizes[0] * curve.unit_cost for curve in curves)
    if left < 0:
        raise ValueError("the smallest sizes cost more than the budget")
    steps = []
    for which, curve in enumerate(curves):
        corners = hull(curve)
        for a, b in pairwise(corners):
            gain = (curve.losses[a] - curve.losses[b]) / ((curve.sizes[b] - curve.sizes[a]) * curve.unit_cost)
            steps.append((-gain, which, b))
    # Within a curve gains fall from step to step, so that sorting keeps their order.
    for _, which, corner in sorted(steps):
        curve = curves[which]
        affordable = [
            i
            for i in range(chosen[which] + 1, corner + 1)
            if (curve.sizes[i] - curve.sizes[chosen[which]]) * curve.unit_cost <= left
        ]
        best = min(affordable, key=lambda i: curve.losses[i], default=chosen[which])
        if curve.losses[best] < curve.losses[chosen[which]]:
            left -= (curve.sizes[best] - curve.sizes[chosen[which]]) * curve.unit_cost
            chosen[which] = best
    return [curve.sizes[i] for curve, i in zip(curves, chosen, strict=True)]

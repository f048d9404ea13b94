"""Allocation against exhaustive search."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from a3q.allocate import Curve, allocate, hull


def cost(curves: Sequence[Curve], sizes: Sequence[int]) -> int:
    return sum(curve.unit_cost * size for curve, size in zip(curves, sizes, strict=True))


def loss(curves: Sequence[Curve], sizes: Sequence[int]) -> float:
    return sum(curve.loss_at(size) for curve, size in zip(curves, sizes, strict=True))


def exhaustive(curves: Sequence[Curve], budget: int) -> float:
    ways = itertools.product(*(curve.sizes for curve in curves))
    return min(loss(curves, sizes) for sizes in ways if cost(curves, sizes) <= budget)


def made_up(rng: random.Random, form: str) -> Curve:
    sizes = tuple(sorted(rng.sample(range(1, 30), rng.randint(1, 5))))
    if form == "convex":
        strength, power = rng.uniform(0.1, 10), rng.uniform(0.5, 2)
        return Curve(sizes, tuple(strength / size**power for size in sizes), rng.randint(1, 9))
    drops = sorted((rng.uniform(0, 5) for _ in sizes), reverse=True)
    if form == "any":
        rng.shuffle(drops)
    return Curve(sizes, tuple(drops), rng.randint(1, 9))


def budgets(curves: Sequence[Curve], rng: random.Random) -> list[int]:
    least = sum(curve.sizes[0] * curve.unit_cost for curve in curves)
    most = sum(curve.sizes[-1] * curve.unit_cost for curve in curves)
    return [least, most, *(rng.randint(least, most) for _ in range(4))]


def on_hull(curve: Curve, size: float) -> float:
    """The lower convex envelope of the points that are at most `size` large, at `size`, by all chords."""
    points = list(zip(curve.sizes, curve.losses, strict=True))
    values = [loss for n, loss in points if n <= size]
    for (a, at_a), (b, at_b) in itertools.combinations(points, 2):
        if a <= size <= b:
            values.append(at_a + (at_b - at_a) * (size - a) / (b - a))
    return min(values)


@pytest.mark.parametrize("form", ["convex", "falling", "any"])
def test_hull_is_the_lower_convex_envelope(form: str) -> None:
    rng = random.Random(0)
    for _ in range(200):
        curve = made_up(rng, form)
        corners = hull(curve)
        assert corners[0] == 0 and corners == sorted(set(corners))
        slopes = []
        for a, b in itertools.pairwise(corners):
            slopes.append((curve.losses[b] - curve.losses[a]) / (curve.sizes[b] - curve.sizes[a]))
        assert all(slope < 0 for slope in slopes)
        assert all(before < after for before, after in itertools.pairwise(slopes))
        for i in range(len(curve.sizes)):
            if i in corners:
                assert curve.losses[i] == pytest.approx(on_hull(curve, curve.sizes[i]))
        assert curve.losses[corners[-1]] == min(curve.losses)
        if form == "convex":
            assert corners == list(range(len(curve.sizes)))


@pytest.mark.parametrize("form", ["convex", "falling", "any"])
def test_no_worse_than_the_best_but_for_one_step(form: str) -> None:
    """Never above the budget; and above the optimum by less than the one hull step that was not affordable."""
    rng = random.Random(1)
    exact = 0
    cases = 0
    for _ in range(60):
        curves = [made_up(rng, form) for _ in range(rng.randint(1, 4))]
        step = max(
            (curve.losses[a] - curve.losses[b] for curve in curves for a, b in itertools.pairwise(hull(curve))),
            default=0.0,
        )
        for budget in budgets(curves, rng):
            sizes = allocate(curves, budget)
            assert all(size in curve.sizes for size, curve in zip(sizes, curves, strict=True))
            assert cost(curves, sizes) <= budget
            best = exhaustive(curves, budget)
            gap = loss(curves, sizes) - best
            assert -1e-12 <= gap <= step + 1e-12
            cases += 1
            exact += gap < 1e-12
    assert exact > 0.5 * cases


def test_exact_where_every_step_costs_the_same() -> None:
    """Convex curves of equal steps: the greedy choice is then optimal at every budget."""
    rng = random.Random(2)
    for _ in range(30):
        sizes = (2, 4, 6, 8, 10)
        curves = []
        for _ in range(3):
            drops = sorted((rng.uniform(0, 3) for _ in range(4)), reverse=True)
            curves.append(Curve(sizes, tuple(sum(drops[i:]) for i in range(5)), 3))
        for budget in range(18, 91):
            assert loss(curves, allocate(curves, budget)) == pytest.approx(exhaustive(curves, budget), abs=1e-12)


def test_enough_budget_gives_every_curve_its_best() -> None:
    curves = [Curve((1, 2, 3), (5.0, 1.0, 0.0), 10), Curve((4, 8), (0.5, 0.2), 1)]
    assert allocate(curves, 38) == [3, 8]
    assert allocate(curves, 10**9) == [3, 8]
    assert allocate(curves, 37) == [3, 4]
    assert allocate(curves, 33) == [2, 8]


def test_what_a_step_cannot_pay_goes_to_others() -> None:
    """A curve whose next step is too dear takes what it can on the way there and leaves the rest to cheaper ones."""
    dear, cheap = Curve((1, 2, 10), (9.0, 8.5, 0.0), 10), Curve((1, 5), (1.0, 0.9), 1)
    assert hull(dear) == [0, 2]
    assert allocate([dear, cheap], 50) == [2, 5]
    assert allocate([dear, cheap], 105) == [10, 5]
    assert allocate([dear, cheap], 101) == [10, 1]


def test_flat_and_rising_curves_stay_at_their_smallest() -> None:
    flat, rising = Curve((8, 16, 32), (0.0, 0.0, 0.0), 5), Curve((8, 16), (1.0, 2.0), 5)
    assert hull(flat) == hull(rising) == [0]
    assert allocate([flat, rising, Curve((1, 9), (1.0, 0.0), 1)], 10**6) == [8, 8, 9]
    # Flat behind a fall: no more than needed.
    assert allocate([Curve((8, 16, 32), (1.0, 0.0, 0.0), 5)], 10**6) == [16]


def test_the_smallest_sizes_must_fit() -> None:
    curves = [Curve((4, 8), (1.0, 0.0), 3), Curve((2,), (1.0,), 7)]
    assert allocate(curves, 26) == [4, 2]
    with pytest.raises(ValueError, match="smallest sizes"):
        allocate(curves, 25)
    assert allocate([], 0) == []

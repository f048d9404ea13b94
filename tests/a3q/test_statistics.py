"""Accumulated statistics against direct sums."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import Tensor

from a3q import statistics
from a3q.model import LayerShape, ModelConfig
from a3q.statistics import AttentionStatistics, Moment, attention_distances

CPU = torch.device("cpu")
T, SIZE = 5, 8
SHARED = (tuple(10.0 ** (-i / 2) for i in range(SIZE // 2)),)
PARTIAL = ((0.9, 0.2, 0.05),)
SLOPES = (0.5, 0.25, 0.125, 0.06)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shaped(lists: tuple[tuple[float, ...], ...] = SHARED, v_size: int = SIZE, window: int | None = None) -> LayerShape:
    return LayerShape(SIZE, v_size, 16, lists, window)


def config(H: int, G: int, shape: LayerShape, slopes: tuple[float, ...] = ()) -> ModelConfig:
    return ModelConfig((shape,), 16, H, G, 16, 64, 1e-5, True, alibi_slopes=slopes[:H])


def naive_distances(
    q: Tensor,
    k: Tensor,
    lists: tuple[tuple[float, ...], ...] = SHARED,
    window: int | None = None,
    slopes: tuple[float, ...] = (),
) -> Tensor:
    """Attention mass by distance, pair of positions by pair, with complex numbers."""
    B, H, length, d = q.shape
    G = k.shape[1]
    mass = torch.zeros(H, length, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            own = lists[g if len(lists) == G else 0] if lists else ()
            m = len(own)
            x, y = q[b, h].double().tolist(), k[b, g].double().tolist()
            for i in range(length):
                scores = {}
                for j in range(max(0, i + 1 - (window or length)), i + 1):
                    score = sum(x[i][e] * y[j][e] for e in range(2 * m, d))
                    for p, w in enumerate(own):
                        query, key = complex(x[i][p], x[i][p + m]), complex(y[j][p], y[j][p + m])
                        score += (query * key.conjugate() * cmath.exp(1j * w * (i - j))).real
                    score /= math.sqrt(d)
                    scores[j] = math.exp(score - (slopes[h] * (i - j) if slopes else 0))
                for j, weight in scores.items():
                    mass[h, i - j] += weight / sum(scores.values())
    return mass.float()


def test_moment_is_the_mean_of_outer_products_over_all_batches() -> None:
    x, y = random(3, 20, 4, seed=0), random(3, 20, 2, seed=1)
    own, cross = Moment(3, 4, 4, device=CPU), Moment(3, 4, 2, device=CPU)
    for part in (slice(0, 7), slice(7, 8), slice(8, 20)):
        own.add(x[:, part])
        cross.add(x[:, part], y[:, part])
    torch.testing.assert_close(own.mean(), torch.einsum("hni,hnj->hij", x, x) / 20)
    torch.testing.assert_close(cross.mean(), torch.einsum("hni,hnj->hij", x, y) / 20)


def test_an_empty_moment_is_zero() -> None:
    assert torch.equal(Moment(2, 3, device=CPU).mean(), torch.zeros(2, 3))


@pytest.mark.parametrize(("H", "G"), [(4, 2), (3, 3), (3, 1)])
@pytest.mark.parametrize("window", [None, 1, 3, T])
@pytest.mark.parametrize("form", ["shared", "own", "partial", "slopes"])
def test_attention_distances_equal_a_sum_over_pairs(H: int, G: int, window: int | None, form: str) -> None:
    own = tuple(tuple(w * (g + 1) for w in SHARED[0]) for g in range(G))
    lists = {"shared": SHARED, "own": own, "partial": PARTIAL, "slopes": ()}[form]
    slopes = SLOPES if form == "slopes" else ()
    shape = shaped(lists, window=window)
    q, k = 1.5 * random(2, H, T, SIZE, seed=2), 1.5 * random(2, G, T, SIZE, seed=3)
    mass = attention_distances(config(H, G, shape, slopes), shape, q, k)
    torch.testing.assert_close(mass, naive_distances(q, k, lists, window, slopes), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mass.sum(-1), torch.full((H,), 2.0 * T))
    if window is not None:
        assert (mass[:, window:] == 0).all()


def test_attention_distances_of_a_single_token() -> None:
    q, k = random(1, 2, 1, SIZE, seed=4), random(1, 1, 1, SIZE, seed=5)
    assert torch.equal(attention_distances(config(2, 1, shaped()), shaped(), q, k), torch.ones(2, 1))


def test_observer_over_batches_equals_one_direct_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments take every sequence; distances take the first few, also where the limit falls inside a batch."""
    monkeypatch.setattr(statistics, "DISTANCE_SEQUENCES", 4)
    H, G, v_size = 4, 2, 6
    q, k = 1.5 * random(9, H, T, SIZE, seed=6), 1.5 * random(9, G, T, SIZE, seed=7)
    o, v = random(9, H, T, v_size, seed=8), random(9, G, T, v_size, seed=9)
    shape = shaped(v_size=v_size)
    observed = AttentionStatistics(config(H, G, shape), shape, T, CPU)
    for part in (slice(0, 3), slice(3, 6), slice(6, 9)):
        for name, x in (("q", q), ("k", k), ("v", v), ("o", o)):
            observed(name, x[part])
        observed.take_in()
    for moment, x in ((observed.q, q), (observed.k, k), (observed.o, o), (observed.v, v)):
        torch.testing.assert_close(moment.mean(), torch.einsum("bhti,bhtj->hij", x, x) / (9 * T))
    mass = naive_distances(q[:4], k[:4])
    torch.testing.assert_close(observed.distances(), mass / (4 * T), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(observed.distances().sum(-1), torch.ones(H))


def test_without_rope_no_attention_is_laid_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distances are for RoPE alone; nothing is computed in vain."""
    monkeypatch.setattr(statistics, "attention_distances", None)
    shape = shaped(())
    observed = AttentionStatistics(config(2, 2, shape), shape, T, CPU)
    for name in "qkvo":
        observed(name, random(1, 2, T, SIZE, seed=10))
    observed.take_in()
    assert observed.q.mean().abs().sum() > 0


def test_distances_that_nobody_wants_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "attention_distances", None)
    shape = shaped()
    observed = AttentionStatistics(config(2, 2, shape), shape, T, CPU, distances=False)
    for name in "qkvo":
        observed(name, random(1, 2, T, SIZE, seed=10))
    observed.take_in()
    assert observed.q.mean().abs().sum() > 0
    with pytest.raises(ValueError, match="not to be measured"):
        observed.distances()

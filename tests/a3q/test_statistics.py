"""Accumulated statistics against direct sums."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import Tensor

from a3q import statistics
from a3q.forward import Rope
from a3q.model import ModelConfig
from a3q.statistics import AttentionStatistics, Moment, attention_distances

CPU = torch.device("cpu")
T, SIZE = 5, 8
FREQUENCIES = tuple(10.0 ** (-i / 2) for i in range(SIZE // 2))


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config(H: int, G: int, v_size: int = SIZE) -> ModelConfig:
    return ModelConfig(
        num_hidden_layers=1,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=H,
        num_key_value_heads=G,
        head_dim=SIZE,
        v_head_dim=v_size,
        vocab_size=16,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=100.0,
        frequencies=FREQUENCIES,
        tie_word_embeddings=True,
    )


def naive_distances(q: Tensor, k: Tensor) -> Tensor:
    """Attention mass by distance, pair of positions by pair, with complex numbers."""
    B, H, length, d = q.shape
    mass = torch.zeros(H, length, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            x, y = q[b, h].double().tolist(), k[b, h // (H // k.shape[1])].double().tolist()
            for i in range(length):
                scores = []
                for j in range(i + 1):
                    score = 0.0
                    for p, w in enumerate(FREQUENCIES):
                        query, key = complex(x[i][p], x[i][p + d // 2]), complex(y[j][p], y[j][p + d // 2])
                        score += (query * key.conjugate() * cmath.exp(1j * w * (i - j))).real
                    scores.append(math.exp(score / math.sqrt(d)))
                for j, weight in enumerate(scores):
                    mass[h, i - j] += weight / sum(scores)
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
def test_attention_distances_equal_a_sum_over_pairs(H: int, G: int) -> None:
    q, k = 1.5 * random(2, H, T, SIZE, seed=2), 1.5 * random(2, G, T, SIZE, seed=3)
    mass = attention_distances(q, k, Rope(FREQUENCIES, T, CPU))
    torch.testing.assert_close(mass, naive_distances(q, k), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mass.sum(-1), torch.full((H,), 2.0 * T))


def test_attention_distances_of_a_single_token() -> None:
    q, k = random(1, 2, 1, SIZE, seed=4), random(1, 1, 1, SIZE, seed=5)
    assert torch.equal(attention_distances(q, k, Rope(FREQUENCIES, 1, CPU)), torch.ones(2, 1))


def test_observer_over_batches_equals_one_direct_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments take every sequence; distances take the first few, also where the limit falls inside a batch."""
    monkeypatch.setattr(statistics, "DISTANCE_SEQUENCES", 4)
    H, G, v_size = 4, 2, 6
    q, k = 1.5 * random(9, H, T, SIZE, seed=6), 1.5 * random(9, G, T, SIZE, seed=7)
    o = random(9, H, T, v_size, seed=8)
    observed = AttentionStatistics(config(H, G, v_size), T, Rope(FREQUENCIES, T, CPU), CPU)
    for part in (slice(0, 3), slice(3, 6), slice(6, 9)):
        for name, x in (("q", q), ("k", k), ("o", o)):
            observed(name, x[part])
    for moment, x in ((observed.q, q), (observed.k, k), (observed.o, o)):
        torch.testing.assert_close(moment.mean(), torch.einsum("bhti,bhtj->hij", x, x) / (9 * T))
    mass = naive_distances(q[:4], k[:4])
    torch.testing.assert_close(observed.distances(), mass / (4 * T), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(observed.distances().sum(-1), torch.ones(H))

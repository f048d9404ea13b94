"""QK with RoPE against the sum that its moments stand for: every sampled query, key and distance, one by one."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from a3q.forward import Rope
from a3q.solve.qk import (
    QKSolution,
    characteristic,
    complex_moment,
    functional_loss,
    mix_rows,
    select_frequencies,
    solve_qk,
)

M, T, KEPT = 6, 12, [0, 2, 3, 5]
FREQUENCIES = torch.tensor([100.0 ** (-i / M) for i in range(M)], dtype=torch.float64)
GROUPINGS = pytest.mark.parametrize(("H", "G"), [(4, 2), (2, 2), (3, 1)])


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rows(heads: int, count: int, seed: int) -> Tensor:
    """Half-split queries or keys `[heads, count, 2 M]`: correlated, of unequal strength, with a mean."""
    mix = torch.eye(2 * M, dtype=torch.float64) + 0.3 * random(heads, 2 * M, 2 * M, seed=seed)
    return (random(heads, count, 2 * M, seed=seed + 1) + 0.5 * random(heads, 1, 2 * M, seed=seed + 2)) @ mix


def as_complex(x: Tensor) -> Tensor:
    """Half-split `[…, 2 m]` to complex `[…, m]`."""
    return torch.complex(*x.chunk(2, dim=-1))


class Heads:
    """Sampled queries, keys and attention distances of a layer, with their moments."""

    def __init__(self, H: int, G: int, seed: int = 0) -> None:
        self.H, self.G = H, G
        self.q, self.k = rows(H, 30, seed), rows(G, 25, seed + 10)
        falling = -0.3 * torch.arange(T, dtype=torch.float64)
        self.P = (random(H, T, seed=seed + 20) + falling).softmax(-1)

    def solve(self, kept: list[int] = KEPT, sweeps: int = 12) -> QKSolution:
        q_moment, k_moment = (x.mT @ x / x.shape[1] for x in (self.q, self.k))
        return solve_qk(q_moment, k_moment, self.P, FREQUENCIES, kept, sweeps)

    def loss(self, A: Tensor, B: Tensor, kept: list[int] = KEPT) -> Tensor:
        """The objective by enumeration: all queries × keys × distances, for `A` `[H, R, m]`, `B` `[G, R, m]`."""
        wave = torch.exp(1j * FREQUENCIES[:, None] * torch.arange(T))
        q, k = as_complex(self.q), as_complex(self.k)
        each = self.H // self.G
        old = torch.einsum("hap,hbp,pt->habt", q, k.repeat_interleave(each, 0).conj(), wave)
        a, b = q @ A.mT, (k @ B.mT).repeat_interleave(each, 0)
        new = torch.einsum("has,hbs,st->habt", a, b.conj(), wave[kept])
        weights = self.P[:, None, None]
        return ((old - new).abs().square() * weights).sum() / (old.abs().square() * weights).sum()

    def selection(self, kept: list[int] = KEPT) -> tuple[Tensor, Tensor]:
        """Mixes that keep the pairs `kept` as they are."""
        plain = torch.eye(M, dtype=torch.complex128)[kept]
        return plain.expand(self.H, -1, -1), plain.expand(self.G, -1, -1)


def test_moment_and_characteristic_are_what_they_stand_for() -> None:
    x = rows(3, 40, seed=1)
    z = as_complex(x)
    direct = torch.einsum("hnp,hns->hps", z, z.conj()) / 40
    torch.testing.assert_close(complex_moment(x.mT @ x / 40), direct)
    P = random(2, T, seed=2).softmax(-1)
    phi = characteristic(P, FREQUENCIES)
    for h, s, p in ((0, 0, 0), (0, 1, 4), (1, 5, 2)):
        terms = [P[h, t] * torch.exp(1j * (FREQUENCIES[p] - FREQUENCIES[s]) * t) for t in range(T)]
        torch.testing.assert_close(phi[h, s, p], torch.stack(terms).sum())


@GROUPINGS
def test_functional_loss_equals_the_enumeration(H: int, G: int) -> None:
    """For any mixes, not only solved ones."""
    heads = Heads(H, G)
    R = len(KEPT)
    A = torch.complex(random(H, R, M, seed=3), random(H, R, M, seed=4))
    B = torch.complex(random(G, R, M, seed=5), random(G, R, M, seed=6))
    C_q = complex_moment(heads.q.mT @ heads.q / 30).view(G, H // G, M, M)
    C_k = complex_moment(heads.k.mT @ heads.k / 25)[:, None]
    phi = characteristic(heads.P, FREQUENCIES).view(G, H // G, M, M)
    ours = functional_loss(A.view(G, H // G, R, M), B[:, None], C_q, C_k, phi, KEPT)
    assert ours == pytest.approx(float(heads.loss(A, B)), rel=1e-10)


@GROUPINGS
def test_mixing_beats_selection_and_improves_with_every_sweep(H: int, G: int) -> None:
    heads = Heads(H, G)
    losses = [float(heads.loss(*heads.selection()))]
    for sweeps in (1, 2, 3, 5, 8, 12):
        solution = heads.solve(sweeps=sweeps)
        assert solution.loss == pytest.approx(float(heads.loss(solution.query, solution.key)), rel=1e-9)
        losses.append(solution.loss)
    assert all(after < before for before, after in pairwise(losses))
    assert losses[-1] < 0.8 * losses[0]


@GROUPINGS
def test_each_half_step_is_stationary(H: int, G: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The enumerated loss has no slope in B where a sweep ends, and none in A where a sweep's first half ends."""
    monkeypatch.setattr("a3q.solve.qk._balance", lambda A, B, C_q, C_k: (A, B))
    heads = Heads(H, G)

    def slopes(A: Tensor, B: Tensor) -> tuple[float, float]:
        A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
        return tuple(float(g.norm()) for g in torch.autograd.grad(heads.loss(A, B), (A, B)))  # type: ignore[return-value]

    start_A, start_B = heads.selection()
    first = heads.solve(sweeps=1)
    before, _ = slopes(start_A, start_B)
    in_a, untouched = slopes(first.query, start_B)
    assert in_a < 1e-5 * before
    assert untouched > 1e-3 * before
    last = heads.solve(sweeps=3)
    assert slopes(last.query, last.key)[1] < 1e-5 * before


@GROUPINGS
def test_balance_equalises_energies_and_keeps_the_scores(H: int, G: int, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = Heads(H, G)
    balanced = heads.solve()
    monkeypatch.setattr("a3q.solve.qk._balance", lambda A, B, C_q, C_k: (A, B))
    plain = heads.solve()
    each = H // G

    def products(solution: QKSolution) -> Tensor:
        return torch.einsum("hsp,hsk->hspk", solution.query, solution.key.repeat_interleave(each, 0).conj())

    def energies(solution: QKSolution) -> tuple[Tensor, Tensor]:
        a = (as_complex(heads.q) @ solution.query.mT).abs().square().mean(1)
        return a.view(G, each, -1).mean(1), (as_complex(heads.k) @ solution.key.mT).abs().square().mean(1)

    torch.testing.assert_close(products(balanced), products(plain))
    assert balanced.loss == pytest.approx(plain.loss, rel=1e-9)
    torch.testing.assert_close(*energies(balanced))
    before = energies(plain)
    assert ((before[0] / before[1]).log().abs() > 0.1).any()


def test_mix_rows_acts_as_the_complex_matrix() -> None:
    mix = torch.complex(random(2, 4, M, seed=7), random(2, 4, M, seed=8))
    weight = random(2, 2 * M, 9, seed=9)
    mixed = mix_rows(mix, weight)
    torch.testing.assert_close(as_complex(mixed.mT).mT, mix @ as_complex(weight.mT).mT)
    torch.testing.assert_close(mix_rows(mix, weight.float()), mix_rows(mix, weight.float().double()))


def rotated_scores(q: Tensor, k: Tensor, frequencies: Tensor) -> Tensor:
    """Scores `[H, positions, positions]` of half-split rows, one a position, turned as a runtime does."""
    rope = Rope(frequencies.tolist(), q.shape[1], torch.device("cpu"))
    return (rope(q[None]) @ rope(k[None]).repeat_interleave(len(q) // len(k), 1).mT)[0]


@GROUPINGS
@pytest.mark.parametrize("kept", [list(range(M)), KEPT])
def test_mixed_real_rows_under_rope_give_the_fitted_scores(H: int, G: int, kept: list[int]) -> None:
    """The complex problem is the real one: mixed weight rows, turned at the kept frequencies, score as it says."""
    heads = Heads(H, G)
    solution = heads.solve(kept)
    q, k = heads.q[:, :T], heads.k[:, :T]
    ours = rotated_scores(
        mix_rows(solution.query, q.mT).mT, mix_rows(solution.key, k.mT).mT, FREQUENCIES[torch.tensor(kept)]
    )
    a, b = as_complex(q) @ solution.query.mT, (as_complex(k) @ solution.key.mT).repeat_interleave(H // G, 0)
    position = torch.arange(T)
    wave = torch.exp(1j * FREQUENCIES[kept] * (position[:, None] - position)[..., None])
    expected = torch.einsum("his,hjs,ijs->hij", a, b.conj(), wave).real
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
    if len(kept) == M:
        old = rotated_scores(q, k, FREQUENCIES)
        assert solution.loss < 1e-9
        assert (ours - old).norm() < 1e-4 * old.norm()


def test_pairs_that_carry_nothing_are_dropped_for_free() -> None:
    """Where the pairs left out are silent, the fit is exact; heads then need no mixing."""
    heads = Heads(4, 2)
    silent = [i for i in range(M) if i not in KEPT]
    heads.q[..., silent + [M + i for i in silent]] = 0
    assert heads.solve().loss < 1e-9


@pytest.mark.parametrize("side", ["one query", "queries of a group", "keys of a group", "everything"])
@pytest.mark.parametrize(("H", "G"), [(4, 2), (4, 4)])
def test_dead_heads_are_finite_and_leave_the_others_alone(H: int, G: int, side: str) -> None:
    heads = Heads(H, G)
    alive = heads.solve()
    each = H // G
    if side == "one query":
        heads.q[1] = 0
    if side in ("queries of a group", "everything"):
        heads.q[:each] = 0
    if side in ("keys of a group", "everything"):
        heads.k[0] = 0
    if side == "everything":
        heads.q[:], heads.k[:] = 0, 0
    solution = heads.solve()
    assert all(x.isfinite().all() and x.abs().max() < 1e3 for x in (solution.query, solution.key))
    assert math.isfinite(solution.loss)
    assert solution.loss == pytest.approx(0 if side == "everything" else alive.loss, abs=0.2)
    if side != "everything":
        torch.testing.assert_close(solution.query[2 * each :], alive.query[2 * each :])
        torch.testing.assert_close(solution.key[-1], alive.key[-1])


def test_a_moment_of_low_rank_is_finite() -> None:
    heads = Heads(4, 2)
    heads.q, heads.k = (x[:, :, :2] @ random(2, 2 * M, seed=11) for x in (heads.q, heads.k))
    solution = heads.solve()
    assert solution.loss < float(heads.loss(*heads.selection()))
    assert max(solution.query.abs().max(), solution.key.abs().max()) < 1e3


def test_one_head_does_not_change_another() -> None:
    """Groups are solved each for itself."""
    heads = Heads(4, 2)
    both = heads.solve()
    heads.q, heads.k, heads.P, heads.H, heads.G = heads.q[2:], heads.k[1:], heads.P[2:], 2, 1
    alone = heads.solve()
    torch.testing.assert_close(alone.query, both.query[2:])
    torch.testing.assert_close(alone.key, both.key[1:])


def test_select_frequencies_for_every_size() -> None:
    for count in range(2, 65):
        for keep in range(2, count + 1):
            kept = select_frequencies(count, keep)
            assert len(kept) == keep
            assert (kept[0], kept[-1]) == (0, count - 1)
            steps = [after - before for before, after in pairwise(kept)]
            assert min(steps) > 0 and max(steps) - min(steps) <= 1
    assert select_frequencies(32, 32) == list(range(32))

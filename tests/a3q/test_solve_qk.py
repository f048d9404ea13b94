"""QK against the sums that its moments stand for: every sampled query, key and distance, one by one."""

from __future__ import annotations

import itertools
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from a3q.forward import rope
from a3q.solve import qk
from a3q.solve.qk import (
    QKSolution,
    characteristic,
    complex_moment,
    pair_energy,
    select_frequencies,
    select_pairs,
    solve_pairs,
    solve_plain,
    split_dimensions,
)

M, T, D, HIDDEN = 6, 12, 7, 20
SHARED = torch.tensor([0, 2, 3, 5])
FREQUENCIES = torch.tensor([100.0 ** (-i / M) for i in range(M)], dtype=torch.float64)
GROUPINGS = pytest.mark.parametrize(("H", "G"), [(4, 2), (2, 2), (3, 1)])


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rows(heads: int, count: int, size: int, seed: int) -> Tensor:
    """Queries or keys `[heads, count, size]`: correlated, of unequal strength, with a mean."""
    mix = torch.eye(size, dtype=torch.float64) + 0.3 * random(heads, size, size, seed=seed)
    return (random(heads, count, size, seed=seed + 1) + 0.5 * random(heads, 1, size, seed=seed + 2)) @ mix


def moment(x: Tensor) -> Tensor:
    return x.mT @ x / x.shape[-2]


def symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()[..., None, :]) @ vectors.mT


def as_complex(x: Tensor) -> Tensor:
    """Half-split `[…, 2 m]` to complex `[…, m]`."""
    return torch.complex(*x.chunk(2, dim=-1))


def real(mix: Tensor) -> Tensor:
    return qk._as_real(mix)


def complex_of(mixed: Tensor) -> Tensor:
    """The complex matrix `[…, R, m]` behind a real one `[…, 2 R, 2 m]` that acts on half-split rows."""
    R, m = mixed.shape[-2] // 2, mixed.shape[-1] // 2
    re, im = mixed[..., :R, :m], mixed[..., R:, :m]
    torch.testing.assert_close(mixed[..., R:, m:], re)
    torch.testing.assert_close(mixed[..., :R, m:], -im)
    return torch.complex(re, im)


# Heads without RoPE


def plain_error(q: Tensor, k: Tensor, query: Tensor, key: Tensor) -> float:
    """Squared error of the score of every query with every key, mean over the pairs, summed over heads."""
    k, key = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, key))
    return float((q @ k.mT - (q @ query.mT) @ (k @ key.mT).mT).square().mean((1, 2)).sum())


@GROUPINGS
@pytest.mark.parametrize("r", [1, 4, 6])
def test_plain_is_the_papers_optimum_over_the_hidden_states(H: int, G: int, r: int) -> None:
    """A3's statement on `hidden × hidden`, the heads of a group stacked, and the error of all pairs of positions."""
    x = random(300, HIDDEN, seed=0) @ random(HIDDEN, HIDDEN, seed=1)
    w_q, w_k = random(H, HIDDEN, D, seed=2), random(G, HIDDEN, D, seed=3)
    root = symmetric_root(moment(x))
    expected = total = 0.0
    best = []
    for g in range(G):
        stacked = torch.cat([root @ w_q[h] @ w_k[g].T @ root for h in range(g * H // G, (g + 1) * H // G)])
        U, sigma, Vh = torch.linalg.svd(stacked, full_matrices=False)
        expected += float(sigma[r:].square().sum())
        total += float(sigma.square().sum())
        best.append(((U[:, :r] * sigma[:r]) @ Vh[:r]).view(H // G, HIDDEN, HIDDEN))

    solution = solve_plain(moment(x @ w_q), moment(x @ w_k), r)
    assert solution.query.shape == (H, r, D) and solution.key.shape == (G, r, D)
    assert solution.lost == pytest.approx(expected, rel=1e-7)
    assert solution.energy == pytest.approx(total, rel=1e-9)
    assert solution.loss == pytest.approx(expected / total, rel=1e-7)
    key = solution.key.repeat_interleave(H // G, 0)
    new = w_q @ solution.query.mT @ key @ w_k.repeat_interleave(H // G, 0).mT
    wanted = torch.cat(best)
    assert (root @ new @ root - wanted).norm() < 1e-6 * wanted.norm()
    assert plain_error(x @ w_q, x @ w_k, solution.query, solution.key) == pytest.approx(expected, rel=1e-6)


@GROUPINGS
def test_no_change_of_the_plain_factors_does_better(H: int, G: int) -> None:
    q, k = rows(H, 60, D, seed=4), rows(G, 50, D, seed=8)
    solution = solve_plain(moment(q), moment(k), 4)
    assert plain_error(q, k, solution.query, solution.key) == pytest.approx(solution.lost, rel=1e-8)
    for seed in range(20):
        for size in (1e-3, 0.05, 0.5):
            # The heads of a group share their transform.
            change = random(G, 4, D, seed=seed).repeat_interleave(H // G, 0)
            query = solution.query + size * solution.query.abs().mean() * change
            key = solution.key + size * solution.key.abs().mean() * random(G, 4, D, seed=100 + seed)
            for other in ((query, solution.key), (solution.query, key), (query, key)):
                assert plain_error(q, k, *other) > solution.lost


def test_plain_groups_are_solved_each_for_itself_and_balanced() -> None:
    q, k = rows(4, 60, D, seed=12), rows(2, 60, D, seed=16)
    both = solve_plain(moment(q), moment(k), 3)
    apart = [solve_plain(moment(q[2 * g : 2 * g + 2]), moment(k[g : g + 1]), 3) for g in range(2)]
    assert both.lost == pytest.approx(sum(one.lost for one in apart), rel=1e-12)
    together = (both.query.mT @ both.key.repeat_interleave(2, 0)).view(2, 2, D, D)
    for product, alone in zip(together, apart, strict=True):
        torch.testing.assert_close(alone.query.mT @ alone.key, product)
    energy_q = torch.einsum("hrd,hde,hre->hr", both.query, moment(q), both.query).view(2, 2, 3).sum(1)
    energy_k = torch.einsum("hrd,hde,hre->hr", both.key, moment(k), both.key)
    torch.testing.assert_close(energy_q, energy_k)


@GROUPINGS
def test_plain_full_rank_keeps_every_score(H: int, G: int) -> None:
    q, k = rows(H, 60, D, seed=20), rows(G, 50, D, seed=24)
    solution = solve_plain(moment(q), moment(k), D)
    assert solution.lost == 0
    assert plain_error(q, k, solution.query, solution.key) < 1e-12 * solution.energy


def test_plain_of_low_rank_or_dead_heads_is_exact_and_bounded() -> None:
    q, k = rows(2, 60, 3, seed=28) @ random(3, D, seed=29), rows(2, 50, 3, seed=30) @ random(3, D, seed=31)
    solution = solve_plain(moment(q), moment(k), 4)
    assert plain_error(q, k, solution.query, solution.key) < 1e-9 * solution.energy
    for dead in ((q, "q"), (k, "k")):
        dead[0][0] = 0
        solution = solve_plain(moment(q), moment(k), 4)
        assert all(x.float().isfinite().all() for x in (solution.query, solution.key))
        # What a score with a vector never seen becomes is no larger than its size lets it be.
        assert torch.linalg.matrix_norm(solution.query.mT @ solution.key, 2).max() < 1e3
        assert plain_error(q, k, solution.query, solution.key) < 1e-9 * solution.energy


# Heads with RoPE


class Heads:
    """Sampled queries, keys and attention distances of a layer, with their moments."""

    def __init__(self, H: int, G: int, seed: int = 0, lists: int = 0) -> None:
        self.H, self.G = H, G
        self.q, self.k = rows(H, 30, 2 * M, seed), rows(G, 25, 2 * M, seed + 10)
        falling = -0.3 * torch.arange(T, dtype=torch.float64)
        self.P = (random(H, T, seed=seed + 20) + falling).softmax(-1)
        self.frequencies = FREQUENCIES
        if lists:
            self.frequencies = FREQUENCIES * torch.linspace(1, 2, lists, dtype=torch.float64)[:, None]
        self.kept = SHARED.expand(G, -1)

    def solve(self, sweeps: int = 12, reach: int = 0) -> QKSolution:
        return solve_pairs(moment(self.q), moment(self.k), self.P, self.frequencies, self.kept, sweeps, reach)

    def error(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Lost and whole energy by enumeration of queries × keys × distances, for `A` `[H, R, m]`, `B` `[G, R, m]`."""
        each = self.H // self.G
        own = self.frequencies.expand(self.G, M)
        wave = torch.exp(1j * own[..., None] * torch.arange(self.P.shape[-1]))
        wave_new = wave.take_along_dim(self.kept[..., None], 1)
        wave, wave_new = (x.repeat_interleave(each, 0) for x in (wave, wave_new))
        q, k = as_complex(self.q), as_complex(self.k)
        old = torch.einsum("hap,hbp,hpt->habt", q, k.repeat_interleave(each, 0).conj(), wave)
        a, b = q @ A.mT, (k @ B.mT).repeat_interleave(each, 0)
        new = torch.einsum("has,hbs,hst->habt", a, b.conj(), wave_new)
        weights = self.P[:, None, None] / (2 * self.q.shape[1] * self.k.shape[1])
        return ((old - new).abs().square() * weights).sum(), (old.abs().square() * weights).sum()

    def lost(self, solution: QKSolution) -> float:
        return float(self.error(complex_of(solution.query), complex_of(solution.key))[0])

    def selection(self) -> tuple[Tensor, Tensor]:
        """Mixes that keep the pairs `kept` as they are."""
        key = torch.eye(M, dtype=torch.complex128)[self.kept]
        return key.repeat_interleave(self.H // self.G, 0), key


SELECTIONS = pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])


def heads_for(H: int, G: int, own: bool) -> Heads:
    """With `own`, each key head has a frequency list and a selection of its own."""
    heads = Heads(H, G, lists=G if own else 0)
    if own:
        heads.kept = torch.stack([torch.tensor([g, g + 1, 4, 5]) for g in range(G)])
    return heads


def test_moment_and_characteristic_are_what_they_stand_for() -> None:
    x = rows(3, 40, 2 * M, seed=1)
    z = as_complex(x)
    torch.testing.assert_close(complex_moment(moment(x)), torch.einsum("hnp,hns->hps", z, z.conj()) / 40)
    P, own = random(2, T, seed=2).softmax(-1), torch.stack((FREQUENCIES, 2 * FREQUENCIES))
    phi = characteristic(P, own)
    for h, s, p in ((0, 0, 0), (0, 1, 4), (1, 5, 2)):
        terms = [P[h, t] * torch.exp(1j * (own[h, p] - own[h, s]) * t) for t in range(T)]
        torch.testing.assert_close(phi[h, s, p], torch.stack(terms).sum())


def test_real_rows_act_as_the_complex_matrix() -> None:
    mix, x = torch.complex(random(2, 4, M, seed=7), random(2, 4, M, seed=8)), random(2, 9, 2 * M, seed=9)
    torch.testing.assert_close(as_complex(x @ real(mix).mT), as_complex(x) @ mix.mT)
    torch.testing.assert_close(complex_of(real(mix)), mix)


@GROUPINGS
def test_without_sweeps_the_pairs_stay_as_they_are(H: int, G: int) -> None:
    """The paper's step: rows of the kept pairs; its loss, up to the balance of queries and keys, by enumeration."""
    heads = heads_for(H, G, True)
    solution = heads.solve(0)
    A, B = heads.selection()
    query, key = complex_of(solution.query), complex_of(solution.key)
    assert torch.equal(query != 0, A != 0) and torch.equal(key != 0, B != 0)
    # Real and positive: scaled, not turned; and what queries lose keys gain.
    assert (query.imag == 0).all() and (query.real >= 0).all()
    product = (query.sum(-1) * key.sum(-1).repeat_interleave(H // G, 0)).real
    torch.testing.assert_close(product, torch.ones_like(product))
    lost, energy = heads.error(A, B)
    assert solution.lost == pytest.approx(float(lost), rel=1e-10)
    assert solution.energy == pytest.approx(float(energy), rel=1e-10)


def test_the_papers_energy_is_the_error_over_all_phases() -> None:
    """Dropping pairs of independent random phases costs the sum of their `E|q|² E|k|²`, halved."""
    H, G, phases = 4, 2, 5
    q, k = rows(H, 30, 2 * M, seed=3), rows(G, 25, 2 * M, seed=5)
    energy = pair_energy(moment(q), moment(k))
    kept = select_pairs(energy, 4)
    assert kept.shape == (G, 4)
    turns = torch.tensor(list(itertools.product(range(phases), repeat=2)), dtype=torch.float64) * 2 * math.pi / phases
    for g in range(G):
        dropped = sorted(set(range(M)) - set(kept[g].tolist()))
        cost = {}
        for pair in itertools.combinations(range(M), 2):
            total = 0.0
            for h in (2 * g, 2 * g + 1):
                z = as_complex(q[h])[:, None, pair] * as_complex(k[g])[None, :, pair].conj()
                scores = torch.einsum("abp,tp->abt", z, torch.exp(1j * turns)).real
                total += float(scores.square().mean((0, 1, 2)))
            cost[pair] = total
            assert total == pytest.approx(float(energy[g, list(pair)].sum()) / 2, rel=1e-9)
        assert min(cost, key=lambda pair: cost[pair]) == tuple(dropped)


@GROUPINGS
@SELECTIONS
def test_mixing_beats_selection_and_no_sweep_makes_it_worse(H: int, G: int, own: bool) -> None:
    heads = heads_for(H, G, own)
    losses = []
    for sweeps in (0, 1, 2, 3, 5, 8, 12, 20):
        solution = heads.solve(sweeps)
        assert solution.lost == pytest.approx(heads.lost(solution), rel=1e-9)
        losses.append(solution.lost)
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(losses))
    assert losses[3] < losses[2] < losses[1] < losses[0]
    assert losses[-1] < 0.8 * losses[0]


@GROUPINGS
@SELECTIONS
def test_no_change_of_either_mix_does_better(H: int, G: int, own: bool) -> None:
    heads = heads_for(H, G, own)
    solution = heads.solve(200)
    A, B = complex_of(solution.query), complex_of(solution.key)
    for seed in range(10):
        for size in (0.03, 0.3):
            a, b = (torch.complex(random(*x.shape, seed=seed), random(*x.shape, seed=50 + seed)) for x in (A, B))
            assert float(heads.error(A + size * A.abs().mean() * a, B)[0]) > solution.lost
            assert float(heads.error(A, B + size * B.abs().mean() * b)[0]) > solution.lost


@GROUPINGS
@SELECTIONS
def test_each_half_step_is_stationary(H: int, G: int, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The enumerated loss has no slope in B where a sweep ends, and none in A where a sweep's first half ends."""
    monkeypatch.setattr(qk, "_balance", lambda A, B, C_q, C_k: (A, B))
    heads = heads_for(H, G, own)

    def slopes(A: Tensor, B: Tensor) -> tuple[float, float]:
        A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
        in_a, in_b = torch.autograd.grad(heads.error(A, B)[0], (A, B))
        return float(in_a.norm()), float(in_b.norm())

    start_A, start_B = heads.selection()
    before, _ = slopes(start_A, start_B)
    in_a, untouched = slopes(complex_of(heads.solve(1).query), start_B)
    assert in_a < 1e-5 * before
    assert untouched > 1e-3 * before
    last = heads.solve(3)
    assert slopes(complex_of(last.query), complex_of(last.key))[1] < 1e-5 * before


@GROUPINGS
def test_balance_equalises_energies_and_keeps_the_scores(H: int, G: int, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = heads_for(H, G, True)
    balanced = heads.solve()
    monkeypatch.setattr(qk, "_balance", lambda A, B, C_q, C_k: (A, B))
    plain = heads.solve()
    each = H // G

    def products(solution: QKSolution) -> Tensor:
        key = complex_of(solution.key).repeat_interleave(each, 0)
        return torch.einsum("hsp,hsk->hspk", complex_of(solution.query), key.conj())

    def energies(solution: QKSolution) -> tuple[Tensor, Tensor]:
        a = (as_complex(heads.q) @ complex_of(solution.query).mT).abs().square().mean(1)
        return a.view(G, each, -1).mean(1), (as_complex(heads.k) @ complex_of(solution.key).mT).abs().square().mean(1)

    torch.testing.assert_close(products(balanced), products(plain))
    assert balanced.lost == pytest.approx(plain.lost, rel=1e-9)
    torch.testing.assert_close(*energies(balanced))
    before = energies(plain)
    assert ((before[0] / before[1]).log().abs() > 0.1).any()


def rotated_scores(q: Tensor, k: Tensor, frequencies: Tensor) -> Tensor:
    """Scores `[H, positions, positions]` of half-split rows, one a position, turned as a runtime does."""
    lists = tuple(tuple(one) for one in frequencies.tolist())
    turn = rope(lists, q.shape[1], torch.device("cpu"))
    return (turn(q[None].float()) @ turn(k[None].float()).repeat_interleave(len(q) // len(k), 1).mT)[0].double()


@GROUPINGS
@SELECTIONS
@pytest.mark.parametrize("full", [False, True])
def test_mixed_real_rows_under_rope_give_the_fitted_scores(H: int, G: int, own: bool, full: bool) -> None:
    """The complex problem is the real one: mixed rows, turned at the kept frequencies, score as it says."""
    heads = heads_for(H, G, own)
    if full:
        heads.kept = torch.arange(M).expand(G, -1)
    solution = heads.solve()
    q, k = heads.q[:, :T], heads.k[:, :T]
    lists = heads.frequencies.expand(G, M)
    kept = lists.take_along_dim(heads.kept, 1)
    ours = rotated_scores(q @ solution.query.mT, k @ solution.key.mT, kept)
    a = as_complex(q) @ complex_of(solution.query).mT
    b = (as_complex(k) @ complex_of(solution.key).mT).repeat_interleave(H // G, 0)
    position = torch.arange(T)
    delta = (position[:, None] - position)[..., None]
    wave = torch.exp(1j * kept[:, None, None] * delta).repeat_interleave(H // G, 0)
    expected = torch.einsum("his,hjs,hijs->hij", a, b.conj(), wave).real
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
    if full:
        old = rotated_scores(q, k, lists)
        assert solution.loss < 1e-9
        assert (ours - old).norm() < 1e-4 * old.norm()
        exact = heads.solve(0)
        assert exact.lost < 1e-12 * exact.energy
        assert (rotated_scores(q @ exact.query.mT, k @ exact.key.mT, kept) - old).norm() < 1e-6 * old.norm()


def test_pairs_that_carry_nothing_are_dropped_for_free() -> None:
    """Where the pairs left out are silent, the fit is exact; heads then need no mixing."""
    heads = Heads(4, 2)
    silent = [i for i in range(M) if i not in SHARED.tolist()]
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
    assert solution.lost < float(heads.error(*heads.selection())[0])
    assert max(solution.query.abs().max(), solution.key.abs().max()) < 1e3


def test_one_head_does_not_change_another() -> None:
    """Groups are solved each for itself, with their own lists and pairs."""
    heads = heads_for(4, 2, True)
    both = heads.solve()
    heads.q, heads.k, heads.P, heads.H, heads.G = heads.q[2:], heads.k[1:], heads.P[2:], 2, 1
    heads.frequencies, heads.kept = heads.frequencies[1:], heads.kept[1:]
    alone = heads.solve()
    torch.testing.assert_close(alone.query, both.query[2:])
    torch.testing.assert_close(alone.key, both.key[1:])


def test_a_list_for_each_head_that_says_the_same_is_the_shared_list() -> None:
    heads = Heads(4, 2)
    one = heads.solve()
    heads.frequencies = FREQUENCIES.expand(2, M)
    each = heads.solve()
    assert torch.equal(one.query, each.query) and torch.equal(one.key, each.key) and one.lost == each.lost


def test_select_frequencies_for_every_size() -> None:
    for count in range(2, 65):
        for keep in range(2, count + 1):
            kept = select_frequencies(count, keep)
            assert len(kept) == keep
            assert (kept[0], kept[-1]) == (0, count - 1)
            steps = [after - before for before, after in pairwise(kept)]
            assert min(steps) > 0 and max(steps) - min(steps) <= 1
    assert select_frequencies(32, 32) == list(range(32))
    assert (select_frequencies(8, 0), select_frequencies(0, 0), select_frequencies(8, 1)) == ([], [], [0])


def test_select_pairs_takes_the_spread_first_and_then_by_energy() -> None:
    energy = random(3, 16, seed=40).square()
    before = energy.clone()
    for keep in range(17):
        for spread in range(keep + 1):
            kept = select_pairs(energy, keep, spread)
            assert kept.shape == (3, keep)
            for own, row in zip(energy.tolist(), kept.tolist(), strict=True):
                fixed = set(select_frequencies(16, spread))
                others = sorted(set(range(16)) - fixed, key=lambda i: -own[i])[: keep - spread]
                assert row == sorted(fixed | set(others))
    assert torch.equal(energy, before)


# Heads of which a part is rotated


@GROUPINGS
@pytest.mark.parametrize("rest", [0, 3, 5])
@pytest.mark.parametrize("strength", [0.2, 1.0, 5.0])
def test_the_split_is_the_best_of_all_splits(H: int, G: int, rest: int, strength: float) -> None:
    """Each split by what selection of pairs and the SVD of the rest would lose, from the solvers' own references."""
    size = 2 * M + rest
    scale = torch.ones(size, dtype=torch.float64)
    scale[2 * M :] = strength
    q, k = rows(H, 40, size, seed=41) * scale, rows(G, 40, size, seed=45)
    C_q, C_k = moment(q), moment(k)
    energy = pair_energy(C_q[:, : 2 * M, : 2 * M], C_k[:, : 2 * M, : 2 * M])
    found = set()
    for r in range(size + 1):
        costs = {}
        for R in range(M + 1):
            plain = r - 2 * R
            if 0 <= plain <= rest:
                drops = [list(drop) for drop in itertools.combinations(range(M), M - R)]
                lost = sum(float(min(own[drop].sum() for drop in drops)) for own in energy)
                tail = solve_plain(C_q[:, 2 * M :, 2 * M :], C_k[:, 2 * M :, 2 * M :], plain).lost if rest else 0.0
                costs[R, plain] = lost / 2 + tail
        if not costs:
            with pytest.raises(ValueError, match=f"{M} rotated pairs and {rest} other"):
                split_dimensions(C_q, C_k, M, r)
            continue
        chosen = split_dimensions(C_q, C_k, M, r)
        assert costs[chosen] <= min(costs.values()) * (1 + 1e-9) + 1e-12
        found.add(chosen)
    assert found


def test_the_split_follows_the_strength() -> None:
    """A strong unrotated part stays whole, a weak one goes first."""
    size = 2 * M + 4
    for strength, expected in ((100.0, (4, 4)), (1e-3, (6, 0))):
        q, k = rows(2, 40, size, seed=50), rows(2, 40, size, seed=54)
        q[..., 2 * M :] *= strength
        assert split_dimensions(moment(q), moment(k), M, 12) == expected


def test_heads_without_rope_have_no_pairs_to_keep() -> None:
    C = moment(rows(2, 40, D, seed=58))
    assert split_dimensions(C, C, 0, 5) == (0, 5)


# Distances beyond the calibration text


def test_far_characteristic_is_that_of_its_distances() -> None:
    reach = qk._CHUNK + 100
    share = 1 / (1 + torch.arange(reach, dtype=torch.float64))
    [wanted] = characteristic((share / share.sum())[None], FREQUENCIES[None])
    torch.testing.assert_close(qk.far_characteristic(tuple(FREQUENCIES.tolist()), reach), wanted, rtol=0, atol=1e-7)


@GROUPINGS
def test_scores_hold_beyond_the_distances_that_were_seen(H: int, G: int) -> None:
    """The error at distances that the text lacks falls, and that at the others rises by little."""
    seen, unseen = Heads(H, G), Heads(H, G)
    reach = 40 * T
    share = 1 / (1 + torch.arange(reach, dtype=torch.float64))
    unseen.P = (share / share.sum()).expand(H, -1)
    near, far = seen.solve(), seen.solve(reach=reach)
    assert unseen.lost(far) < 0.9 * unseen.lost(near)
    assert seen.lost(near) <= seen.lost(far) < 1.5 * seen.lost(near)
    assert far.lost == pytest.approx((1 - qk.FAR) * seen.lost(far) + qk.FAR * unseen.lost(far), rel=1e-6)

"""MLP selection and refit against least squares on the raw activations."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from a3q.solve.mlp import RIDGE, damped_cholesky, mlp_losses, solve_mlp, unit_scores

UNITS, HIDDEN, ROWS = 12, 7, 300


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def m() -> Tensor:
    """Correlated activations of unequal strength."""
    mix = torch.eye(UNITS, dtype=torch.float64) + 0.4 * random(UNITS, UNITS, seed=0)
    return random(ROWS, UNITS, seed=1) @ mix * torch.linspace(0.3, 2, UNITS, dtype=torch.float64)


W = random(HIDDEN, UNITS, seed=2)


def moment(m: Tensor) -> Tensor:
    return m.T @ m / len(m)


def relative_error(m: Tensor, kept: Tensor, down: Tensor) -> float:
    y = m @ W.T
    return float((y - m[:, kept] @ down.T).square().sum() / y.square().sum())


@pytest.mark.parametrize("keep", [1, 5, 9])
def test_refit_is_ridge_regression_on_the_activations(m: Tensor, keep: int) -> None:
    solution = solve_mlp(moment(m), W, keep)
    x, y = m[:, solution.kept], m @ W.T
    damping = (RIDGE * x.square().sum() / keep).sqrt() * torch.eye(keep, dtype=torch.float64)
    stacked = torch.linalg.lstsq(torch.cat((x, damping)), torch.cat((y, torch.zeros(keep, HIDDEN)))).solution.T
    torch.testing.assert_close(solution.down, stacked, rtol=1e-9, atol=1e-11)
    # What the ridge moves the plain least squares by is at most λ over the smallest eigenvalue.
    plain = torch.linalg.lstsq(x, y).solution.T
    gram = moment(x)
    bound = RIDGE * gram.diagonal().mean() / torch.linalg.eigvalsh(gram)[0]
    assert (solution.down - plain).norm() < bound * plain.norm() < 0.01 * plain.norm()


@pytest.mark.parametrize("keep", [1, 5, 9])
def test_loss_is_the_lost_share_of_the_output(m: Tensor, keep: int) -> None:
    solution = solve_mlp(moment(m), W, keep)
    assert solution.loss == pytest.approx(relative_error(m, solution.kept, solution.down), rel=1e-9)


def test_refit_loses_less_than_the_old_weights_and_than_any_change(m: Tensor) -> None:
    solution = solve_mlp(moment(m), W, 8)
    assert solution.loss < 0.9 * relative_error(m, solution.kept, W[:, solution.kept])
    for seed in range(10):
        change = 0.02 * solution.down.norm() * torch.nn.functional.normalize(random(HIDDEN, 8, seed=seed), dim=None)
        assert relative_error(m, solution.kept, solution.down + change) > solution.loss


def test_keeps_the_units_that_matter_most_in_their_old_order(m: Tensor) -> None:
    """The score is the root-mean-square of what a unit alone adds to the output."""
    alone = torch.stack([torch.outer(m[:, i], W[:, i]).square().sum(1).mean().sqrt() for i in range(UNITS)])
    torch.testing.assert_close(unit_scores(moment(m), W), alone)
    kept = solve_mlp(moment(m), W, 5).kept.tolist()
    assert kept == sorted(sorted(range(UNITS), key=lambda i: -float(alone[i]))[:5])


def test_keeping_every_unit_is_the_identity(m: Tensor) -> None:
    solution = solve_mlp(moment(m), W, UNITS)
    assert solution.kept.tolist() == list(range(UNITS))
    C = moment(m)
    bound = RIDGE * C.diagonal().mean() / torch.linalg.eigvalsh(C)[0]
    assert (solution.down - W).norm() < bound * W.norm() < 0.1 * W.norm()
    assert solution.loss < 1e-6


@pytest.mark.parametrize("keep", [1, 5, 9, UNITS])
def test_without_refit_the_kept_columns_stay(m: Tensor, keep: int) -> None:
    """A3's CUR: the same units, their old weights bit for bit, and the loss of that."""
    plain, refitted = (solve_mlp(moment(m), W, keep, refit=refit) for refit in (False, True))
    assert torch.equal(plain.kept, refitted.kept)
    assert torch.equal(plain.down, W[:, plain.kept])
    assert plain.loss == pytest.approx(relative_error(m, plain.kept, plain.down), rel=1e-9, abs=1e-12)
    assert plain.loss > refitted.loss or keep == UNITS


def test_losses_by_size_are_those_of_solving_at_each_size(m: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """One factorization for all sizes, against one solve a size: equal without the ridge, and close with it."""
    keeps = list(range(1, UNITS + 1))

    def both() -> tuple[list[float], list[float]]:
        return mlp_losses(moment(m), W, keeps), [solve_mlp(moment(m), W, keep).loss for keep in keeps]

    together, apart = both()
    assert together == pytest.approx(apart, rel=0.02, abs=2 * RIDGE)
    assert together[-1] < 1e-12
    assert all(after <= before for before, after in pairwise(together))
    assert together[0] > 0.3
    monkeypatch.setattr("a3q.solve.mlp.RIDGE", 1e-13)
    together, apart = both()
    assert together == pytest.approx(apart, rel=1e-7, abs=1e-10)
    some = mlp_losses(moment(m), W, [9, 2, 5])
    assert some == pytest.approx([together[8], together[1], together[4]], rel=1e-12)


def test_losses_without_refit_are_those_of_what_is_dropped(m: Tensor) -> None:
    keeps = list(range(1, UNITS + 1))
    together = mlp_losses(moment(m), W, keeps, refit=False)
    apart = [solve_mlp(moment(m), W, keep, refit=False) for keep in keeps]
    assert together == pytest.approx([one.loss for one in apart], rel=1e-9, abs=1e-12)
    assert together == pytest.approx([relative_error(m, one.kept, one.down) for one in apart], rel=1e-9, abs=1e-12)
    assert together[-1] == 0
    assert mlp_losses(torch.zeros(UNITS, UNITS), W, [3, UNITS], refit=False) == [0, 0]


def test_losses_of_dead_units_are_zero_and_of_a_dead_mlp_finite(m: Tensor) -> None:
    m[:, [2, 7, 8]] = 0
    assert mlp_losses(moment(m), W, [UNITS - 3, UNITS])[0] < 1e-4
    # A share of nothing is any share.
    assert all(0 <= loss <= 1 for loss in mlp_losses(torch.zeros(UNITS, UNITS), W, [3, UNITS]))
    assert mlp_losses(moment(m), torch.zeros(HIDDEN, UNITS), [3, UNITS]) == [0, 0]


def test_the_ridge_grows_until_an_indefinite_moment_factors(m: Tensor) -> None:
    """As float32 sums can leave it; NaN are told apart from that."""
    gram = moment(m) - 0.05 * torch.eye(UNITS, dtype=torch.float64)
    assert torch.linalg.eigvalsh(gram)[0] < 0
    ridge = torch.tensor(1e-4, dtype=torch.float64)
    factor = damped_cholesky(gram, ridge)
    added = (factor @ factor.T - gram).diagonal()
    torch.testing.assert_close(added, added[:1].expand(UNITS))
    assert float(added[0]) in (pytest.approx(10.0**-n) for n in range(5))
    assert solve_mlp(gram, W, 5).down.isfinite().all()
    with pytest.raises(ValueError, match="NaN"):
        damped_cholesky(gram * torch.nan, ridge)


def test_a_unit_that_repeats_others_costs_nothing(m: Tensor) -> None:
    """A dropped unit that is a sum of kept ones is made up for by the refit."""
    m[:, 3] = 0.1 * (m[:, 10] - m[:, 11])
    solution = solve_mlp(moment(m), W, UNITS - 1)
    assert 3 not in solution.kept
    assert solution.loss < 1e-6 < relative_error(m, solution.kept, W[:, solution.kept])


def test_units_that_never_fire_go_first_and_do_no_harm(m: Tensor) -> None:
    silent = [2, 7, 8]
    m[:, silent] = 0
    alive = [i for i in range(UNITS) if i not in silent]
    assert solve_mlp(moment(m), W, len(alive)).kept.tolist() == alive
    more = solve_mlp(moment(m), W, len(alive) + 2)
    assert more.down.isfinite().all() and more.loss < 1e-6
    assert (more.down[:, torch.isin(more.kept, torch.tensor(silent))] == 0).all()


def test_a_dead_mlp_is_finite_and_loses_nothing() -> None:
    solution = solve_mlp(torch.zeros(UNITS, UNITS), W, 6)
    assert (solution.down == 0).all()
    assert solution.loss == 0


def test_a_moment_of_rank_one_is_finite() -> None:
    u = random(UNITS, seed=5)
    solution = solve_mlp(torch.outer(u, u), W, 6)
    assert solution.down.abs().max() < 1e3
    assert solution.loss < 1e-6

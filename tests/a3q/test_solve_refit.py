"""The refit is ridge regression towards a given weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from a3q.solve.refit import refit, refit_with_bias

N, OUT, ROWS = 6, 4, 80


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, Y, PRIOR = random(ROWS, N, seed=0) @ random(N, N, seed=1), random(ROWS, OUT, seed=2), random(N, OUT, seed=3)


def solved(ridge: float) -> Tensor:
    return refit(X.T @ X / ROWS, X.T @ Y / ROWS, PRIOR, ridge)


@pytest.mark.parametrize("ridge", [1e-6, 0.1, 10.0])
def test_equals_least_squares_with_the_prior_as_further_rows(ridge: float) -> None:
    root = (ridge * X.square().sum() / N).sqrt()
    rows = torch.cat((X, root * torch.eye(N, dtype=torch.float64)))
    stacked = torch.linalg.lstsq(rows, torch.cat((Y, root * PRIOR))).solution
    torch.testing.assert_close(solved(ridge), stacked, rtol=1e-8, atol=1e-10)


def test_goes_from_least_squares_to_the_prior() -> None:
    torch.testing.assert_close(solved(1e-12), torch.linalg.lstsq(X, Y).solution, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(solved(1e9), PRIOR, rtol=1e-6, atol=1e-6)
    distances = [float((solved(ridge) - PRIOR).norm()) for ridge in (1e-3, 1e-2, 0.1, 1.0, 10.0)]
    assert distances == sorted(distances, reverse=True)


def test_a_prior_that_fits_stays() -> None:
    exact = refit(X.T @ X / ROWS, X.T @ (X @ PRIOR) / ROWS, PRIOR, 0.1)
    torch.testing.assert_close(exact, PRIOR)


@pytest.mark.parametrize("ridge", [1e-4, 0.1, 1.0])
def test_without_data_the_prior_stays(ridge: float) -> None:
    torch.testing.assert_close(refit(torch.zeros(N, N), torch.zeros(N, OUT), PRIOR, ridge), PRIOR)


def test_a_dead_input_keeps_its_prior_and_the_others_are_fitted_without_it() -> None:
    x = X.clone()
    x[:, 2] = 0
    alive = [0, 1, 3, 4, 5]
    fitted = refit(x.T @ x / ROWS, x.T @ Y / ROWS, PRIOR, 0.1)
    torch.testing.assert_close(fitted[2], PRIOR[2])
    y, small = Y - x @ PRIOR, x[:, alive]
    strength = 0.1 * x.square().sum() / ROWS / N
    gram = small.T @ small / ROWS + strength * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close((fitted - PRIOR)[alive], torch.linalg.solve(gram, small.T @ y / ROWS))


SHIFT = random(1, N, seed=4)
MOVED, RAISED = X + SHIFT, Y + 3 * random(1, OUT, seed=5)


def solved_with_bias(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    return refit_with_bias(x.T @ x / ROWS, x.T @ y / ROWS, x.mean(0), y.mean(0), PRIOR, ridge)


@pytest.mark.parametrize("ridge", [1e-12, 0.1, 10.0])
def test_an_intercept_equals_least_squares_with_a_column_of_ones(ridge: float) -> None:
    """The intercept itself is not held back; the pull is over the mean variance of the inputs."""
    root = (ridge * (MOVED - MOVED.mean(0)).square().sum() / N).sqrt()
    ones, nothing = torch.ones(ROWS, 1, dtype=torch.float64), torch.zeros(N, 1, dtype=torch.float64)
    rows = torch.cat((torch.cat((MOVED, ones), 1), torch.cat((root * torch.eye(N, dtype=torch.float64), nothing), 1)))
    stacked = torch.linalg.lstsq(rows, torch.cat((RAISED, root * PRIOR))).solution
    weight, bias = solved_with_bias(MOVED, RAISED, ridge)
    torch.testing.assert_close(weight, stacked[:N], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(bias, stacked[N], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("ridge", [1e-6, 0.1, 1e6])
def test_an_intercept_takes_away_the_mean_error(ridge: float) -> None:
    weight, bias = solved_with_bias(MOVED, RAISED, ridge)
    error = MOVED @ weight + bias - RAISED
    assert error.mean(0).abs().max() < 1e-10
    assert error.square().sum() < (MOVED @ solved_on(MOVED, RAISED, ridge) - RAISED).square().sum()


def solved_on(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    return refit(x.T @ x / ROWS, x.T @ y / ROWS, PRIOR, ridge)


def test_without_means_the_intercept_is_zero_and_the_weight_the_plain_one() -> None:
    x, y = X - X.mean(0), Y - Y.mean(0)
    weight, bias = solved_with_bias(x, y, 0.1)
    torch.testing.assert_close(weight, solved_on(x, y, 0.1))
    assert bias.abs().max() < 1e-12


def test_a_constant_or_dead_input_keeps_its_prior_beside_an_intercept() -> None:
    x = MOVED.clone()
    x[:, 2], x[:, 4] = 0, 5
    weight, bias = solved_with_bias(x, RAISED, 0.1)
    torch.testing.assert_close(weight[[2, 4]], PRIOR[[2, 4]])
    torch.testing.assert_close(bias, (RAISED - x @ weight).mean(0))

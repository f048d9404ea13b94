"""OV on small moments against A3's own statement on the full matrices, and the free choices that must not matter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from a3q.solve.ov import OVSolution, solve_ov

HIDDEN, D, ROWS = 24, 8, 200


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def skewed(heads: int, seed: int) -> Tensor:
    """Attention-averaged values `[heads, rows, d]` with a wide spectrum."""
    scale = torch.logspace(0, -1.5, D, dtype=torch.float64)
    return random(heads, ROWS, D, seed=seed) * scale @ random(heads, D, D, seed=seed + 1)


def moment(x: Tensor) -> Tensor:
    return x.mT @ x / x.shape[-2]


def product(solution: OVSolution, w_o: Tensor, groups: int) -> Tensor:
    """`P Q_h W_o[h]`, `[H, d, hidden]`: what stands in the place of each head's output weight."""
    return solution.value.repeat_interleave(len(w_o) // groups, 0) @ solution.output @ w_o


def relative_error(x: Tensor, w_o: Tensor, new: Tensor) -> float:
    """Lost share of the heads' output energy, from the activations themselves."""
    return float((x @ (w_o - new)).square().sum() / (x @ w_o).square().sum())


def symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.sqrt()[..., None, :]) @ vectors.mT


@pytest.mark.parametrize("r", [1, 4, 6])
def test_is_the_truncated_svd_of_the_full_weighted_product(r: int) -> None:
    """With one query head per value head: A3's optimum in `hidden × hidden`, and its loss, from `d × d` moments."""
    heads = 3
    averaged = random(heads, ROWS, HIDDEN, seed=0) @ random(HIDDEN, HIDDEN, seed=1)
    w_v, w_o = random(heads, HIDDEN, D, seed=2), random(heads, D, HIDDEN, seed=3)
    R = moment(averaged)
    root = symmetric_root(R)
    U, sigma, Vh = torch.linalg.svd(root @ w_v @ w_o)
    best = torch.linalg.solve(root, (U[..., :r] * sigma[:, None, :r]) @ Vh[:, :r])

    solution = solve_ov(w_v.mT @ R @ w_v, w_o, heads, r)
    ours = w_v @ product(solution, w_o, heads)
    assert (ours - best).norm() < 1e-6 * best.norm()
    lost = (root @ (w_v @ w_o - ours)).square().sum()
    assert float(lost) == pytest.approx(float(sigma[:, r:].square().sum()), rel=1e-9)
    assert solution.loss == pytest.approx(float(sigma[:, r:].square().sum() / sigma.square().sum()), rel=1e-9)


@pytest.mark.parametrize("r", [2, 5])
def test_heads_of_one_moment_share_the_svd_of_their_weights_side_by_side(r: int) -> None:
    """With several heads a group whose moments agree, the optimum is known too: one SVD over all their outputs."""
    C = moment(skewed(1, seed=4))
    w_o = random(3, D, HIDDEN, seed=5)
    root = symmetric_root(C[0])
    wide = torch.cat(tuple(root @ w_o), -1)
    U, sigma, Vh = torch.linalg.svd(wide)
    best = torch.linalg.solve(root, (U[:, :r] * sigma[:r]) @ Vh[:r]).view(D, 3, HIDDEN).transpose(0, 1)
    solution = solve_ov(C.expand(3, -1, -1), w_o, 1, r)
    assert (product(solution, w_o, 1) - best).norm() < 1e-6 * best.norm()
    assert solution.loss == pytest.approx(float(sigma[r:].square().sum() / sigma.square().sum()), rel=1e-9)


def test_each_head_is_refitted_by_least_squares_on_its_own_values() -> None:
    """The gradient in every head's new output weight is zero, and any change of `output` makes the loss worse."""
    x, w_o = skewed(4, seed=6), random(4, D, HIDDEN, seed=8)
    solution = solve_ov(moment(x), w_o, 2, 5)
    inner = x @ solution.value.repeat_interleave(2, 0)
    fitted = solution.output @ w_o
    gradient = inner.mT @ (x @ w_o - inner @ fitted)
    assert gradient.norm() < 1e-6 * (inner.mT @ (x @ w_o)).norm()
    assert solution.loss == pytest.approx(relative_error(x, w_o, product(solution, w_o, 2)), rel=1e-9)
    for seed in range(10):
        change = 0.01 * solution.output.norm() * torch.nn.functional.normalize(random(4 * 5, D, seed=seed), dim=None)
        other = OVSolution(solution.value, solution.output + change.view(4, 5, D), 0.0, 1.0)
        assert relative_error(x, w_o, product(other, w_o, 2)) > solution.loss * (1 + 1e-6)


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 1), (3, 3)])
@pytest.mark.parametrize("r", [2, 5])
def test_the_papers_solution_is_one_svd_over_the_values_own_moment(heads: int, groups: int, r: int) -> None:
    """With shared values: `C_v^{1/2} [W_o …]` truncated; the loss reported is under the attention-averaged values."""
    each = heads // groups
    x, values, w_o = skewed(heads, seed=40), skewed(groups, seed=42), random(heads, D, HIDDEN, seed=44)
    C_v = moment(values)
    solution = solve_ov(moment(x), w_o, groups, r, C_v)
    best = []
    for g in range(groups):
        root = symmetric_root(C_v[g])
        U, sigma, Vh = torch.linalg.svd(root @ torch.cat(tuple(w_o[g * each : (g + 1) * each]), -1))
        truncated = torch.linalg.solve(root, (U[:, :r] * sigma[:r]) @ Vh[:r])
        best.append(truncated.view(D, each, HIDDEN).transpose(0, 1))
    ours = product(solution, w_o, groups)
    assert (ours - torch.cat(best)).norm() < 1e-6 * ours.norm()
    assert solution.loss == pytest.approx(relative_error(x, w_o, ours), rel=1e-9)


@pytest.mark.parametrize("r", [1, 4, 7])
def test_attention_weights_and_a_refit_for_each_head_lose_no_more_than_the_paper(r: int) -> None:
    """What counts is the loss under each head's attention-averaged values; the paper's subspace is of the values."""
    for seed in range(5):
        x, w_o = skewed(4, seed=50 + 4 * seed), random(4, D, HIDDEN, seed=52 + 4 * seed)
        C, C_v = moment(x), moment(skewed(2, seed=53 + 4 * seed))
        assert solve_ov(C, w_o, 2, r).loss < solve_ov(C, w_o, 2, r, C_v).loss
    # One head a value head, and values that are all attended alike: then both say the same.
    C, w_o = moment(skewed(3, seed=70)), random(3, D, HIDDEN, seed=72)
    ours, papers = solve_ov(C, w_o, 3, r), solve_ov(C, w_o, 3, r, C)
    assert (product(ours, w_o, 3) - product(papers, w_o, 3)).norm() < 1e-5 * w_o.norm()
    assert ours.loss == pytest.approx(papers.loss, rel=1e-9)


def test_no_change_of_the_value_projection_does_better_for_one_head_a_value_head() -> None:
    """The optimum over both factors, not only over the refitted one."""
    x, w_o = skewed(3, seed=74), random(3, D, HIDDEN, seed=76)
    solution = solve_ov(moment(x), w_o, 3, 4)
    for seed in range(20):
        for size in (1e-3, 0.05, 0.5):
            value = solution.value + size * solution.value.abs().mean() * random(3, D, 4, seed=seed)
            output = solution.output + size * solution.output.abs().mean() * random(3, 4, D, seed=100 + seed)
            for other in (OVSolution(value, solution.output, 0.0, 1.0), OVSolution(value, output, 0.0, 1.0)):
                assert relative_error(x, w_o, product(other, w_o, 3)) > solution.loss


def test_grouped_heads_lose_less_than_their_best_coordinates() -> None:
    """The shared subspace beats keeping the values' own strongest dimensions, each head refitted in both cases."""
    x, w_o = skewed(4, seed=9), random(4, D, HIDDEN, seed=11)
    C = moment(x)
    solution = solve_ov(C, w_o, 2, 4)
    new = []
    for h in range(4):
        energy = C[h - h % 2 : h - h % 2 + 2].mean(0).diagonal()
        chosen = energy.topk(4).indices
        weight = torch.zeros(D, HIDDEN, dtype=torch.float64)
        weight[chosen] = torch.linalg.lstsq(x[h][:, chosen], x[h] @ w_o[h]).solution
        new.append(weight)
    assert solution.loss < 0.9 * relative_error(x, w_o, torch.stack(new))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_full_rank_changes_nothing(groups: int) -> None:
    w_o = random(4, D, HIDDEN, seed=12)
    solution = solve_ov(moment(skewed(4, seed=13)), w_o, groups, D)
    assert solution.loss < 1e-9
    assert (product(solution, w_o, groups) - w_o).norm() < 5e-3 * w_o.norm()


@pytest.mark.parametrize("groups", [2, 4])
def test_new_coordinates_inside_a_head_do_not_matter(groups: int) -> None:
    """`v → v T`, `W_o → T⁻¹ W_o` for any invertible T leaves value-to-output products the same."""
    x, w_o = skewed(4, seed=15), random(4, D, HIDDEN, seed=17)
    T = torch.linalg.qr(random(groups, D, D, seed=18)).Q * torch.linspace(0.5, 2, D, dtype=torch.float64)
    per_head = T.repeat_interleave(4 // groups, 0)
    there = torch.linalg.solve(per_head, w_o)
    plain = product(solve_ov(moment(x), w_o, groups, 5), w_o, groups)
    turned = per_head @ product(solve_ov(moment(x @ per_head), there, groups, 5), there, groups)
    assert (turned - plain).norm() < 1e-5 * plain.norm()


def test_groups_are_solved_independently() -> None:
    """Other groups, or another order of them, do not change a group's result."""
    C, w_o = moment(skewed(6, seed=20)), random(6, D, HIDDEN, seed=22)
    order = torch.tensor([4, 5, 0, 1, 2, 3])
    here, there = solve_ov(C, w_o, 3, 4), solve_ov(C[order], w_o[order], 3, 4)
    torch.testing.assert_close(product(there, w_o[order], 3), product(here, w_o, 3)[order])
    alone = solve_ov(C[:2], w_o[:2], 1, 4)
    torch.testing.assert_close(product(alone, w_o[:2], 1), product(here, w_o, 3)[:2])


def test_balance_equalises_the_inner_dimensions_and_keeps_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    C, w_o = moment(skewed(4, seed=23)), random(4, D, HIDDEN, seed=25)
    balanced = solve_ov(C, w_o, 2, 5)
    monkeypatch.setattr("a3q.solve.ov._balance", lambda P, fit, W: (P, fit))
    plain = solve_ov(C, w_o, 2, 5)
    torch.testing.assert_close(product(balanced, w_o, 2), product(plain, w_o, 2))
    norm = (balanced.output @ w_o).square().sum(-1).view(2, 2, 5).mean(1).sqrt()
    torch.testing.assert_close(norm, norm[:, :1].expand(-1, 5))
    assert (plain.output @ w_o).square().sum(-1).view(2, 2, 5).mean(1).sqrt().std(-1).min() > 0.1


@pytest.mark.parametrize("r", [3, D])
@pytest.mark.parametrize("dead", [[1], [0, 1], [0, 1, 2, 3]])
def test_dead_heads_stay_finite_and_leave_the_others_alone(dead: list[int], r: int) -> None:
    """Heads whose values are always zero: finite in float32, the precision of the weights that they multiply."""
    C, w_o = moment(skewed(4, seed=26)), random(4, D, HIDDEN, seed=28)
    alive = solve_ov(C[2:], w_o[2:], 1, r)
    C[dead] = 0
    solution = solve_ov(C, w_o, 2, r)
    assert solution.value.float().isfinite().all() and solution.output.float().isfinite().all()
    assert 0 <= solution.loss < 1
    if 2 not in dead:
        torch.testing.assert_close(product(solution, w_o, 2)[2:], product(alive, w_o[2:], 1))


@pytest.mark.parametrize("r", [3, 5, D])
def test_values_of_low_rank_are_kept_exactly(r: int) -> None:
    """Values in three dimensions only: any `r` of three or more loses nothing, and nothing blows up."""
    x = random(4, ROWS, 3, seed=29) @ random(3, D, seed=30)
    w_o = random(4, D, HIDDEN, seed=31)
    solution = solve_ov(moment(x), w_o, 2, r)
    assert relative_error(x, w_o, product(solution, w_o, 2)) < 1e-10
    assert max(solution.value.abs().max(), solution.output.abs().max()) < 1e4


def test_zero_output_weights_are_finite() -> None:
    solution = solve_ov(moment(skewed(4, seed=32)), torch.zeros(4, D, HIDDEN), 2, 4)
    assert solution.value.isfinite().all() and solution.output.isfinite().all()
    assert solution.loss == 0

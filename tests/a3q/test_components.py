"""Each component's step on the weights of a layer, judged by what the layer puts out."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from a3q import components, ranks
from a3q.components import Method, ov_losses, qk_losses, reduce_mlp, reduce_ov, reduce_qk, spread_norms
from a3q.forward import attention, embed, mlp, norm
from a3q.model import Layer, LayerShape, Model, ModelConfig
from a3q.solve.qk import pair_energy, select_frequencies, select_pairs
from a3q.statistics import AttentionStatistics, Moment
from converters.hf_reader import open_huggingface
from tests.pico import KINDS, VOCAB, Kind, write_model

CPU = torch.device("cpu")
LENGTH = 48
TOKENS = torch.randint(VOCAB, (12, LENGTH), generator=torch.Generator().manual_seed(0))
METHODS = [Method(name, frequencies) for name in ("a3q", "paper") for frequencies in ("per_head", "shared")]
ALL_METHODS = pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{m.frequencies}")
PARTIAL: dict[str, Any] = {
    "kind": "phi3",
    "rope": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
}
VARIANTS: dict[str, dict[str, Any]] = {kind: {"kind": kind} for kind in KINDS} | {
    "llama-biases": {"bias": True},
    "phi3-partial": PARTIAL,
    "qwen3-biases": {"kind": "qwen3", "bias": True},
}


NORMED = ("qwen3", "gemma3", "olmo2", "qwen3-biases")


class Bench:
    """The first layer of a model with its true inputs and statistics."""

    def __init__(self, model: Model) -> None:
        self.model, self.config, self.shape = model, model.config, model.config.layers[0]
        self.w = dict(model.layers[0])
        self.x = embed(model, TOKENS)
        self.normed = norm(self.config, self.w, "attn_norm", self.x)
        self.statistics = AttentionStatistics(self.config, self.shape, LENGTH, CPU)
        self.attended = attention(self.config, self.shape, self.w, self.normed, self.statistics)
        self.statistics.take_in()
        units = self.shape.intermediate_size
        self.moment = Moment(units, units, device=CPU)
        self.inner = norm(self.config, self.w, "mlp_norm", self.x)
        self.out = mlp(self.config, self.w, self.inner, lambda _, m: self.moment.add(m.flatten(0, 1)))

    def attend(self, w: Layer, shape: LayerShape, config: ModelConfig | None = None) -> Tensor:
        return attention(config or self.config, shape, w, self.normed)

    def observed(self, w: Layer, shape: LayerShape, config: ModelConfig | None = None) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        attention(config or self.config, shape, w, self.normed, seen.__setitem__)
        return seen

    def reduce_qk(self, r: int, method: Method) -> tuple[ModelConfig, LayerShape, Layer, float]:
        w = dict(self.w)
        frequencies, loss = reduce_qk(self.config, self.shape, w, self.statistics, r, method)
        config = dataclasses.replace(self.config, qk_norm="heads") if self.config.qk_norm == "head" else self.config
        return config, dataclasses.replace(self.shape, qk_head_dim=r, frequencies=frequencies), w, loss


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bench]:
    root = tmp_path_factory.mktemp("components")
    return {name: Bench(open_huggingface(write_model(root / name, **VARIANTS[name]))) for name in VARIANTS}


@pytest.fixture(params=VARIANTS)
def bench(request: pytest.FixtureRequest, benches: dict[str, Bench]) -> Bench:
    return benches[request.param]


@pytest.fixture(params=[name for name in VARIANTS if name not in NORMED])
def unnormed(request: pytest.FixtureRequest, benches: dict[str, Bench]) -> Bench:
    return benches[request.param]


@pytest.fixture(params=NORMED)
def normed(request: pytest.FixtureRequest, benches: dict[str, Bench]) -> Bench:
    return benches[request.param]


def test_the_variants_with_norms_are_named(benches: dict[str, Bench]) -> None:
    assert [name for name, bench in benches.items() if bench.config.qk_norm is not None] == list(NORMED)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def fits(bench: Bench, w: Layer, shape: LayerShape, config: ModelConfig) -> None:
    assert w.keys() == bench.w.keys()
    for role in bench.model.family.layer:
        if role.name in w:
            weight = w[role.name]
            assert tuple(weight.shape) == role.expected_shape(config, shape), role.name
            assert weight.dtype == torch.float32 and weight.is_contiguous() and weight.isfinite().all(), role.name


@ALL_METHODS
def test_full_rank_leaves_the_attention_as_it_was(bench: Bench, method: Method) -> None:
    """All pairs and dimensions kept, mixes and SVDs taken nevertheless: what comes out is the same."""
    original = dict(bench.w)
    config, shape, w, loss = bench.reduce_qk(bench.shape.qk_head_dim, method)
    assert loss < 1e-9
    assert shape == bench.shape
    fits(bench, w, shape, config)
    assert distance(bench.attend(w, shape, config), bench.attended) < 1e-5
    w = dict(bench.w)
    assert reduce_ov(bench.config, w, bench.statistics, shape.v_head_dim, method) < 1e-9
    fits(bench, w, shape, bench.config)
    assert not torch.equal(w["v"], original["v"])
    assert distance(bench.attend(w, shape), bench.attended) < 1e-5
    assert all(bench.w[role] is original[role] for role in original), "the original layer must stay"


@pytest.mark.parametrize("name", ["a3q", "paper"])
def test_all_units_leave_the_mlp_as_it_was(bench: Bench, name: str) -> None:
    w = dict(bench.w)
    kept, loss = reduce_mlp(w, bench.moment.mean(), bench.shape.intermediate_size, Method(name))
    assert kept.tolist() == list(range(bench.shape.intermediate_size))
    assert loss < 1e-6
    # a3q's refit has a ridge of 1e-4 of the mean diagonal.
    assert distance(mlp(bench.config, w, bench.inner), bench.out) < (1e-6 if name == "paper" else 2e-3)
    fits(bench, w, bench.shape, bench.config)


@ALL_METHODS
@pytest.mark.parametrize("r", [4, 12])
def test_losses_are_told_without_the_step(bench: Bench, method: Method, r: int) -> None:
    *_, loss = bench.reduce_qk(r, method)
    assert qk_losses(bench.config, bench.shape, bench.statistics, [r], method) == [loss]
    assert 0 < loss < 1
    before = dict(bench.w)
    (told,) = ov_losses(bench.config, before, bench.statistics, [r], method)
    assert all(before[role] is bench.w[role] for role in before)
    assert reduce_ov(bench.config, before, bench.statistics, r, method) == told
    assert 0 < told < 1


@ALL_METHODS
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_out_the_sizes(
    bench: Bench, method: Method, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each solves for its own to the last bit, larger and smaller ones, and where there are too few, for none."""
    sizes = [6, 8, 12]
    known = bench.config, bench.shape, bench.statistics, sizes, method
    whole = qk_losses(*known)
    assert whole == [loss for r in sizes for loss in qk_losses(*known[:3], [r], method)]
    for name in ("same_object", "agreed"):
        monkeypatch.setattr(ranks, name, lambda decided: decided)
    monkeypatch.setattr(ranks, "add_up", lambda *_: None)
    monkeypatch.setattr(ranks, "count", lambda: processes)
    for rank in range(processes):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        assert qk_losses(*known) == [loss if i % processes == rank else 0 for i, loss in enumerate(whole)]


@ALL_METHODS
def test_frequencies_are_those_of_the_kept_pairs(bench: Bench, method: Method) -> None:
    """One list for all heads when shared; otherwise one for each key head, by its energy, half of them spread."""
    _, shape, _, _ = bench.reduce_qk(12, method)
    G, old = bench.config.num_key_value_heads, bench.shape.frequencies
    if not bench.shape.pairs:
        assert shape.frequencies == ()
        return
    turned = 2 * bench.shape.pairs
    assert 2 * shape.pairs <= 12 <= 2 * shape.pairs + bench.shape.qk_head_dim - turned
    if method.frequencies == "shared":
        expected = tuple(old[0][i] for i in select_frequencies(bench.shape.pairs, shape.pairs))
        assert shape.frequencies == (expected,)
        return
    C_q, C_k = (m.mean()[:, :turned, :turned] for m in (bench.statistics.q, bench.statistics.k))
    kept = select_pairs(pair_energy(C_q, C_k), shape.pairs, shape.pairs // 2 if method.fitted else 0)
    lists = [tuple(old[0][i] for i in row) for row in kept.tolist()]
    found = list(shape.frequencies)
    assert found == (lists if len(set(lists)) > 1 else lists[:1])
    assert len(found) in (1, G)


def scores(bench: Bench, w: Layer, shape: LayerShape, config: ModelConfig) -> Tensor:
    """Scores of every query with every key at every distance, `[H, queries, keys, T]`, over the root of the size."""
    seen = bench.observed(w, shape, config)
    each = config.queries_per_group
    m = shape.pairs
    q, k = (seen[name][:, :, ::12].transpose(0, 1).flatten(1, 2).double() for name in "qk")
    k = k.repeat_interleave(each, 0)
    lists = torch.tensor(shape.frequencies or ((),), dtype=torch.float64)
    lists = lists.expand(config.num_key_value_heads, -1).repeat_interleave(each, 0)
    wave = torch.exp(1j * lists[..., None] * torch.arange(LENGTH))
    a, b = (torch.complex(x[..., :m], x[..., m : 2 * m]) for x in (q, k))
    turned = torch.einsum("has,hbs,hst->habt", a, b.conj(), wave).real
    plain = (q[..., 2 * m :] @ k[..., 2 * m :].mT)[..., None]
    return (turned + plain) / math.sqrt(shape.qk_head_dim)


@ALL_METHODS
def test_reduced_scores_are_close_on_the_scale_of_the_old(unnormed: Bench, method: Method) -> None:
    """Over all pairs of positions and all distances, with each layer's own divisor: as far off as the loss says."""
    config, shape, w, loss = unnormed.reduce_qk(12, method)
    P = (
        unnormed.statistics.distances().double()[:, None, None]
        if unnormed.shape.pairs
        else torch.full((1,), 1 / LENGTH)
    )
    old, new = scores(unnormed, unnormed.w, unnormed.shape, unnormed.config), scores(unnormed, w, shape, config)
    error = float(((old - new).square() * P).sum() / (old.square() * P).sum())
    assert error == pytest.approx(loss, rel=0.5)
    # The best multiple of the new scores is near one: the changed divisor is made up for.
    best = float((old * new * P).sum() / (new.square() * P).sum())
    assert best == pytest.approx(1, abs=0.2 if method.fitted or not unnormed.shape.pairs else 0.3)


@ALL_METHODS
def test_silent_pairs_and_dimensions_go_for_free(method: Method, unnormed: Bench) -> None:
    """Queries whose dropped part is zero: scale, biases, order of the rows, anything wrong would show."""
    r, m, d = 12, unnormed.shape.pairs, unnormed.shape.qk_head_dim
    keep = select_frequencies(m, min(m, 6 if 2 * m == d else 4))
    silent = [i for i in range(m) if i not in keep]
    rows = [*silent, *(m + i for i in silent), *range(2 * m + r - 2 * len(keep), d)]
    assert len(rows) == d - r
    w = {role: weight.clone() for role, weight in unnormed.w.items()}
    for role in ("q", "q_bias"):
        if role in w:
            w[role].view(unnormed.config.num_attention_heads, d, -1)[:, rows] = 0
    statistics = AttentionStatistics(unnormed.config, unnormed.shape, LENGTH, CPU)
    before = attention(unnormed.config, unnormed.shape, w, unnormed.normed, statistics)
    statistics.take_in()
    lists, loss = reduce_qk(unnormed.config, unnormed.shape, w, statistics, r, method)
    shape = dataclasses.replace(unnormed.shape, qk_head_dim=r, frequencies=lists)
    assert loss < 1e-6
    assert distance(unnormed.attend(w, shape), before) < 1e-4


def test_norms_of_fewer_dimensions_keep_the_scale(normed: Bench) -> None:
    """The weights make up for the changed root mean square, by its mean square ratio over the rows; and for sqrt(r)."""
    d, r, each = normed.shape.qk_head_dim, 12, normed.config.queries_per_group
    config, shape, w, _ = normed.reduce_qk(r, Method("paper", "per_head"))
    assert config.qk_norm == ("all" if normed.config.qk_norm == "all" else "heads")
    fits(normed, w, shape, config)
    raw = {side: normed.normed @ normed.w[side].T + normed.w.get(f"{side}_bias", 0) for side in "qk"}
    old = list(normed.shape.frequencies[0])
    for side, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
        x = raw[side].view(-1, heads, d).double()
        over = (1, 2) if config.qk_norm == "all" else (2,)
        square = x.square()
        whole = normed.w[f"{side}_norm"].double().view(-1, d).expand(heads, d)
        wanted = []
        for h in range(heads):
            g = h // each if side == "q" else h
            own = shape.frequencies[g % len(shape.frequencies)]
            pairs = [old.index(w) for w in own]
            wanted.append([*pairs, *(p + d // 2 for p in pairs)])
        kept = torch.stack([square[:, h, rows] for h, rows in enumerate(wanted)], 1)
        then, now = (part.mean(over, keepdim=True) + config.norm_eps for part in (square, kept))
        ratio = (now / then).mean((0, 2)).expand(heads)
        weight = torch.stack([whole[h, rows] for h, rows in enumerate(wanted)]) * ratio.sqrt()[:, None]
        if side == "q":
            weight = weight * math.sqrt(r / d)
        torch.testing.assert_close(w[f"{side}_norm"].double().view(heads, r), weight, rtol=1e-5, atol=1e-6)
        rows_of = normed.w[side].view(heads, d, -1)
        expected = torch.stack([rows_of[h, rows] for h, rows in enumerate(wanted)])
        assert torch.equal(w[side].view(heads, r, -1), expected)
        if f"{side}_bias" in normed.w:
            bias = normed.w[f"{side}_bias"].view(heads, d)
            assert torch.equal(
                w[f"{side}_bias"].view(heads, r), torch.stack([bias[h, i] for h, i in enumerate(wanted)])
            )
    # Seen from outside: kept dimensions have the mean square they had, where it is divided by less.
    seen, before = normed.observed(w, shape, config), normed.observed(normed.w, normed.shape)
    for h, rows in enumerate(wanted):
        now, then = seen["k"][:, h].square().sum(-1).mean(), before["k"][:, h][..., rows].square().sum(-1).mean()
        assert float(now / then) == pytest.approx(1, abs=0.1)


def test_a_norm_weight_of_zero_hides_its_dimension_and_harms_nothing(normed: Bench) -> None:
    w = {role: weight.clone() for role, weight in normed.w.items()}
    for role in ("q_norm", "k_norm"):
        w[role][:3] = 0
    statistics = AttentionStatistics(normed.config, normed.shape, LENGTH, CPU)
    attention(normed.config, normed.shape, w, normed.normed, statistics)
    statistics.take_in()
    reduce_qk(normed.config, normed.shape, w, statistics, 12, Method())
    assert all(w[role].isfinite().all() and w[role].abs().max() < 10 for role in ("q_norm", "k_norm"))


def test_spread_norms_is_the_same_norm(bench: Bench) -> None:
    w = dict(bench.w)
    spread_norms(bench.config, w)
    if bench.config.qk_norm != "head":
        assert all(w[role] is bench.w[role] for role in w)
        return
    config = dataclasses.replace(bench.config, qk_norm="heads")
    fits(bench, w, bench.shape, config)
    assert torch.equal(bench.attend(w, bench.shape, config), bench.attended)


@pytest.mark.parametrize("r", [3, 12])
@ALL_METHODS
def test_ov_loss_is_that_of_the_heads_outputs(bench: Bench, method: Method, r: int) -> None:
    """The lost share of each head's own output, summed over heads, from the activations of the reduced layer."""
    w = dict(bench.w)
    loss = reduce_ov(bench.config, w, bench.statistics, r, method)
    shape = dataclasses.replace(bench.shape, v_head_dim=r)
    fits(bench, w, shape, bench.config)
    H = bench.config.num_attention_heads

    def outputs(w: Layer, shape: LayerShape) -> Tensor:
        o = bench.observed(w, shape)["o"].double()
        return torch.einsum("bhtd,hde->bhte", o, w["o"].T.view(H, shape.v_head_dim, -1).double())

    old, new = outputs(bench.w, bench.shape), outputs(w, shape)
    assert float((old - new).square().sum() / old.square().sum()) == pytest.approx(loss, rel=1e-3)
    assert distance(bench.attend(w, shape), bench.attended) < 1


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_order_and_coordinates_of_heads_do_not_matter(kind: Kind, tmp_path: Path) -> None:
    """Value heads turned inside and key/value groups in another order: the reduced layer is the same function."""
    bench = Bench(open_huggingface(write_model(tmp_path / "m", kind)))
    config, d = bench.config, bench.shape.qk_head_dim
    H, G = config.num_attention_heads, config.num_key_value_heads
    generator = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(G, d, d, generator=generator)).Q
    order = torch.randperm(G, generator=generator)
    heads = (order[:, None] * (H // G) + torch.arange(H // G)).flatten()
    other = dict(bench.w)
    for role, of in (("q", heads), ("k", order), ("v", order)):
        for name in (role, f"{role}_bias"):
            if name in other:
                rows = other[name].view(len(of), d, -1)
                if role == "v":
                    rows = turn @ rows
                other[name] = rows[of].reshape(other[name].shape)
    o = bench.w["o"].T.view(H, d, -1)
    other["o"] = (turn.repeat_interleave(H // G, 0) @ o)[heads].flatten(0, 1).T.contiguous()
    statistics = AttentionStatistics(config, bench.shape, LENGTH, CPU)
    assert distance(attention(config, bench.shape, other, bench.normed, statistics), bench.attended) < 1e-5
    statistics.take_in()
    for method in METHODS:
        results = []
        for w, moments in ((dict(bench.w), bench.statistics), (other.copy(), statistics)):
            lists, qk = reduce_qk(config, bench.shape, w, moments, 12, method)
            ov = reduce_ov(config, w, moments, 10, method)
            shape = LayerShape(12, 10, bench.shape.intermediate_size, lists)
            results.append((bench.attend(w, shape), qk, ov))
        (one, *losses), (two, *other_losses) = results
        assert losses == pytest.approx(other_losses, rel=1e-4)
        assert distance(two, one) < 1e-3


def test_fitted_losses_are_no_larger_than_the_papers(bench: Bench) -> None:
    """Mixing starts from a selection and each head's output is fitted: with the same pairs neither can lose more."""
    for r in (4, 8, 12):
        (ours,), (papers,) = (
            ov_losses(bench.config, bench.w, bench.statistics, [r], Method(name)) for name in ("a3q", "paper")
        )
        assert ours <= papers * (1 + 1e-6)
        (ours,), (papers,) = (
            qk_losses(bench.config, bench.shape, bench.statistics, [r], Method(name, "shared"))
            for name in ("a3q", "paper")
        )
        assert ours <= papers * (1 + 1e-6)


def test_units_keep_their_rows(bench: Bench) -> None:
    for name in ("a3q", "paper"):
        w = dict(bench.w)
        kept, loss = reduce_mlp(w, bench.moment.mean(), 72, Method(name))
        shape = dataclasses.replace(bench.shape, intermediate_size=72)
        fits(bench, w, shape, bench.config)
        for role in ("gate", "up", "gate_bias", "up_bias"):
            if role in w:
                assert torch.equal(w[role], bench.w[role][kept])
        assert torch.equal(w["down"], bench.w["down"][:, kept]) is (name == "paper")
        bias = bench.w.get("down_bias", torch.zeros(1))
        new = mlp(bench.config, w, bench.inner)
        error = (new - bench.out).square().sum() / (bench.out - bias).square().sum()
        assert float(error) == pytest.approx(loss, rel=1e-3)


def test_a_second_reduction_starts_from_the_first(tmp_path: Path) -> None:
    """A layer with a list of frequencies for each key head, or with no pairs left, is reduced like any other."""
    bench = Bench(open_huggingface(write_model(tmp_path / "m", **PARTIAL)))
    for method in METHODS:
        config, shape, w, _ = bench.reduce_qk(12, Method("paper", "per_head"))
        for r in (10, 8):
            statistics = AttentionStatistics(config, shape, LENGTH, CPU)
            attention(config, shape, w, bench.normed, statistics)
            statistics.take_in()
            lists, loss = reduce_qk(config, shape, w, statistics, r, method)
            shape = dataclasses.replace(shape, qk_head_dim=r, frequencies=lists)
            assert 0 < loss < 1
            fits(bench, w, shape, config)
            assert bench.attend(w, shape).isfinite().all()


@ALL_METHODS
def test_more_sweeps_only_help(bench: Bench, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    for sweeps in (1, 4, 12):
        monkeypatch.setattr(components, "SWEEPS", sweeps)
        losses += qk_losses(bench.config, bench.shape, bench.statistics, [8], method)
    assert losses[0] * (1 + 1e-9) >= losses[1] and losses[1] * (1 + 1e-9) >= losses[2]
    if not method.fitted or not bench.shape.pairs or bench.config.qk_norm:
        assert losses[0] == losses[2]

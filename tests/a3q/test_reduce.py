"""Reduction end to end: what must come out unchanged, what must be better than cutting, what must not break."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from a3q import batching, components, fit, statistics
from a3q.batching import Batches
from a3q.components import Method
from a3q.errors import InputError
from a3q.forward import attention, block, embed, hidden_states, mlp, norm
from a3q.model import Layer, LayerShape, Model, ModelConfig
from a3q.quantize import LayerRounding
from a3q.reduce import Reduction, reduce
from a3q.reduce_layer import Dimensions, Streams, reduce_fitted, reduce_plainly
from a3q.solve.ov import OVSolution, solve_ov_sizes
from a3q.solve.qk import _as_real, select_frequencies
from a3q.statistics import AttentionStatistics, Moment
from a3q.store import LayerLosses
from a3q.stream import Stream
from converters.hf_reader import open_huggingface
from tests.pico import VOCAB, Kind, write_model
from tests.test_reduction_of_families import METHODS, check_shapes, cut, distance, logits

CPU = torch.device("cpu")
LENGTH = 64
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biases": {"bias": True},
    "qwen2": {"kind": "qwen2"},
    "gpt_neox": {"kind": "gpt_neox"},
}
QUARTER = {
    "qk": Dimensions(12, 16, 96),
    "ov": Dimensions(16, 12, 96),
    "mlp": Dimensions(16, 16, 72),
    "all": Dimensions(12, 12, 72),
}
ALL_METHODS = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
SHARED = METHODS["a3q-shared"]

BETTER = {"qk": 0.7, "ov": 0.1, "mlp": 0.2, "all": 0.6}
"""What a reduction by a3q may leave of the error that plain cutting makes."""
BETTER_PAPER = {"qk": 0.85, "ov": 0.1, "mlp": 0.2, "all": 0.85}


def tokens(count: int, length: int, seed: int) -> Tensor:
    return torch.randint(VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


CALIBRATION, HELD_OUT = tokens(16, LENGTH, 0), tokens(4, LENGTH, 1)


def concentrated(w: Layer, config: ModelConfig, shape: LayerShape, seed: int) -> Layer:
    """The same layer with what trained models have: heads of falling spectrum, and units of unequal strength."""
    generator = torch.Generator().manual_seed(seed)

    def fading(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=dtype)).Q
        return (basis * torch.logspace(0.5, -1.5, size)) @ basis.mH

    def mixed(heads: int) -> Tensor:
        """Pairs mixed as complex numbers, and the other dimensions among themselves."""
        turned = [_as_real(fading(shape.pairs, torch.complex64)) for _ in range(heads)]
        rest = shape.qk_head_dim - 2 * shape.pairs
        return torch.stack([torch.block_diag(part, fading(rest) if rest else torch.empty(0, 0)) for part in turned])

    new = dict(w)
    H, G = config.num_attention_heads, config.num_key_value_heads
    for role, heads, mix in (
        ("q", H, mixed(H)),
        ("k", G, mixed(G)),
        ("v", G, torch.stack([fading(16) for _ in range(G)])),
    ):
        for name in (role, f"{role}_bias"):
            if name in w:
                new[name] = (mix @ w[name].view(heads, 16, -1)).view(w[name].shape)
    weak = torch.randperm(96, generator=generator)[:24]
    for name in ("up", "up_bias"):
        if name in w:
            new[name] = w[name].clone()
            new[name][weak] *= 0.1
    return new


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    model = open_huggingface(write_model(tmp_path_factory.mktemp(request.param), **KINDS[request.param]))
    layers = [concentrated(w, model.config, model.config.layers[i], i) for i, w in enumerate(model.layers)]
    return dataclasses.replace(model, layers=layers)


def run(model: Model, dimensions: Dimensions, method: Method = SHARED, memory_budget: int = 10**9) -> Reduction:
    return reduce(model, CALIBRATION, [dimensions] * len(model.config.layers), CPU, memory_budget, method)


def error(model: Model, other: Model, ids: Tensor = HELD_OUT) -> float:
    return distance(logits(other, ids), logits(model, ids))


def copies(model: Model) -> list[Layer]:
    return [{role: weight.clone() for role, weight in layer.items()} for layer in model.layers]


def values_put_out(model: Model, w: Layer) -> Tensor:
    """What each query head makes of its input: output projection times values, `[heads, hidden, hidden]`."""
    config = model.config
    values = w["v"].view(config.num_key_value_heads, 16, -1).repeat_interleave(config.queries_per_group, 0)
    return w["o"].view(-1, config.num_attention_heads, 16).transpose(0, 1) @ values


@ALL_METHODS
def test_the_same_dimensions_change_nothing(model: Model, method: Method) -> None:
    """The refits' targets are then the weights' own outputs; evening out heads and balancing units are exact."""
    reduction = run(model, Dimensions.of(model.config.layers[0]), method)
    assert reduction.model.config == model.config
    assert reduction.losses == [LayerLosses()] * 2
    assert error(model, reduction.model) < 1e-5
    for layer, before in zip(reduction.model.layers, model.layers, strict=True):
        if not method.fitted:
            assert all(torch.equal(layer[role], before[role]) for role in before)
            continue
        assert all(torch.equal(layer[role], before[role]) for role in before if role.endswith("norm"))
        assert distance(values_put_out(model, layer), values_put_out(model, before)) < 1e-4
        for role, other in (("q", "k"), ("k", "q")):
            # Rows are scaled, up in one and down in the other, and not turned.
            cosine = torch.cosine_similarity(layer[role], before[role])
            torch.testing.assert_close(cosine, torch.ones_like(cosine))
            assert not torch.equal(layer[other], before[other])
        if "gate" in layer:
            norms = layer["down"].norm(dim=0)
            torch.testing.assert_close(norms, norms.mean().expand_as(norms))
            assert torch.equal(layer["gate"], before["gate"])


@ALL_METHODS
@pytest.mark.parametrize("what", QUARTER)
def test_a_quarter_less_fits_its_shapes_and_beats_cutting(model: Model, what: str, method: Method) -> None:
    """Each component alone and all together, judged on tokens not calibrated on."""
    before = copies(model)
    reduction = run(model, QUARTER[what], method)
    for layer, copy in zip(model.layers, before, strict=True):
        assert all(torch.equal(layer[role], copy[role]) for role in copy), "the original must stay as it is"
    check_shapes(reduction.model, model)
    assert [Dimensions.of(shape) for shape in reduction.model.config.layers] == [QUARTER[what]] * 2
    if method.frequencies == "shared":
        for shape, old in zip(reduction.model.config.layers, model.config.layers, strict=True):
            kept = select_frequencies(old.pairs, shape.pairs)
            assert shape.frequencies == (tuple(old.frequencies[0][i] for i in kept),)
    for loss in reduction.losses:
        for name, value in {"qk": loss.qk, "ov": loss.ov, "mlp": loss.mlp}.items():
            assert 0 < value < 0.4 if what in (name, "all") else value == 0
    naive = error(model, cut(model, [QUARTER[what]] * 2, spread=True))
    found = error(model, reduction.model)
    if what == "qk" and method == METHODS["paper-shared"] and model.config.layers[0].pairs == 8:
        # Evenly spaced pairs kept as they are: that is the cut itself.
        assert found == pytest.approx(naive, rel=1e-4)
    else:
        assert found < (BETTER if method.fitted else BETTER_PAPER)[what] * naive


def spare(model: Model) -> Model:
    """The model with a quarter of every inner dimension of no effect: silent pairs, flat values, dead units."""
    config, shape = model.config, model.config.layers[0]
    H, G, m = config.num_attention_heads, config.num_key_value_heads, shape.pairs
    dropped = [i for i in range(m) if i not in select_frequencies(m, 6)]
    silent = [*dropped, *(m + i for i in dropped), *range(2 * m, 16)][:4]
    generator = torch.Generator().manual_seed(7)
    layers = []
    for new in copies(model):
        basis = torch.linalg.qr(torch.randn(G, 16, 12, generator=generator)).Q
        units = torch.randperm(96, generator=generator)[:24]
        for suffix in ("", "_bias"):
            if f"q{suffix}" in new:
                new[f"q{suffix}"].view(H, 16, -1)[:, silent] = 0
                flat = basis @ (basis.mT @ new[f"v{suffix}"].view(G, 16, -1))
                new[f"v{suffix}"] = flat.view(new[f"v{suffix}"].shape)
            if f"up{suffix}" in new:
                new[f"up{suffix}"][units] = 0
        layers.append(new)
    return dataclasses.replace(model, layers=layers)


@ALL_METHODS
@pytest.mark.parametrize("what", QUARTER)
def test_dimensions_without_effect_are_removed_without_loss(model: Model, what: str, method: Method) -> None:
    """Mixing, the changed score scale, biases and both refits: any mistake in one of them would show here."""
    original = spare(model)
    reduction = run(original, QUARTER[what], method)
    check_shapes(reduction.model, original)
    # The MLP's relative ridge of 1e-4 is what remains.
    assert error(original, reduction.model) < (1e-4 if what in ("qk", "ov") else 3e-3)
    assert max(max(vars(loss).values()) for loss in reduction.losses) < 1e-5


def test_spilling_to_disk_changes_nothing(model: Model) -> None:
    kept, spilled = (run(model, QUARTER["all"], SHARED, budget) for budget in (10**9, 0))
    assert kept.losses == spilled.losses
    for one, other in zip(kept.model.layers, spilled.model.layers, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[role], other[role]) for role in one)
    assert torch.equal(logits(spilled.model, HELD_OUT), logits(kept.model, HELD_OUT))
    assert spilled.model.layers[0]["q"] is not spilled.model.layers[0]["q"]
    assert kept.model.layers[0]["q"] is kept.model.layers[0]["q"]


@pytest.mark.parametrize("method", [SHARED, METHODS["paper-own"]], ids=["a3q", "paper"])
def test_batches_change_nothing(model: Model, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(model, QUARTER["all"], method)
    monkeypatch.setattr(batching, "BATCH_BYTES", 3 * 4 * LENGTH * (3 * 96 + 4 * 64))
    assert len(list(batching.batches(model.config, len(CALIBRATION), LENGTH))) == 6
    parts = run(model, QUARTER["all"], method)
    assert error(whole.model, parts.model) < 1e-4
    for one, other in zip(whole.losses, parts.losses, strict=True):
        assert vars(one) == pytest.approx(vars(other), rel=1e-3)


def test_streams_are_those_of_the_two_models(model: Model) -> None:
    """After the last layer, one stream holds what the original computes and the other what the reduced model does."""
    x = embed(model, CALIBRATION)
    reference, reduced = Stream(model.config, x.clone(), CPU), Stream(model.config, x.clone(), CPU)
    batches, unrounded = Batches(model.config, LENGTH, CPU), LayerRounding({}, None, "nowhere")
    width = model.config.num_attention_heads * model.config.widest.v_head_dim
    room = torch.empty_like(x), torch.empty(*x.shape[:2], width)
    streams = Streams(reference, reduced, batches, torch.float32, 0, *room)
    layers, shapes = [], []
    for shape, w in zip(model.config.layers, model.layers, strict=True):
        new, new_shape, _ = reduce_fitted(dict(w), shape, QUARTER["all"], streams, SHARED, unrounded)
        layers.append(new)
        shapes.append(new_shape)
    config = dataclasses.replace(model.config, layers=tuple(shapes))
    for stream, runs in ((reference, model), (reduced, dataclasses.replace(model, config=config, layers=layers))):
        final = norm(config, model.top, "final_norm", stream.x)
        torch.testing.assert_close(final, hidden_states(runs, CALIBRATION, CPU), rtol=1e-4, atol=1e-4)


def test_the_papers_stream_is_the_originals(model: Model) -> None:
    stream = Stream(model.config, embed(model, CALIBRATION), CPU)
    batches = Batches(model.config, LENGTH, CPU)
    for shape, w in zip(model.config.layers, model.layers, strict=True):
        reduce_plainly(dict(w), shape, QUARTER["all"], stream, batches, 0, METHODS["paper-own"], "nowhere")
    final = norm(model.config, model.top, "final_norm", stream.x)
    torch.testing.assert_close(final, hidden_states(model, CALIBRATION, CPU), rtol=1e-4, atol=1e-4)


@ALL_METHODS
def test_moments_are_measured_on_the_right_stream(
    model: Model, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """a3q solves the second layer for what the original makes of the reduced first layer's output, the paper not."""
    moments: list[Tensor] = []

    def spy(
        o_moment: Tensor, w_o: Tensor, groups: int, sizes: Sequence[int], v_moment: Tensor | None = None
    ) -> list[OVSolution]:
        moments.append(o_moment)
        shared = model.config.num_attention_heads != model.config.num_key_value_heads
        assert (v_moment is not None) is (shared and not method.fitted)
        return solve_ov_sizes(o_moment, w_o, groups, sizes, v_moment)

    monkeypatch.setattr(components, "solve_ov_sizes", spy)
    reduced = run(model, QUARTER["all"], method).model

    def second(of: Model) -> Tensor:
        config = model.config
        x = block(of.config, of.config.layers[0], of.layers[0], embed(model, CALIBRATION))
        statistics = AttentionStatistics(config, config.layers[1], LENGTH, CPU)
        w = model.layers[1]
        attention(config, config.layers[1], w, norm(config, w, "attn_norm", x), statistics)
        statistics.take_in()
        return statistics.o.mean()

    right, wrong = (reduced, model) if method.fitted else (model, reduced)
    assert distance(moments[1], second(right)) < 1e-4
    assert distance(moments[1], second(wrong)) > 5e-3


def test_refit_and_correction_bring_the_calibration_text_closer(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two steps past A3 lowers the error where it is fitted."""

    def found() -> float:
        return error(model, run(model, QUARTER["all"]).model, CALIBRATION)

    both = found()
    monkeypatch.setattr(fit, "CORRECTION", 0.0)
    local = found()
    monkeypatch.setattr(fit, "RIDGE", 1e9)
    plain = found()
    assert both < 0.98 * local
    assert local < 0.995 * plain


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "opt"])
def test_biases_take_up_the_mean_error(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the original's output as target, what the reduced first layer puts out has no mean error over the text."""
    monkeypatch.setattr(fit, "CORRECTION", 0.0)
    model = open_huggingface(write_model(tmp_path / "m", kind, **({"bias": True} if kind == "llama" else {})))
    assert {"o_bias", "down_bias"} <= model.layer_roles
    config, (old, w) = model.config, (model.config.layers[0], model.layers[0])
    x = embed(model, CALIBRATION)

    def outputs(shape: LayerShape, layer: Layer, entry: Tensor) -> tuple[Tensor, Tensor]:
        attended = attention(config, shape, layer, norm(config, layer, "attn_norm", x))
        return attended, mlp(config, layer, norm(config, layer, "mlp_norm", entry))

    for name, method in METHODS.items():
        reduction = run(model, QUARTER["all"], method).model
        shape, new = reduction.config.layers[0], reduction.layers[0]
        attended, _ = outputs(shape, new, x)
        # The MLP of both reads what the reduced attention leaves.
        entry = x if config.parallel_residual else x + attended
        for one, other in zip(outputs(old, w, entry), outputs(shape, new, entry), strict=True):
            gap = (one - other).mean((0, 1)).norm() / (one - other).square().mean((0, 1)).sum().sqrt()
            assert (gap < 1e-3) if name.startswith("a3q") else (gap > 5e-3)
    assert torch.equal(run(model, QUARTER["all"], METHODS["paper-own"]).model.layers[0]["o_bias"], w["o_bias"])


def test_refit_is_least_squares_on_the_two_streams(model: Model) -> None:
    """The first layer's output projection, against ridge regression on rows: half the gap, half the local output."""
    config, w, old = model.config, model.layers[0], model.config.layers[0]
    reduction = run(model, QUARTER["all"]).model
    shape, new = reduction.config.layers[0], reduction.layers[0]
    x = embed(model, CALIBRATION)
    normed = norm(config, w, "attn_norm", x)
    seen: dict[str, Tensor] = {}
    attention(config, shape, new, normed, seen.__setitem__)
    rows = seen["o"].transpose(1, 2).flatten(2).flatten(0, 1).double()
    # Both streams begin with the same states, so that the gap and the local output are one.
    target = attention(config, old, w, normed).flatten(0, 1).double()
    statistics = AttentionStatistics(config, old, LENGTH, CPU)
    attention(config, old, w, normed, statistics)
    statistics.take_in()
    prior, inputs = dict(w), normed.flatten(0, 1)
    components.reduce_qk(config, old, prior, statistics, 12, SHARED)
    components.reduce_ov(config, prior, statistics, 12, SHARED)
    components.even_heads(config, shape, prior, inputs.T @ inputs / len(inputs), inputs.mean(0))
    start = prior["o"].T.double()
    if "o_bias" in w:
        x_mean, y_mean = rows.mean(0), target.mean(0)
        rows, target = rows - x_mean, target - y_mean
    strength = fit.RIDGE * rows.square().sum() / len(rows) / rows.shape[1]
    root = (strength * len(rows)).sqrt() * torch.eye(rows.shape[1], dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat((rows, root)), torch.cat((target, root @ start))).solution
    assert distance(new["o"].T.double(), expected) < 1e-4
    if "o_bias" in w:
        assert distance(new["o_bias"].double(), y_mean - x_mean @ expected) < 1e-3


@pytest.mark.parametrize("kind", ["olmo2", "gemma3"])
def test_targets_go_backwards_through_a_norm(kind: Kind, tmp_path: Path) -> None:
    """Normed, a target is the mean of the gap and what the original would add, whatever the local output's scale."""
    model = open_huggingface(write_model(tmp_path / "m", kind))
    config, w = model.config, dict(model.layers[0])
    generator = torch.Generator().manual_seed(2)
    local = 0.01 * torch.randn(3, 5, 64, generator=generator)
    gap, base = torch.randn(3, 5, 64, generator=generator), torch.randn(3, 5, 64, generator=generator)
    reference, reduced = Stream(config, base + gap, CPU), Stream(config, base, CPU)
    whole = slice(None)
    target = fit.target(reference, reduced, whole, w, "attn_post_norm", local)
    weight = w["attn_post_norm"]
    scale = (local.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    wanted = fit.CORRECTION * gap + (1 - fit.CORRECTION) * norm(config, w, "attn_post_norm", local)
    torch.testing.assert_close(target / scale * weight, wanted, rtol=1e-4, atol=1e-5)
    # Where nothing is amiss, the target is the output itself; and a weight of next to nothing is not divided by.
    w["attn_post_norm"] = weight.clone()
    w["attn_post_norm"][:3] = torch.tensor([0.0, 1e-9, -1e-9])
    reference = Stream(config, base + norm(config, w, "attn_post_norm", local), CPU)
    same = fit.target(reference, reduced, whole, w, "attn_post_norm", local)
    torch.testing.assert_close(same, local, rtol=1e-3, atol=1e-6)


def test_reported_losses_are_those_of_the_components(model: Model) -> None:
    """The paper's first layer, step by step by hand."""
    method = METHODS["paper-own"]
    reduction = run(model, QUARTER["all"], method)
    config, shape, w = model.config, model.config.layers[0], dict(model.layers[0])
    x = embed(model, CALIBRATION)
    statistics = AttentionStatistics(config, shape, LENGTH, CPU)
    y = x + attention(config, shape, w, norm(config, w, "attn_norm", x), statistics)
    statistics.take_in()
    moment = Moment(96, 96, device=CPU)
    inner = norm(config, w, "mlp_norm", x if config.parallel_residual else y)
    mlp(config, w, inner, lambda _, m: moment.add(m.flatten(0, 1)))
    lists, qk = components.reduce_qk(config, shape, w, statistics, 12, method)
    ov = components.reduce_ov(config, w, statistics, 12, method)
    _, units = components.reduce_mlp(w, moment.mean(), 72, method)
    assert reduction.losses[0] == LayerLosses(qk, ov, units)
    assert reduction.model.config.layers[0].frequencies == lists
    for role, weight in reduction.model.layers[0].items():
        torch.testing.assert_close(weight, w[role])


@ALL_METHODS
def test_attention_is_only_laid_open_where_queries_and_keys_shrink(
    model: Model, monkeypatch: pytest.MonkeyPatch, method: Method
) -> None:
    def called(*_: object) -> Tensor:
        raise LookupError

    monkeypatch.setattr(statistics, "attention_distances", called)
    run(model, Dimensions(16, 12, 72), method)
    with pytest.raises(LookupError):
        run(model, QUARTER["qk"], method)


def silence(w: Layer, *roles: str, rows: slice = slice(None)) -> Layer:
    new = {role: weight.clone() for role, weight in w.items()}
    for role in roles:
        for name in (role, f"{role}_bias"):
            if name in new:
                new[name][rows] = 0
    return new


DEAD: dict[str, dict[str, Any]] = {
    "values": {"roles": ("v",)},
    "one value head": {"roles": ("v",), "rows": slice(0, 16)},
    "queries": {"roles": ("q",)},
    "one query head": {"roles": ("q",), "rows": slice(16, 32)},
    "one key head": {"roles": ("k",), "rows": slice(16, 32)},
    "output": {"roles": ("o",)},
    "gate": {"roles": ("gate",)},
    "most units": {"roles": ("up",), "rows": slice(0, 60)},
    "down": {"roles": ("down",)},
    "everything": {"roles": ("q", "k", "v", "o", "gate", "up", "down")},
}


@ALL_METHODS
@pytest.mark.parametrize("which", DEAD)
def test_dead_weights_stay_finite_and_harmless(model: Model, which: str, method: Method) -> None:
    """A layer with dead parts reduces to finite weights, no worse than the whole layer does."""
    first, second = model.layers
    broken = dataclasses.replace(
        model, layers=[silence(first, *DEAD[which]["roles"], rows=DEAD[which].get("rows", slice(None))), second]
    )
    reduction = run(broken, QUARTER["all"], method)
    check_shapes(reduction.model, broken)
    assert max(weight.abs().max() for layer in reduction.model.layers for weight in layer.values()) < 1e3
    assert error(broken, reduction.model) < (0.7 if method.fitted else 1)


@ALL_METHODS
def test_fewer_tokens_than_units_is_finite(model: Model, method: Method) -> None:
    """Singular moments: 12 tokens for 96 units and 64 attended dimensions."""
    reduction = reduce(model, CALIBRATION[:1, :12], [QUARTER["all"]] * 2, CPU, 10**9, method)
    check_shapes(reduction.model, model)
    assert max(weight.abs().max() for layer in reduction.model.layers for weight in layer.values()) < 1e2


def test_progress_is_reported_once_a_layer_and_dimensions_must_be_as_many(model: Model) -> None:
    calls: list[int] = []

    def reduce_to(dimensions: Sequence[Dimensions]) -> None:
        reduce(model, CALIBRATION[:2], dimensions, CPU, 10**9, on_layer=lambda: calls.append(1))

    reduce_to([QUARTER["all"]] * 2)
    assert len(calls) == 2
    with pytest.raises(ValueError, match="3 layers for 2"):
        reduce_to([QUARTER["all"]] * 3)


FIRST_STAYS = [Dimensions(16, 16, 96), QUARTER["all"]]


def test_layers_in_front_that_stay_need_no_fit(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fitted as those behind them are, they are themselves again, and the rest is the same."""
    found = reduce(model, CALIBRATION, FIRST_STAYS, CPU, 10**9, SHARED)
    assert found.losses[0] == LayerLosses() and found.losses[1].mlp > 0
    monkeypatch.setattr("a3q.reduce._untouched", lambda *_: 0)
    fitted = reduce(model, CALIBRATION, FIRST_STAYS, CPU, 10**9, SHARED)
    assert error(fitted.model, found.model) < 0.01 * error(model, found.model)


@pytest.mark.parametrize(
    ("role", "name"),
    [("o", "the attention's output"), ("down", "the MLP's output"), ("attn_norm", "the attention's input")],
)
def test_a_layer_that_stays_is_looked_at_all_the_same(model: Model, role: str, name: str) -> None:
    layers = copies(model)
    layers[0][role].view(-1)[5] = torch.nan
    with pytest.raises(InputError, match=f"layer 0: {name} holds values that are no numbers"):
        reduce(dataclasses.replace(model, layers=layers), CALIBRATION, FIRST_STAYS, CPU, 10**9, SHARED)

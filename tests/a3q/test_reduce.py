"""Whole reductions of tiny models: what must stay exactly, what must be better than cutting, what must not break."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import embedding

from a3q import forward
from a3q import reduce as reducing
from a3q.forward import Rope, hidden_states, output_logits, rms_norm
from a3q.model import Layer, Model, ModelConfig
from a3q.reduce import Dimensions, LayerLosses, Reduction, Stream, reduce, reduce_layer, reduced_config
from a3q.solve.ov import OVSolution, solve_ov
from a3q.solve.qk import mix_rows
from a3q.statistics import AttentionStatistics
from converters.hf_reader import open_huggingface
from tests.pico import VOCAB, write_model

CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {"llama": {}, "llama-biases": {"bias": True}, "qwen2": {"kind": "qwen2"}}
QUARTER = {
    "qk": Dimensions(12, 16, 96),
    "ov": Dimensions(16, 12, 96),
    "mlp": Dimensions(16, 16, 72),
    "all": Dimensions(12, 12, 72),
}

BETTER = {"qk": 0.75, "ov": 0.15, "mlp": 0.25, "all": 0.65}
"""What a reduction may leave of the error that plain cutting makes."""


def tokens(count: int, length: int, seed: int) -> Tensor:
    return torch.randint(VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


CALIBRATION, HELD_OUT = tokens(16, 64, 0), tokens(4, 64, 1)


def concentrated(w: Layer, seed: int) -> Layer:
    """The same layer with what trained models have: heads of falling spectrum, and units of unequal strength."""
    generator = torch.Generator().manual_seed(seed)

    def fading(size: int, dtype: torch.dtype) -> Tensor:
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=dtype)).Q
        return (basis * torch.logspace(0.5, -1.5, size)) @ basis.mH

    new = dict(w)
    for role, heads in (("q", 4), ("k", 2)):
        mix = torch.stack([fading(8, torch.complex64) for _ in range(heads)])
        for name in (role, f"{role}_bias"):
            if name in w:
                new[name] = mix_rows(mix, w[name].view(heads, 16, -1)).float().view(w[name].shape)
    for name in ("v", "v_bias"):
        if name in w:
            generator.manual_seed(seed)
            mix = torch.stack([fading(16, torch.float32) for _ in range(2)])
            new[name] = (mix @ w[name].view(2, 16, -1)).view(w[name].shape)
    weak = torch.randperm(96, generator=generator)[:24]
    new["up"] = w["up"].clone()
    new["up"][weak] *= 0.1
    return new


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    model = open_huggingface(write_model(tmp_path_factory.mktemp(request.param), **KINDS[request.param]))
    return dataclasses.replace(model, layers=[concentrated(w, i) for i, w in enumerate(model.layers)])


def run(model: Model, dimensions: Dimensions, memory_budget: int = 10**9) -> Reduction:
    return reduce(model, CALIBRATION, dimensions, CPU, memory_budget)


def logits(model: Model, ids: Tensor = HELD_OUT) -> Tensor:
    return output_logits(model, hidden_states(model, ids, CPU), CPU)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def cut(model: Model, dimensions: Dimensions) -> Model:
    """What reduction must beat: evenly spaced pairs, first value dimensions, first units, nothing fitted."""
    config, kept = reduced_config(model.config, dimensions)
    pairs = kept + [model.config.head_dim // 2 + i for i in kept]
    values = list(range(config.v_head_dim))
    layers = []
    for w in model.layers:
        new = dict(w)
        for role, heads, rows in (("q", 4, pairs), ("k", 2, pairs), ("v", 2, values)):
            for name in (role, f"{role}_bias"):
                if name in w:
                    new[name] = w[name].view(heads, 16, *w[name].shape[1:])[:, rows].flatten(0, 1)
                    if role == "q":
                        new[name] = new[name] * (config.head_dim / 16) ** 0.5
        new["o"] = w["o"].view(64, 4, 16)[:, :, values].flatten(1)
        for name in ("gate", "up", "gate_bias", "up_bias"):
            if name in w:
                new[name] = w[name][: config.intermediate_size]
        new["down"] = w["down"][:, : config.intermediate_size]
        layers.append(new)
    return dataclasses.replace(model, config=config, layers=layers)


def check_shapes(model: Model, original: Model) -> None:
    """Every role that the original has, in the size that the new dimensions ask for, finite, float32, contiguous."""
    for layer, before in zip(model.layers, original.layers, strict=True):
        assert layer.keys() == before.keys()
        for role in model.family.layer:
            if role.name in layer:
                weight = layer[role.name]
                assert weight.shape == role.expected_shape(model.config), role.name
                assert weight.dtype == torch.float32 and weight.is_contiguous() and weight.isfinite().all(), role.name


def test_the_same_dimensions_change_nothing(model: Model) -> None:
    """The refits' targets are then the weights' own outputs, and unit balancing is exact."""
    reduction = run(model, Dimensions.of(model.config))
    assert reduction.model.config == model.config
    assert reduction.losses == [LayerLosses()] * 2
    assert distance(logits(reduction.model), logits(model)) < 1e-5
    for layer, before in zip(reduction.model.layers, model.layers, strict=True):
        assert all(torch.equal(layer[role], before[role]) for role in ("q", "k", "v", "gate"))
        assert distance(layer["o"], before["o"]) < 1e-4
        norms = layer["down"].norm(dim=0)
        torch.testing.assert_close(norms, norms.mean().expand_as(norms))


@pytest.mark.parametrize("what", QUARTER)
def test_a_quarter_less_fits_its_shapes_and_beats_cutting(model: Model, what: str) -> None:
    """Each component alone and all together, judged on tokens not calibrated on."""
    before = [{role: weight.clone() for role, weight in layer.items()} for layer in model.layers]
    reduction = run(model, QUARTER[what])
    for layer, copy in zip(model.layers, before, strict=True):
        assert all(torch.equal(layer[role], copy[role]) for role in copy), "the original must stay as it is"
    check_shapes(reduction.model, model)
    assert dataclasses.astuple(QUARTER[what]) == (
        reduction.model.config.head_dim,
        reduction.model.config.v_head_dim,
        reduction.model.config.intermediate_size,
    )
    kept = reduction.frequencies_kept
    assert reduction.model.config.frequencies == tuple(model.config.frequencies[i] for i in kept)
    assert len(kept) == (6 if what in ("qk", "all") else 8)
    for loss in reduction.losses:
        for name, value in vars(loss).items():
            assert 0 < value < 0.3 if what in (name, "all") else value == 0
    expected = logits(model)
    assert distance(logits(reduction.model), expected) < BETTER[what] * distance(
        logits(cut(model, QUARTER[what])), expected
    )


def spare(model: Model) -> Model:
    """The model with a quarter of every inner dimension of no effect: silent pairs, flat values, dead units."""
    _, kept = reduced_config(model.config, QUARTER["all"])
    dropped = [i for i in range(8) if i not in kept]
    pairs = dropped + [8 + i for i in dropped]
    generator = torch.Generator().manual_seed(7)
    layers = []
    for w in model.layers:
        new = {role: weight.clone() for role, weight in w.items()}
        basis = torch.linalg.qr(torch.randn(2, 16, 12, generator=generator)).Q
        units = torch.randperm(96, generator=generator)[:24]
        for suffix in ("", "_bias"):
            if f"q{suffix}" in w:
                new[f"q{suffix}"].view(4, 16, -1)[:, pairs] = 0
                flat = basis @ (basis.mT @ w[f"v{suffix}"].view(2, 16, -1))
                new[f"v{suffix}"] = flat.view(w[f"v{suffix}"].shape)
            if f"up{suffix}" in w:
                new[f"up{suffix}"][units] = 0
        layers.append(new)
    return dataclasses.replace(model, layers=layers)


@pytest.mark.parametrize("what", QUARTER)
def test_dimensions_without_effect_are_removed_without_loss(model: Model, what: str) -> None:
    """Mixing, the changed score scale, biases and both refits: any mistake in one of them would show here."""
    original = spare(model)
    reduction = run(original, QUARTER[what])
    check_shapes(reduction.model, original)
    # The MLP's relative ridge of 1e-4 is what remains.
    assert distance(logits(reduction.model), logits(original)) < (1e-4 if what in ("qk", "ov") else 3e-3)
    assert max(max(vars(loss).values()) for loss in reduction.losses) < 1e-5


def test_mixing_into_all_frequencies_gives_the_old_attention(model: Model) -> None:
    """With nothing dropped the complex mixes, biases included, must reproduce every score."""
    w, config = dict(model.layers[0]), model.config
    rope = Rope(config.frequencies, 64, CPU)
    x = rms_norm(embedding(CALIBRATION, model.embed), w["attn_norm"], config.rms_norm_eps)
    statistics = AttentionStatistics(config, 64, rope, CPU)
    before = forward.attention(config, w, x, rope, statistics, None)
    assert reducing._apply_qk(config, w, statistics, list(range(8))) < 1e-9
    assert not torch.equal(w["q"], model.layers[0]["q"])
    assert distance(forward.attention(config, w, x, rope, None, None), before) < 1e-4


def test_spilling_to_disk_changes_nothing(model: Model) -> None:
    kept, spilled = (run(model, QUARTER["all"], budget) for budget in (10**9, 0))
    assert kept.losses == spilled.losses
    for one, other in zip(kept.model.layers, spilled.model.layers, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[role], other[role]) for role in one)


def test_batches_change_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(model, QUARTER["all"])
    monkeypatch.setattr(forward, "BATCH_BYTES", 3 * 4 * 64 * (3 * 96 + 4 * 64))
    parts = run(model, QUARTER["all"])
    assert distance(logits(parts.model), logits(whole.model)) < 1e-4
    for one, other in zip(whole.losses, parts.losses, strict=True):
        assert vars(one) == pytest.approx(vars(other), rel=1e-3)


def test_streams_are_those_of_the_two_models(model: Model) -> None:
    """After the last layer, one stream holds what the original computes and the other what the reduced model does."""
    config, kept = reduced_config(model.config, QUARTER["all"])
    x = embedding(CALIBRATION, model.embed)
    reference = Stream(model.config, x.clone(), Rope(model.config.frequencies, 64, CPU), CPU)
    reduced = Stream(config, x.clone(), Rope(config.frequencies, 64, CPU), CPU)
    layers = [reduce_layer(dict(w), reference, reduced, kept)[0] for w in model.layers]
    for stream, runs in ((reference, model), (reduced, dataclasses.replace(model, config=config, layers=layers))):
        final = rms_norm(stream.x, model.final_norm, config.rms_norm_eps)
        torch.testing.assert_close(final, hidden_states(runs, CALIBRATION, CPU), rtol=1e-4, atol=1e-4)


def test_moments_are_measured_on_the_reduced_stream(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second layer is solved for what the original layer makes of the first reduced layer's output."""
    moments: list[Tensor] = []

    def spy(o_moment: Tensor, w_o: Tensor, groups: int, r: int) -> OVSolution:
        moments.append(o_moment)
        return solve_ov(o_moment, w_o, groups, r)

    monkeypatch.setattr(reducing, "solve_ov", spy)
    reduced = run(model, QUARTER["all"]).model

    def second(first: Layer, config: ModelConfig) -> Tensor:
        x = embedding(CALIBRATION, model.embed)
        x = forward.block(config, first, x, Rope(config.frequencies, 64, CPU))
        rope = Rope(model.config.frequencies, 64, CPU)
        statistics = AttentionStatistics(model.config, 64, rope, CPU)
        forward.block(model.config, model.layers[1], x, rope, lambda n, y: None if n == "m" else statistics(n, y))
        return statistics.o.mean()

    torch.testing.assert_close(moments[1], second(reduced.layers[0], reduced.config), rtol=1e-3, atol=1e-4)
    assert distance(moments[1], second(model.layers[0], model.config)) > 1e-2


def test_refit_and_correction_bring_the_calibration_text_closer(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two steps past A3 lowers the error where it is fitted."""
    expected = logits(model, CALIBRATION)

    def error() -> float:
        return distance(logits(run(model, QUARTER["all"]).model, CALIBRATION), expected)

    both = error()
    monkeypatch.setattr(reducing, "CORRECTION", 0.0)
    local = error()
    monkeypatch.setattr(reducing, "REFIT_RIDGE", 1e9)
    plain = error()
    assert both < 0.98 * local
    assert local < 0.995 * plain


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


@pytest.mark.parametrize("which", DEAD)
def test_dead_weights_stay_finite_and_harmless(model: Model, which: str) -> None:
    """A layer with dead parts reduces to finite weights, no worse than the whole layer does."""
    first, second = model.layers
    broken = dataclasses.replace(
        model, layers=[silence(first, *DEAD[which]["roles"], rows=DEAD[which].get("rows", slice(None))), second]
    )
    reduction = run(broken, QUARTER["all"])
    check_shapes(reduction.model, broken)
    assert max(weight.abs().max() for layer in reduction.model.layers for weight in layer.values()) < 1e3
    error = distance(logits(reduction.model), logits(broken))
    assert error < 0.7


def test_fewer_tokens_than_units_is_finite(model: Model) -> None:
    """Singular moments: 12 tokens for 96 units and 64 attended dimensions."""
    reduction = reduce(model, CALIBRATION[:1, :12], QUARTER["all"], CPU, 10**9)
    check_shapes(reduction.model, model)
    assert max(weight.abs().max() for layer in reduction.model.layers for weight in layer.values()) < 1e2


def test_progress_is_reported_once_a_layer(model: Model) -> None:
    calls: list[int] = []
    reduce(model, CALIBRATION[:2], QUARTER["all"], CPU, 10**9, lambda: calls.append(1))
    assert len(calls) == 2

"""Sensitivities against reducing one component of one layer by hand and running the whole model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from a3q import batching, perplexity, sensitivity
from a3q.components import Method, reduce_mlp, reduce_ov, reduce_qk, spread_norms
from a3q.families import Component
from a3q.forward import attention, block, embed, hidden_states, mlp, norm, output_logits
from a3q.model import Layer, Model
from a3q.perplexity import kl_divergence
from a3q.sensitivity import Sensitivity, Sizes, measure
from a3q.statistics import AttentionStatistics, Moment
from converters.hf_reader import open_huggingface
from tests.pico import KINDS, VOCAB, Kind, write_model

CPU = torch.device("cpu")
METHODS = {
    "a3q-own": Method("a3q", "per_head"),
    "a3q-shared": Method("a3q", "shared"),
    "paper-own": Method("paper", "per_head"),
}
ALL_METHODS = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def tokens(count: int, length: int, seed: int) -> Tensor:
    return torch.randint(VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


TOKENS, PROBES = tokens(8, 40, 0), tokens(3, 33, 1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Three layers each."""
    root = tmp_path_factory.mktemp("sensitivity")
    return {kind: open_huggingface(write_model(root / kind, kind, num_hidden_layers=3)) for kind in KINDS}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, models: dict[str, Model]) -> Model:
    return models[request.param]


def sizes_of(model: Model) -> list[Sizes]:
    units = model.config.layers[0].intermediate_size
    return [{"QK": (4, 8, 12, 16), "OV": (4, 8, 12, 16), "MLP": (units // 2, 3 * units // 4, units)} for _ in range(3)]


def alone(model: Model, i: int, component: Component, size: int, method: Method) -> tuple[Model, float]:
    """The model with one component of layer `i` reduced, calibrated on the original's activations; and the loss."""
    config, x = model.config, embed(model, TOKENS)
    for shape, w in zip(config.layers[:i], model.layers, strict=False):
        x = block(config, shape, w, x)
    shape, new = config.layers[i], dict(model.layers[i])
    statistics = AttentionStatistics(config, shape, TOKENS.shape[1], CPU)
    y = attention(config, shape, new, norm(config, new, "attn_norm", x), statistics)
    statistics.take_in()
    y = x + norm(config, new, "attn_post_norm", y)
    moment = Moment(shape.intermediate_size, shape.intermediate_size, device=CPU)
    inner = norm(config, new, "mlp_norm", x if config.parallel_residual else y)
    mlp(config, new, inner, lambda _, m: moment.add(m.flatten(0, 1)))
    layers: list[Layer] = [dict(w) for w in model.layers]
    if component == "QK":
        frequencies, loss = reduce_qk(config, shape, new, statistics, size, method)
        shape = dataclasses.replace(shape, qk_head_dim=size, frequencies=frequencies)
        for layer in layers:
            spread_norms(config, layer)
        config = dataclasses.replace(config, qk_norm="heads" if config.qk_norm == "head" else config.qk_norm)
    elif component == "OV":
        loss = reduce_ov(config, new, statistics, size, method)
        shape = dataclasses.replace(shape, v_head_dim=size)
    else:
        _, loss = reduce_mlp(new, moment.mean(), size, method)
        shape = dataclasses.replace(shape, intermediate_size=size)
    layers[i] = new
    shapes = (*config.layers[:i], shape, *config.layers[i + 1 :])
    return dataclasses.replace(model, config=dataclasses.replace(config, layers=shapes), layers=layers), loss


def divergence(model: Model, other: Model) -> float:
    """Mean KL over the second half of the probes."""
    half = PROBES.shape[1] // 2
    p, q = (
        output_logits(m, hidden_states(m, PROBES, CPU)[:, half:], CPU).double().log_softmax(-1) for m in (model, other)
    )
    return float(kl_divergence(p, q).mean())


@ALL_METHODS
def test_equals_reducing_each_component_by_hand(model: Model, method: Method) -> None:
    calls: list[int] = []
    sizes = sizes_of(model)
    found = measure(model, TOKENS, PROBES, sizes, 0.25, CPU, method, lambda: calls.append(1))
    assert len(calls) == len(found) == 3
    for i, layer in enumerate(found):
        assert list(layer) == ["QK", "OV", "MLP"]
        for component, one in layer.items():
            assert one.sizes == tuple(sizes[i][component])
            assert one.probed == one.sizes[-2]
            reduced, _ = alone(model, i, component, one.probed, method)
            assert one.kl == pytest.approx(divergence(model, reduced), rel=2e-3, abs=1e-6), (i, component)
            assert one.kl > 1e-4


@ALL_METHODS
def test_losses_are_those_of_the_solvers(model: Model, method: Method) -> None:
    """At each size the loss of the method's own step, and none at the last."""
    found = measure(model, TOKENS, PROBES[:1, :4], sizes_of(model), 0.25, CPU, method)
    for i, layer in enumerate(found):
        for component, one in layer.items():
            by_hand = [alone(model, i, component, size, method)[1] for size in one.sizes[:-1]]
            # The MLP's come from one factorization with one ridge for all sizes.
            close = {"rel": 0.02, "abs": 1e-4} if component == "MLP" else {"rel": 1e-3, "abs": 1e-9}
            assert one.losses[:-1] == pytest.approx(by_hand, **close)
            assert one.losses[-1] == pytest.approx(0, abs=1e-12)
            assert 0 < one.losses[0] < 1
        monotone: tuple[Component, ...] = ("OV", "MLP") if method.fitted else ("MLP",)
        for component in monotone:
            losses = layer[component].losses
            assert list(losses) == sorted(losses, reverse=True)


def test_only_what_is_asked_at_the_nearest_size(models: dict[str, Model]) -> None:
    """Layers may be asked for different components, in any order, and nothing; a lone size is probed as it is."""
    model, method = models["llama"], METHODS["a3q-own"]
    sizes: list[Sizes] = [{"MLP": (24, 48, 96), "QK": (16,)}, {}, {"OV": (2, 6, 10, 16)}]
    found = measure(model, TOKENS, PROBES, sizes, 0.6, CPU, method)
    assert [list(layer) for layer in found] == [["MLP", "QK"], [], ["OV"]]
    assert found[0]["MLP"].probed == 48
    assert found[2]["OV"].probed == 6
    whole = found[0]["QK"]
    assert (whole.probed, whole.losses) == (16, (0.0,))
    assert whole.kl < 1e-9
    for i, component in ((0, "MLP"), (2, "OV")):
        one = found[i][component]
        reduced, _ = alone(model, i, component, one.probed, method)
        assert one.kl == pytest.approx(divergence(model, reduced), rel=2e-3)
    assert measure(model, TOKENS, PROBES, [{}, {}, {}], 0.5, CPU, method) == [{}, {}, {}]


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gemma3", "mpt"])
def test_pieces_change_nothing(models: dict[str, Model], kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of a sequence, and logits of a few positions at a time; the model and the tokens stay as they are."""
    model, method = models[kind], METHODS["a3q-own"]
    before = [{role: weight.clone() for role, weight in layer.items()} for layer in model.layers]
    whole = measure(model, TOKENS, PROBES, sizes_of(model), 0.25, CPU, method)
    monkeypatch.setattr(batching, "BATCH_BYTES", 1)
    monkeypatch.setattr(perplexity, "_ROWS", 7)
    parts = measure(model, TOKENS, PROBES, sizes_of(model), 0.25, CPU, method)
    for one, other in zip(whole, parts, strict=True):
        for component in one:
            assert other[component].kl == pytest.approx(one[component].kl, rel=1e-2)
            assert other[component].losses == pytest.approx(one[component].losses, rel=1e-2, abs=1e-6)
    for layer, copy in zip(model.layers, before, strict=True):
        assert all(torch.equal(layer[role], copy[role]) for role in copy)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_outside_the_layers_stay_in_their_type(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but what the logits need, which is as good as if it had been float32 before."""
    model = open_huggingface(write_model(tmp_path / "m", "llama", tied=tied))
    half = {role: weight.half() if weight.dim() == 2 else weight for role, weight in model.top.items()}
    exact = {role: weight.float() for role, weight in half.items()}
    heads: list[Model] = []

    def spy(head: Model, hidden: Tensor, device: torch.device) -> Tensor:
        heads.append(head)
        return output_logits(head, hidden, device)

    monkeypatch.setattr(sensitivity, "output_logits", spy)
    sizes = sizes_of(model)[:2]
    kept, turned = (
        measure(dataclasses.replace(model, top=top), TOKENS, PROBES, sizes, 0.25, CPU, METHODS["a3q-own"])
        for top in (half, exact)
    )
    assert kept == turned
    assert heads[0].output.dtype == torch.float32
    assert tied or heads[0].embed is half["embed"]


def test_a_curve_goes_through_the_probed_divergence() -> None:
    one = Sensitivity((8, 12, 16), (0.4, 0.1, 0.0), 12, 0.05)
    curve = one.curve(7)
    assert (curve.sizes, curve.unit_cost) == ((8, 12, 16), 7)
    assert curve.losses == pytest.approx((0.2, 0.05, 0.0))
    # A component that loses nothing costs nothing at any size.
    assert dataclasses.replace(one, losses=(0.0, 0.0, 0.0)).curve(1).losses == (0.0, 0.0, 0.0)
    assert dataclasses.replace(one, losses=(0.0,), sizes=(16,), probed=16, kl=0.0).curve(1).losses == (0.0,)


def test_a_component_without_effect_has_no_sensitivity(tmp_path: Path) -> None:
    """Dead queries, values and units: no divergence, and no NaN."""
    options: dict[str, Any] = {"num_hidden_layers": 2}
    model = open_huggingface(write_model(tmp_path / "m", "llama", **options))
    dead = dict(model.layers[0])
    for role in ("q", "v", "up"):
        dead[role] = torch.zeros_like(dead[role])
    model = dataclasses.replace(model, layers=[dead, model.layers[1]])
    found = measure(model, TOKENS, PROBES, sizes_of(model)[:2], 0.25, CPU, METHODS["a3q-own"])
    for one in found[0].values():
        assert one.kl < 1e-9
        assert all(0 <= loss <= 1 for loss in one.losses)
        assert all(loss < 1e-6 for loss in one.curve(1).losses)
    assert all(one.kl > 1e-4 for one in found[1].values())

"""What noise costs, against disturbing a matrix by hand and running the whole model; what grids make; and the cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from a3q import cache, noise, perplexity
from a3q.forward import hidden_states, output_logits
from a3q.model import Layer, Model
from a3q.noise import NOISE, Costs, disturb, matrices_of, measure, rounding_error
from a3q.perplexity import kl_divergence
from a3q.solve.gptq import quantize
from a3q.solve.grid import GRIDS, Grid
from converters.hf_reader import open_huggingface
from tests.pico import VOCAB, Kind, write_model

CPU = torch.device("cpu")
PROBES = torch.randint(VOCAB, (3, 33), generator=torch.Generator().manual_seed(1))
CASES: tuple[tuple[Kind, bool], ...] = (("llama", False), ("llama", True), ("gemma3", True), ("gpt2", True))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{'tied' if case[1] else 'untied'}")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    kind, tied = request.param
    return open_huggingface(write_model(tmp_path_factory.mktemp("noise") / kind, kind, tied=tied))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_huggingface(write_model(tmp_path_factory.mktemp("noise") / "llama"))


def by_hand(model: Model, layers: Mapping[int, Layer], top: Layer, probes: Tensor = PROBES) -> float:
    """Mean KL over the second half of the probes with some weights replaced, per unit of noise."""
    changed = replace(
        model, layers=[{**w, **layers.get(i, {})} for i, w in enumerate(model.layers)], top={**model.top, **top}
    )
    half = probes.shape[1] // 2
    p, q = (
        output_logits(m, hidden_states(m, probes, CPU)[:, half:], CPU).double().log_softmax(-1)
        for m in (model, changed)
    )
    return float(kl_divergence(p, q).mean()) / NOISE


def by_hand_in_draws(model: Model, role: str) -> float:
    """The mean of several draws, as embedding and output have it."""
    drawn = [disturb(model.top[role], NOISE, noise._draw(0, draw)) for draw in range(noise._DRAWS)]
    return sum(by_hand(model, {}, {role: one}) for one in drawn) / len(drawn)


def test_equals_disturbing_each_matrix_by_hand(model: Model) -> None:
    tied = model.config.tie_word_embeddings
    calls: list[int] = []
    costs = measure(model, PROBES, CPU, tied, lambda: calls.append(1))
    assert len(calls) == len(costs.layers) == model.config.num_hidden_layers
    generator = noise._draw(0, noise._DRAWS)
    for i, layer in enumerate(costs.layers):
        assert list(layer) == matrices_of(model)
        assert set(layer) == {role for role, weight in model.layers[i].items() if weight.dim() == 2}
        for role, cost in layer.items():
            # Each sequence with noise of its own.
            drawn = [disturb(model.layers[i][role], NOISE, generator) for _ in PROBES]
            kls = [by_hand(model, {i: {role: w}}, {}, one[None]) for one, w in zip(PROBES, drawn, strict=True)]
            assert cost == pytest.approx(sum(kls) / len(kls), rel=5e-3), (i, role)
            assert cost > 0.01
    # An output that is tied follows the embedding.
    assert costs.top["embed"] == pytest.approx(by_hand_in_draws(model, "embed"), rel=5e-3)
    if not tied:
        assert costs.top["output"] == pytest.approx(by_hand_in_draws(model, "output"), rel=5e-3)
    assert list(costs.top) == (["embed"] if tied else ["embed", "output"])


def test_a_tied_matrix_that_the_file_stores_twice(tmp_path: Path) -> None:
    """Then each use has a cost of its own."""
    model = open_huggingface(write_model(tmp_path / "llama", tied=True))
    apart, together = (measure(model, PROBES, CPU, tied).top for tied in (False, True))
    alone = {**model.top, "output": model.embed}
    assert apart["embed"] == pytest.approx(by_hand_in_draws(replace(model, top=alone), "embed"), rel=5e-3)
    assert apart["output"] == pytest.approx(by_hand_in_draws(replace(model, top=alone), "output"), rel=5e-3)
    assert set(apart) == {"embed", "output"}
    assert together["embed"] > apart["embed"]


def test_the_same_again_in_pieces_and_with_another_seed(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure(llama, PROBES, CPU, False)
    assert measure(llama, PROBES, CPU, False) == first
    assert measure(llama, PROBES, CPU, False, seed=1) != first
    monkeypatch.setattr(perplexity, "_ROWS", 7)
    pieces = measure(llama, PROBES, CPU, False)
    assert [list(one.values()) for one in pieces.layers] == [
        pytest.approx(list(one.values()), rel=1e-3) for one in first.layers
    ]


def test_cost_hardly_depends_on_the_noise(llama: Model) -> None:
    one, two = (measure(llama, PROBES, CPU, False, noise=size) for size in (0.001, 0.004))
    for a, b in zip(one.layers, two.layers, strict=True):
        assert a == pytest.approx(b, rel=0.1)


def test_noise_has_its_size() -> None:
    weight = torch.randn(40, 512, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 40)[:, None]
    left = disturb(weight, 0.01, torch.Generator().manual_seed(0)) - weight
    assert float(left.square().sum() / weight.square().sum()) == pytest.approx(0.01, rel=1e-4)
    rows = left.square().sum(1) / weight.square().sum(1)
    assert rows.tolist() == pytest.approx([0.01] * 40, rel=0.3)


def test_roles_of_one_tensor_add_up() -> None:
    costs = Costs(({"q": 1.0, "k": 2.0, "v": 4.0},), {"embed": 8.0})
    assert costs.of(0, ["q", "v"]) == 5.0
    assert costs.of(None, ["embed"]) == 8.0


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_rounding_error_is_that_of_rounded_weights(grid: Grid) -> None:
    """With inputs alike and independent, GPTQ rounds to the nearest too."""
    weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    rounded = quantize(weight, torch.eye(512), grid, passes=0).weight
    error = float((weight - rounded).square().sum() / weight.square().sum())
    # Sub-blocks of a super-block are chosen anew there, for the scales as they came out.
    assert rounding_error(weight, grid) == pytest.approx(error, rel=0.1)
    assert rounding_error(rounded, grid) < 0.6 * error


def test_rounding_error_of_nothing_is_none() -> None:
    assert rounding_error(torch.zeros(2, 32), GRIDS["q4_0"]) == 0.0


@pytest.fixture
def kept(llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Costs]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = cache.costs_file(["aa"], llama.config, PROBES, False)
    layer = {role: 0.1 + i for i, role in enumerate(matrices_of(llama))}
    costs = Costs((layer, layer), {"embed": 1 / 3, "output": 0.0})
    assert cache.load_costs(path, llama, False) is None
    cache.save_costs(path, costs)
    return path, costs


def test_what_is_kept_comes_back(llama: Model, kept: tuple[Path, Costs]) -> None:
    path, costs = kept
    assert cache.load_costs(path, llama, False) == costs
    assert cache.load_costs(path, llama, True) is None


def test_every_difference_is_another_file(llama: Model, kept: tuple[Path, Costs]) -> None:
    path, config = kept[0], replace(llama.config, rope_theta=5e5)
    others = [
        cache.costs_file(["bb"], llama.config, PROBES, False),
        cache.costs_file(["aa"], config, PROBES, False),
        cache.costs_file(["aa"], llama.config, PROBES + 1, False),
        cache.costs_file(["aa"], llama.config, PROBES, True),
    ]
    assert len({path, *others}) == 5
    assert cache.costs_file(["aa"], llama.config, PROBES, False) == path


BROKEN: dict[str, Any] = {
    "a list": [],
    "nothing": {},
    "no layers": {"layers": [], "top": {"embed": 1.0, "output": 1.0}},
    "layers of numbers": {"layers": [1, 2], "top": {"embed": 1.0, "output": 1.0}},
    "a role less": {"layers": [{"q": 1.0}] * 2, "top": {"embed": 1.0, "output": 1.0}},
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_what_is_not_whole_is_nothing(llama: Model, kept: tuple[Path, Costs], content: Any) -> None:
    kept[0].write_text(json.dumps(content))
    assert cache.load_costs(kept[0], llama, False) is None


@pytest.mark.parametrize("number", ["NaN", "-1.0", '"x"', "null"])
def test_what_is_no_cost_is_nothing(llama: Model, kept: tuple[Path, Costs], number: str) -> None:
    path = kept[0]
    path.write_text(path.read_text().replace("0.1,", f"{number},", 1))
    assert cache.load_costs(path, llama, False) is None

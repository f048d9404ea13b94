"""Rounding layers for a file's grids, alone and in the course of a reduction."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from a3q import quantize as quantizing
from a3q.components import Method
from a3q.errors import InputError
from a3q.forward import block, embed, hidden_states, norm, output_logits
from a3q.model import Layer, Model
from a3q.perplexity import kl_divergence
from a3q.quantize import Encoder, LayerRounding, Quantization
from a3q.reduce import Reduction, reduce
from a3q.reduce_layer import Dimensions
from a3q.solve.gptq import nearest
from a3q.solve.grid import GRIDS, Blocks, Grid
from converters import ggml_encode
from converters.hf_reader import open_huggingface
from converters.nearest import nearest as by_ggml
from tests.pico import VOCAB, write_model

CPU = torch.device("cpu")
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
Q4_0, Q8_0 = GRIDS["q4_0"], GRIDS["q8_0"]
ALL_Q4_0 = [dict.fromkeys(ROLES, Q4_0)] * 2


def layer() -> tuple[Layer, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    w = {role: torch.randn(rows, 64, generator=generator) for role, rows in (("q", 48), ("k", 32), ("v", 32))}
    return w, x.T @ x / 300


def rounding(grids: dict[str, Grid], encoder: Encoder | None = None) -> LayerRounding:
    return LayerRounding(grids, encoder, "model: layer 3")


def test_each_role_has_its_grid_and_others_stay() -> None:
    w, gram = layer()
    before = dict(w)
    done = rounding({"q": Q4_0, "v": Q8_0, "down": Q4_0})
    done.apply(w, ("q", "k", "v"), gram)
    assert w["k"] is before["k"] and done.blocks.keys() == {"q", "v"} == done.losses.keys()
    assert {role: blocks.grid for role, blocks in done.blocks.items()} == {"q": Q4_0, "v": Q8_0}
    for role, blocks in done.blocks.items():
        assert torch.equal(w[role], blocks.dequantize()) and w[role].shape == before[role].shape
        left, energy = w[role] - before[role], float((before[role] @ gram * before[role]).sum())
        assert float((left @ gram * left).sum()) / energy == pytest.approx(done.losses[role], rel=1e-2)
    assert 1e-6 < done.losses["v"] < 0.1 * done.losses["q"] < 1e-2


def test_roles_on_one_grid_are_split_again() -> None:
    w, gram = layer()
    alone = {role: weight.clone() for role, weight in w.items()}
    together, single = rounding(dict.fromkeys("qkv", Q4_0)), rounding(dict.fromkeys("qkv", Q4_0))
    together.apply(w, ("q", "k", "v"), gram)
    for role in ("q", "k", "v"):
        single.apply(alone, (role,), gram)
        assert float((single.blocks[role].codes == together.blocks[role].codes).double().mean()) > 0.99
        assert torch.equal(w[role], together.blocks[role].dequantize())


@pytest.mark.parametrize("encoder", [None, nearest], ids=["gptq", "nearest"])
def test_many_rows_are_rounded_in_parts(encoder: Encoder | None, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole, gram), (parts, _) = layer(), layer()
    rounding(dict.fromkeys("qk", Q4_0), encoder).apply(whole, ("q", "k"), gram)
    monkeypatch.setattr(quantizing, "_ROWS", 7)
    done = rounding(dict.fromkeys("qk", Q4_0), encoder)
    done.apply(parts, ("q", "k"), gram)
    for role in ("q", "k"):
        assert torch.equal(parts[role], done.blocks[role].dequantize())
        assert float((parts[role] == whole[role]).double().mean()) > 0.99


@pytest.mark.parametrize("encoder", [None, nearest], ids=["gptq", "nearest"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 65600.0, -7e4])
def test_weights_that_cannot_be_rounded_are_named(bad: float, encoder: Encoder | None) -> None:
    w, gram = layer()
    w["k"][3, 5] = bad
    with pytest.raises(InputError, match=r"model: layer 3, k: .*(no numbers|too large)"):
        rounding({"k": Q4_0, "q": Q8_0}, encoder).apply(w, ("q", "k"), gram)


@pytest.mark.parametrize("name", GRIDS)
def test_the_largest_weights_that_are_taken_stay_finite(name: str) -> None:
    w = {"q": torch.randn(8, 256).sign() * 65504}
    rounding({"q": GRIDS[name]}).apply(w, ("q",), torch.eye(256))
    assert w["q"].isfinite().all()


def test_inputs_that_are_no_numbers_are_named() -> None:
    w, gram = layer()
    gram[0, 1] = float("nan")
    with pytest.raises(InputError, match=r"model: layer 3, q: its inputs"):
        rounding({"q": Q4_0}).apply(w, ("q",), gram)


TEXT = torch.randint(VOCAB, (16, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_huggingface(write_model(tmp_path_factory.mktemp("m"), tied=request.param))


def run(
    model: Model, quantization: Quantization, dimensions: Dimensions | None = None, budget: int = 10**9
) -> Reduction:
    sizes = [dimensions or Dimensions.of(shape) for shape in model.config.layers]
    return reduce(model, TEXT, sizes, CPU, budget, Method(), quantization=quantization)


def divergence(model: Model, other: Model) -> float:
    one, two = (output_logits(m, hidden_states(m, TEXT, CPU), CPU).log_softmax(-1) for m in (model, other))
    return float(kl_divergence(one, two).mean())


def rounded_plainly(model: Model) -> Model:
    """Every weight of the layers to its nearest value."""
    layers = [dict(w) for w in model.layers]
    for w in layers:
        w |= {role: nearest(w[role], Q4_0, torch.ones(w[role].shape[1])).dequantize() for role in ROLES}
    return dataclasses.replace(model, layers=layers)


def check_on_grid(reduction: Reduction, quantization: Quantization) -> None:
    for i, grids in enumerate(quantization.layers):
        w = reduction.model.layers[i]
        assert reduction.rounding_losses[i].keys() == grids.keys()
        for role in w:
            blocks = reduction.blocks(i, role)
            assert (blocks is not None) is (role in grids)
            if blocks is not None:
                assert blocks.grid is grids[role] and torch.equal(blocks.dequantize(), w[role])
                assert 0 < reduction.rounding_losses[i][role] < 0.05


def test_a_rounded_model_is_on_its_grids_and_closer_than_plain_rounding(model: Model) -> None:
    quantization = Quantization(ALL_Q4_0)
    reduction = run(model, quantization)
    check_on_grid(reduction, quantization)
    assert not reduction.top and reduction.blocks(None, "embed") is None
    found, plain = divergence(model, reduction.model), divergence(model, rounded_plainly(model))
    assert found < 0.6 * plain


def test_some_roles_reduced_and_on_disk(model: Model) -> None:
    """Fewer units and values, different grids, and nothing in memory."""
    quantization = Quantization([{"q": Q4_0, "down": GRIDS["iq4_nl"]}, {"o": Q8_0, "up": GRIDS["q5_1"], "gate": Q4_0}])
    kept, spilled = (run(model, quantization, Dimensions(16, 8, 64), budget) for budget in (10**9, 0))
    check_on_grid(kept, quantization)
    check_on_grid(spilled, quantization)
    for one, other in zip(kept.model.layers, spilled.model.layers, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[role], other[role]) for role in one)


def test_each_layer_is_rounded_for_what_the_rounded_ones_before_it_put_out(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    grams: list[Tensor] = []
    apply = LayerRounding.apply

    def spy(self: LayerRounding, w: Layer, roles: tuple[str, ...], gram: Tensor) -> None:
        if "q" in roles:
            grams.append(gram.clone())
        apply(self, w, roles, gram)

    monkeypatch.setattr(LayerRounding, "apply", spy)
    both = run(model, Quantization([dict.fromkeys(ROLES, GRIDS["q4_1"]), {"q": Q4_0}]))
    second = run(model, Quantization([{}, {"q": Q4_0}]))
    # The first layer that stays is not looked at.
    assert len(grams) == 3
    x = block(model.config, both.model.config.layers[0], both.model.layers[0], embed(model, TEXT))
    rows = norm(model.config, model.layers[1], "attn_norm", x).flatten(0, 1)
    expected = rows.T @ rows / len(rows)
    torch.testing.assert_close(grams[1], expected, rtol=1e-3, atol=1e-4)
    assert float((grams[2] - expected).norm() / expected.norm()) > 1e-3
    blocks = [reduction.blocks(1, "q") for reduction in (both, second)]
    assert blocks[0] is not None and blocks[1] is not None
    assert not torch.equal(blocks[0].codes, blocks[1].codes)


def test_embedding_and_output_are_rounded_too(model: Model) -> None:
    tied = model.config.tie_word_embeddings
    top = {"embed": Q8_0} if tied else {"embed": Q8_0, "output": Q4_0}
    reduction = run(model, Quantization(ALL_Q4_0, top))
    assert reduction.top.keys() == top.keys() == {role for role in top if role in reduction.model.top}
    for role, grid in top.items():
        blocks = reduction.blocks(None, role)
        assert blocks is not None and blocks.grid is grid
        assert torch.equal(blocks.dequantize(), reduction.model.top[role])
        left = reduction.model.top[role] - model.top[role]
        assert 0 < float(left.norm() / model.top[role].norm()) < (0.02 if grid is Q8_0 else 0.15)
    assert torch.equal(reduction.model.top["final_norm"], model.top["final_norm"])
    assert divergence(model, reduction.model) < 1.5 * divergence(model, rounded_plainly(model))


def test_layers_make_up_for_a_rounded_embedding(model: Model) -> None:
    """Untied, they read what is left of it; tied, it is rounded last."""
    with_it, without = (run(model, Quantization([{"q": Q4_0}] * 2, top)) for top in ({"embed": GRIDS["q4_0"]}, {}))
    blocks = [reduction.blocks(0, "q") for reduction in (with_it, without)]
    assert blocks[0] is not None and blocks[1] is not None
    assert torch.equal(blocks[0].codes, blocks[1].codes) is model.config.tie_word_embeddings


@pytest.mark.skipif(not ggml_encode.available(), reason="llama.cpp is not installed")
def test_to_the_nearest_by_ggml(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its encoder gets weights and importances, and what it gives is kept."""
    seen: list[tuple[Tensor, Tensor, Blocks]] = []

    def encoder(weight: Tensor, grid: Grid, importance: Tensor) -> Blocks:
        blocks = by_ggml(weight, grid, importance)
        seen.append((weight, importance, blocks))
        return blocks

    quantization = Quantization(ALL_Q4_0, {"embed": Q8_0}, nearest=encoder)
    reduction = run(model, quantization)
    check_on_grid(reduction, quantization)
    # q, k, v at once; o; gate and up; down; and the embedding.
    assert len(seen) == 4 * 2 + 1
    assert all(
        importance.shape == (weight.shape[1],) and bool((importance > 0).all()) for weight, importance, _ in seen
    )
    assert divergence(model, run(model, Quantization(ALL_Q4_0)).model) < divergence(model, reduction.model)

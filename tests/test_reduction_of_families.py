"""Every family reduced: nothing lost where nothing shrinks, right shapes and sizes, better than cutting rows off."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from a3q.components import Method
from a3q.forward import hidden_states, output_logits
from a3q.model import LayerShape, Model
from a3q.perplexity import kl_divergence
from a3q.reduce import Reduction, reduce
from a3q.reduce_layer import Dimensions
from a3q.solve.qk import select_frequencies
from a3q.store import LayerLosses
from converters.hf_reader import open_huggingface
from tests.pico import KINDS, VOCAB, write_model

CPU = torch.device("cpu")
METHODS = {
    "a3q-own": Method("a3q", "per_head"),
    "a3q-shared": Method("a3q", "shared"),
    "paper-own": Method("paper", "per_head"),
    "paper-shared": Method("paper", "shared"),
}
BETTER = 0.85
"""What a reduction may leave of the divergence that cutting rows off makes; random weights leave little to win."""


def tokens(count: int, seed: int) -> Tensor:
    return torch.randint(VOCAB, (count, 64), generator=torch.Generator().manual_seed(seed))


CALIBRATION, HELD_OUT = tokens(24, 0), tokens(6, 1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    root = tmp_path_factory.mktemp("families")
    return {kind: open_huggingface(write_model(root / kind, kind)) for kind in KINDS}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, models: dict[str, Model]) -> Model:
    return models[request.param]


def run(model: Model, dimensions: Sequence[Dimensions], method: Method) -> Reduction:
    return reduce(model, CALIBRATION, dimensions, CPU, 10**9, method)


def logits(model: Model, ids: Tensor = HELD_OUT) -> Tensor:
    return output_logits(model, hidden_states(model, ids, CPU), CPU)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def divergence(model: Model, other: Model, ids: Tensor = HELD_OUT) -> float:
    """Mean KL in nats of what `other` predicts from what `model` does."""
    return float(kl_divergence(logits(model, ids).log_softmax(-1), logits(other, ids).log_softmax(-1)).mean())


def quarter(shape: LayerShape) -> Dimensions:
    return Dimensions(12, 12, 3 * shape.intermediate_size // 4)


def graded(model: Model) -> list[Dimensions]:
    """Different in every layer, one component untouched in each."""
    units = [shape.intermediate_size for shape in model.config.layers]
    sizes = [Dimensions(16, 10, units[0] - 10), Dimensions(10, 16, units[0] // 2), Dimensions(8, 13, units[0])]
    return sizes[: len(units)]


def cut(model: Model, dimensions: Sequence[Dimensions], spread: bool = False) -> Model:
    """What a reduction must beat: the first of every inner dimension kept (or pairs evenly spread), nothing fitted."""
    config, shapes, layers = model.config, [], []
    d, old_v = config.layers[0].qk_head_dim, config.layers[0].v_head_dim
    H, G = config.num_attention_heads, config.num_key_value_heads
    for shape, target, w in zip(config.layers, dimensions, model.layers, strict=True):
        r, m = target.qk_head_dim, shape.pairs
        R = min(m, r // 2)
        pairs = select_frequencies(m, R) if spread else list(range(R))
        rows = [*pairs, *(m + p for p in pairs), *range(2 * m, 2 * m + r - 2 * R)]
        new = dict(w)
        for role, heads, kept in (("q", H, rows), ("k", G, rows), ("v", G, list(range(target.v_head_dim)))):
            for name in (role, f"{role}_bias", f"{role}_norm"):
                if name in w:
                    per_head = w[name].view(-1, old_v if role == "v" else d, *w[name].shape[1:])
                    assert len(per_head) in (1, heads)
                    new[name] = per_head[:, kept].flatten(0, 1)
        for name in ("q", "q_bias") if config.qk_norm is None else ("q_norm",):
            if name in new:
                new[name] = new[name] * (r / d) ** 0.5
        new["o"] = w["o"].view(-1, H, old_v)[..., : target.v_head_dim].flatten(1)
        for name in ("gate", "up", "gate_bias", "up_bias"):
            if name in w:
                new[name] = w[name][: target.intermediate_size]
        new["down"] = w["down"][:, : target.intermediate_size]
        lists = tuple(tuple(own[p] for p in pairs) for own in shape.frequencies)
        shapes.append(LayerShape(**vars(target), frequencies=lists, sliding_window=shape.sliding_window))
        layers.append(new)
    return dataclasses.replace(model, config=dataclasses.replace(config, layers=tuple(shapes)), layers=layers)


def check_shapes(model: Model, original: Model) -> None:
    """Every role that the original has, in the size that the new dimensions ask for, finite, float32, contiguous."""
    for i, (layer, before) in enumerate(zip(model.layers, original.layers, strict=True)):
        assert layer.keys() == before.keys()
        for role in model.family.layer:
            if role.name in layer:
                weight = layer[role.name]
                expected = role.expected_shape(model.config, model.config.layers[i])
                assert tuple(weight.shape) == expected, (i, role.name)
                assert weight.dtype == torch.float32 and weight.is_contiguous() and weight.isfinite().all(), role.name


def counted(original: Model, dimensions: Sequence[Dimensions], spread_norms: bool) -> int:
    """Parameters of the reduced model, from the original's weights and what goes of each."""
    config = original.config
    total = sum(weight.numel() for weight in original.top.values())
    for shape, target, w in zip(config.layers, dimensions, original.layers, strict=True):
        qk = Fraction(target.qk_head_dim, shape.qk_head_dim)
        v = Fraction(target.v_head_dim, shape.v_head_dim)
        mlp = Fraction(target.intermediate_size, shape.intermediate_size)
        shares = dict.fromkeys(("q", "k", "q_bias", "k_bias", "q_norm", "k_norm"), qk)
        shares |= dict.fromkeys(("v", "o", "v_bias"), v)
        shares |= dict.fromkeys(("gate", "up", "down", "gate_bias", "up_bias"), mlp)
        if spread_norms:
            shares |= {"q_norm": qk * config.num_attention_heads, "k_norm": qk * config.num_key_value_heads}
        sizes = [weight.numel() * shares.get(role, Fraction(1)) for role, weight in w.items()]
        assert all(size.denominator == 1 for size in sizes)
        total += int(sum(sizes))
    return total


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_same_dimensions_change_nothing(model: Model, method: Method) -> None:
    reduction = run(model, [Dimensions.of(shape) for shape in model.config.layers], method)
    assert reduction.model.config == model.config
    assert reduction.losses == [LayerLosses()] * len(model.config.layers)
    check_shapes(reduction.model, model)
    assert distance(logits(reduction.model), logits(model)) < 1e-5
    assert reduction.model.parameters() == model.parameters()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("mixed", [False, True], ids=["quarter", "mixed"])
def test_reduced_models_are_whole_and_better_than_cut_ones(model: Model, method: Method, mixed: bool) -> None:
    old = model.config
    dimensions = graded(model) if mixed else [quarter(shape) for shape in old.layers]
    before = [dict(layer) for layer in model.layers]
    copies = [{role: weight.clone() for role, weight in layer.items()} for layer in before]
    reduction = run(model, dimensions, method)
    assert all(torch.equal(layer[r], copy[r]) for layer, copy in zip(before, copies, strict=True) for r in copy)

    new, config = reduction.model, reduction.model.config
    check_shapes(new, model)
    assert [Dimensions.of(shape) for shape in config.layers] == dimensions
    assert [shape.sliding_window for shape in config.layers] == [shape.sliding_window for shape in old.layers]
    assert config.qk_norm == ("heads" if old.qk_norm == "head" else old.qk_norm)
    for shape, was in zip(config.layers, old.layers, strict=True):
        assert all(set(own) <= set(was.frequencies[0]) and len(own) == shape.pairs for own in shape.frequencies)
        if method.frequencies == "shared":
            assert len(shape.frequencies) == len(was.frequencies)
        if shape.qk_head_dim == was.qk_head_dim:
            assert shape.frequencies == was.frequencies
        elif was.pairs and 2 * was.pairs == was.qk_head_dim:
            assert shape.pairs == shape.qk_head_dim // 2
    changed = dataclasses.replace(config, layers=old.layers, qk_norm=old.qk_norm)
    assert changed == old
    assert new.parameters() == counted(model, dimensions, old.qk_norm == "head")
    assert new.parameters() == sum(w.numel() for part in (new.top, *new.layers) for w in part.values())

    for loss, shape, was in zip(reduction.losses, config.layers, old.layers, strict=True):
        shrunk = (
            shape.qk_head_dim < was.qk_head_dim,
            shape.v_head_dim < was.v_head_dim,
            shape.intermediate_size < was.intermediate_size,
        )
        for share, shrinks in zip((loss.qk, loss.ov, loss.mlp), shrunk, strict=True):
            assert (0 < share < 1) if shrinks else share == 0
    assert logits(new).isfinite().all()
    ours, naive = divergence(model, new), divergence(model, cut(model, dimensions))
    assert ours < BETTER * naive


@pytest.mark.parametrize("frequencies", ["per_head", "shared"])
def test_a3q_is_closer_than_the_paper_on_the_calibration_text(model: Model, frequencies: str) -> None:
    dimensions = [quarter(shape) for shape in model.config.layers]
    ours, papers = (
        divergence(model, run(model, dimensions, Method(name, frequencies)).model, CALIBRATION)
        for name in ("a3q", "paper")
    )
    assert ours < papers


@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
@pytest.mark.parametrize("name", ["a3q", "paper"])
def test_norms_spread_to_the_heads_once(models: dict[str, Model], kind: str, name: str) -> None:
    """Also where all heads' reduced norms together are as long as one of the original's, 4 × 4 = 16."""
    model = models[kind]
    whole = [Dimensions.of(shape) for shape in model.config.layers]
    first = [Dimensions(4, 16, 96), *whole[1:]]
    new = run(model, first, Method(name, "per_head")).model
    check_shapes(new, model)
    assert [layer["q_norm"].numel() for layer in new.layers] == [16, *(64 for _ in whole[1:])]
    config, w = model.config, model.layers[-1]
    assert torch.equal(new.layers[-1]["q_norm"], w["q_norm"].repeat(config.num_attention_heads))
    assert torch.equal(new.layers[-1]["k_norm"], w["k_norm"].repeat(config.num_key_value_heads))


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt_neox"])
def test_a_reduced_model_can_be_reduced_again(models: dict[str, Model], kind: str) -> None:
    """Per-head frequencies and spread norms are read like any others."""
    model = models[kind]
    once = run(model, [quarter(shape) for shape in model.config.layers], METHODS["a3q-own"]).model
    dimensions = [Dimensions(8, 8, 48)] * len(model.config.layers)
    for method in METHODS.values():
        twice = run(once, dimensions, method).model
        check_shapes(twice, model)
        assert logits(twice).isfinite().all()
        assert divergence(model, twice) < divergence(model, cut(model, dimensions))

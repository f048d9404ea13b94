"""A layer trained by itself: towards what it should put out, never worse than it was."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from a3q.errors import InputError
from a3q.forward import block, embed, norm, output_logits
from a3q.heal import blocks
from a3q.heal.blocks import BlockLimit, BlockLoss, PredictionDistance, Shares, heal_block
from a3q.heal.schedule import Limit
from a3q.model import Layer, Model
from a3q.reduce import reduce
from a3q.reduce_layer import Dimensions
from converters.hf_reader import open_huggingface
from tests.pico import VOCAB, Kind, write_model

reduce_module = import_module("a3q.reduce")
CPU = torch.device("cpu")
LENGTH = 32
TEXT = torch.randint(VOCAB, (64, LENGTH), generator=torch.Generator().manual_seed(0))
LIMIT = Limit(200 * 256, None)
BLOCKS = BlockLimit(200 * 256)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "STEP_TOKENS", {"cpu": 256})


def damaged(layer: Layer) -> Layer:
    generator = torch.Generator().manual_seed(1)
    return {
        role: weight * (1 + 0.2 * torch.randn(weight.shape, generator=generator)) if weight.dim() == 2 else weight
        for role, weight in layer.items()
    }


def states(model: Model, seed: int = 0, count: int = 64) -> Tensor:
    return torch.randn(count, LENGTH, model.config.hidden_size, generator=torch.Generator().manual_seed(seed))


def distance(y: Tensor, wanted: Tensor) -> float:
    """Mean over tokens of the squared distance over the energy of what is wanted."""
    return float(((y - wanted).square().sum(-1) / wanted.square().sum(-1)).mean())


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen3", "gpt2", "gpt_neox"])
@torch.inference_mode()
def test_a_damaged_layer_comes_back(tmp_path: Path, kind: Kind) -> None:
    """On states it was not trained on. Reductions run without gradients, and so does this but for the training."""
    model = open_huggingface(write_model(tmp_path / "m", kind, initializer_range=0.2))
    config, shape, layer = model.config, model.config.layers[0], model.layers[0]
    run = partial(block, config, shape)
    entry = states(model)
    new, loss, notes = heal_block(config, shape, damaged(layer), entry, run(layer, entry), LIMIT, CPU, torch.float32, 0)
    fresh = states(model, seed=1)
    before, after = (distance(run(w, fresh), run(layer, fresh)) for w in (damaged(layer), new))
    assert loss.before == pytest.approx(before, rel=0.2) and loss.after == pytest.approx(after, rel=0.2)
    assert after < 0.3 * before
    assert 0 < loss.tokens <= LIMIT.tokens and notes == []
    assert all(torch.equal(new[role], layer[role]) for role in layer if role.endswith("norm"))


def test_what_does_not_gain_stays(tmp_path: Path) -> None:
    """Noise cannot be learned; training ends early, and with the weights that it began with."""
    model = open_huggingface(write_model(tmp_path / "m", "llama", initializer_range=0.2))
    config, shape, layer = model.config, model.config.layers[0], dict(model.layers[0])
    entry = states(model)
    wanted = block(config, shape, layer, entry) + 3 * states(model, seed=2)
    new, loss, _ = heal_block(config, shape, layer, entry, wanted, LIMIT, CPU, torch.float32, 0)
    assert loss.after == loss.before and loss.tokens < LIMIT.tokens
    assert all(torch.equal(new[role], layer[role]) for role in layer)


def test_a_gain_may_come_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the learning rate falls; in the first half of the time nothing is given up."""
    model = open_huggingface(write_model(tmp_path / "m", "llama", initializer_range=0.2))
    config, shape, layer = model.config, model.config.layers[0], model.layers[0]
    entry = states(model)
    wanted = block(config, shape, layer, entry)
    looks = iter([1.0] + 7 * [2.0] + 5 * [0.5])
    monkeypatch.setattr(blocks._Block, "_held_loss", lambda _: next(looks))
    new, loss, _ = heal_block(config, shape, damaged(layer), entry, wanted, LIMIT, CPU, torch.float32, 0)
    assert (loss.before, loss.after) == (1.0, 0.5)
    assert not torch.equal(new["down"], damaged(layer)["down"])


def test_one_sequence_is_trained_on_as_far_as_it_is_held_out(tmp_path: Path) -> None:
    """Nothing can be judged then, and nothing is changed."""
    model = open_huggingface(write_model(tmp_path / "m", "llama"))
    shape, layer, entry = model.config.layers[0], model.layers[0], states(model, count=1)
    new, loss, _ = heal_block(model.config, shape, damaged(layer), entry, entry, LIMIT, CPU, torch.float32, 0)
    assert loss.before == loss.after == 0
    assert all(torch.equal(new[role], weight) for role, weight in damaged(layer).items())


@pytest.mark.parametrize(("bad", "ended"), [(blocks.BROKEN - 1, False), (1 << 20, True)])
def test_steps_without_numbers_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int, ended: bool
) -> None:
    """A few cost nothing but their time; when there is no end of them, the layer stays as it is."""
    model = open_huggingface(write_model(tmp_path / "m", "llama", initializer_range=0.2))
    config, shape, layer = model.config, model.config.layers[0], model.layers[0]
    entry = states(model)
    wanted = block(config, shape, layer, entry)
    calls = 0

    def broken(config: object, shape: object, w: Layer, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        # The first is the look at what is held out.
        y = block(model.config, model.config.layers[0], w, x)
        return y * torch.nan if 2 <= calls < 2 + bad else y

    monkeypatch.setattr(blocks, "block", broken)
    new, loss, notes = heal_block(config, shape, damaged(layer), entry, wanted, LIMIT, CPU, torch.float32, 0)
    assert all(bool(torch.isfinite(weight).all()) for weight in new.values())
    assert notes == (["a layer's healing was ended early, since gradients were no numbers"] if ended else [])
    assert (loss.after == loss.before) == ended


def test_a_layer_that_is_right_is_not_trained(tmp_path: Path) -> None:
    model = open_huggingface(write_model(tmp_path / "m", "llama", initializer_range=0.2))
    config, shape, layer = model.config, model.config.layers[0], model.layers[0]
    entry = states(model)
    wanted = block(config, shape, layer, entry)
    new, loss, _ = heal_block(config, shape, layer, entry, wanted, LIMIT, CPU, torch.float32, 0)
    assert loss.tokens == 0 and all(torch.equal(new[role], layer[role]) for role in layer)


def test_only_attention_is_trained_where_the_mlp_stays(tmp_path: Path) -> None:
    model = open_huggingface(write_model(tmp_path / "m", "llama", initializer_range=0.2))
    config, shape, layer = model.config, model.config.layers[0], model.layers[0]
    entry, broken = states(model), damaged(model.layers[0])
    wanted = block(config, shape, layer, entry)
    new, _, _ = heal_block(config, shape, broken, entry, wanted, LIMIT, CPU, torch.float32, 0, attention_only=True)
    moved = {role for role in layer if not torch.equal(new[role], broken[role])}
    assert moved == {"q", "k", "v", "o"}


def test_distance_of_predictions_is_their_kl(tmp_path: Path) -> None:
    """Of every fourth token, from the step's number on."""
    model = open_huggingface(write_model(tmp_path / "m", "llama", initializer_range=0.2))
    distance = PredictionDistance(model, CPU, torch.float32)
    y, wanted = states(model, seed=3, count=5), states(model, seed=4, count=5)
    logs = [
        output_logits(model, norm(model.config, model.top, "final_norm", x), CPU).log_softmax(-1) for x in (y, wanted)
    ]
    kl = (logs[1].exp() * (logs[1] - logs[0])).sum(-1)
    for step, first in ((None, 0), (0, 0), (3, 3), (6, 2)):
        assert float(distance(y, wanted, step)) == pytest.approx(float(kl[:, first::4].mean(-1).sum()), rel=1e-4)
    assert float(distance(y[:, :1], wanted[:, :1], 3)) == pytest.approx(float(kl[:, 0].sum()), rel=1e-4)


def test_predictions_are_learnt_in_a_pass_without_gradients(tmp_path: Path) -> None:
    """What is made in it cannot be kept for a backward pass, on a GPU all that comes there."""
    model = open_huggingface(write_model(tmp_path / "m", "gpt2", initializer_range=0.2))
    with torch.inference_mode():
        model = replace(model, top={role: weight.clone() for role, weight in model.top.items()})
        distance = PredictionDistance(model, CPU, torch.float32)
    y = states(model, seed=3, count=2).requires_grad_()
    distance(y, states(model, seed=4, count=2), 0).backward()  # type: ignore[no-untyped-call]
    assert y.grad is not None and bool(y.grad.abs().sum() > 0)


def test_a_last_layer_learns_to_predict(tmp_path: Path) -> None:
    model = open_huggingface(write_model(tmp_path / "m", "llama", initializer_range=0.2))
    config, shape, layer = model.config, model.config.layers[-1], model.layers[-1]
    entry = states(model)
    wanted = block(config, shape, layer, entry)
    distance = PredictionDistance(model, CPU, torch.float32)
    args = config, shape, damaged(layer), entry, wanted, LIMIT, CPU, torch.float32, 0
    new, loss, _ = heal_block(*args, distance=distance)
    fresh = states(model, seed=1)
    before, after = (
        float(distance(block(config, shape, w, fresh), block(config, shape, layer, fresh), None)) / len(fresh)
        for w in (damaged(layer), new)
    )
    assert loss.before == pytest.approx(before, rel=0.2) and loss.after == pytest.approx(after, rel=0.2)
    assert after < 0.6 * before


def test_memory_that_runs_out_changes_nothing_but_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_huggingface(write_model(tmp_path / "m", "llama", initializer_range=0.2))
    config, shape, layer = model.config, model.config.layers[0], model.layers[0]
    entry = states(model)
    wanted = block(config, shape, layer, entry)

    def healed() -> tuple[Layer, list[str]]:
        limit = Limit(10 * 256, None)
        new, _, notes = heal_block(config, shape, damaged(layer), entry, wanted, limit, CPU, torch.float32, 0)
        return new, notes

    whole, _ = healed()

    def tight(config: object, shape: object, w: Layer, x: Tensor) -> Tensor:
        if len(x) > 3:
            raise torch.OutOfMemoryError
        return block(model.config, model.config.layers[0], w, x)

    monkeypatch.setattr(blocks, "block", tight)
    new, notes = healed()
    assert notes == ["memory ran out on cpu while healing: went on with 2 sequences at once"]
    for role in layer:
        torch.testing.assert_close(new[role], whole[role], rtol=1e-3, atol=1e-4)

    def impossible(*_: object) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(blocks, "block", impossible)
    with pytest.raises(InputError, match="out of memory on cpu with one sequence"):
        healed()


def test_time_that_one_layer_does_not_use_is_for_those_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    monkeypatch.setattr(blocks.time, "monotonic", lambda: clock)
    shares = Shares(BlockLimit(7, 60.0), 6)
    found = []
    for used in (0.0, 14.0, 11.5):
        with shares.next() as limit:
            clock += used
        assert limit.tokens == 7
        found.append(limit.seconds)
    shares.pass_over()
    with shares.next() as limit:
        clock += 50.0
    found.append(limit.seconds)
    # Where more was used than there was, the rest is as good as none, but a limit still.
    with shares.next() as limit:
        pass
    assert found == pytest.approx([10.0, 12.0, 11.5, 11.5])
    assert limit.seconds is not None and 0 < limit.seconds < 0.01
    with Shares(BlockLimit(7), 2).next() as limit:
        pass
    assert limit == Limit(7, None)


@pytest.mark.parametrize(("kind", "fitted"), [("llama", len(TEXT)), ("llama", 20), ("gpt_neox", 20)])
def test_a_reduction_heals_each_layer_and_goes_on_from_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, fitted: int
) -> None:
    """The layers behind are fitted to healed ones; a run that was ended gives the same."""
    monkeypatch.setattr(reduce_module, "FITTED_TOKENS", fitted * LENGTH)
    model = open_huggingface(write_model(tmp_path / "m", kind, initializer_range=0.2))
    sizes = [Dimensions(shape.qk_head_dim, shape.v_head_dim, 40) for shape in model.config.layers]

    def run(folder: Path | None, limit: BlockLimit | None = BLOCKS) -> list[Layer]:
        found = reduce(model, TEXT, sizes, CPU, 1 << 30, healing=limit, folder=folder)
        gains = [loss.before_healing - loss.after_healing for loss in found.losses]
        assert (min(gains) >= 0 and max(gains) > 0) if limit else gains == [0, 0]
        last = found.losses[-1]
        assert 0 < last.after_predictions <= last.before_predictions if limit else last.before_predictions == 0
        assert all(loss.before_predictions == 0 for loss in found.losses[:-1])
        return list(found.model.layers)

    (tmp_path / "kept").mkdir()
    plain, healed = run(None, None), run(tmp_path / "kept")
    assert any(not torch.equal(a["up"], b["up"]) for a, b in zip(plain, healed, strict=True))
    (tmp_path / "kept" / "00001.safetensors").unlink()
    again = run(tmp_path / "kept")
    for a, b in zip(healed, again, strict=True):
        assert all(torch.equal(a[role], b[role]) for role in a)


def test_layers_that_are_healed_are_not_rounded_in_the_same_pass(tmp_path: Path) -> None:
    from a3q.quantize import Quantization

    model = open_huggingface(write_model(tmp_path / "m", "llama"))
    sizes = [Dimensions.of(shape) for shape in model.config.layers]
    quantization = replace(Quantization([{}, {}]))
    with pytest.raises(ValueError, match="another pass"):
        reduce(model, TEXT, sizes, CPU, 1 << 30, quantization=quantization, healing=BLOCKS)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_layers_are_fitted_to_some_and_trained_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    """From what the reduced layers make of the text to what the original ones do; those in front stay."""
    model = open_huggingface(write_model(tmp_path / "m", kind, num_hidden_layers=3))
    sizes = [Dimensions(shape.qk_head_dim, shape.v_head_dim, 40) for shape in model.config.layers]
    sizes[0] = Dimensions.of(model.config.layers[0])
    seen = []

    def untrained(*args: Any, **named: Any) -> tuple[Layer, BlockLoss, list[str]]:
        _, _, w, entry, wanted, *_ = args
        seen.append((entry.clone(), wanted.clone()))
        return w, BlockLoss(0.0, 0.0, 0), []

    monkeypatch.setattr(reduce_module, "heal_block", untrained)
    monkeypatch.setattr(reduce_module, "FITTED_TOKENS", 20 * LENGTH)
    found = reduce(model, TEXT, sizes, CPU, 1 << 30, healing=BLOCKS).model
    known = reduce(model, TEXT[:20], sizes, CPU, 1 << 30).model
    # The last layer is trained twice.
    assert len(seen) == 3
    for i, (a, b) in enumerate(zip(found.layers, known.layers, strict=True)):
        # Nothing in front has changed, to which the first would be fitted otherwise.
        for role in a if i > 0 else ():
            torch.testing.assert_close(a[role], b[role], rtol=1e-4, atol=1e-5)
    for i, (entry, wanted) in enumerate(seen[:2], 1):
        states = []
        for one in (found, model):
            x = embed(one, TEXT)
            for shape, w in list(zip(one.config.layers, one.layers, strict=True))[: i if one is found else i + 1]:
                x = block(one.config, shape, w, x)
            states.append(x)
        torch.testing.assert_close(entry, states[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(wanted, states[1], rtol=1e-4, atol=1e-4)

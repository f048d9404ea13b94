"""Distillation: its loss and gradient, its steps, and what it does for a reduced model."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from a3q.errors import InputError
from a3q.forward import hidden_states, output_logits
from a3q.heal import divergence as divergence_module
from a3q.heal.checkpoint import restore, save
from a3q.heal.distill import BROKEN, Distillation, Group, Recipe, Teacher, final_states, picked, split
from a3q.heal.divergence import Slice, divergence
from a3q.heal.schedule import WARM_UP_STEPS, Limit, rate
from a3q.heal.student import FullStudent, Student, trained_roles
from a3q.model import Model
from converters.hf_reader import open_huggingface
from tests.damaged import CPU, LENGTH, TEXT
from tests.pico import Kind, write_model


def distillation(
    original: Model,
    smaller: Model,
    steps: int = 30,
    peak: float = 3e-3,
    size: int = 8,
    student: Student | None = None,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    fused: bool = False,
) -> Distillation:
    student = student or FullStudent(smaller, device, dtype)
    limit, recipe = Limit(steps * size * LENGTH, None), Recipe(step_tokens=size * LENGTH)
    teacher = Teacher(original, device, dtype)
    groups = [Group(student.parameters(), peak)]
    return Distillation(teacher, student, groups, TEXT, limit, device, dtype, 7, recipe, fused)


def finished(run: Distillation) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in run.parameters]


def kl(original: Model, model: Model, tokens: Tensor) -> float:
    """Of all positions, by whole passes."""
    log_p, log_q = (
        output_logits(one, hidden_states(one, tokens, CPU), CPU).log_softmax(-1).flatten(0, 1)
        for one in (original, model)
    )
    return float(F.kl_div(log_q, log_p, log_target=True, reduction="batchmean"))


@pytest.mark.parametrize("trains_output", [False, True])
def test_divergence_and_gradient_equal_those_of_whole_logits(
    monkeypatch: pytest.MonkeyPatch, trains_output: bool
) -> None:
    """In slices of 7 of 40 positions, and scaled by what comes behind the loss."""
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = torch.randn(2, 40, 16, generator=generator)
    output, teacher_output = torch.randn(2, 50, 16, generator=generator)
    hidden.requires_grad_()
    output.requires_grad_(trains_output)
    monkeypatch.setattr(divergence_module, "_LOGITS_BYTES", 7 * 4 * 50)
    found = divergence(hidden, output, teacher, teacher_output)
    wanted = [hidden, output] if trains_output else [hidden]
    gradients = torch.autograd.grad(3 * found, wanted)
    logs = ((hidden @ output.T).log_softmax(-1), (teacher @ teacher_output.T).log_softmax(-1))
    expected = F.kl_div(*logs, log_target=True, reduction="batchmean")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(3 * expected, wanted))


def test_learning_rate_rises_and_falls() -> None:
    rates = [rate(2.0, share / 1000, 1000) for share in range(1001)]
    peak = rates.index(max(rates))
    assert rates[0] > 0 and rates[-1] == pytest.approx(0, abs=1e-12) and max(rates) == pytest.approx(2.0)
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0.01 < peak / 1000 < 0.1
    # The first of few steps are small however far the run is.
    few = [rate(2.0, 0.3, step) for step in range(WARM_UP_STEPS + 5)]
    assert few[:WARM_UP_STEPS] == pytest.approx([few[-1] * (i + 1) / WARM_UP_STEPS for i in range(WARM_UP_STEPS)])
    assert few[-1] == few[WARM_UP_STEPS]


def test_the_first_limit_counts() -> None:
    both = Limit(1000, 10.0)
    assert both.progress(500, 1.0) == 0.5 and both.progress(100, 9.0) == 0.9 and both.progress(2000, 0) == 1.0
    assert Limit(None, 10.0).progress(10**9, 5.0) == 0.5
    with pytest.raises(ValueError, match="no limit"):
        Limit(None, None)


@pytest.mark.parametrize(("count", "size"), [(10, 4), (10, 10), (7, 5), (3, 8), (1, 2)])
def test_every_pass_takes_each_sequence_once(count: int, size: int) -> None:
    steps = [picked(count, size, 3, step) for step in range(count)]
    assert all(len(one) == size for one in steps)
    passes = torch.cat(steps)[: count * size].view(size, count)
    assert torch.equal(passes.sort(dim=1).values, torch.arange(count).expand(size, -1))
    if count > 5:
        assert not torch.equal(passes[0], passes[1])
        assert not torch.equal(picked(count, size, 4, 0), steps[0])


def test_held_out_sequences_are_not_trained_on() -> None:
    for count, held in ((2, 1), (8, 1), (64, 8), (1000, 16)):
        text = torch.arange(count)[:, None].expand(-1, 4)
        own, out = split(text)
        assert len(out) == held and sorted([*own[:, 0].tolist(), *out[:, 0].tolist()]) == list(range(count))
    with pytest.raises(InputError, match="give more text"):
        split(TEXT[:1])


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen3", "gpt2", "gpt_neox", "mpt", "phi3"])
def test_training_forward_pass_equals_the_other(tmp_path: Path, kind: Kind) -> None:
    """Norms behind components, biases, windows, slopes; with layers computed twice and once."""
    model = open_huggingface(write_model(tmp_path / "m", kind, initializer_range=0.2))
    student = FullStudent(model, CPU, torch.float32)
    gradients = []
    for recompute in (False, True):
        states = final_states(model, student.layer, TEXT[:3], recompute)
        torch.testing.assert_close(states.detach(), hidden_states(model, TEXT[:3], CPU), rtol=1e-4, atol=1e-4)
        gradients.append(torch.autograd.grad(states.square().sum(), student.parameters()))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert all(bool(gradient.abs().sum() > 0) for gradient in gradients[0])


def test_norms_stay_and_cache_only_reductions_leave_the_mlp() -> None:
    roles = ["attn_norm", "q", "q_bias", "k_norm", "o", "gate", "down_bias", "mlp_post_norm"]
    assert trained_roles(roles) == ["q", "q_bias", "o", "gate", "down_bias"]
    assert trained_roles(roles, attention_only=True) == ["q", "q_bias", "o"]


def test_healing_brings_predictions_back(original: Model, smaller: Model) -> None:
    """On text that was not trained on; measured by whole passes, on weights that were not touched by the run."""
    run = distillation(original, smaller, steps=100)
    held = split(TEXT)[1]
    before = kl(original, smaller, held)
    shares: list[float] = []
    run.train(shares.append)
    layers = [run._student.finished(i) for i in range(smaller.config.num_hidden_layers)]
    after = kl(original, replace(smaller, layers=layers), held)
    assert run.state.before == pytest.approx(before, rel=1e-3)
    assert run.held_out_loss() == pytest.approx(after, rel=1e-3)
    assert after < 0.75 * before
    losses = [point.loss for point in run.state.curve]
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])
    assert shares == sorted(shares) and shares[-1] == 1
    assert run.state.tokens == 100 * 8 * LENGTH and run.state.steps == 100
    assert torch.equal(layers[0]["attn_norm"], smaller.layers[0]["attn_norm"])


def test_smaller_portions_make_the_same_gradient(original: Model, smaller: Model) -> None:
    """Memory that runs out halves what is computed at once, then computes layers twice, and then says so."""
    whole = distillation(original, smaller, steps=1)
    loss = float(whole._gradients(TEXT[:8]))
    expected = [parameter.grad for parameter in whole.parameters]
    run = distillation(original, smaller, steps=1)
    divergence_of, limit = run._divergence, 3

    def tight(tokens: Tensor, of_slice: Slice) -> Tensor:
        found = divergence_of(tokens, of_slice)
        if len(tokens) > limit or (limit == 0 and not run.portions.recompute):
            found.backward()  # type: ignore[no-untyped-call]  # what is left of a failed attempt must not count
            raise torch.OutOfMemoryError
        return found

    run._divergence = tight  # type: ignore[method-assign]
    assert float(run._gradients(TEXT[:8])) == pytest.approx(loss, rel=1e-5)
    for parameter, gradient in zip(run.parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
    assert run.portions.notes == ["memory ran out on cpu while healing: went on with 2 sequences at once"]

    def impossible(tokens: Tensor, of_slice: Slice) -> Tensor:
        raise torch.OutOfMemoryError

    run._divergence = impossible  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"out of memory on cpu with one sequence at a time; .*--heal blocks"):
        run._gradients(TEXT[:8])
    assert run.portions.recompute


def test_steps_without_numbers_are_left_out(original: Model, smaller: Model) -> None:
    run = distillation(original, smaller, steps=BROKEN + 4)
    divergence_of, calls = run._divergence, 0

    def broken(tokens: Tensor, of_slice: Slice) -> Tensor:
        nonlocal calls
        calls += 1
        # The first is the look at the held-out text.
        return divergence_of(tokens, of_slice) * (math.nan if 2 < calls < BROKEN + 2 else 1)

    run._divergence = broken  # type: ignore[method-assign]
    run.train(lambda _: None)
    assert run.state.left_out == BROKEN - 1
    assert all(bool(torch.isfinite(parameter).all()) for parameter in run.parameters)
    assert all(math.isfinite(point.loss) for point in run.state.curve)
    run = distillation(original, smaller, steps=BROKEN + 4)
    run._divergence = lambda tokens, of_slice: divergence_of(tokens, of_slice) * math.nan  # type: ignore[method-assign]
    with pytest.raises(InputError, match=f"no numbers in {BROKEN} steps one after another"):
        run.train(lambda _: None)


@pytest.mark.parametrize("stop", [1, 7, 12])
def test_a_run_goes_on_from_a_checkpoint_to_the_same_bits(
    original: Model, smaller: Model, tmp_path: Path, stop: int
) -> None:
    class KilledError(Exception):
        pass

    whole = distillation(original, smaller, steps=12)
    whole.train(lambda _: None)
    first, path = distillation(original, smaller, steps=12), tmp_path / "heal.safetensors"

    def step() -> None:
        if first.state.steps == stop:
            save(first, path)
            raise KilledError

    with pytest.raises(KilledError):
        first.train(lambda _: None, step)
    second = distillation(original, smaller, steps=12)
    assert restore(second, path)
    assert second.state.steps == stop
    second.train(lambda _: None)
    assert all(torch.equal(a, b) for a, b in zip(finished(whole), finished(second), strict=True))
    told = [
        {**asdict(run.state), "seconds": 0.0, "curve": [p.loss for p in run.state.curve]} for run in (whole, second)
    ]
    assert told[0] == told[1]
    assert second.held_out_loss() == whole.held_out_loss()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
@pytest.mark.parametrize("fused", [False, True])
def test_a_gpu_learns_as_much_also_where_it_goes_on(
    original: Model, smaller: Model, tmp_path: Path, fused: bool
) -> None:
    """In recorded steps; those behind a checkpoint run by themselves at first, so that the last bits are others."""
    known = distillation(original, smaller, steps=60)
    known.train(lambda _: None)
    path = tmp_path / "heal.safetensors"

    def on_gpu() -> Distillation:
        return distillation(original, smaller, 60, device=torch.device("cuda"), dtype=torch.bfloat16, fused=fused)

    run, second = on_gpu(), on_gpu()
    run.train(lambda _: None, lambda: save(run, path) if run.state.steps == 30 else None)
    assert run._recorded._known is not None
    assert restore(second, path) and second.state.steps == 30
    second.train(lambda _: None)
    for one in (run, second):
        assert one.state.before == pytest.approx(known.state.before, rel=0.05)
        assert one.held_out_loss() == pytest.approx(known.held_out_loss(), rel=0.05)


def test_there_may_be_no_checkpoint_or_a_damaged_one(original: Model, smaller: Model, tmp_path: Path) -> None:
    run, path = distillation(original, smaller), tmp_path / "heal.safetensors"
    before = finished(run)
    assert not restore(run, path)
    path.write_bytes(b"no tensors")
    with pytest.raises(InputError, match=r"heal\.safetensors"):
        restore(run, path)
    assert all(torch.equal(a, b) for a, b in zip(before, finished(run), strict=True))
    assert json.dumps(asdict(run.state))

"""Low-rank adapters: what they compute, what is trained, what they are merged to, and when they are taken."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from a3q.errors import InputError
from a3q.forward import AdaptedLayer, hidden_states
from a3q.heal import stage
from a3q.heal.adapters import RANK, LowRankStudent, _needed, free_on, student_for
from a3q.heal.checkpoint import restore, save
from a3q.heal.distill import Teacher, final_states, split
from a3q.heal.settings import Healing
from a3q.heal.stage import HealJob, heal
from a3q.heal.student import FullStudent, trained_roles
from a3q.model import Model
from a3q.progress import silent
from a3q.reduce import Reduction
from a3q.store import LayerLosses
from a3q.work import WorkFolder
from converters.hf_reader import open_huggingface
from tests.a3q.heal.test_distill import distillation, kl
from tests.damaged import CPU, LENGTH, TEXT
from tests.pico import Kind, write_model

KINDS = pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "opt", "phi3", "mpt"])


def merged(student: LowRankStudent) -> Model:
    return replace(student.model, layers=[student.finished(i) for i in range(student.model.config.num_hidden_layers)])


def trained(model: Model, dtype: torch.dtype = torch.float32, rank: int = RANK, steps: int = 10) -> LowRankStudent:
    """A student that has been moved away from its start, where one factor of all products is 0."""
    student = LowRankStudent(model, CPU, dtype, rank=rank)
    optimizer = torch.optim.AdamW(student.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        final_states(model, student.layer, TEXT[:2]).tanh().sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return student


def weights(student: LowRankStudent) -> list[Tensor]:
    """Copies of all that the forward pass reads but the adapters."""
    layers = [student.layer(i) for i in range(student.model.config.num_hidden_layers)]
    return [weight.clone() for layer in layers for _, weight in sorted(layer.items())]


@KINDS
def test_the_start_is_the_model_itself(tmp_path: Path, kind: Kind) -> None:
    model = open_huggingface(write_model(tmp_path / "m", kind, initializer_range=0.2))
    state = torch.get_rng_state()
    student = LowRankStudent(model, CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    states = final_states(model, student.layer, TEXT[:3]).detach()
    torch.testing.assert_close(states, final_states(model, FullStudent(model, CPU, torch.float32).layer, TEXT[:3]))
    for found, layer in zip(merged(student).layers, model.layers, strict=True):
        assert found.keys() == layer.keys()
        assert all(torch.equal(found[role], weight) for role, weight in layer.items())


@KINDS
def test_merged_weights_compute_what_the_adapters_do(tmp_path: Path, kind: Kind) -> None:
    """Every matrix has moved, by adapters alone; biases and norms have not."""
    model = open_huggingface(write_model(tmp_path / "m", kind, initializer_range=0.2))
    start = LowRankStudent(model, CPU, torch.float32)
    student = trained(model)
    states = final_states(model, student.layer, TEXT[:3]).detach()
    found = merged(student)
    torch.testing.assert_close(states, hidden_states(found, TEXT[:3], CPU), rtol=1e-4, atol=1e-4)
    before = hidden_states(model, TEXT[:3], CPU)
    assert (states - before).norm() > 0.05 * before.norm()
    assert all(torch.equal(a, b) for a, b in zip(weights(start), weights(student), strict=True))
    assert all(one.dtype == torch.float32 and one.requires_grad for one in student.parameters())
    for new, layer in zip(found.layers, model.layers, strict=True):
        moved = {role for role, weight in layer.items() if not torch.equal(new[role], weight)}
        assert moved == {role for role in trained_roles(list(layer)) if layer[role].dim() == 2}
        assert all(weight.dtype == torch.float32 and not weight.requires_grad for weight in new.values())
        ranks = {int(torch.linalg.matrix_rank((new[role] - layer[role]).double(), rtol=1e-4)) for role in moved}
        assert max(ranks) <= RANK


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_computed_twice_give_the_same_gradients(tmp_path: Path, kind: Kind, dtype: torch.dtype) -> None:
    model = open_huggingface(write_model(tmp_path / "m", kind, initializer_range=0.2))
    student = trained(model, dtype, steps=1)
    losses = [final_states(model, student.layer, TEXT[:3], again).square().sum() for again in (False, True)]
    gradients = [torch.autograd.grad(loss, student.parameters()) for loss in losses]
    torch.testing.assert_close(*gradients)
    assert all(bool(gradient.abs().sum() > 0) for gradient in gradients[0])


def test_bfloat16_is_for_computing_only(original: Model) -> None:
    """Adapters are float32, near what they compute in it, and merged with the weights as they came."""
    student = trained(original, torch.bfloat16)
    assert all(one.dtype == torch.float32 for one in student.parameters())
    layer = student.layer(0)
    assert isinstance(layer, AdaptedLayer) and layer["q"].dtype == torch.bfloat16
    x = torch.randn(3, original.config.hidden_size, dtype=torch.bfloat16)
    y = layer.products["q"](x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), x.float() @ student.finished(0)["q"].T, rtol=0.03, atol=0.03)
    A, B = student.parameters()[:2]
    role = sorted(trained_roles(list(layer)))[0]
    torch.testing.assert_close(student.finished(0)[role], original.layers[0][role] + 2 * B.detach() @ A.detach())
    fresh = LowRankStudent(original, CPU, torch.bfloat16)
    assert all(torch.equal(fresh.finished(1)[role], weight) for role, weight in original.layers[1].items())


@pytest.mark.parametrize("rank", [1, 40, 1000])
def test_no_rank_is_above_a_matrix_own(original: Model, rank: int) -> None:
    """And products of all ranks are scaled alike, which LoRA divides by the rank."""
    student = LowRankStudent(original, CPU, torch.float32, rank=rank)
    shapes = [original.layers[0][role].shape for role in sorted(trained_roles(list(original.layers[0])))]
    pairs = list(zip(student.parameters()[::2], student.parameters()[1::2], strict=True))
    assert [(B.shape[0], A.shape[1]) for A, B in pairs[: len(shapes)]] == shapes
    assert [len(A) for A, _ in pairs[: len(shapes)]] == [min(rank, *shape) for shape in shapes]
    with torch.no_grad():
        for one in student.parameters():
            one.fill_(0.1)
    moved = student.finished(0)["k"] - original.layers[0]["k"]
    torch.testing.assert_close(moved, torch.full_like(moved, 2 * 0.01 * min(rank, *moved.shape)))


def test_attention_alone_is_adapted_where_only_it_may_change(original: Model) -> None:
    layer = LowRankStudent(original, CPU, torch.float32, attention_only=True).layer(0)
    assert isinstance(layer, AdaptedLayer) and set(layer.products) == {"q", "k", "v", "o"}


def test_healing_with_adapters_brings_predictions_back(original: Model, smaller: Model) -> None:
    student = LowRankStudent(smaller, CPU, torch.float32)
    run = distillation(original, smaller, steps=100, peak=1e-2, student=student)
    held = split(TEXT)[1]
    before = kl(original, smaller, held)
    run.train(lambda _: None)
    after = kl(original, merged(student), held)
    assert run.state.before == pytest.approx(before, rel=1e-3)
    assert run.held_out_loss() == pytest.approx(after, rel=1e-3)
    assert after < 0.8 * before


def test_a_run_with_adapters_goes_on_to_the_same_bits(original: Model, smaller: Model, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    runs = [
        distillation(original, smaller, steps=8, student=LowRankStudent(smaller, CPU, torch.float32)) for _ in range(3)
    ]
    whole, first, second = runs
    whole.train(lambda _: None)
    path = tmp_path / "heal.safetensors"

    def step() -> None:
        if first.state.steps == 5:
            save(first, path)
            raise KilledError

    with pytest.raises(KilledError):
        first.train(lambda _: None, step)
    assert restore(second, path) and second.state.steps == 5
    second.train(lambda _: None)
    for a, b in zip(whole.parameters, second.parameters, strict=True):
        assert torch.equal(a, b)


def test_weights_of_a_pass_without_gradients_can_be_adapted(original: Model) -> None:
    """Those of a reduction are."""
    with torch.inference_mode():
        layers = [{role: weight.clone() for role, weight in layer.items()} for layer in original.layers]
    student = LowRankStudent(replace(original, layers=layers), CPU, torch.float32)
    final_states(original, student.layer, TEXT[:2], True).sum().backward()  # type: ignore[no-untyped-call]


# The choice


def test_memory_decides_what_is_trained(original: Model, smaller: Model) -> None:
    def chosen(free: int, adapted: bool | None = None) -> tuple[FullStudent | LowRankStudent, list[str]]:
        return student_for(smaller, original, CPU, torch.float32, False, free, adapted=adapted)

    student, notes = chosen(1 << 40)
    assert isinstance(student, FullStudent) and notes == []
    whole, _ = _needed(smaller, original, torch.float32, False)
    # Beside what is held, half as much is to be left.
    assert isinstance(chosen(int(1.51 * whole))[0], FullStudent)
    student, notes = chosen(int(1.49 * whole))
    assert isinstance(student, LowRankStudent)
    assert len(notes) == 1
    assert notes[0].startswith("the model is too large to train all its weights, for which ")
    assert notes[0].endswith("memory are wanted: low-rank adapters (LoRA, rank 16) instead")
    with pytest.raises(InputError, match=r"even with low-rank adapters takes .* on cpu, and 0\.1 MB .*--heal blocks"):
        chosen(100_000)
    # A run that goes on stays with what it began.
    assert isinstance(chosen(1 << 40, adapted=True)[0], LowRankStudent)
    assert isinstance(chosen(int(1.3 * whole), adapted=False)[0], FullStudent)
    with pytest.raises(InputError, match="with all weights, as this run has begun"):
        chosen(whole, adapted=False)


def tensors(*models: list[Tensor]) -> int:
    """Bytes of different storages."""
    found = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for model in models for one in model}
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("attention_only", [False, True])
def test_what_is_said_to_be_needed_is_what_is_held(
    original: Model, smaller: Model, dtype: torch.dtype, adapted: bool, attention_only: bool
) -> None:
    """Weights of both models, of one's gradients and moments, and copies for computing, by their storages."""
    needed = _needed(smaller, original, dtype, attention_only)[adapted]
    kind = LowRankStudent if adapted else FullStudent
    student = kind(smaller, CPU, dtype, attention_only)
    teacher = Teacher(original, CPU, dtype)
    run = distillation(original, smaller, steps=1, student=student)
    run.train(lambda _: None)
    layers = range(smaller.config.num_hidden_layers)
    held = tensors(
        list(teacher.model.top.values()),
        list(teacher.shared(smaller.top).values()),
        [weight for i in layers for weight in teacher.layer(i).values()],
        [weight for i in layers for weight in student.layer(i).values()],
        student.parameters(),
        [weight for i in layers for role, weight in student.finished(i).items() if not adapted],
        [one.grad for one in student.parameters() if one.grad is not None],
        [run.optimizer.state[one][name] for one in student.parameters() for name in ("exp_avg", "exp_avg_sq")],
    )
    if dtype != torch.float32:
        held += 2 * original.output.numel() + 2 * smaller.output.numel()
        # Copies of adapters while they are computed with.
        held += 2 * sum(one.numel() for one in student.parameters()) * adapted
    assert needed == pytest.approx(held, rel=0.03)


def test_a_run_that_goes_on_stays_with_adapters(
    original: Model, smaller: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much memory is free by then: what the first half has left would not fit otherwise."""
    free = [int(1.4 * _needed(smaller, original, torch.float32, False)[0]), 1 << 40]
    monkeypatch.setattr(stage, "free_on", lambda device: free.pop(0))
    monkeypatch.setattr(stage, "STEP_TOKENS", {"cpu": 8 * LENGTH})
    reduction = Reduction(smaller, [LayerLosses()] * smaller.config.num_hidden_layers)
    found = []
    for tokens in (20, 60):
        with WorkFolder.open(tmp_path / "work", {"run": "one"}) as work:
            shutil.rmtree(work.path / "layers-heal", ignore_errors=True)
            healing = Healing("full", tokens=tokens * 8 * LENGTH)
            job = HealJob(original, healing, (), LENGTH, 0, CPU, 1 << 30, silent, work)
            found.append(heal(job, reduction, TEXT))
    for healed, _ in found:
        assert any("low-rank adapters" in note for note in healed.notes)
    (_, first), (_, second) = found
    assert (first.tokens, second.tokens) == (20 * 8 * LENGTH, 60 * 8 * LENGTH)
    assert second.curve[:5] == first.curve[:5] and second.after < first.after < first.before


def test_free_memory_of_the_machine() -> None:
    assert 1 << 20 < free_on(CPU) < 1 << 50


def test_peft_that_is_missing_is_named(original: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        InputError, match=r'adapters need peft \(.*\); pip install "a3q\[heal\]", or take --heal blocks'
    ):
        student_for(original, original, CPU, torch.float32, False, 1 << 40, adapted=True)

"""The loss in fused kernels, and without them where there is no compiler."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from a3q.heal.divergence import slice_divergence
from a3q.heal.fused import FusedDivergence, pays
from a3q.heal.schedule import Limit

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def states(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    hidden, teacher = (torch.randn(count, 24, generator=generator) for _ in range(2))
    output, teacher_output = (torch.randn(300, 24, generator=generator) for _ in range(2))
    return hidden, output, teacher, teacher_output


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler is here")
def test_fused_kernels_give_the_same() -> None:
    fused = FusedDivergence()
    for count in (17, 17, 5):
        loss, gradient = fused(*states(count))
        known_loss, known_gradient = slice_divergence(*states(count))
        assert float(loss) == pytest.approx(float(known_loss), rel=1e-5)
        torch.testing.assert_close(gradient, known_gradient, rtol=1e-4, atol=1e-6)
    assert fused._works


def test_it_goes_on_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def refuse(*_: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(1)
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch, "compile", lambda function: refuse)
    fused = FusedDivergence()
    for count in (4, 5):
        for found, known in zip(fused(*states(count)), slice_divergence(*states(count)), strict=True):
            assert torch.equal(found, known)
    assert len(calls) == 1


def test_memory_that_runs_out_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever calls takes less then."""

    def full(*_: Tensor) -> tuple[Tensor, Tensor]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "compile", lambda function: full)
    fused = FusedDivergence()
    with pytest.raises(torch.OutOfMemoryError):
        fused(*states(4))
    assert fused._works


@pytest.mark.parametrize(
    ("tokens", "seconds", "device", "expected"),
    [
        (None, 600.0, CUDA, True),
        (None, 600.0, CPU, False),
        (None, 60.0, CUDA, False),
        (100 << 20, None, CUDA, True),
        (1 << 20, None, CUDA, False),
        (1 << 20, 600.0, CUDA, False),
    ],
)
def test_only_long_training_pays(
    tokens: int | None, seconds: float | None, device: torch.device, expected: bool
) -> None:
    assert pays(Limit(tokens, seconds), device) == expected

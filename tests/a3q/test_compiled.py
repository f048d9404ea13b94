"""Functions in fused kernels, and without them where there is no compiler."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from a3q.compiled import compiled
from a3q.heal.divergence import slice_divergence


def states(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    hidden, teacher = (torch.randn(count, 24, generator=generator) for _ in range(2))
    output, teacher_output = (torch.randn(300, 24, generator=generator) for _ in range(2))
    return hidden, output, teacher, teacher_output


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler is here")
def test_fused_kernels_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    make = torch.compile
    made = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        kernels = make(function)

        def call(*args: Tensor) -> tuple[Tensor, Tensor]:
            found: tuple[Tensor, Tensor] = kernels(*args)
            made.append(1)
            return found

        return call

    monkeypatch.setattr(torch, "compile", noted)
    fused = compiled(slice_divergence)
    for count in (17, 17, 5):
        loss, gradient = fused(*states(count))
        known_loss, known_gradient = slice_divergence(*states(count))
        assert float(loss) == pytest.approx(float(known_loss), rel=1e-5)
        torch.testing.assert_close(gradient, known_gradient, rtol=1e-4, atol=1e-6)
    assert len(made) == 3


def test_it_goes_on_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def refuse(*_: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(1)
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch, "compile", lambda function: refuse)
    fused = compiled(slice_divergence)
    for count in (4, 5):
        for found, known in zip(fused(*states(count)), slice_divergence(*states(count)), strict=True):
            assert torch.equal(found, known)
    assert len(calls) == 1


def test_memory_that_runs_out_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever calls takes less then."""

    calls = []

    def full(*_: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(1)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "compile", lambda function: full)
    fused = compiled(slice_divergence)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            fused(*states(4))
    assert len(calls) == 2

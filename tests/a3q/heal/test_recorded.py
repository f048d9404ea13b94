"""A step's gradients as one CUDA graph; what can be tried without a GPU is what happens where none can be made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from a3q.graphs import BEFORE
from a3q.heal import recorded
from a3q.heal.recorded import Recorded, add_gradients

WEIGHT = torch.arange(1.0, 5.0)


def loss(weight: Tensor) -> recorded.Loss:
    return lambda part: (part @ weight).square().sum()


def gradient(part: Tensor) -> Tensor:
    return 2 * part.T @ (part @ WEIGHT.to(part.device))


def parts(count: int, rows: int, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(rows, 4, generator=generator).to(device) for _ in range(count)]


def test_gradients_are_added() -> None:
    weight = WEIGHT.clone().requires_grad_()
    first, second = parts(2, 3)
    found = [add_gradients(loss(weight), part) for part in (first, second)]
    assert not found[0].requires_grad and float(found[1]) == pytest.approx(float((second @ WEIGHT).square().sum()))
    torch.testing.assert_close(weight.grad, gradient(first) + gradient(second))


def test_what_cannot_be_recorded_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def refuse(*_: object) -> None:
        tries.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    weight = WEIGHT.clone().requires_grad_()
    run, wanted = Recorded(loss(weight), [weight]), torch.zeros(4)
    for part in parts(7, 3):
        assert float(run(part)) == pytest.approx(float((part @ WEIGHT).square().sum()), rel=1e-5)
        wanted += gradient(part)
    torch.testing.assert_close(weight.grad, wanted)
    assert len(tries) == 1


def test_memory_that_runs_out_is_for_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who then comes with less, of which again some run before another attempt."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", full)
    weight = WEIGHT.clone().requires_grad_()
    run = Recorded(loss(weight), [weight])
    *some, last = parts(BEFORE + 1, 4)
    for part in some:
        run(part)
    before = weight.grad
    with pytest.raises(torch.OutOfMemoryError):
        run(last)
    assert weight.grad is before
    for part in parts(BEFORE, 2):
        run(part)
    with pytest.raises(torch.OutOfMemoryError):
        run(last[:2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
def test_a_graph_gives_the_same() -> None:
    weight = WEIGHT.cuda().requires_grad_()
    run = Recorded(loss(weight), [weight])
    for rows in (3, 2):
        for part in parts(BEFORE + 3, rows, "cuda"):
            # Twice, as two portions of a step.
            weight.grad = None
            found = [float(run(part)) for _ in range(2)]
            assert found == pytest.approx([float((part @ weight).square().sum())] * 2, rel=1e-5)
            torch.testing.assert_close(weight.grad, 2 * gradient(part))
        assert run._known is not None

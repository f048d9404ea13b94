"""Norms, rotations and gates in fused kernels give what they give one operation after another."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from a3q.pieces import Pieces, activated, fusing, pieces, using

CPP = shutil.which("c++") is not None or shutil.which("g++") is not None
BF16, F32 = torch.bfloat16, torch.float32


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def alike(found: Callable[..., Tensor], known: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Values and gradients, up to the rounding of their type."""
    results = []
    for work in (found, known):
        own = [one.clone().requires_grad_() for one in inputs]
        y = work(*own)
        y.backward(drawn(*y.shape, seed=9, dtype=y.dtype))  # type: ignore[no-untyped-call]
        results.append((y.detach(), [one.grad for one in own]))
    (y, by_inputs), (known_y, by_known) = results
    assert y.dtype == known_y.dtype
    rough = 2e-2 if BF16 in (y.dtype, inputs[0].dtype) else 1e-5
    torch.testing.assert_close(y, known_y, rtol=rough, atol=rough)
    for one, other in zip(by_inputs, by_known, strict=True):
        torch.testing.assert_close(one, other, rtol=rough, atol=rough)


@pytest.mark.skipif(not CPP, reason="no C++ compiler is here")
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_fused_pieces_give_the_same(dtype: torch.dtype) -> None:
    fused, plain = fusing(), Pieces()
    weight = drawn(24, seed=1).abs()

    def check(T: int) -> None:
        alike(
            lambda x: fused.rms_norm(x, weight, 1e-5, dtype),
            lambda x: plain.rms_norm(x, weight, 1e-5, dtype),
            [3 * drawn(2, T, 24)],
        )
        cos, sin = drawn(1, T, 3, seed=2), drawn(1, T, 3, seed=3)
        alike(
            lambda x: fused.rotate(x, cos, sin, dtype),
            lambda x: plain.rotate(x, cos, sin, dtype),
            [drawn(2, T, 4, 8, dtype=dtype).transpose(1, 2)],
        )
        alike(
            lambda gate, up: fused.gated("silu", gate, up),
            lambda gate, up: plain.gated("silu", gate, up),
            [drawn(2, T, 6 + T, dtype=dtype), drawn(2, T, 6 + T, seed=1, dtype=dtype)],
        )

        alike(fused.add, plain.add, [drawn(2, T, 24), drawn(2, T, 24, seed=1, dtype=dtype)])
        logits = drawn(3, T, 8, dtype=dtype)
        most = logits.float().amax((1, 2), keepdim=True)
        torch.testing.assert_close(fused.block_sums(logits, most), (logits.float() - most).exp().sum(-1))

    for T in (5, 7, 5):
        check(T)


def test_gate_times_up() -> None:
    gate, up = drawn(3, 4), drawn(3, 4, seed=1)
    torch.testing.assert_close(Pieces().gated("relu", gate, up), gate.clamp_min(0) * up)
    torch.testing.assert_close(activated("silu", gate), gate * torch.sigmoid(gate))


def test_others_are_used_only_meanwhile() -> None:
    before, other = pieces(), Pieces(gated=lambda activation, gate, up: up)
    with pytest.raises(ValueError, match="over"), using(other):
        assert pieces() is other
        raise ValueError("over")
    assert pieces() is before

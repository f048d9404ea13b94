"""When fused kernels pay."""

from __future__ import annotations

import pytest
import torch

from a3q.heal.fused import pays
from a3q.heal.schedule import Limit

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("tokens", "seconds", "device", "expected"),
    [
        (None, 600.0, CUDA, True),
        (None, 600.0, CPU, False),
        (None, 30.0, CUDA, False),
        (100 << 20, None, CUDA, True),
        (1 << 20, None, CUDA, False),
        (1 << 20, 600.0, CUDA, False),
    ],
)
def test_only_long_training_pays(
    tokens: int | None, seconds: float | None, device: torch.device, expected: bool
) -> None:
    assert pays(Limit(tokens, seconds), device) == expected

"""A chat template, and what the tests look for in texts."""

from __future__ import annotations

import torch
from torch import Tensor

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[me]{% endif %}"
)


def begins(text: Tensor, prompt: list[int]) -> Tensor:
    """Which rows do, `[N]`."""
    return (text[:, : len(prompt)] == torch.tensor(prompt, dtype=torch.int64)).all(1)


def runs(text: Tensor, size: int = 8) -> set[tuple[int, ...]]:
    """All runs of tokens in the rows."""
    return {tuple(run) for row in text.tolist() for run in zip(*(row[i:] for i in range(size)), strict=False)}

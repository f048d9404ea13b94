"""KL divergence between the predictions of two models from their final hidden states, with its gradient.

The logits of a batch take more memory than all else in training: 32 × 1024 tokens of a vocabulary of 49152 are 6.4 GB
for each model in float32. Loss and gradient are therefore made from a slice of the positions at a time, and only the
gradient by the hidden states and by the output weight is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LOGITS_BYTES = 512 << 20
"""Of a slice's logits in float32, of one model."""

Slice = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def slice_divergence(hidden: Tensor, output: Tensor, teacher: Tensor, teacher_output: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over positions of `KL(teacher ‖ student)` in nats, and its gradient by the student's logits `[n, vocab]`.

    Hidden states are `[n, hidden]`, output weights `[vocab, hidden]`. With `p` and `q` the softmax of the teacher's and
    the student's logits, the gradient is `q - p`.
    """
    log_q = F.linear(hidden, output).float().log_softmax(-1)
    log_p = F.linear(teacher, teacher_output).float().log_softmax(-1)
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(), (log_q.exp() - p).to(hidden.dtype)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, output: Tensor, teacher: Tensor, teacher_output: Tensor, of_slice: Slice
    ) -> Tensor:
        count, vocab = len(hidden), len(output)
        by_hidden = torch.empty_like(hidden)
        by_output = torch.zeros_like(output, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), device=hidden.device)
        step = max(1, _LOGITS_BYTES // (4 * vocab))
        for start in range(0, count, step):
            rows = slice(start, start + step)
            loss, by_logits = of_slice(hidden[rows], output, teacher[rows], teacher_output)
            total += loss
            by_logits /= count
            by_hidden[rows] = by_logits @ output
            if by_output is not None:
                by_output += by_logits.T @ hidden[rows]
        ctx.save_for_backward(by_hidden, by_output)
        ctx.output_dtype = output.dtype
        return total / count

    @staticmethod
    def backward(ctx: Any, *by_loss: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden, by_output = ctx.saved_tensors
        if by_output is not None:
            by_output = (by_output * by_loss[0]).to(ctx.output_dtype)
        return by_hidden * by_loss[0], by_output, None, None, None


def divergence(
    hidden: Tensor, output: Tensor, teacher: Tensor, teacher_output: Tensor, of_slice: Slice = slice_divergence
) -> Tensor:
    """Mean over positions of `KL(teacher ‖ student)` in nats, at temperature 1.

    Final, normed hidden states `[n, hidden]` and output weights `[vocab, hidden]`, each model's of one type.
    Differentiable in the student's. `of_slice`: `slice_divergence` or what torch.compile makes of it.
    """
    found: Tensor = _Divergence.apply(hidden, output, teacher, teacher_output, of_slice)  # type: ignore[no-untyped-call]
    return found

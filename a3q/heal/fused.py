"""The loss in fused kernels where PyTorch can make them.

With 49152 logits a position, a pass over memory for every step of two softmaxes takes longer than the products: a step
of SmolLM2-135M on 32,768 tokens spends 71 of 281 ms there on an H100, and 18 of 226 in fused kernels. What
torch.compile made of whole layers was slower than they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from a3q.batching import out_of_memory
from a3q.heal.divergence import slice_divergence
from a3q.heal.schedule import Limit

_WORTH_S = 120.0
_WORTH_TOKENS = 8 << 20
"""Of training, below which making kernels (10 s) does not pay."""


def pays(limit: Limit, device: torch.device) -> bool:
    """Whether training on `device` is so long that fused kernels save time."""
    long = limit.seconds is None or limit.seconds >= _WORTH_S
    return device.type == "cuda" and long and (limit.tokens is None or limit.tokens >= _WORTH_TOKENS)


class FusedDivergence:
    """`slice_divergence` in fused kernels; itself where these cannot be made, without a C compiler, say."""

    def __init__(self) -> None:
        self._fused = torch.compile(slice_divergence)
        self._works = True

    def __call__(
        self, hidden: Tensor, output: Tensor, teacher: Tensor, teacher_output: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `slice_divergence`; the kernels are made at the first call."""
        if self._works:
            try:
                return self._fused(hidden, output, teacher, teacher_output)
            except Exception as error:  # whatever a compiler does
                if out_of_memory(error):
                    raise
                self._works = False
        return slice_divergence(hidden, output, teacher, teacher_output)

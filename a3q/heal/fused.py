"""When fused kernels pay.

With 49152 logits a position, a pass over memory for every step of two softmaxes takes longer than the products: a step
of SmolLM2-135M on 32,768 tokens spends 71 of 281 ms there on an H100, and 18 of 226 in fused kernels. See also
`a3q.pieces`.
"""

from __future__ import annotations

import torch

from a3q.heal.schedule import Limit

_WORTH_S = 36.0
_WORTH_TOKENS = 5 << 20
"""Of work, below which making kernels (20 s) does not pay."""


def pays(limit: Limit, device: torch.device) -> bool:
    """Whether training or writing on `device` is so long that fused kernels save time."""
    long = limit.seconds is None or limit.seconds >= _WORTH_S
    return device.type == "cuda" and long and (limit.tokens is None or limit.tokens >= _WORTH_TOKENS)

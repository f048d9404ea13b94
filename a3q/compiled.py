"""Functions in fused kernels where PyTorch can make them."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from a3q.batching import out_of_memory

_SHAPES = 64
"""Kinds of inputs that kernels are made for, 8 by default; further ones are computed operation by operation."""
_P = ParamSpec("_P")
_R = TypeVar("_R")


def compiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`function` in fused kernels, made at the first call; itself where these cannot be made, without a C compiler,
    say."""
    # Layers and batches of many sizes share one, each with and without gradients.
    torch._dynamo.config.recompile_limit = _SHAPES
    fused, works = torch.compile(function), True

    def call(*args: _P.args, **named: _P.kwargs) -> _R:
        nonlocal works
        if works:
            try:
                return fused(*args, **named)
            except Exception as error:  # whatever a compiler does
                if out_of_memory(error):
                    raise
                works = False
        return function(*args, **named)

    return call

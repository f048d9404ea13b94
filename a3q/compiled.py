"""Functions in fused kernels where PyTorch can make them."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from a3q.batching import out_of_memory

_P = ParamSpec("_P")
_R = TypeVar("_R")


def compiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`function` in fused kernels, made at the first call; itself where these cannot be made, without a C compiler,
    say."""
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

"""Recording of CUDA graphs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

BEFORE = 3
"""Times that something runs by itself before it is recorded, so that all that libraries set up is there."""


@contextmanager
def recording() -> Iterator[torch.cuda.CUDAGraph]:
    """A graph of what is started meanwhile, good after that.

    No garbage is collected until then: a graph that ends breaks the recording of another.
    """
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            yield graph
    finally:
        if collects:
            gc.enable()

"""Published methods that a3q is compared with, written anew for llama-like models, for benchmarks only.

Each takes `(model, tokens [B, T], ratio, device)` and returns a `Rival` whose layers store `(1 − ratio)` of the weights
that the original's layers store; what is counted is said by each. Perplexity is then comparable at equal size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from a3q.model import Model
from benchmarks.rivals.modegpt import modegpt, modegpt_allocated
from benchmarks.rivals.pruning import magnitude, wanda_structured
from benchmarks.rivals.rival import Rival, layer_parameters
from benchmarks.rivals.slicegpt import slicegpt
from benchmarks.rivals.svd import svd_llm, svd_llm_updated, truncated_svd

RIVALS: Mapping[str, Callable[[Model, Tensor, float, torch.device], Rival]] = {
    "truncated SVD": truncated_svd,
    "magnitude pruning": magnitude,
    "structured Wanda": wanda_structured,
    "SliceGPT": slicegpt,
    "SVD-LLM (W)": svd_llm,
    "SVD-LLM (W + update)": svd_llm_updated,
    "MoDeGPT": modegpt,
    "MoDeGPT (allocated)": modegpt_allocated,
}
"""Every method by the name that tables give it."""

__all__ = [
    "RIVALS",
    "Rival",
    "layer_parameters",
    "magnitude",
    "modegpt",
    "modegpt_allocated",
    "slicegpt",
    "svd_llm",
    "svd_llm_updated",
    "truncated_svd",
    "wanda_structured",
]

"""What llama.cpp computes for each architecture that a3q reads or writes, as far as a file cannot choose it.

Read from llama.cpp's loaders and graphs (`src/models/*.cpp`), and held against them by the tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from a3q.model import ModelConfig

_ATTENTION_BIASES = frozenset(("q_bias", "k_bias", "v_bias"))
_ALL_ATTENTION_BIASES = _ATTENTION_BIASES | {"o_bias"}


@dataclass(frozen=True)
class Graph:
    """The fixed part of one architecture."""

    norm: Literal["rms", "layer"] = "rms"
    activation: Literal["silu", "gelu_tanh"] = "silu"
    """llama.cpp's GELU is the one with tanh; of a model with the exact one it computes an approximation."""
    rotary: Literal["whole", "partial", "none"] = "whole"
    """How much of a head RoPE turns."""
    factors: bool = False
    """Frequencies may be any, given as divisors (`rope_freqs.weight`); otherwise they follow from base and factor."""
    free_heads: bool = False
    """A file chooses the head size; otherwise the heads make up the hidden size."""
    mixed: bool = False
    """A file may give every layer its own MLP size."""
    qk_norm: Literal["head", "all"] | None = None
    window_period: int | None = None
    """Only every so manieth layer sees beyond the sliding window, unless the file has a pattern; None: no windows."""
    parallel: bool = False
    """A file chooses whether attention and MLP stand side by side."""
    alibi: bool = False
    scaled_embedding: bool = False
    """The embedding is multiplied by the root of the hidden size."""
    tied: bool = True
    """The output may be left out, for the embedding to be used."""
    biases: frozenset[str] = frozenset()
    """Biases of projections that the loader takes."""
    needs: frozenset[str] = frozenset()
    """Those among them that it insists on."""


_LLAMA = Graph(
    factors=True, free_heads=True, biases=_ALL_ATTENTION_BIASES | {"gate_bias", "up_bias", "down_bias"}
)  # fmt: skip
_WITH_BIASES = _ALL_ATTENTION_BIASES | {"up_bias", "down_bias"}

GRAPHS: Mapping[str, Graph] = {
    "llama": _LLAMA,
    "deci": Graph(factors=True, free_heads=True, mixed=True, biases=_LLAMA.biases),
    "qwen2": Graph(biases=_ATTENTION_BIASES),
    "qwen3": Graph(free_heads=True, qk_norm="head", biases=_ATTENTION_BIASES),
    "gemma3": Graph(
        activation="gelu_tanh",
        free_heads=True,
        qk_norm="head",
        window_period=6,
        scaled_embedding=True,
        biases=_ATTENTION_BIASES,
    ),
    "olmo2": Graph(qk_norm="all", tied=False, biases=_ATTENTION_BIASES),
    "gptneox": Graph(
        "layer", "gelu_tanh", "partial", parallel=True, tied=False, biases=_WITH_BIASES, needs=_WITH_BIASES
    ),
    "gpt2": Graph("layer", "gelu_tanh", "none", biases=_WITH_BIASES, needs=_WITH_BIASES),
    "mpt": Graph("layer", "gelu_tanh", "none", alibi=True, biases=_WITH_BIASES),
}
"""By `general.architecture`."""


LOCAL_BASE = 10000.0
"""RoPE base of layers with a sliding window where the file gives none."""


def alibi_slopes(max_bias: float, heads: int) -> tuple[float, ...]:
    """Slope of each query head as llama.cpp computes it; none when `max_bias` is 0."""
    if max_bias == 0:
        return ()
    whole = 1 << (heads.bit_length() - 1)
    exponents = [(h + 1) / whole if h < whole else (h - whole + 0.5) / whole for h in range(heads)]
    return tuple(2.0 ** (-max_bias * exponent) for exponent in exponents)


def local_layers(period: int, layers: int) -> list[bool]:
    """Which layers have a sliding window where every `period`-th has none; with 0 all have one."""
    return [period == 0 or i % period < period - 1 for i in range(layers)]


def query_scale(architecture: str, config: ModelConfig) -> float:
    """What llama.cpp multiplies attention scores by beyond `1 / sqrt(qk_head_dim)`.

    Gemma 3 of 27B divides by another root, and llama.cpp knows that model by its number of layers alone.
    """
    if architecture != "gemma3" or config.num_hidden_layers != 62:
        return 1.0
    return math.sqrt(config.layers[0].qk_head_dim / (config.hidden_size // config.num_attention_heads))

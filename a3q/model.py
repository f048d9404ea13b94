"""The in-memory description of a model that every stage reads: plain data, the same for every source format.

Weights are float32 in Hugging Face layout: a projection is `[out_features, in_features]`, and the rows of `q` and `k`
are half-split per head (pair `p` of a head is rows `p` and `p + head_dim / 2`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from gguf.gguf_writer import GGUFValue
from torch import Tensor

if TYPE_CHECKING:
    from a3q.families import Family

Layer = dict[str, Tensor]
"""Weights of one layer by role (see `a3q.families`); an optional role that the model lacks is absent."""


def plain_frequencies(theta: float, head_dim: int) -> tuple[float, ...]:
    """`theta ** (-2 i / head_dim)`: `head_dim / 2` angles in radians per position."""
    return tuple(theta ** (-2.0 * i / head_dim) for i in range(head_dim // 2))


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions of a decoder-only transformer.

    `head_dim` is the size of a query or key head and `v_head_dim` that of a value head: equal in every file that a3q
    reads or writes, but either may be reduced alone. `frequencies` holds `head_dim / 2` angles in radians per position,
    with every static RoPE scaling already applied.
    Attention scores are scaled by `1 / sqrt(head_dim)`.
    """

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    v_head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    frequencies: tuple[float, ...]
    tie_word_embeddings: bool

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    def plain_frequencies(self) -> tuple[float, ...]:
        """RoPE without any scaling: `rope_theta ** (-2 i / head_dim)`."""
        return plain_frequencies(self.rope_theta, self.head_dim)

    def kv_bytes_per_token(self, bytes_per_element: float = 2.0) -> float:
        """Key and value cache of all layers for one token; float16 elements unless told."""
        width = self.num_key_value_heads * (self.head_dim + self.v_head_dim)
        return self.num_hidden_layers * width * bytes_per_element


class Tokenizer(Protocol):
    """Text to token ids and back, with the GGUF metadata that describes the same tokenizer."""

    metadata: dict[str, GGUFValue]
    """Every `tokenizer.*` key of a GGUF file, values typed."""
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    """Whether the runtime puts `bos_id` in front of a text."""
    chat_template: str | None

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`, no BOS or EOS added; `special` reads control tokens written out in the text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, control tokens left out."""
        ...


@dataclass(frozen=True)
class Source:
    """Where a model was read from."""

    path: Path
    format: str
    """`gguf` or `huggingface`."""
    file_size: int
    """Bytes of all weight files."""
    weight_files: tuple[Path, ...] = ()
    tensor_types: Mapping[str, int] = field(default_factory=dict)
    """GGML type name (or safetensors dtype) → number of parameters stored in it."""


@dataclass(frozen=True)
class Model:
    """A model to be run, reduced or written. `layers` may load each layer anew at every access."""

    family: Family
    config: ModelConfig
    embed: Tensor
    """`[vocab_size, hidden_size]`"""
    final_norm: Tensor
    """`[hidden_size]`"""
    output: Tensor | None
    """`[vocab_size, hidden_size]`; None when tied to `embed`."""
    layers: Sequence[Layer]
    tokenizer: Tokenizer
    metadata: dict[str, GGUFValue]
    """GGUF keys to carry over that are neither dimensions nor `tokenizer.*`, with architecture keys under their bare
    name (`{arch}.` left in place as written by the source format is not allowed)."""
    source: Source

    def parameters(self) -> int:
        """Number of weights, a tied output not counted twice."""
        block = sum(tensor.numel() for tensor in self.layers[0].values()) * len(self.layers)
        output = 0 if self.output is None else self.output.numel()
        return block + self.embed.numel() + self.final_norm.numel() + output


def pick_device(name: str) -> torch.device:
    """`auto` takes a CUDA device where there is one."""
    from a3q.errors import InputError

    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {name}: give auto, cpu or cuda")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is available to PyTorch here; use --device cpu")
    return torch.device(name)

"""The in-memory description of a model that every stage reads: plain data, the same for every source format.

Weights are float32 in Hugging Face layout: a projection is `[out_features, in_features]`. The rows of a query or key
head are the real parts of its rotated pairs, then their imaginary parts, then what is not rotated: with `m` pairs, pair
`p` is rows `p` and `p + m`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from gguf.gguf_writer import GGUFValue
from torch import Tensor

if TYPE_CHECKING:
    from a3q.families import Family

Layer = dict[str, Tensor]
"""Weights of one layer by role (see `a3q.families`); an optional role that the model lacks is absent."""


def plain_frequencies(theta: float, rotated: int) -> tuple[float, ...]:
    """`theta ** (-2 i / rotated)`: `rotated / 2` angles in radians per position."""
    return tuple(theta ** (-2.0 * i / rotated) for i in range(rotated // 2))


@dataclass(frozen=True)
class LayerShape:
    """Inner dimensions of one layer: what A3 reduces, and what its attention can see."""

    qk_head_dim: int
    """Size of a query or key head. Attention scores are divided by its root."""
    v_head_dim: int
    intermediate_size: int
    frequencies: tuple[tuple[float, ...], ...] = ()
    """Rotation in radians per position, every static scaling applied: one list for all heads, or one for each key
    head, all as long; without RoPE, no list."""
    sliding_window: int | None = None
    """Last positions that a query sees, its own among them; None: all."""

    @property
    def pairs(self) -> int:
        """Rotated pairs of a head."""
        return len(self.frequencies[0]) if self.frequencies else 0


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions and form of a decoder-only transformer; what differs between layers is in `layers`."""

    layers: tuple[LayerShape, ...]
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    tie_word_embeddings: bool
    rope_theta: float = 10000.0
    norm: Literal["rms", "layer"] = "rms"
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    """Of the gate, or of the one inner projection where there is no gate."""
    parallel_residual: bool = False
    """Attention and MLP read the same hidden states, and both outputs are added to them."""
    qk_norm: Literal["head", "heads", "all"] | None = None
    """RMS norm between projection and RoPE: over a head with one weight for all (`head`) or one for each (`heads`), or
    over the heads together (`all`)."""
    alibi_slopes: tuple[float, ...] = ()
    """One for each query head: its scores fall by so much a position. None with other position encodings."""
    embedding_scale: float = 1.0

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @cached_property
    def uniform(self) -> LayerShape | None:
        """The shape of every layer; None where they differ."""
        return self.layers[0] if len(set(self.layers)) == 1 else None

    @property
    def widest(self) -> LayerShape:
        """The largest of each inner dimension among the layers; frequencies and window are the first layer's."""
        first = self.layers[0]
        return LayerShape(
            max(shape.qk_head_dim for shape in self.layers),
            max(shape.v_head_dim for shape in self.layers),
            max(shape.intermediate_size for shape in self.layers),
            first.frequencies,
            first.sliding_window,
        )

    def kv_bytes_per_token(self, bytes_per_element: float = 2.0) -> float:
        """Key and value cache of all layers for one token; float16 elements unless told."""
        sizes = sum(shape.qk_head_dim + shape.v_head_dim for shape in self.layers)
        return self.num_key_value_heads * sizes * bytes_per_element


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
    stored: Mapping[str, str] = field(default_factory=dict)
    """GGML type name of each tensor of a GGUF, by its name."""


@dataclass(frozen=True)
class Model:
    """A model to be run, reduced or written. `layers` may load each layer anew at every access."""

    family: Family
    config: ModelConfig
    top: Layer
    """Weights outside the layers by role: `embed` `[vocab_size, hidden_size]`, `final_norm`, …; `output` `[vocab_size,
    hidden_size]` is absent when tied to `embed`. Large ones may be of another floating type, in the memory of their
    file."""
    layers: Sequence[Layer]
    layer_roles: frozenset[str]
    """Roles that every layer has."""
    tokenizer: Tokenizer
    metadata: dict[str, GGUFValue]
    """GGUF keys to carry over that are neither dimensions nor `tokenizer.*`, with architecture keys under their bare
    name (`{arch}.` left in place as written by the source format is not allowed)."""
    source: Source

    @property
    def embed(self) -> Tensor:
        """Token embedding `[vocab_size, hidden_size]`."""
        return self.top["embed"]

    @property
    def output(self) -> Tensor:
        """Output weight `[vocab_size, hidden_size]`, the embedding where they are tied."""
        return self.top.get("output", self.top["embed"])

    def parameters(self) -> int:
        """Number of weights, a tied output not counted twice; no layer is loaded."""
        roles = [role for role in self.family.layer if role.name in self.layer_roles]
        layers = sum(prod(role.expected_shape(self.config, shape)) for shape in self.config.layers for role in roles)
        return layers + sum(weight.numel() for weight in self.top.values())


def free_memory(device: torch.device | None = None) -> int:
    """Bytes that a program may take now, of main memory unless told; a careful guess where the system does not say."""
    if device is not None and device.type == "cuda":
        # What earlier stages have given back, and PyTorch keeps, counts as taken.
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        # Linux counts the file cache, which it gives up when asked, among what is available but not among free pages.
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, ValueError, KeyError):
        return 8 << 30


def pick_device(name: str) -> torch.device:
    """`auto` takes a CUDA device where there is one: the current one of this thread, by its number, so that other
    threads mean the same."""
    from a3q.errors import InputError

    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {name}: give auto, cpu or cuda")
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise InputError("--device cuda: no CUDA device is available to PyTorch here; use --device cpu")
    if name == "cpu" or not there:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())

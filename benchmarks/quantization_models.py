"""What `benchmarks.quantization` quantizes: a plausible float original of the demo file, and the same padded."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from gguf import ReaderTensor, quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from a3q.model import Layer, Model
from converters.gguf_reader import check_gguf, open_gguf

Q4_1 = GGMLQuantizationType.Q4_1


def dithered(path: Path, seed: int = 0) -> Model:
    """The model of a GGUF file, each weight stored as Q4_1 moved evenly at random within the step of its block.

    The file's own weights lie on a Q4_1 lattice, which its type rounds to without loss and others meet as an odd
    distribution; these are weights that would have been rounded to the file.
    """
    header = check_gguf(path)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: _dithered(tensor, generator) if tensor.tensor_type is Q4_1 else tensor
        for name, tensor in header.tensors.items()
    }
    moved = replace(header, tensors=tensors)
    layers = [moved.layer(i) for i in range(header.config.num_hidden_layers)]
    return replace(open_gguf(path), layers=layers)


def _dithered(tensor: ReaderTensor, generator: torch.Generator) -> ReaderTensor:
    weights, bytes_per_block = (int(size) for size in GGML_QUANT_SIZES[Q4_1])
    values = quants.dequantize(tensor.data, Q4_1)
    # A block starts with its step, float16.
    blocks = tensor.data.reshape(-1, bytes_per_block)
    steps = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    noise = torch.rand(len(blocks), weights, generator=generator).numpy() - np.float32(0.5)
    noisy = values + (noise * steps).reshape(values.shape)
    return tensor._replace(data=noisy, tensor_type=GGMLQuantizationType.F32)


def padded(model: Model, hidden: int, kv_heads: int) -> Model:
    """The same function with zeros up to `hidden` and `kv_heads`, each new key head with its share of query heads.

    Rows of 256 weights are what K-quants need. For a llama without biases, all layers alike.
    """
    config = model.config
    shape = config.uniform
    if shape is None or config.norm != "rms" or config.qk_norm is not None or config.embedding_scale != 1:
        raise ValueError("a llama whose layers are alike is wanted")
    # RMS norms divide by the root of the mean square, which zeros make smaller.
    share = config.hidden_size / hidden
    heads = kv_heads * config.queries_per_group
    sizes = {
        "q": (heads * shape.qk_head_dim, hidden),
        "k": (kv_heads * shape.qk_head_dim, hidden),
        "v": (kv_heads * shape.v_head_dim, hidden),
        "o": (hidden, heads * shape.v_head_dim),
        "gate": (shape.intermediate_size, hidden),
        "up": (shape.intermediate_size, hidden),
        "down": (hidden, shape.intermediate_size),
        "embed": (config.vocab_size, hidden),
        "output": (config.vocab_size, hidden),
    }

    def widened(role: str, weight: Tensor) -> Tensor:
        if weight.dim() == 1:
            return F.pad(weight * math.sqrt(share), (0, hidden - len(weight)))
        rows, columns = sizes[role]
        # A group's query heads lie together, and the new groups are the last.
        return F.pad(weight, (0, columns - weight.shape[1], 0, rows - weight.shape[0]))

    def all_widened(weights: Layer) -> Layer:
        return {role: widened(role, weight) for role, weight in weights.items()}

    wider = replace(
        config,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        norm_eps=config.norm_eps * share,
    )
    return replace(model, config=wider, top=all_widened(model.top), layers=[all_widened(w) for w in model.layers])

"""Models of real shapes with random weights, as Hugging Face folders: what speed and memory depend on, nothing more.

    python -m benchmarks.shapes llama-3.1-8b -o DIR [--layers N] [--seed N]

Weights are bfloat16. The normal numbers are drawn once, as many as a prime below 2²⁴; a tensor is what follows from a
random place of that ring on, read round and round. Drawing 8e9 of them would take minutes; this takes as long as the
disk. No two rows of a matrix are alike, since the prime divides no difference of their places, and rows that overlap
are shifted against each other, so that matrices have full rank. Files are written front to back by as many threads as
there are shards; nothing but the ring is in memory.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from benchmarks.random_words import write_tokenizer

_RING = (1 << 24) - 3
_SHARD = 4_000_000_000
_STD = 0.02
_ITEM = 2
"""Bytes of a weight."""


@dataclass(frozen=True)
class Shape:
    """A model's dimensions, by the names that transformers has for them."""

    kind: str
    fields: dict[str, Any] = field(hash=False)

    @property
    def layers(self) -> int:
        """Of the whole model."""
        return int(self.fields["num_hidden_layers"])


def _shape(kind: str, hidden: int, layers: int, heads: int, kv: int, units: int, vocab: int, **others: Any) -> Shape:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": kv, "intermediate_size": units, "vocab_size": vocab}
    return Shape(kind, {"tie_word_embeddings": False, "rms_norm_eps": 1e-5, **sizes, **others})


_LLAMA3 = {
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_QWEN2 = {
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
_LLAMA2 = {
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}

SHAPES: dict[str, Shape] = {
    "llama-3.1-8b": _shape("llama", 4096, 32, 32, 8, 14336, 128256, **_LLAMA3),
    "llama-3.1-70b": _shape("llama", 8192, 80, 64, 8, 28672, 128256, **_LLAMA3),
    "qwen2.5-1.5b": _shape("qwen2", 1536, 28, 12, 2, 8960, 151936, **_QWEN2),
    "tinyllama-1.1b": _shape("llama", 2048, 22, 32, 4, 5632, 32000, **_LLAMA2),
    "tiny": _shape("llama", 256, 3, 4, 2, 512, 1024, **_LLAMA2),
}
"""`tiny` is for tests."""


@dataclass(frozen=True)
class _Placed:
    """A tensor, and where in the ring it begins."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        return _ITEM * prod(self.shape)


def tensor_shapes(name: str, layers: int | None = None) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's tensors by their names in transformers, a tied output left out."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_config(SHAPES[name], layers))
    return {key: tuple(weight.shape) for key, weight in model.named_parameters()}


def weight_bytes(name: str, layers: int | None = None) -> int:
    """Of all tensors."""
    return sum(_ITEM * prod(shape) for shape in tensor_shapes(name, layers).values())


def write_shape(name: str, folder: Path, layers: int | None = None, seed: int = 0, shard_bytes: int = _SHARD) -> Path:
    """Write the model called `name`, or its first `layers`, to `folder`; the same weights for the same seed."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    config = _config(SHAPES[name], layers)
    tensors = [_Placed(key, shape, rng.randrange(_RING)) for key, shape in tensor_shapes(name, layers).items()]
    shards: list[list[_Placed]] = [[]]
    for one in tensors:
        if shards[-1] and sum(other.bytes for other in shards[-1]) + one.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(one)
    drawn = torch.randn(_RING, generator=torch.Generator().manual_seed(seed))
    # What is added to the residual is small, for as many layers as there are.
    damped = _STD / sqrt(2 * config.num_hidden_layers)
    rings = {std: _bytes((std * drawn).bfloat16()) for std in (_STD, damped)}
    ones = _bytes(torch.ones(_RING).bfloat16())
    del drawn

    def content(one: _Placed) -> memoryview:
        if one.name.endswith("norm.weight"):
            return ones
        return rings[damped if one.name.endswith(("o_proj.weight", "down_proj.weight")) else _STD]

    count = len(shards)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    if count == 1:
        names = ["model.safetensors"]
    else:
        index = {one.name: file for file, shard in zip(names, shards, strict=True) for one in shard}
        total = {"total_size": sum(one.bytes for one in tensors)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": total, "weight_map": index}))

    def write(file: str, shard: list[_Placed]) -> None:
        with (folder / file).open("wb") as out:
            out.write(_header(shard))
            for one in shard:
                for part in _around(content(one), _ITEM * one.start, one.bytes):
                    out.write(part)

    with ThreadPoolExecutor(min(count, 8)) as pool:
        list(pool.map(write, names, shards))
    config.save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)
    return folder


def _config(shape: Shape, layers: int | None) -> Any:
    if layers is not None and not 1 <= layers <= shape.layers:
        raise SystemExit(f"--layers {layers}: give 1 to {shape.layers}")
    config_class = CONFIG_MAPPING[shape.kind]
    # transformers writes into the objects that it is given.
    fields = json.loads(json.dumps(shape.fields)) | {"num_hidden_layers": layers or shape.layers}
    config = config_class(**fields, bos_token_id=0, eos_token_id=1, pad_token_id=None, dtype="bfloat16")
    config.architectures = [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[shape.kind]]
    return config


def _bytes(values: Tensor) -> memoryview:
    return values.view(torch.uint8).numpy().data


def _around(ring: memoryview, start: int, count: int) -> Iterator[memoryview]:
    """`count` bytes of the ring from `start` on."""
    while count > 0:
        part = ring[start : start + count]
        yield part
        count -= len(part)
        start = 0


def _header(shard: list[_Placed]) -> bytes:
    """What a safetensors file has in front of its tensors: the size of a JSON text, and that text."""
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for one in shard:
        begin, end = end, end + one.bytes
        described[one.name] = {"dtype": "BF16", "shape": one.shape, "data_offsets": [begin, end]}
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder")
    parser.add_argument("--layers", type=int, help="only so many")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.monotonic()
    write_shape(args.shape, args.output, args.layers, args.seed)
    written, seconds = weight_bytes(args.shape, args.layers), time.monotonic() - start
    print(f"{args.output}: {written / 1e9:.2f} GB of weights in {seconds:.1f} s ({written / 1e9 / seconds:.2f} GB/s)")


if __name__ == "__main__":
    main()

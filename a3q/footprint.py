"""What running a model takes, from its dimensions and the sizes of its tensors: memory, arithmetic, and which of the
runtime's fast paths it can take. No weight is read.

Memory of the cache and of the compute buffer follows llama.cpp (`llama_kv_cache`, `graph_reserve`), checked against its
own report.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from a3q.errors import InputError
from a3q.families import Family
from a3q.hf.layout import top_parts
from a3q.model import LayerShape, ModelConfig

CACHE_TYPES = ("f16", "q8_0", "q4_0")
"""Types of a KV cache."""
CACHE_BLOCK = 32
"""Values of a head that a quantized cache stores together; the head size must be a multiple of it."""
CACHE_STEP = 256
"""llama.cpp rounds a context up to a multiple of it."""
_BATCH = 512
"""Tokens that llama.cpp runs at once unless told (`--ubatch-size`)."""
_FLOAT = 4

_FLASH_CUDA = (40, 64, 72, 80, 96, 112, 128, 256)
_FLASH_METAL = (*_FLASH_CUDA, 32, 48, 192)
VECTORS = {"AVX-512": 64, "AVX2": 32, "ARM": 32}
"""Values that llama.cpp's dot product of half floats takes at once on a CPU (`GGML_F16_STEP`); what a head has beyond a
multiple goes one by one. With AVX-512, behind 4096 tokens, SmolLM2 with heads of 48 wrote 10.7 tokens a second and with
heads of 64 41.6."""
BACKENDS = ("CPU", "CUDA", "Metal", "Vulkan")
"""Of llama.cpp."""


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor; shape in Hugging Face order, with whole blocks for quantized types."""

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return prod(self.shape)


@dataclass(frozen=True)
class TypeTotal:
    """All tensors of one type."""

    type: str
    tensors: int
    parameters: int
    bytes: int


def totals(tensors: Iterable[TensorInfo]) -> tuple[TypeTotal, ...]:
    """By type, the largest first."""
    groups: dict[str, list[TensorInfo]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.type, []).append(tensor)
    found = [
        TypeTotal(kind, len(group), sum(one.parameters for one in group), sum(one.bytes for one in group))
        for kind, group in groups.items()
    ]
    return tuple(sorted(found, key=lambda total: -total.bytes))


@dataclass(frozen=True)
class Use:
    """How a model is going to be run."""

    context: int
    """Tokens of each sequence."""
    cache_type: str = "f16"
    """Of keys and values, one of `CACHE_TYPES`."""
    parallel: int = 1
    """Sequences at once, each with a context of its own."""

    def check(self) -> None:
        """InputError for a value out of range."""
        if self.context < 1:
            raise InputError(f"--ctx {self.context}: give a positive number of tokens")
        if self.parallel < 1:
            raise InputError(f"--parallel {self.parallel}: give a positive number of sequences")
        check_cache_type(self.cache_type)


def check_cache_type(name: str) -> None:
    """InputError unless llama.cpp has such a cache and a3q can tell its size."""
    if name not in CACHE_TYPES:
        raise InputError(f"--kv-type {name}: give {', '.join(CACHE_TYPES)}")


@dataclass(frozen=True)
class Footprint:
    """What a model takes, run as told. Sizes in bytes."""

    parameters: int
    file_bytes: int
    types: tuple[TypeTotal, ...]
    """Of the stored tensors."""
    cache_type: str
    context: int
    parallel: int
    kv_bytes_per_token: float
    """Keys and values of all layers."""
    kv_bytes: int
    """At the context, for all sequences."""
    compute_bytes: int
    """Estimate of llama.cpp's compute buffer, with flash attention and 512 tokens at once."""
    prompt_flops: float
    """Floating-point operations a token, in the mean over a prompt as long as the context."""
    generation_flops: float
    """The same for one generated token behind a full context."""
    generation_bytes: float
    """Weights and cache that are read for it."""
    head_sizes: tuple[int, ...]
    """Sizes of key and value heads, ascending."""
    flash_attention: tuple[str, ...]
    """Backends of llama.cpp whose flash attention takes the heads of every layer."""
    quantized_cache: bool
    """Whether llama.cpp can start with a cache of type q8_0 or q4_0."""
    vectorized: tuple[str, ...]
    """Instruction sets of CPUs on which attention over this cache runs at full speed, of `VECTORS`."""

    @property
    def memory(self) -> int:
        """Weights, cache and compute buffer."""
        return self.file_bytes + self.kv_bytes + self.compute_bytes


@dataclass(frozen=True)
class Speedup:
    """How much faster a model may become: what limits a prompt is arithmetic, and a generated token the memory's
    bandwidth."""

    prompt: float
    generation: float

    @classmethod
    def of(cls, before: Footprint, after: Footprint) -> Speedup:
        """By as much as less is computed, and read."""
        return cls(before.prompt_flops / after.prompt_flops, before.generation_bytes / after.generation_bytes)


def footprint(
    family: Family, config: ModelConfig, tensors: Sequence[TensorInfo], file_bytes: int, parameters: int, use: Use
) -> Footprint:
    """Of a model whose file holds `tensors`, of which `file_bytes` with metadata."""
    heads = tuple(sorted({size for shape in config.layers for size in (shape.qk_head_dim, shape.v_head_dim)}))
    layers = _layer_flops(family, tensors)
    return Footprint(
        parameters=parameters,
        file_bytes=file_bytes,
        types=totals(tensors),
        cache_type=use.cache_type,
        context=use.context,
        parallel=use.parallel,
        kv_bytes_per_token=config.kv_bytes_per_token(element_bytes(use.cache_type)),
        kv_bytes=cache_bytes(config, use.context, use.cache_type, use.parallel),
        compute_bytes=compute_bytes(family, config, use.context),
        prompt_flops=layers
        + sum(_attention_flops(config, shape, _mean_seen(shape, use.context)) for shape in config.layers),
        generation_flops=layers
        + 2.0 * config.vocab_size * config.hidden_size
        + sum(_attention_flops(config, shape, _seen(shape, use.context)) for shape in config.layers),
        generation_bytes=_weights_read(family, tensors) + _cache_read(config, use),
        head_sizes=heads,
        flash_attention=tuple(name for name in BACKENDS if all(name in flash_attention_backends(n) for n in heads)),
        quantized_cache=can_quantize_cache(config),
        vectorized=tuple(
            name for name, step in VECTORS.items() if use.cache_type != "f16" or all(n % step == 0 for n in heads)
        ),
    )


def limits(before: Footprint, after: Footprint) -> list[str]:
    """What the runtime will do worse than with the model as it was, in words."""
    sizes = ", ".join(map(str, after.head_sizes))
    found = []
    missing = [name for name in BACKENDS if name not in after.flash_attention]
    if after.cache_type != "f16" and missing:
        found.append(
            f"a {after.cache_type} cache needs flash attention, which {', '.join(missing)} has not for heads of "
            f"{sizes}; there it runs on the CPU"
        )
    elif lost := [name for name in missing if name in before.flash_attention]:
        found.append(f"{', '.join(lost)} has no flash attention for heads of {sizes}")
    if slow := [name for name in VECTORS if name in before.vectorized and name not in after.vectorized]:
        steps = ", ".join(f"{VECTORS[name]} ({name})" for name in slow)
        found.append(
            f"heads of {sizes} are no multiple of {steps}, which llama.cpp's attention on such CPUs takes at once: "
            "behind a long context it is several times slower; a q8_0 or q4_0 cache is not, where it starts"
        )
    return found


def element_bytes(cache_type: str) -> float:
    """Bytes of one value in a cache of this type, its share of a block's scale included."""
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[cache_type.upper()]]
    return float(size) / float(values)


def can_quantize_cache(config: ModelConfig) -> bool:
    """Whether llama.cpp can start with a cache of type q8_0 or q4_0."""
    return all(size % CACHE_BLOCK == 0 for shape in config.layers for size in (shape.qk_head_dim, shape.v_head_dim))


def padded_context(tokens: int) -> int:
    """Positions that llama.cpp makes room for."""
    return -(-tokens // CACHE_STEP) * CACHE_STEP


def cache_bytes(config: ModelConfig, context: int, kv_type: str = "f16", parallel: int = 1) -> int:
    """Bytes that llama.cpp takes for keys and values of `parallel` sequences of `context` tokens each.

    A layer with a sliding window keeps the window and one batch.
    """
    cells = sum(_cells(shape, context) * (shape.qk_head_dim + shape.v_head_dim) for shape in config.layers)
    return round(parallel * cells * config.num_key_value_heads * element_bytes(kv_type))


def _cells(shape: LayerShape, context: int) -> int:
    """Positions that llama.cpp keeps of a sequence for one layer."""
    if shape.sliding_window is None:
        return padded_context(context)
    return min(padded_context(context), padded_context(shape.sliding_window + _BATCH))


def compute_bytes(family: Family, config: ModelConfig, context: int) -> int:
    """Estimate of llama.cpp's compute buffer for 512 tokens at once, with flash attention.

    The largest of what is alive together: the logits and two copies of the hidden states; or the attention masks (one
    of the layers with a sliding window, one of those without) in half floats with an MLP's two or, if it has a gate,
    three inner activations and four copies of the hidden states.
    """
    batch = min(_BATCH, context)
    hidden, units = config.hidden_size, config.widest.intermediate_size
    output = batch * (config.vocab_size + 2 * hidden) * _FLOAT
    mask = batch * 2 * sum({shape.sliding_window: _cells(shape, context) for shape in config.layers}.values())
    inner = 3 if any(role.name == "gate" for role in family.layer) else 2
    layer = batch * (inner * units + 4 * hidden) * _FLOAT
    return max(output, mask + layer)


def _names_outside(family: Family, roles: Iterable[str] | None = None) -> set[str]:
    """What weights outside the layers (those of `roles`) are called, in whatever format."""
    known = {role.name for role in family.top} if roles is None else set(roles)
    own = {part.name for part in top_parts(family, known)}
    return own | {name for role in family.top if role.name in known for name in (role.gguf, role.hf)}


def _layer_flops(family: Family, tensors: Sequence[TensorInfo]) -> float:
    """A multiplication and an addition for every weight of the layers' matrices; norms and activations are left out."""
    outside = _names_outside(family)
    return 2.0 * sum(one.parameters for one in tensors if len(one.shape) > 1 and one.name not in outside)


def _seen(shape: LayerShape, context: int) -> float:
    """Positions that the last token of a context sees."""
    return float(context if shape.sliding_window is None else min(context, shape.sliding_window))


def _mean_seen(shape: LayerShape, context: int) -> float:
    """Positions that a token of a context sees in the mean."""
    window = _seen(shape, context)
    return (window * (window + 1) / 2 + (context - window) * window) / context


def _attention_flops(config: ModelConfig, shape: LayerShape, seen: float) -> float:
    return 2.0 * config.num_attention_heads * (shape.qk_head_dim + shape.v_head_dim) * seen


def _weights_read(family: Family, tensors: Sequence[TensorInfo]) -> float:
    """Bytes of all tensors but an embedding of which one row is read."""
    outputs = _names_outside(family, ("output",))
    # Without an output of its own the embedding serves as one, all of which is read.
    tied = all(tensor.name not in outputs for tensor in tensors)
    rows = _names_outside(family, ("positions",) if tied else ("embed", "positions"))
    return float(sum(tensor.bytes for tensor in tensors if tensor.name not in rows))


def _cache_read(config: ModelConfig, use: Use) -> float:
    size = element_bytes(use.cache_type) * config.num_key_value_heads
    return sum(_seen(one, use.context) * (one.qk_head_dim + one.v_head_dim) * size for one in config.layers)


def flash_attention_backends(head_dim: int) -> tuple[str, ...]:
    """Backends of llama.cpp whose flash attention takes this size of key and value heads, as of late 2026."""
    takes = {
        "CPU": True,
        "CUDA": head_dim in _FLASH_CUDA,
        "Metal": head_dim in _FLASH_METAL,
        "Vulkan": head_dim % 8 == 0,
    }
    return tuple(backend for backend, taken in takes.items() if taken)

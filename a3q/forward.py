"""The decoder's forward pass as functions on weights by role, so that any head size and frequency list can run.

Checked against transformers and llama.cpp by the tests. Activations are float32 row vectors `[batch, time, hidden]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from a3q.batching import Batches
from a3q.model import Layer, LayerShape, Model, ModelConfig
from a3q.pieces import activated, pieces

Observer = Callable[[str, Tensor], None]
"""Receives `q`, `k` before RoPE (`[B, heads, T, qk_head_dim]`), `v` and `o` (`[B, heads, T, v_head_dim]`) and `m` (`[B,
T, F]`); of a whole block also what attention and MLP read, `attn_in` and `mlp_in` (`[B, T, hidden]`)."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Attention of one position, as `a3q.decode_triton.attend` has it."""


def to_device(layer: Layer, device: torch.device) -> Layer:
    """The same weights on `device`, float32, into which they are turned there: the way to it is slow."""
    return {role: weight.to(device).to(torch.float32) for role, weight in layer.items()}


def compute_dtype(device: torch.device, hidden_size: int) -> torch.dtype:
    """What activations are computed in where there are many: bfloat16 where the hardware has it, else float32.

    Models with small matrices gain nothing from it on a CPU.
    """
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = hidden_size >= _WORTH_IT and _cpu_has_bfloat16()
    return torch.bfloat16 if fast else torch.float32


_WORTH_IT = 512


@lru_cache
def _cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices by itself: 4 times as fast as float32 with AVX-512."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(f" {flag} " in flags for flag in ("avx512_bf16", "amx_bf16"))


def lowered(w: Layer, dtype: torch.dtype) -> Layer:
    """The same weights with matrices of `dtype`, which the functions below then compute in; the rest stays float32.

    Contiguous, so that the same weights give the same bits wherever they come from.
    """
    return {role: weight.to(dtype).contiguous() if weight.dim() == 2 else weight for role, weight in w.items()}


class AdaptedLayer(dict[str, Tensor]):
    """A `Layer` in which some products are not by the weight alone."""

    def __init__(self, weights: Layer, products: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        """`products`: by the weight's role, what takes the place of multiplying by it and adding its bias."""
        super().__init__(weights)
        self.products = products


def _linear(w: Layer, name: str, x: Tensor) -> Tensor:
    weight, bias = w[name], w.get(f"{name}_bias")
    if isinstance(w, AdaptedLayer) and name in w.products:
        return w.products[name](x.to(weight.dtype))
    return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))


@dataclass(frozen=True)
class Rope:
    """Cosine and sine of each pair's angle, `[lists, T, m]`; pair `p` of a head is (`p`, `p + m`), the rest stays."""

    cos: Tensor
    sin: Tensor

    def window(self, start: int | Tensor, length: int) -> Rope:
        """The same rotation for `length` positions from `start` on only."""
        return Rope(_window(self.cos, 1, start, length), _window(self.sin, 1, start, length))

    def __call__(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """`[B, heads, T, qk_head_dim]` turned, of `dtype`; where each key head has a list, its query heads share it."""
        if self.cos.shape[-1] == 0:
            return x.to(dtype)
        cos, sin = self.cos, self.sin
        if len(cos) not in (1, x.shape[1]):
            cos, sin = (part.repeat_interleave(x.shape[1] // len(part), dim=0) for part in (cos, sin))
        return pieces().rotate(x, cos, sin, dtype)


def _window(x: Tensor, dim: int, start: int | Tensor, length: int) -> Tensor:
    """Entries `start … start + length` of a dimension; a start that is a tensor may change in a recorded graph."""
    if isinstance(start, int):
        return x.narrow(dim, start, length)
    return x.index_select(dim, start + torch.arange(length, device=x.device))


@lru_cache(maxsize=256)
def rope(frequencies: tuple[tuple[float, ...], ...], length: int, device: torch.device) -> Rope:
    """Rotation for positions `0 … length`, kept for the next layer with the same frequencies."""
    with torch.inference_mode(False):
        lists = torch.tensor(frequencies or ((),), dtype=torch.float64)
        angles = torch.arange(length, dtype=torch.float64)[:, None] * lists[:, None]
        return Rope(torch.cos(angles).float().to(device), torch.sin(angles).float().to(device))


class KeyValueCache:
    """Keys and values of one layer for up to `capacity` positions, for generation."""

    def __init__(
        self,
        config: ModelConfig,
        shape: LayerShape,
        batch: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        heads = config.num_key_value_heads
        self.keys = torch.empty(batch, heads, capacity, shape.qk_head_dim, device=device, dtype=dtype)
        self.values = torch.empty(batch, heads, capacity, shape.v_head_dim, device=device, dtype=dtype)
        self.capacity = capacity
        self.start: int | Tensor = 0
        """Position that comes next; an int64 `[1]` after `follow`."""
        self.attend: Callable[[Tensor], Tensor] | None = None
        """Attention of the position's queries to keys as far as they go; else to all that `append` returns."""
        self._seen = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new positions and return all so far; after `follow` one position, and all that may be seen."""
        if isinstance(self.start, Tensor):
            self.keys.index_copy_(2, self.start, k)
            self.values.index_copy_(2, self.start, v)
        else:
            end = self.start + k.shape[2]
            self.keys[:, :, self.start : end] = k
            self.values[:, :, self.start : end] = v
            self.start = self._seen = end
        return self.keys[:, :, : self._seen], self.values[:, :, : self._seen]

    def follow(self, start: Tensor, seen: int, attend: Attend | None = None) -> None:
        """Take single positions from now on, each at `start` `[1]`, which the caller moves on.

        What runs is then the same for all positions below `seen`, as a CUDA graph needs it.
        """
        if isinstance(self.start, int):
            # Masked, but what is no number would come through a product with zero.
            self.keys[:, :, self.start :] = 0
            self.values[:, :, self.start :] = 0
        self.start, self._seen = start, seen
        # Of the tensors and not of the cache itself, which would stay until garbage is collected.
        keys, values = self.keys, self.values
        self.attend = None if attend is None else lambda queries: attend(queries, keys, values, start)


def norm(config: ModelConfig, w: Layer, role: str, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The norm called `role` over the last dimension, in `dtype`; a layer that lacks it leaves `x` as it is."""
    weight = w.get(role)
    if weight is None:
        return x
    if config.norm == "layer":
        return F.layer_norm(x.float(), weight.shape, weight, w.get(f"{role}_bias"), config.norm_eps).to(dtype)
    return pieces().rms_norm(x, weight, config.norm_eps, dtype)


def head_norm(config: ModelConfig, weight: Tensor, x: Tensor) -> Tensor:
    """Norm of queries or keys `[B, heads, T, d]` as `config.qk_norm` says; `weight` `[d]` or `[heads · d]`."""
    over = (1, 3) if config.qk_norm == "all" else (3,)
    scale = (x.square().mean(over, keepdim=True) + config.norm_eps).rsqrt()
    return x * scale * weight.view(-1, 1, x.shape[-1])


def only_causal(config: ModelConfig, shape: LayerShape, keys: int) -> bool:
    """Whether of `keys` positions each looks at all up to itself, and at all alike."""
    windowed = shape.sliding_window is not None and shape.sliding_window < keys
    return not windowed and not config.alibi_slopes


def score_bias(
    config: ModelConfig, shape: LayerShape, start: int | Tensor, queries: int, keys: int, device: torch.device
) -> Tensor | None:
    """What is added to the scores of queries from position `start` on, `[heads or 1, queries, keys]`.

    None where the queries are the last of the keys and the causal mask is all there is.
    """
    if isinstance(start, int) and only_causal(config, shape, keys):
        return None
    distance = (start + torch.arange(queries, device=device))[:, None] - torch.arange(keys, device=device)
    hidden = distance < 0
    if shape.sliding_window is not None:
        hidden |= distance >= shape.sliding_window
    slopes = _slopes(config.alibi_slopes or (0.0,), device)
    return (-slopes[:, None, None] * distance).masked_fill(hidden, -math.inf)


@lru_cache
def _slopes(slopes: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(slopes, device=device)


def attention_inner(
    config: ModelConfig,
    shape: LayerShape,
    w: Layer,
    x: Tensor,
    observe: Observer | None = None,
    cache: KeyValueCache | None = None,
) -> Tensor:
    """What the output projection of causal self-attention on normed `x` reads, `[B, T, heads · v_head_dim]`."""
    B, T, _ = x.shape
    start, capacity = (0, T) if cache is None else (cache.start, cache.capacity)

    # Once, not by each of the three products.
    x = x.to(w["q"].dtype)

    def heads(name: str, count: int, size: int) -> Tensor:
        return _linear(w, name, x).view(B, T, count, size).transpose(1, 2)

    q = heads("q", config.num_attention_heads, shape.qk_head_dim)
    k = heads("k", config.num_key_value_heads, shape.qk_head_dim)
    v = heads("v", config.num_key_value_heads, shape.v_head_dim)
    if config.qk_norm is not None:
        q, k = head_norm(config, w["q_norm"], q), head_norm(config, w["k_norm"], k)
    if observe is not None:
        observe("q", q)
        observe("k", k)
        observe("v", v)
    turn = rope(shape.frequencies, capacity, x.device).window(start, T)
    q, k = turn(q, v.dtype), turn(k, v.dtype)
    if cache is not None:
        k, v = cache.append(k, v)
    attend = None if cache is None else cache.attend
    bias = None if attend is not None else score_bias(config, shape, start, T, k.shape[2], x.device)
    bias = None if bias is None else bias.to(v.dtype)
    if T == 1:
        # The queries that share a key head are as good as several positions, and no key is copied for them.
        groups, shared = config.num_key_value_heads, config.queries_per_group
        grouped = q.reshape(B, groups, shared, -1)
        if bias is not None and len(bias) > 1:
            bias = bias.reshape(groups, shared, -1)
        o = F.scaled_dot_product_attention(grouped, k, v, bias) if attend is None else attend(grouped)
        o = o.reshape(B, config.num_attention_heads, 1, -1)
    else:
        o = F.scaled_dot_product_attention(
            q,
            k,
            v,
            bias,
            is_causal=bias is None,
            enable_gqa=config.queries_per_group > 1,
        )
    if observe is not None:
        observe("o", o)
    return o.transpose(1, 2).reshape(B, T, -1)


def project(w: Layer, rows: Tensor) -> Tensor:
    """The output projection of attention on what `attention_inner` gives."""
    return _linear(w, "o", rows)


def attention(
    config: ModelConfig,
    shape: LayerShape,
    w: Layer,
    x: Tensor,
    observe: Observer | None = None,
    cache: KeyValueCache | None = None,
) -> Tensor:
    """Causal self-attention of normed `x`, output projection included, a norm behind it not."""
    return project(w, attention_inner(config, shape, w, x, observe, cache))


def mlp_inner(config: ModelConfig, w: Layer, x: Tensor) -> Tensor:
    """What the down projection of the MLP on normed `x` reads, `[B, T, F]`."""
    x = x.to(w["up"].dtype)
    m = _linear(w, "up", x)
    if "gate" not in w:
        return activated(config.activation, m)
    return pieces().gated(config.activation, _linear(w, "gate", x), m)


def mlp_output(w: Layer, m: Tensor) -> Tensor:
    """The down projection on what `mlp_inner` gives."""
    return _linear(w, "down", m)


def mlp(config: ModelConfig, w: Layer, x: Tensor, observe: Observer | None = None) -> Tensor:
    """MLP of normed `x`, gated where the layer has a gate; a norm behind it is not included."""
    m = mlp_inner(config, w, x)
    if observe is not None:
        observe("m", m)
    return mlp_output(w, m)


def block(
    config: ModelConfig,
    shape: LayerShape,
    w: Layer,
    x: Tensor,
    cache: KeyValueCache | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """One decoder layer, `[B, T, hidden]` to the same shape. A cache may hold earlier positions only when T is 1."""
    # What observes may want more digits than the products.
    dtype = w["q"].dtype if observe is None else torch.float32
    read = norm(config, w, "attn_norm", x, dtype)
    if observe is not None:
        observe("attn_in", read)
    y = pieces().add(x, norm(config, w, "attn_post_norm", attention(config, shape, w, read, observe, cache)))
    read = norm(config, w, "mlp_norm", x if config.parallel_residual else y, dtype)
    if observe is not None:
        observe("mlp_in", read)
    return pieces().add(y, norm(config, w, "mlp_post_norm", mlp(config, w, read, observe)))


def embed(model: Model, tokens: Tensor, start: int | Tensor = 0) -> Tensor:
    """Hidden states `[B, T, hidden]` of `tokens` `[B, T]` at positions from `start` on, where the embedding is kept."""
    x = F.embedding(tokens, model.embed).float() * model.config.embedding_scale
    positions = model.top.get("positions")
    return x if positions is None else x + _window(positions, 0, start, tokens.shape[1])


@torch.inference_mode()
def run_layer(config: ModelConfig, shape: LayerShape, w: Layer, x: Tensor, device: torch.device) -> None:
    """Replace the hidden states `x` `[B, T, hidden]`, kept where they are, by this layer's output, batch by batch."""

    def pass_through(part: slice) -> None:
        x[part] = block(config, shape, w, x[part].to(device)).to(x.device)

    Batches(config, x.shape[1], device).each(len(x), pass_through)


@torch.inference_mode()
def hidden_states(
    model: Model, tokens: Tensor, device: torch.device, on_layer: Callable[[], None] | None = None
) -> Tensor:
    """Final, normed hidden states `[B, T, hidden]` (CPU) of `tokens` `[B, T]`; each layer is loaded once."""
    config = model.config
    x = embed(model, tokens)
    for shape, layer in zip(config.layers, model.layers, strict=True):
        run_layer(config, shape, to_device(layer, device), x, device)
        if on_layer is not None:
            on_layer()
    return norm(config, model.top, "final_norm", x)


@torch.inference_mode()
def output_logits(model: Model, hidden: Tensor, device: torch.device) -> Tensor:
    """Logits `[..., vocab_size]` (on `device`) of final hidden states `[..., hidden]`."""
    return F.linear(hidden.to(device), model.output.to(device, torch.float32))

"""Reduce a model's inner dimensions, layer by layer.

The paper's method needs one stream of hidden states, the original model's. a3q's own runs two: the *reference* stream
is the original, the *reduced* stream runs the layers already reduced, and every moment is measured on it, so that each
layer is fitted to the inputs it will really see. After A3's own step (`a3q/components.py`) the output and down
projections are refitted to a target half way between what the original layer would make of the reduced stream and what
would lead the reduced stream back to the reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from a3q.components import Method, even_heads, reduce_mlp, reduce_ov, reduce_qk, spread_norms
from a3q.fit import InputMoments, OutputFit
from a3q.fit import target as target_of
from a3q.forward import batches, embed, norm, to_device
from a3q.model import Layer, LayerShape, Model, ModelConfig
from a3q.quantize import LayerRounding, Quantization
from a3q.solve.grid import Blocks
from a3q.statistics import AttentionStatistics, Moment
from a3q.store import LayerStore
from a3q.stream import Stream

MLP = ("gate", "up", "down")
"""Roles of an MLP's matrices."""


@dataclass(frozen=True)
class Dimensions:
    """Inner dimensions that a layer is reduced to."""

    qk_head_dim: int
    v_head_dim: int
    intermediate_size: int

    @classmethod
    def of(cls, shape: LayerShape) -> Dimensions:
        """Those of a layer as it is."""
        return cls(shape.qk_head_dim, shape.v_head_dim, shape.intermediate_size)


def planned(config: ModelConfig, dimensions: Sequence[Dimensions]) -> ModelConfig:
    """`config` with these dimensions; which RoPE frequencies stay is not known yet, only how many."""
    shapes = []
    for shape, new in zip(config.layers, dimensions, strict=True):
        pairs = shape.pairs * new.qk_head_dim // shape.qk_head_dim
        frequencies = tuple(one[:pairs] for one in shape.frequencies)
        shapes.append(LayerShape(**vars(new), frequencies=frequencies, sliding_window=shape.sliding_window))
    return dataclasses.replace(config, layers=tuple(shapes))


@dataclass(frozen=True)
class LayerLosses:
    """Share of each component's functional energy that one layer lost before the refit; 0 if it was left alone."""

    qk: float = 0.0
    ov: float = 0.0
    mlp: float = 0.0


@dataclass(frozen=True)
class Reduction:
    """A reduced model, and what each layer lost."""

    model: Model
    losses: list[LayerLosses]
    layers: LayerStore | None = None
    """The reduced layers with what was rounded in them; None where the model is the original itself."""
    top: Mapping[str, Blocks] = field(default_factory=dict)
    """What was rounded outside the layers."""
    rounding_losses: Sequence[Mapping[str, float]] = ()
    """Share of the output energy that rounding cost each weight of each layer, by role."""

    def blocks(self, layer: int | None, role: str) -> Blocks | None:
        """A rounded weight (`layer` None: outside the layers); None where it was not rounded."""
        if layer is None:
            return self.top.get(role)
        return None if self.layers is None else self.layers.blocks(layer).get(role)


@torch.inference_mode()
def reduce(
    model: Model,
    tokens: Tensor,
    dimensions: Sequence[Dimensions],
    device: torch.device,
    memory_budget: int,
    method: Method = Method(),  # noqa: B008 (immutable)
    on_layer: Callable[[], None] = lambda: None,
    quantization: Quantization | None = None,
    mlp_stays: bool = False,
) -> Reduction:
    """`model` with each layer under its `dimensions`, and rounded if so told, calibrated on `tokens` `[B, T]`.

    Reduced layers beyond `memory_budget` bytes wait on disk. With `mlp_stays` an MLP is only touched to be rounded;
    otherwise it is fitted to the attention before it even where its size stays. ValueError for rounding with a
    `method` that fits nothing.
    """
    if quantization is not None and not method.fitted:
        raise ValueError(f"method {method.name} does not follow what rounding does to the layers before")
    normed_apart = model.config.qk_norm == "head" and any(
        new.qk_head_dim < old.qk_head_dim for new, old in zip(dimensions, model.config.layers, strict=True)
    )
    config = dataclasses.replace(model.config, qk_norm="heads") if normed_apart else model.config
    quantization = quantization or Quantization([{}] * len(model.config.layers))
    outside = LayerRounding(quantization.top, quantization.nearest, str(model.source.path))
    top = dict(model.top)
    x = embed(model, tokens)
    x = x.to(_home(x.nbytes, device))
    reference = Stream(model.config, x, device)
    y = x.clone()
    if "embed" in quantization.top and not model.config.tie_word_embeddings:
        # Tokens pick rows of it; all columns count the same.
        top["embed"] = model.embed.to(device)
        outside.apply(top, ("embed",), torch.eye(model.config.hidden_size, device=device))
        top["embed"] = top["embed"].to(model.embed.device)
        y = embed(dataclasses.replace(model, top=top), tokens).to(x.device)
    reduced = Stream(config, y, device) if method.fitted else None
    layers = LayerStore(memory_budget)
    shapes, losses, rounding_losses = [], [], []
    for i, (shape, target, w) in enumerate(zip(model.config.layers, dimensions, model.layers, strict=True)):
        w = to_device(w, device)
        rounding = LayerRounding(quantization.layers[i], quantization.nearest, f"{model.source.path}: layer {i}")
        if normed_apart:
            # The forward pass makes the same of copies, so both streams may run on them.
            spread_norms(model.config, w)
        if reduced is None:
            layer, new_shape, loss = reduce_plainly(w, shape, target, reference, method)
        else:
            streams = _Streams(reference, reduced)
            layer, new_shape, loss = reduce_fitted(w, shape, target, streams, method, rounding, mlp_stays)
        layers.append(to_device(layer, model.embed.device), rounding.blocks)
        shapes.append(new_shape)
        losses.append(loss)
        rounding_losses.append(rounding.losses)
        on_layer()
    if reduced is not None:
        _round_output(model.config, top, reduced, outside)
    found = dataclasses.replace(
        model,
        config=dataclasses.replace(config, layers=tuple(shapes)),
        layers=layers,
        top=to_device(top, model.embed.device),
    )
    return Reduction(found, losses, layers, outside.blocks, rounding_losses)


def _round_output(config: ModelConfig, top: Layer, stream: Stream, rounding: LayerRounding) -> None:
    """The output weight for the states that reach it; tied, it is the embedding as well."""
    role = "embed" if config.tie_word_embeddings else "output"
    if role not in rounding.grids:
        return
    inputs = InputMoments(config.hidden_size, stream.device)
    last = to_device({name: weight for name, weight in top.items() if name.startswith("final_norm")}, stream.device)
    for part in batches(config, stream.x.shape[0], stream.x.shape[1]):
        inputs.add(norm(config, last, "final_norm", stream.part(part)))
    top[role] = top[role].to(stream.device)
    rounding.apply(top, (role,), inputs.gram())


def _home(stream_bytes: int, device: torch.device) -> torch.device:
    """Where hidden states are kept: on a GPU that has ample room for both streams and what is made of them."""
    if device.type == "cuda" and 8 * stream_bytes < torch.cuda.mem_get_info(device)[0]:
        return device
    return torch.device("cpu")


@dataclass(frozen=True)
class _Streams:
    """The original's hidden states, and those behind the layers already reduced."""

    reference: Stream
    reduced: Stream


def reduce_plainly(
    w: Layer, shape: LayerShape, target: Dimensions, reference: Stream, method: Method
) -> tuple[Layer, LayerShape, LayerLosses]:
    """One layer as the paper does it, on the original's own activations; the stream moves on through the original."""
    config, (B, T, _) = reference.config, reference.x.shape
    new = dict(w)
    statistics = AttentionStatistics(config, shape, T, reference.device)
    reference.begin_layer()
    for part in batches(config, B, T):
        reference.add(part, w, "attn_post_norm", reference.attention(shape, w, part, statistics))
    new_shape, qk, ov = _reduce_attention(config, shape, target, new, statistics, method)

    units, lost = shape.intermediate_size, 0.0
    gram = Moment(units, units, device=reference.device)
    for part in batches(config, B, T):
        seen: dict[str, Tensor] = {}
        reference.add(part, w, "mlp_post_norm", reference.mlp(w, part, seen.__setitem__))
        if target.intermediate_size < units:
            gram.add(seen["m"].flatten(0, 1))
    if target.intermediate_size < units:
        _, lost = reduce_mlp(new, gram.mean(), target.intermediate_size, method)
    return new, new_shape, LayerLosses(qk, ov, lost)


def reduce_fitted(
    w: Layer,
    shape: LayerShape,
    target: Dimensions,
    streams: _Streams,
    method: Method,
    rounding: LayerRounding,
    mlp_stays: bool = False,
) -> tuple[Layer, LayerShape, LayerLosses]:
    """One layer as a3q does it, rounded as it goes; both streams move on through it. See `reduce` for `mlp_stays`."""
    new = dict(w)
    streams.reference.begin_layer()
    streams.reduced.begin_layer()
    new_shape, qk, ov = _fit_attention(w, new, shape, target, streams, method, rounding)
    if mlp_stays and rounding.grids.keys().isdisjoint(MLP):
        for part in batches(streams.reduced.config, *streams.reduced.x.shape[:2]):
            for stream in (streams.reference, streams.reduced):
                stream.add(part, w, "mlp_post_norm", stream.mlp(w, part))
        return new, new_shape, LayerLosses(qk, ov, 0.0)
    lost = _fit_mlp(w, new, shape, target, streams, method, rounding)
    return new, new_shape, LayerLosses(qk, ov, lost)


def _reduce_attention(
    config: ModelConfig,
    shape: LayerShape,
    target: Dimensions,
    w: Layer,
    statistics: AttentionStatistics,
    method: Method,
) -> tuple[LayerShape, float, float]:
    """QK and OV of one layer in place, where their sizes shrink."""
    qk, ov, frequencies = 0.0, 0.0, shape.frequencies
    if target.qk_head_dim < shape.qk_head_dim:
        frequencies, qk = reduce_qk(config, shape, w, statistics, target.qk_head_dim, method)
    if target.v_head_dim < shape.v_head_dim:
        ov = reduce_ov(config, w, statistics, target.v_head_dim, method)
    return LayerShape(**vars(target), frequencies=frequencies, sliding_window=shape.sliding_window), qk, ov


def _fit_attention(
    w: Layer,
    new: Layer,
    shape: LayerShape,
    target: Dimensions,
    streams: _Streams,
    method: Method,
    rounding: LayerRounding,
) -> tuple[LayerShape, float, float]:
    reference, reduced = streams.reference, streams.reduced
    config, device, (B, T, hidden) = reference.config, reduced.device, reduced.x.shape
    # The original layer on the reduced stream.
    local = Stream(config, reduced.x, device)
    statistics = AttentionStatistics(config, shape, T, device)
    inputs = InputMoments(hidden, device)
    outputs = torch.empty_like(reduced.x)
    for part in batches(config, B, T):
        inputs.add(local.attention_input(w, part))
        reference.add(part, w, "attn_post_norm", reference.attention(shape, w, part))
        outputs[part] = local.attention(shape, w, part, statistics).to(outputs.device)
    new_shape, qk, ov = _reduce_attention(config, shape, target, new, statistics, method)
    even_heads(config, new_shape, new, inputs.gram(), inputs.mean())
    rounding.apply(new, ("q", "k", "v"), inputs.gram())

    width = config.num_attention_heads * target.v_head_dim
    fit = OutputFit(width, hidden, device)
    attended = torch.empty(B, T, width, device=reduced.x.device)
    for part in batches(config, B, T):
        seen: dict[str, Tensor] = {}
        reduced.attention(new_shape, new, part, seen.__setitem__)
        rows = seen["o"].transpose(1, 2).flatten(2)
        attended[part] = rows.to(attended.device)
        wanted = target_of(reference, reduced, part, w, "attn_post_norm", outputs[part].to(device))
        fit.add(rows.flatten(0, 1), wanted.flatten(0, 1))
    fit.apply(new, "o")
    rounding.apply(new, ("o",), fit.gram.mean())
    for part in batches(config, B, T):
        y = F.linear(attended[part].to(device), new["o"], new.get("o_bias"))
        reduced.add(part, new, "attn_post_norm", y)
    return new_shape, qk, ov


def _fit_mlp(
    w: Layer,
    new: Layer,
    shape: LayerShape,
    target: Dimensions,
    streams: _Streams,
    method: Method,
    rounding: LayerRounding,
) -> float:
    reference, reduced = streams.reference, streams.reduced
    device, (B, T, hidden) = reduced.device, reduced.x.shape
    inputs, fit = InputMoments(hidden, device), OutputFit(shape.intermediate_size, hidden, device)
    outputs = torch.empty_like(reduced.x)
    for part in batches(reference.config, B, T):
        reference.add(part, w, "mlp_post_norm", reference.mlp(w, part))
        seen: dict[str, Tensor] = {}
        local = reduced.mlp(w, part, seen.__setitem__)
        wanted = target_of(reference, reduced, part, w, "mlp_post_norm", local)
        if rounding.grids:
            inputs.add(reduced.mlp_input(w, part))
            outputs[part] = wanted.to(outputs.device)
        fit.add(seen["m"].flatten(0, 1), wanted.flatten(0, 1))
    kept, lost = None, 0.0
    if target.intermediate_size < shape.intermediate_size:
        kept, lost = reduce_mlp(new, fit.gram.mean(), target.intermediate_size, method)
    fit.apply(new, "down", kept)
    if "gate" in new:
        _balance_units(new)
    if rounding.grids:
        rounding.apply(new, ("gate", "up"), inputs.gram())
        # The units are not quite what they were.
        fit = OutputFit(target.intermediate_size, hidden, device)
        for part in batches(reduced.config, B, T):
            reduced.mlp(new, part, seen.__setitem__)
            fit.add(seen["m"].flatten(0, 1), outputs[part].to(device).flatten(0, 1))
        fit.apply(new, "down")
        rounding.apply(new, ("down",), fit.gram.mean())
    for part in batches(reduced.config, B, T):
        reduced.add(part, new, "mlp_post_norm", reduced.mlp(new, part))
    return lost


def _balance_units(w: Layer) -> None:
    """Give the columns of `down` equal norm and `up` the inverse scale: exact, and block grids round them alike."""
    norms = w["down"].norm(dim=0)
    norms = torch.where(norms > 0, norms / norms.mean(), torch.ones_like(norms))
    w["down"] = w["down"] / norms
    w["up"] = w["up"] * norms[:, None]
    if "up_bias" in w:
        w["up_bias"] = w["up_bias"] * norms

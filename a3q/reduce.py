"""Reduce a model's inner dimensions, layer by layer.

The paper's method needs one stream of hidden states, the original model's. a3q's own runs two: the *reference* stream
is the original, the *reduced* stream runs the layers already reduced, and every moment is measured on it, so that each
layer is fitted to the inputs it will really see. After A3's own step (`a3q/components.py`) the output and down
projections are refitted to a target half way between what the original layer would make of the reduced stream and what
would lead the reduced stream back to the reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from a3q.components import Method, reduce_mlp, reduce_ov, reduce_qk, spread_norms
from a3q.forward import attention, batches, embed, mlp, norm, to_device
from a3q.model import Layer, LayerShape, Model, ModelConfig
from a3q.solve.refit import refit, refit_with_bias
from a3q.statistics import AttentionStatistics, Moment
from a3q.store import LayerStore

CORRECTION = 0.5
"""Share of the gap between the two streams that a refit tries to close: 0 only copies the layer, 1 trusts the
calibration text entirely. Measured on held-out text: 0, 0.25, 0.5, 0.75 gave 55.8, 51.4, 50.9, 51.6."""
REFIT_RIDGE = 0.03
"""Pull towards A3's own solution over the mean diagonal of the moment; 0.01 to 0.1 differ by 1 % in perplexity."""
FAINT = 1e-3
"""A norm's weight below this share of their mean is not divided by."""


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


@dataclass
class Stream:
    """Hidden states `x` `[B, T, hidden]` of the calibration tokens as they pass through the layers of a model."""

    config: ModelConfig
    x: Tensor
    device: torch.device
    entry: Tensor | None = None
    """What the layer began with, where its MLP reads that."""

    def begin_layer(self) -> None:
        """Remember the layer's input if its MLP will need it."""
        self.entry = self.x.clone() if self.config.parallel_residual else None

    def part(self, part: slice) -> Tensor:
        """Some of the sequences, on the device."""
        return self.x[part].to(self.device)

    def add(self, part: slice, w: Layer, post_norm: str, y: Tensor) -> None:
        """Add a component's output to the residual, through the norm behind the component if there is one."""
        self.x[part] += norm(self.config, w, post_norm, y).to(self.x.device)

    def attention(
        self, shape: LayerShape, w: Layer, part: slice, observe: Callable[[str, Tensor], None] | None = None
    ) -> Tensor:
        """Output of a layer's attention for some sequences."""
        return attention(self.config, shape, w, norm(self.config, w, "attn_norm", self.part(part)), observe)

    def mlp(self, w: Layer, part: slice, observe: Callable[[str, Tensor], None] | None = None) -> Tensor:
        """Output of a layer's MLP for some sequences."""
        x = self.part(part) if self.entry is None else self.entry[part].to(self.device)
        return mlp(self.config, w, norm(self.config, w, "mlp_norm", x), observe)


@torch.inference_mode()
def reduce(
    model: Model,
    tokens: Tensor,
    dimensions: Sequence[Dimensions],
    device: torch.device,
    memory_budget: int,
    method: Method = Method(),  # noqa: B008 (immutable)
    on_layer: Callable[[], None] = lambda: None,
) -> Reduction:
    """`model` with each layer under its `dimensions`, calibrated on `tokens` `[B, T]`.

    Reduced layers beyond `memory_budget` bytes wait on disk.
    """
    normed_apart = model.config.qk_norm == "head" and any(
        new.qk_head_dim < old.qk_head_dim for new, old in zip(dimensions, model.config.layers, strict=True)
    )
    config = dataclasses.replace(model.config, qk_norm="heads") if normed_apart else model.config
    x = embed(model, tokens)
    x = x.to(_home(x.nbytes, device))
    reference = Stream(model.config, x, device)
    reduced = Stream(config, x.clone(), device) if method.fitted else None
    layers = LayerStore(memory_budget)
    shapes, losses = [], []
    for shape, target, w in zip(model.config.layers, dimensions, model.layers, strict=True):
        w = to_device(w, device)
        if normed_apart:
            # The forward pass makes the same of copies, so both streams may run on them.
            spread_norms(model.config, w)
        if reduced is None:
            layer, new_shape, loss = reduce_plainly(w, shape, target, reference, method)
        else:
            layer, new_shape, loss = reduce_fitted(w, shape, target, reference, reduced, method)
        layers.append(to_device(layer, model.embed.device))
        shapes.append(new_shape)
        losses.append(loss)
        on_layer()
    return Reduction(
        dataclasses.replace(model, config=dataclasses.replace(config, layers=tuple(shapes)), layers=layers), losses
    )


def _home(stream_bytes: int, device: torch.device) -> torch.device:
    """Where hidden states are kept: on a GPU that has ample room for both streams and what is made of them."""
    if device.type == "cuda" and 8 * stream_bytes < torch.cuda.mem_get_info(device)[0]:
        return device
    return torch.device("cpu")


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
    w: Layer, shape: LayerShape, target: Dimensions, reference: Stream, reduced: Stream, method: Method
) -> tuple[Layer, LayerShape, LayerLosses]:
    """One layer as a3q does it; both streams move on through it."""
    new = dict(w)
    reference.begin_layer()
    reduced.begin_layer()
    new_shape, qk, ov = _fit_attention(w, new, shape, target, reference, reduced, method)
    lost = _fit_mlp(w, new, shape, target, reference, reduced, method)
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


class _Refit:
    """Sums for the least-squares fit of an output projection, with its bias where it has one."""

    def __init__(self, width: int, hidden: int, device: torch.device) -> None:
        self.gram = Moment(width, width, device=device)
        self.cross = Moment(width, hidden, device=device)
        self._x, self._y = torch.zeros(width, device=device), torch.zeros(hidden, device=device)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in inputs `[rows, width]` and what they should become `[rows, hidden]`, the bias included."""
        self.gram.add(x)
        self.cross.add(x, y)
        self._x += x.sum(0)
        self._y += y.sum(0)

    def apply(self, w: Layer, role: str, kept: Tensor | None = None) -> None:
        """Refit the weight called `role` in place, held back towards what it is, on the `kept` inputs."""
        gram, cross, rows = self.gram.mean(), self.cross.mean(), max(1, self.gram.rows)
        x, y = self._x / rows, self._y / rows
        if kept is not None:
            gram, cross, x = gram[kept][:, kept], cross[kept], x[kept]
        bias = f"{role}_bias"
        if bias in w:
            weight, intercept = refit_with_bias(gram, cross, x, y, w[role].T, REFIT_RIDGE)
            w[bias] = intercept.float()
        else:
            weight = refit(gram, cross, w[role].T, REFIT_RIDGE)
        w[role] = weight.float().T.contiguous()


def _target(reference: Stream, reduced: Stream, part: slice, w: Layer, post_norm: str, local: Tensor) -> Tensor:
    """What a component should put out on the reduced stream, `[rows, hidden]`, before the norm behind it.

    The reference is past the component already; `local` is what the original makes of the reduced stream.
    """
    gap = reference.part(part) - reduced.part(part)
    weight = w.get(post_norm)
    if weight is None:
        return (CORRECTION * gap + (1 - CORRECTION) * local).flatten(0, 1)
    # Through the norm backwards, at the scale of the original's output; where the norm passes next to nothing on, any
    # error is as good.
    normed = norm(reduced.config, w, post_norm, local)
    wanted = CORRECTION * gap + (1 - CORRECTION) * normed
    scale = (local.square().mean(-1, keepdim=True) + reduced.config.norm_eps).sqrt()
    clear = weight.abs() > FAINT * weight.abs().mean()
    return torch.where(clear, wanted / torch.where(clear, weight, 1.0) * scale, local).flatten(0, 1)


def _fit_attention(
    w: Layer,
    new: Layer,
    shape: LayerShape,
    target: Dimensions,
    reference: Stream,
    reduced: Stream,
    method: Method,
) -> tuple[LayerShape, float, float]:
    config, device, (B, T, hidden) = reference.config, reduced.device, reduced.x.shape
    local = Stream(config, reduced.x, device)
    statistics = AttentionStatistics(config, shape, T, device)
    outputs = torch.empty_like(reduced.x)
    for part in batches(config, B, T):
        reference.add(part, w, "attn_post_norm", reference.attention(shape, w, part))
        outputs[part] = local.attention(shape, w, part, statistics).to(outputs.device)
    new_shape, qk, ov = _reduce_attention(config, shape, target, new, statistics, method)

    width = config.num_attention_heads * target.v_head_dim
    fit = _Refit(width, hidden, device)
    attended = torch.empty(B, T, width, device=reduced.x.device)
    for part in batches(config, B, T):
        seen: dict[str, Tensor] = {}
        reduced.attention(new_shape, new, part, seen.__setitem__)
        rows = seen["o"].transpose(1, 2).flatten(2)
        attended[part] = rows.to(attended.device)
        wanted = _target(reference, reduced, part, w, "attn_post_norm", outputs[part].to(device))
        fit.add(rows.flatten(0, 1), wanted)
    fit.apply(new, "o")
    for part in batches(config, B, T):
        y = F.linear(attended[part].to(device), new["o"], new.get("o_bias"))
        reduced.add(part, new, "attn_post_norm", y)
    return new_shape, qk, ov


def _fit_mlp(
    w: Layer,
    new: Layer,
    shape: LayerShape,
    target: Dimensions,
    reference: Stream,
    reduced: Stream,
    method: Method,
) -> float:
    device, (B, T, hidden) = reduced.device, reduced.x.shape
    fit = _Refit(shape.intermediate_size, hidden, device)
    for part in batches(reference.config, B, T):
        reference.add(part, w, "mlp_post_norm", reference.mlp(w, part))
        seen: dict[str, Tensor] = {}
        local = reduced.mlp(w, part, seen.__setitem__)
        fit.add(seen["m"].flatten(0, 1), _target(reference, reduced, part, w, "mlp_post_norm", local))
    kept, lost = None, 0.0
    if target.intermediate_size < shape.intermediate_size:
        kept, lost = reduce_mlp(new, fit.gram.mean(), target.intermediate_size, method)
    fit.apply(new, "down", kept)
    if "gate" in new:
        _balance_units(new)
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

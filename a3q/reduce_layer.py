"""Reduce one layer and fit it to what went before; round it on the way.

The paper's method needs one stream of hidden states, the original model's. a3q's own runs two: the *reference* stream
is the original, the *reduced* stream runs the layers already reduced, and every moment is measured on it, so that each
layer is fitted to the inputs it will really see. After A3's own step (`a3q/components.py`) the output and down
projections are refitted to a target half way between what the original layer would make of the reduced stream and what
would lead the reduced stream back to the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from a3q.batching import Batches
from a3q.components import Method, even_heads, reduce_mlp, reduce_ov, reduce_qk
from a3q.errors import InputError
from a3q.fit import InputMoments, OutputFit
from a3q.fit import target as target_of
from a3q.forward import compute_dtype, lowered, mlp_output, project
from a3q.model import Layer, LayerShape, ModelConfig
from a3q.quantize import LayerRounding
from a3q.statistics import AttentionStatistics, Moment
from a3q.store import LayerLosses
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


@dataclass(frozen=True)
class Streams:
    """The original's hidden states, those behind the layers already reduced, and room for what passes between them."""

    reference: Stream
    reduced: Stream
    batches: Batches
    dtype: torch.dtype
    """Of matrices and activations inside the components."""
    earlier: int
    """Sequences before these, in other processes."""
    outputs: Tensor
    """`[B, T, hidden]`"""
    attended: Tensor
    """`[B, T, heads · v_head_dim]` of the widest layer."""

    def each(self, work: Callable[[slice], None]) -> None:
        """`work` on all sequences, in batches; see `Batches.each`."""
        self.batches.each(len(self.reduced.x), work)

    def split(self, count: int) -> tuple[Streams, Streams]:
        """The first `count` sequences and the others, in the same memory."""
        first, rest = slice(0, count), slice(count, None)
        return self._some(first), replace(self._some(rest), earlier=self.earlier + count)

    def _some(self, rows: slice) -> Streams:
        reference, reduced = self.reference.some(rows), self.reduced.some(rows)
        return replace(
            self, reference=reference, reduced=reduced, outputs=self.outputs[rows], attended=self.attended[rows]
        )


def pass_on(stream: Stream, batches: Batches, shape: LayerShape, low: Layer) -> None:
    """Move hidden states on through a layer, a component at a time, as when it was reduced."""
    stream.begin_layer()
    count = len(stream.x)
    batches.each(count, lambda part: stream.pass_attention(shape, low, part))
    batches.each(count, lambda part: stream.pass_mlp(low, part))


def _check(where: str, moments: Mapping[str, Moment]) -> None:
    """InputError names the first of the activations, in the order of the forward pass, that is no number."""
    for name, moment in moments.items():
        if not bool(torch.isfinite(moment.mean()).all()):
            raise InputError(_no_numbers(where, name))


def _finite(where: str, y: Tensor, name: str = "the MLP's output") -> Tensor:
    """What goes into or out of a component of which nothing else is measured; InputError like that of `_check`."""
    if not bool(torch.isfinite(y).all()):
        raise InputError(_no_numbers(where, name))
    return y


def _pass_mlp(where: str, stream: Stream, low: Layer, part: slice) -> None:
    stream.add(part, low, "mlp_post_norm", _finite(where, stream.mlp(low, part)))


def _no_numbers(where: str, name: str) -> str:
    return (
        f"{where}: {name} holds values that are no numbers (NaN or infinite) on the calibration text; the model is "
        "broken there, or numbers overflow"
    )


def _check_attention(where: str, statistics: AttentionStatistics) -> None:
    named = {"the queries": statistics.q, "the keys": statistics.k, "the values": statistics.v}
    _check(where, {**named, "the attention's output": statistics.o})


def reduce_plainly(
    w: Layer,
    shape: LayerShape,
    target: Dimensions,
    reference: Stream,
    batches: Batches,
    earlier: int,
    method: Method,
    where: str,
) -> tuple[Layer, LayerShape, LayerLosses]:
    """One layer as the paper does it, on the original's own activations; the stream moves on through the original."""
    config, (B, T, _) = reference.config, reference.x.shape
    new, low = dict(w), lowered(w, compute_dtype(reference.device, config.hidden_size))
    distances = _shrinks_qk(shape, target)
    statistics = AttentionStatistics(config, shape, T, reference.device, earlier, distances)
    reference.begin_layer()

    def see(part: slice) -> None:
        y = reference.after(low, "attn_post_norm", reference.attention(shape, low, part, statistics))
        y = y.to(reference.x.device)
        statistics.take_in()
        reference.x[part] += y

    batches.each(B, see)
    _check_attention(where, statistics)
    new_shape, qk, ov = _reduce_attention(config, shape, target, new, statistics, method)

    units, lost = shape.intermediate_size, 0.0
    shrinks = target.intermediate_size < units
    gram = Moment(units, units, device=reference.device) if shrinks else None

    def see_units(part: slice) -> None:
        m = reference.mlp_inner(low, part)
        y = _finite(where, reference.after(low, "mlp_post_norm", mlp_output(low, m))).to(reference.x.device)
        if gram is not None:
            gram.add(m.flatten(0, 1))
        reference.x[part] += y

    batches.each(B, see_units)
    if gram is not None:
        _check(where, {"the MLP's inner activations": gram})
        _, lost = reduce_mlp(new, gram.mean(), target.intermediate_size, method)
    return new, new_shape, LayerLosses(qk, ov, lost)


def scaled(w: Layer, shape: LayerShape, streams: Streams, where: str, mlp_stays: bool) -> Layer:
    """A layer that stays as it is, behind others that do, but for what every reduced one gets: even heads and units.

    Both streams, which are the same as yet, move on. Nothing is fitted: the fit's target is what there is already. With
    `mlp_stays` the MLP's weights are not scaled.
    """
    new, low = dict(w), lowered(w, streams.dtype)
    reference = streams.reference
    inputs = InputMoments(reference.x.shape[-1], reference.device)
    reference.begin_layer()

    def attend(part: slice) -> None:
        x = _finite(where, reference.attention_input(low, part), "the attention's input")
        take = inputs.prepared(x.to(streams.dtype))
        y = _finite(where, reference.attention(shape, low, part), "the attention's output")
        take()
        reference.add(part, low, "attn_post_norm", y)

    streams.each(attend)
    even_heads(reference.config, shape, new, inputs.gram(), inputs.mean())
    streams.each(partial(_pass_mlp, where, reference, low))
    if "gate" in new and not mlp_stays:
        _balance_units(new)
    streams.reduced.x.copy_(reference.x)
    return new


def reduce_fitted(
    w: Layer,
    shape: LayerShape,
    target: Dimensions,
    streams: Streams,
    method: Method,
    rounding: LayerRounding,
    mlp_stays: bool = False,
) -> tuple[Layer, LayerShape, LayerLosses]:
    """One layer as a3q does it, rounded as it goes; both streams move on through it. See `reduce` for `mlp_stays`."""
    new, low = dict(w), lowered(w, streams.dtype)
    streams.reference.begin_layer()
    streams.reduced.begin_layer()
    new_shape, qk, ov = _fit_attention(low, new, shape, target, streams, method, rounding)
    if mlp_stays and rounding.grids.keys().isdisjoint(MLP):
        for stream in (streams.reference, streams.reduced):
            streams.each(partial(_pass_mlp, rounding.where, stream, low))
        return new, new_shape, LayerLosses(qk, ov, 0.0)
    lost = _fit_mlp(low, new, shape, target, streams, method, rounding)
    return new, new_shape, LayerLosses(qk, ov, lost)


def _shrinks_qk(shape: LayerShape, target: Dimensions) -> bool:
    """Whether queries and keys are reduced, which alone asks for attention distances."""
    return target.qk_head_dim < shape.qk_head_dim


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
    if _shrinks_qk(shape, target):
        frequencies, qk = reduce_qk(config, shape, w, statistics, target.qk_head_dim, method)
    if target.v_head_dim < shape.v_head_dim:
        ov = reduce_ov(config, w, statistics, target.v_head_dim, method)
    return LayerShape(**vars(target), frequencies=frequencies, sliding_window=shape.sliding_window), qk, ov


def _fit_attention(
    low: Layer,
    new: Layer,
    shape: LayerShape,
    target: Dimensions,
    streams: Streams,
    method: Method,
    rounding: LayerRounding,
) -> tuple[LayerShape, float, float]:
    """`new`, the original's weights, reduced in place; `low` are the same for the forward pass."""
    reference, reduced, outputs = streams.reference, streams.reduced, streams.outputs
    config, device, (_, T, hidden) = reference.config, reduced.device, reduced.x.shape
    # The original layer on the reduced stream.
    local = Stream(config, reduced.x, device)
    distances = _shrinks_qk(shape, target)
    statistics = AttentionStatistics(config, shape, T, device, streams.earlier, distances)
    inputs = InputMoments(hidden, device)

    def see(part: slice) -> None:
        x = local.attention_input(low, part).to(streams.dtype)
        theirs = reference.after(low, "attn_post_norm", reference.attention(shape, low, part)).to(reference.x.device)
        outputs[part] = local.attention(shape, low, part, statistics).to(outputs.device)
        take = inputs.prepared(x)
        statistics.take_in()
        take()
        reference.x[part] += theirs

    streams.each(see)
    _check(rounding.where, {"the attention's input": inputs.moment})
    _check_attention(rounding.where, statistics)
    new_shape, qk, ov = _reduce_attention(config, shape, target, new, statistics, method)
    even_heads(config, new_shape, new, inputs.gram(), inputs.mean())
    rounding.apply(new, ("q", "k", "v"), inputs.gram())

    width = config.num_attention_heads * target.v_head_dim
    fit = OutputFit(width, hidden, device)
    attended = streams.attended.flatten()[: reduced.x[..., 0].numel() * width].view(*reduced.x.shape[:2], width)
    small = lowered(new, streams.dtype)

    def gather(part: slice) -> None:
        rows = reduced.attention_inner(new_shape, small, part)
        wanted = target_of(reference, reduced, part, low, "attn_post_norm", outputs[part].to(device))
        attended[part] = rows.to(attended.device)
        fit.add(rows.flatten(0, 1), wanted.flatten(0, 1))

    streams.each(gather)
    _check(rounding.where, {"the reduced attention's output": fit.gram, "the attention's projection": fit.cross})
    fit.apply(new, "o")
    rounding.apply(new, ("o",), fit.gram.mean())
    small = lowered(new, streams.dtype)
    streams.each(lambda part: reduced.add(part, small, "attn_post_norm", project(small, attended[part].to(device))))
    return new_shape, qk, ov


def _fit_mlp(
    low: Layer,
    new: Layer,
    shape: LayerShape,
    target: Dimensions,
    streams: Streams,
    method: Method,
    rounding: LayerRounding,
) -> float:
    """Like `_fit_attention`."""
    streams.each(partial(streams.reference.pass_mlp, low))
    inputs = InputMoments(streams.reduced.x.shape[-1], streams.reduced.device) if rounding.grids else None
    lost = _reduce_units(low, new, shape, target, streams, method, inputs, rounding.where)
    if "gate" in new:
        _balance_units(new)
    if inputs is not None:
        rounding.apply(new, ("gate", "up"), inputs.gram())
        _fit_rounded(new, target, streams, rounding)
    small = lowered(new, streams.dtype)
    streams.each(partial(streams.reduced.pass_mlp, small))
    return lost


def _reduce_units(
    low: Layer,
    new: Layer,
    shape: LayerShape,
    target: Dimensions,
    streams: Streams,
    method: Method,
    inputs: InputMoments | None,
    where: str,
) -> float:
    """The units of an MLP in place, fitted to a target behind it that stays in `outputs`; the share of energy lost."""
    reference, reduced, outputs = streams.reference, streams.reduced, streams.outputs
    fit = OutputFit(shape.intermediate_size, reduced.x.shape[-1], reduced.device)

    def see(part: slice) -> None:
        m = reduced.mlp_inner(low, part)
        wanted = target_of(reference, reduced, part, low, "mlp_post_norm", mlp_output(low, m).float())
        take = None
        if inputs is not None:
            take = inputs.prepared(reduced.mlp_input(low, part).to(streams.dtype))
            outputs[part] = wanted.to(outputs.device)
        fit.add(m.flatten(0, 1), wanted.flatten(0, 1))
        if take is not None:
            take()

    streams.each(see)
    if inputs is not None:
        _check(where, {"the MLP's input": inputs.moment})
    _check(where, {"the MLP's inner activations": fit.gram, "the MLP's output": fit.cross})
    kept, lost = None, 0.0
    if target.intermediate_size < shape.intermediate_size:
        kept, lost = reduce_mlp(new, fit.gram.mean(), target.intermediate_size, method)
    fit.apply(new, "down", kept)
    return lost


def _fit_rounded(new: Layer, target: Dimensions, streams: Streams, rounding: LayerRounding) -> None:
    """The down projection once more: behind rounded weights the units are not quite what they were."""
    reduced, outputs = streams.reduced, streams.outputs
    fit = OutputFit(target.intermediate_size, reduced.x.shape[-1], reduced.device)
    small = lowered(new, streams.dtype)

    def gather(part: slice) -> None:
        m = reduced.mlp_inner(small, part)
        fit.add(m.flatten(0, 1), outputs[part].to(reduced.device).flatten(0, 1))

    streams.each(gather)
    fit.apply(new, "down")
    rounding.apply(new, ("down",), fit.gram.mean())


def _balance_units(w: Layer) -> None:
    """Give the columns of `down` equal norm and `up` the inverse scale: exact, and block grids round them alike."""
    norms = w["down"].norm(dim=0)
    norms = torch.where(norms > 0, norms / norms.mean(), torch.ones_like(norms))
    w["down"] = w["down"] / norms
    w["up"] = w["up"] * norms[:, None]
    if "up_bias" in w:
        w["up_bias"] = w["up_bias"] * norms

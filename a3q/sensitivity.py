"""How much each component of each layer matters: its functional losses by size, and what they do to the predictions.

One sweep over the layers of the original model. At each layer the functional losses follow from the layer's moments;
then each component alone is reduced to one size, and that branch of a few probe sequences runs on through the rest of
the original model, together with those of all earlier layers. At the end, the KL divergence of each branch from the
unreduced probes is what that component's loss at that size costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from a3q import ranks
from a3q.ahead import fetched
from a3q.allocate import Curve
from a3q.batching import Batches
from a3q.components import Method, ov_losses, qk_losses, reduce_mlp, reduce_ov, reduce_qk
from a3q.errors import InputError
from a3q.families import Component
from a3q.forward import block, compute_dtype, embed, lowered, norm, output_logits, run_layer, to_device
from a3q.model import Layer, LayerShape, Model, ModelConfig
from a3q.perplexity import mean_divergences
from a3q.room import Room
from a3q.solve.mlp import mlp_losses
from a3q.statistics import AttentionStatistics, Moment

Sizes = Mapping[Component, Sequence[int]]
"""Possible inner sizes of each component that may shrink, ascending; the last is the original's."""


@dataclass(frozen=True)
class Sensitivity:
    """One component of one layer: the share of its functional energy lost at each size, and the KL (nats) of one."""

    sizes: tuple[int, ...]
    losses: tuple[float, ...]
    probed: int
    kl: float

    def curve(self, unit_cost: int) -> Curve:
        """Predicted KL at each size: the functional loss, scaled to what was measured at the probed one."""
        at_probe = self.losses[self.sizes.index(self.probed)]
        scale = self.kl / at_probe if at_probe > 0 else 0.0
        return Curve(self.sizes, tuple(scale * loss for loss in self.losses), unit_cost)


@dataclass
class _Moments:
    """What all components need of one layer; an observer of `a3q.forward.block`."""

    attention: AttentionStatistics
    mlp: Moment

    def __call__(self, name: str, x: Tensor) -> None:
        """See what a batch's attention or MLP shows."""
        if name == "m":
            self._units = x
        elif name in ("q", "k", "v", "o"):
            self.attention(name, x)

    def take_in(self) -> None:
        """Count the batch that was seen last."""
        self.attention.take_in()
        self.mlp.add(self._units.flatten(0, 1))


@torch.inference_mode()
def measure(
    model: Model,
    tokens: Tensor,
    probes: Tensor,
    sizes: Sequence[Sizes],
    ratio: float,
    device: torch.device,
    method: Method,
    on_layer: Callable[[], None] = lambda: None,
    memory_budget: int = 1 << 40,
) -> list[dict[Component, Sensitivity]]:
    """Sensitivities of each layer's components in `sizes` (one for each layer).

    `tokens` `[B, T]` give the moments, `probes` `[S, T']` the KL, over the second half of each. A component is probed
    at the size nearest to a reduction by `ratio`. The branches take `S · T' · hidden_size` floats for each component of
    each layer, on disk beyond `memory_budget` bytes. Over several processes each has its share of both.
    """
    config = model.config
    earlier, positions = ranks.share(len(tokens)).start, len(probes) * (probes.shape[1] - probes.shape[1] // 2)
    tokens, probes = tokens[ranks.share(len(tokens))], probes[ranks.share(len(probes))]
    room = Room(memory_budget, device)
    x, probe = (_embedded(model, ids, room) for ids in (tokens, probes))
    branches = room.empty(sum(map(len, sizes)) * len(probe), *probe.shape[1:])
    started, dtype = 0, compute_dtype(device, config.hidden_size)
    found: list[dict[Component, tuple[tuple[int, ...], tuple[float, ...], int]]] = []
    if len(sizes) != config.num_hidden_layers:
        raise ValueError(f"sizes for {len(sizes)} layers of {config.num_hidden_layers}")
    weights = fetched((partial(_loaded, model, i, device) for i in range(len(sizes))), device.type == "cuda")
    for i, (shape, options, w) in enumerate(zip(config.layers, sizes, weights, strict=True)):
        low = lowered(w, dtype)
        moments = _moments(config, shape, low, x, device, earlier, "QK" in options)
        layer: dict[Component, tuple[tuple[int, ...], tuple[float, ...], int]] = {}
        before = started
        for component, grid in options.items():
            probed = _nearest(grid, (1 - ratio) * grid[-1])
            try:
                losses = _losses(config, shape, w, moments, component, grid, method)
            except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]  # exported at run time
                raise InputError(f"{model.source.path}: layer {i}, {component}: {error}") from error
            layer[component] = tuple(grid), tuple(losses), probed
            branch = branches[started : started + len(probe)]
            branch.copy_(probe)
            started += len(probe)
            new_config, new_shape, new = _alone(config, shape, w, moments, component, probed, method)
            run_layer(new_config, new_shape, lowered(new, dtype), branch, device)
        found.append(layer)
        run_layer(config, shape, low, branches[:before], device)
        run_layer(config, shape, low, probe, device)
        on_layer()
    kls = iter(_divergences(model, probe, branches, device, positions, sum(map(len, sizes))))
    return [{component: Sensitivity(*known, next(kls)) for component, known in layer.items()} for layer in found]


def _loaded(model: Model, i: int, device: torch.device) -> Layer:
    return to_device(model.layers[i], device)


def _embedded(model: Model, tokens: Tensor, room: Room) -> Tensor:
    x = room.empty(*tokens.shape, model.config.hidden_size)
    x.copy_(embed(model, tokens))
    return x


def _nearest(grid: Sequence[int], wanted: float) -> int:
    """The size nearest to `wanted` that is a reduction, if there is any."""
    return min(grid[:-1] or grid, key=lambda size: abs(size - wanted))


def _moments(
    config: ModelConfig, shape: LayerShape, w: Layer, x: Tensor, device: torch.device, earlier: int, distances: bool
) -> _Moments:
    """Moments of a layer on hidden states `x`, which move on through it."""
    units, length = shape.intermediate_size, x.shape[1]
    attention = AttentionStatistics(config, shape, length, device, earlier, distances)
    moments = _Moments(attention, Moment(units, units, device=device))

    def see(part: slice) -> None:
        y = block(config, shape, w, x[part].to(device), observe=moments).to(x.device)
        moments.take_in()
        x[part] = y

    Batches(config, length, device).each(len(x), see)
    return moments


def _losses(
    config: ModelConfig,
    shape: LayerShape,
    w: Layer,
    moments: _Moments,
    component: Component,
    grid: Sequence[int],
    method: Method,
) -> list[float]:
    """Share of the component's functional energy lost at each size of `grid`."""
    if component == "MLP":
        return mlp_losses(moments.mlp.mean(), w["down"], grid, method.fitted)
    smaller = grid[:-1]
    if component == "QK":
        return [*qk_losses(config, shape, moments.attention, smaller, method), 0.0]
    return [*ov_losses(config, w, moments.attention, smaller, method), 0.0]


def _alone(
    config: ModelConfig,
    shape: LayerShape,
    w: Layer,
    moments: _Moments,
    component: Component,
    size: int,
    method: Method,
) -> tuple[ModelConfig, LayerShape, Layer]:
    """The layer with one component reduced to `size`."""
    new = dict(w)
    if component == "MLP":
        reduce_mlp(new, moments.mlp.mean(), size, method)
        return config, replace(shape, intermediate_size=size), new
    if component == "OV":
        reduce_ov(config, new, moments.attention, size, method)
        return config, replace(shape, v_head_dim=size), new
    if size < shape.qk_head_dim:
        frequencies, _ = reduce_qk(config, shape, new, moments.attention, size, method)
        shape = replace(shape, qk_head_dim=size, frequencies=frequencies)
        config = replace(config, qk_norm="heads") if config.qk_norm == "head" else config
    return config, shape, new


def _divergences(
    model: Model, probe: Tensor, branches: Tensor, device: torch.device, positions: int, components: int
) -> list[float]:
    """Mean KL (nats) of each branch, `S` sequences in turn, from `probe` `[S, T, hidden]`; over the second half.

    `positions`: of all processes together; `components`: branches.
    """
    half = probe.shape[1] // 2
    output = "output" if "output" in model.top else "embed"
    used = {role: weight for role, weight in model.top.items() if role == output or role.startswith("final_norm")}
    model = replace(model, top={**model.top, **to_device(used, device)})

    def logits(x: Tensor, rows: slice) -> Tensor:
        hidden = norm(model.config, model.top, "final_norm", x[:, half:].flatten(0, 1)[rows].to(device))
        return output_logits(model, hidden, device)

    size, own = max(1, len(probe)), len(probe) * (probe.shape[1] - half)
    others = [partial(logits, branches[start : start + size]) for start in range(0, len(branches), size)]
    found = mean_divergences(partial(logits, probe), others, own) if own else [0.0] * components
    total = torch.tensor(found, dtype=torch.float64, device=device) * (own / positions)
    ranks.add_up(total)
    kls: list[float] = total.tolist()
    return kls

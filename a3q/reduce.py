"""Reduce a model's inner dimensions, layer by layer, on two streams of hidden states.

The *reference* stream runs the original model. The *reduced* stream runs the layers already reduced, and every moment
is measured on it, so that each layer is fitted to the inputs it will really see. After A3's own step (`a3q/solve`) the
output and down projections are refitted once more, to a target between what the original layer makes of the reduced
stream and what would bring that stream back to the reference: errors of earlier layers are partly undone by later ones.
Both streams stay in memory; of the weights, only one layer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from a3q.forward import Rope, attention, batches, mlp, rms_norm, to_device
from a3q.model import Layer, Model, ModelConfig
from a3q.solve.mlp import solve_mlp
from a3q.solve.ov import solve_ov
from a3q.solve.qk import mix_rows, select_frequencies, solve_qk
from a3q.solve.refit import refit
from a3q.statistics import AttentionStatistics, Moment
from a3q.store import LayerStore

CORRECTION = 0.5
"""Share of the target that undoes earlier errors. 1 fits the calibration text best and other text worse."""
REFIT_RIDGE = 0.03
"""Pull of the refit towards A3's own solution; see `a3q.solve.refit`."""


@dataclass(frozen=True)
class Dimensions:
    """Inner sizes after reduction."""

    head_dim: int
    v_head_dim: int
    intermediate_size: int

    @classmethod
    def of(cls, config: ModelConfig) -> Dimensions:
        """The sizes that a model has."""
        return cls(config.head_dim, config.v_head_dim, config.intermediate_size)


@dataclass(frozen=True)
class LayerLosses:
    """Share of each component's functional energy that one layer lost before the refit; 0 if it was left alone."""

    qk: float = 0.0
    ov: float = 0.0
    mlp: float = 0.0


@dataclass(frozen=True)
class Reduction:
    """A reduced model, the frequencies it kept (indices into the original's), and what each layer lost."""

    model: Model
    frequencies_kept: list[int]
    losses: list[LayerLosses]


@dataclass(frozen=True)
class Stream:
    """Hidden states `[B, T, hidden]` of the calibration tokens, kept in `x`, and how to run a layer on them."""

    config: ModelConfig
    x: Tensor
    rope: Rope
    device: torch.device

    def part(self, part: slice) -> Tensor:
        """Some of the sequences, on the device."""
        return self.x[part].to(self.device)

    def add(self, part: slice, y: Tensor) -> None:
        """Add a component's output to the residual."""
        self.x[part] += y.to(self.x.device)

    def attention(self, w: Layer, part: slice, observe: Callable[[str, Tensor], None] | None = None) -> Tensor:
        """Output of a layer's attention for some sequences."""
        normed = rms_norm(self.part(part), w["attn_norm"], self.config.rms_norm_eps)
        return attention(self.config, w, normed, self.rope, observe, None)

    def mlp(self, w: Layer, part: slice, observe: Callable[[str, Tensor], None] | None = None) -> Tensor:
        """Output of a layer's MLP for some sequences."""
        return mlp(w, rms_norm(self.part(part), w["mlp_norm"], self.config.rms_norm_eps), observe)


def reduced_config(config: ModelConfig, dimensions: Dimensions) -> tuple[ModelConfig, list[int]]:
    """`config` under the new dimensions and the indices of the rotation frequencies that stay."""
    kept = select_frequencies(config.head_dim // 2, dimensions.head_dim // 2)
    frequencies = tuple(config.frequencies[i] for i in kept)
    return dataclasses.replace(config, frequencies=frequencies, **vars(dimensions)), kept


@torch.inference_mode()
def reduce(
    model: Model,
    tokens: Tensor,
    dimensions: Dimensions,
    device: torch.device,
    memory_budget: int,
    on_layer: Callable[[], None] = lambda: None,
) -> Reduction:
    """`model` under `dimensions`, calibrated on `tokens` `[B, T]`; layers beyond `memory_budget` bytes wait on disk."""
    config, kept = reduced_config(model.config, dimensions)
    x, length = F.embedding(tokens, model.embed), tokens.shape[1]
    x = x.to(_home(x.nbytes, device))
    reference = Stream(model.config, x, Rope(model.config.frequencies, length, device), device)
    reduced = Stream(config, x.clone(), Rope(config.frequencies, length, device), device)
    layers = LayerStore(memory_budget)
    losses: list[LayerLosses] = []
    for w in model.layers:
        layer, loss = reduce_layer(to_device(w, device), reference, reduced, kept)
        layers.append(to_device(layer, model.embed.device))
        losses.append(loss)
        on_layer()
    return Reduction(dataclasses.replace(model, config=config, layers=layers), kept, losses)


def _home(stream_bytes: int, device: torch.device) -> torch.device:
    """Where hidden states are kept: on a GPU that has ample room for both streams and what is made of them."""
    if device.type == "cuda" and 8 * stream_bytes < torch.cuda.mem_get_info(device)[0]:
        return device
    return torch.device("cpu")


def reduce_layer(w: Layer, reference: Stream, reduced: Stream, kept: list[int]) -> tuple[Layer, LayerLosses]:
    """One layer under `reduced.config`; both streams move on through it."""
    new = dict(w)
    qk, ov = _reduce_attention(w, new, reference, reduced, kept)
    return new, LayerLosses(qk, ov, _reduce_mlp(w, new, reference, reduced))


def _target(reference: Stream, reduced: Stream, part: slice, local: Tensor) -> Tensor:
    """What a component should add to the reduced stream; the reference is past it, `local` is the original's output."""
    return (CORRECTION * (reference.part(part) - reduced.part(part)) + (1 - CORRECTION) * local).flatten(0, 1)


def _reduce_attention(w: Layer, new: Layer, reference: Stream, reduced: Stream, kept: list[int]) -> tuple[float, float]:
    config, device, (B, T, hidden) = reduced.config, reduced.device, reduced.x.shape
    local = dataclasses.replace(reference, x=reduced.x)
    statistics = AttentionStatistics(reference.config, T, reference.rope, device)
    outputs = torch.empty_like(reduced.x)
    for part in batches(reference.config, B, T):
        reference.add(part, reference.attention(w, part))
        outputs[part] = local.attention(w, part, statistics).to(outputs.device)

    qk = ov = 0.0
    if config.head_dim < reference.config.head_dim:
        qk = _apply_qk(reference.config, new, statistics, kept)
    if config.v_head_dim < reference.config.v_head_dim:
        ov = _apply_ov(reference.config, new, statistics, config.v_head_dim)

    width = config.num_attention_heads * config.v_head_dim
    gram, cross = Moment(width, width, device=device), Moment(width, hidden, device=device)
    attended = torch.empty(B, T, width, device=reduced.x.device)
    for part in batches(config, B, T):
        seen: dict[str, Tensor] = {}
        reduced.attention(new, part, seen.__setitem__)
        rows = seen["o"].transpose(1, 2).flatten(2)
        attended[part] = rows.to(attended.device)
        target = _target(reference, reduced, part, outputs[part].to(device))
        if "o_bias" in new:
            target = target - new["o_bias"]
        gram.add(rows.flatten(0, 1))
        cross.add(rows.flatten(0, 1), target)
    new["o"] = refit(gram.mean(), cross.mean(), new["o"].T, REFIT_RIDGE).float().T.contiguous()
    for part in batches(config, B, T):
        reduced.add(part, F.linear(attended[part].to(device), new["o"], new.get("o_bias")))
    return qk, ov


def _per_head(rows: Tensor, heads: int) -> Tensor:
    """`[heads · d, …]` to `[heads, d, columns]`, a bias as one column."""
    return rows.reshape(heads, rows.shape[0] // heads, -1)


def _store(w: Layer, role: str, per_head: Tensor) -> None:
    """Put per-head rows `[heads, r, columns]` under `role`, as a matrix or a bias as before."""
    flat = per_head.reshape(-1) if w[role].dim() == 1 else per_head.reshape(-1, per_head.shape[-1])
    w[role] = flat.float().contiguous()


def _apply_qk(config: ModelConfig, w: Layer, statistics: AttentionStatistics, kept: list[int]) -> float:
    frequencies = torch.tensor(config.frequencies, dtype=torch.float64, device=w["q"].device)
    solution = solve_qk(statistics.q.mean(), statistics.k.mean(), statistics.distances(), frequencies, kept)
    # The runtime divides scores by sqrt(r), the model was trained with sqrt(d).
    rescale = math.sqrt(2 * len(kept) / config.head_dim)
    for side, mix, heads in (
        ("q", solution.query * rescale, config.num_attention_heads),
        ("k", solution.key, config.num_key_value_heads),
    ):
        for role in (side, f"{side}_bias"):
            if role in w:
                _store(w, role, mix_rows(mix, _per_head(w[role], heads)))
    return solution.loss


def _apply_ov(config: ModelConfig, w: Layer, statistics: AttentionStatistics, r: int) -> float:
    H, G = config.num_attention_heads, config.num_key_value_heads
    w_o = _per_head(w["o"].T, H)
    solution = solve_ov(statistics.o.mean(), w_o, G, r)
    for role in ("v", "v_bias"):
        if role in w:
            _store(w, role, solution.value.mT @ _per_head(w[role], G).double())
    w["o"] = (solution.output @ w_o.double()).reshape(H * r, -1).T.float().contiguous()
    return solution.loss


def _reduce_mlp(w: Layer, new: Layer, reference: Stream, reduced: Stream) -> float:
    device, (B, T, hidden) = reduced.device, reduced.x.shape
    units, keep = reference.config.intermediate_size, reduced.config.intermediate_size
    gram, cross = Moment(units, units, device=device), Moment(units, hidden, device=device)
    for part in batches(reference.config, B, T):
        reference.add(part, reference.mlp(w, part))
        seen: dict[str, Tensor] = {}
        local = reduced.mlp(w, part, seen.__setitem__)
        rows, target = seen["m"].flatten(0, 1), _target(reference, reduced, part, local)
        if "down_bias" in w:
            target = target - w["down_bias"]
        gram.add(rows)
        cross.add(rows, target)

    C, loss, prior = gram.mean(), 0.0, w["down"].T
    kept = torch.arange(units, device=device)
    if keep < units:
        solution = solve_mlp(C, w["down"], keep)
        kept, prior, loss = solution.kept, solution.down.T, solution.loss
        for role in ("gate", "up", "gate_bias", "up_bias"):
            if role in w:
                new[role] = w[role][kept].contiguous()
    new["down"] = refit(C[kept][:, kept], cross.mean()[kept], prior, REFIT_RIDGE).float().T.contiguous()
    _balance_units(new)
    for part in batches(reduced.config, B, T):
        reduced.add(part, reduced.mlp(new, part))
    return loss


def _balance_units(w: Layer) -> None:
    """Give the columns of `down` equal norm and `up` the inverse scale: exact, and block grids round them alike."""
    norm = w["down"].norm(dim=0)
    norm = torch.where(norm > 0, norm / norm.mean(), torch.ones_like(norm))
    w["down"] = w["down"] / norm
    w["up"] = w["up"] * norm[:, None]
    if "up_bias" in w:
        w["up_bias"] = w["up_bias"] * norm

"""Reduce a model's inner dimensions: solve each component from its statistics and apply the result to the weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from a3q.model import Layer, Model, ModelConfig
from a3q.solve.mlp import solve_mlp
from a3q.solve.ov import solve_ov
from a3q.solve.qk import mix_rows, select_frequencies, solve_qk
from a3q.statistics import LayerStatistics
from a3q.store import LayerStore


@dataclass(frozen=True)
class Dimensions:
    """Inner sizes after reduction. The GGUF route has one head size for queries, keys and values alike."""

    head_dim: int
    intermediate_size: int


@dataclass(frozen=True)
class LayerLosses:
    """Share of each component's functional energy that one layer lost; 0 for a component left alone."""

    qk: float
    ov: float
    mlp: float


@dataclass(frozen=True)
class Reduction:
    """A reduced model, the frequencies it kept (indices into the original's), and what each layer lost."""

    model: Model
    frequencies_kept: list[int]
    losses: list[LayerLosses]


def reduced_config(config: ModelConfig, dimensions: Dimensions) -> tuple[ModelConfig, list[int]]:
    """`config` under the new dimensions and the indices of the rotation frequencies that stay."""
    kept = select_frequencies(config.head_dim // 2, dimensions.head_dim // 2)
    return dataclasses.replace(
        config,
        head_dim=dimensions.head_dim,
        intermediate_size=dimensions.intermediate_size,
        frequencies=tuple(config.frequencies[i] for i in kept),
    ), kept


def reduce_layer(
    config: ModelConfig,
    w: Layer,
    statistics: LayerStatistics,
    dimensions: Dimensions,
    kept: list[int],
    device: torch.device,
) -> tuple[Layer, LayerLosses]:
    """One layer under `dimensions`; components whose size stays are copied. Solved in float64 on `device`."""
    new = dict(w)
    qk_loss = ov_loss = mlp_loss = 0.0
    if dimensions.head_dim < config.head_dim:
        qk_loss = _reduce_qk(config, new, statistics, kept, device)
        ov_loss = _reduce_ov(config, new, statistics, dimensions.head_dim, device)
    if dimensions.intermediate_size < config.intermediate_size:
        mlp_loss = _reduce_mlp(new, statistics, dimensions.intermediate_size, device)
    return new, LayerLosses(qk_loss, ov_loss, mlp_loss)


def _per_head(rows: Tensor, heads: int) -> Tensor:
    """`[heads · d, …]` to `[heads, d, columns]`, a bias as one column."""
    return rows.reshape(heads, rows.shape[0] // heads, -1)


def _set(w: Layer, role: str, per_head: Tensor) -> None:
    """Store per-head rows `[heads, r, columns]` under `role`, as a matrix or a bias as before."""
    flat = per_head.reshape(-1) if w[role].dim() == 1 else per_head.reshape(-1, per_head.shape[-1])
    w[role] = flat.float().to(w[role].device).contiguous()


def _reduce_qk(
    config: ModelConfig, w: Layer, statistics: LayerStatistics, kept: list[int], device: torch.device
) -> float:
    frequencies = torch.tensor(config.frequencies, dtype=torch.float64, device=device)
    solution = solve_qk(
        statistics.q.to(device), statistics.k.to(device), statistics.distances.to(device), frequencies, kept
    )
    # The runtime divides scores by sqrt(r), the model was trained with sqrt(d).
    rescale = math.sqrt(2 * len(kept) / config.head_dim)
    for side, mix, heads in (
        ("q", solution.query * rescale, config.num_attention_heads),
        ("k", solution.key, config.num_key_value_heads),
    ):
        for role in (side, f"{side}_bias"):
            if role in w:
                _set(w, role, mix_rows(mix, _per_head(w[role].to(device), heads)))
    return solution.loss


def _reduce_ov(config: ModelConfig, w: Layer, statistics: LayerStatistics, r: int, device: torch.device) -> float:
    H, G = config.num_attention_heads, config.num_key_value_heads
    w_o = w["o"].T.reshape(H, config.head_dim, -1).to(device)
    solution = solve_ov(statistics.o.to(device), w_o, G, r)
    for role in ("v", "v_bias"):
        if role in w:
            _set(w, role, solution.value.mT @ _per_head(w[role].to(device), G).double())
    output = solution.output @ w_o.double()
    w["o"] = output.reshape(H * r, -1).T.float().to(w["o"].device).contiguous()
    return solution.loss


def _reduce_mlp(w: Layer, statistics: LayerStatistics, keep: int, device: torch.device) -> float:
    solution = solve_mlp(statistics.m.to(device), w["down"].to(device), keep)
    kept = solution.kept.to(w["up"].device)
    for role in ("gate", "up", "gate_bias", "up_bias"):
        if role in w:
            w[role] = w[role][kept].contiguous()
    w["down"] = solution.down.float().to(w["up"].device).contiguous()
    _balance_units(w)
    return solution.loss


def _balance_units(w: Layer) -> None:
    """Give the columns of `down` equal norm and `up` the inverse scale: exact, and block grids round them alike."""
    norm = w["down"].norm(dim=0)
    norm = torch.where(norm > 0, norm / norm.mean(), torch.ones_like(norm))
    w["down"] = w["down"] / norm
    w["up"] = w["up"] * norm[:, None]
    if "up_bias" in w:
        w["up_bias"] = w["up_bias"] * norm


def reduce(
    model: Model,
    statistics: Sequence[LayerStatistics],
    dimensions: Dimensions,
    device: torch.device,
    memory_budget: int,
    on_layer: Callable[[], None] = lambda: None,
) -> Reduction:
    """The whole model under `dimensions`, layer by layer; layers beyond `memory_budget` bytes wait on disk."""
    config, kept = reduced_config(model.config, dimensions)
    layers: LayerStore[Layer] = LayerStore(memory_budget, lambda layer: layer, lambda tensors: tensors)
    losses: list[LayerLosses] = []
    for w, stats in zip(model.layers, statistics, strict=True):
        layer, loss = reduce_layer(model.config, w, stats, dimensions, kept, device)
        layers.append(layer)
        losses.append(loss)
        on_layer()
    return Reduction(dataclasses.replace(model, config=config, layers=layers), kept, losses)

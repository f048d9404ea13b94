"""A3's step on the weights of one layer: each function solves one component and puts the smaller weights in place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from a3q import ranks
from a3q.model import Layer, LayerShape, ModelConfig
from a3q.solve.mlp import MLPSolution, select_units, solve_mlp
from a3q.solve.ov import OVSolution, solve_ov_sizes
from a3q.solve.qk import (
    QKSolution,
    pair_energy,
    select_frequencies,
    select_pairs,
    solve_pairs,
    solve_plain,
    split_dimensions,
)
from a3q.solve.rotate import key_scales, value_transforms
from a3q.statistics import AttentionStatistics

SWEEPS = 12
"""Alternations of the mixing of RoPE pairs; the loss hardly falls after these."""


@dataclass(frozen=True)
class Method:
    """How a layer is reduced."""

    name: str = "a3q"
    """`paper`: selection of RoPE pairs, OV and CUR as A3 has them. `a3q`: pairs are mixed and every output refitted."""
    frequencies: str = "shared"
    """`shared`: all heads of all layers keep the same RoPE frequencies, as stock GGUF runtimes need; or `per_head`."""

    @property
    def fitted(self) -> bool:
        """Whether a3q's own steps are taken beyond the paper's."""
        return self.name == "a3q"


def _per_head(rows: Tensor, heads: int) -> Tensor:
    """`[heads · d, …]` to `[heads, d, columns]`, a bias as one column."""
    return rows.reshape(heads, rows.shape[0] // heads, -1)


def _store(w: Layer, role: str, per_head: Tensor) -> None:
    """Put per-head rows `[heads, r, columns]` under `role`, as a matrix or a bias as before."""
    flat = per_head.reshape(-1) if w[role].dim() == 1 else per_head.reshape(-1, per_head.shape[-1])
    w[role] = flat.float().contiguous()


def even_heads(config: ModelConfig, shape: LayerShape, w: Layer, gram: Tensor, mean: Tensor) -> None:
    """Use the transform that is free inside each head, in place, so that weights and cache are rounded well.

    `gram` is E[xᵀx] `[hidden, hidden]` of the normed states and `mean` E[x]. The layer computes what it did before.
    """

    def energy(role: str) -> Tensor:
        """E[y²] of each output `[heads, d]` of a projection."""
        weight, bias = w[role], w.get(f"{role}_bias")
        found = (weight @ gram * weight).sum(1)
        if bias is not None:
            found = found + 2 * bias * (weight @ mean) + bias.square()
        return found.clamp_min(0).view(config.num_key_value_heads, -1)

    groups, shared = config.num_key_value_heads, config.queries_per_group
    if config.qk_norm is None:
        divisors = key_scales(energy("k"), shape.pairs)
        for side, scale in (("k", 1 / divisors), ("q", divisors.repeat_interleave(shared, 0))):
            for role in (side, f"{side}_bias"):
                if role in w:
                    w[role] = w[role] * (scale.flatten() if w[role].dim() == 1 else scale.flatten()[:, None])
    columns = w["o"].view(-1, groups, shared, shape.v_head_dim)
    transform, inverse = value_transforms(energy("v"), columns.square().sum((0, 2)).sqrt())
    for role in ("v", "v_bias"):
        if role in w:
            _store(w, role, transform.mT @ _per_head(w[role], groups))
    w["o"] = torch.einsum("ogid,ged->ogie", columns, inverse).reshape(w["o"].shape).contiguous()


def reduce_qk(
    config: ModelConfig, shape: LayerShape, w: Layer, statistics: AttentionStatistics, r: int, method: Method
) -> tuple[tuple[tuple[float, ...], ...], float]:
    """Queries and keys of `r` dimensions, in place; the frequencies they turn at, and the share of energy lost."""
    C_q, C_k = statistics.q.mean(), statistics.k.mean()
    kept, rest = _kept_dimensions(shape, C_q, C_k, r, method)
    if config.qk_norm is None:
        solution = _solve_qk(config, shape, C_q, C_k, statistics, kept, rest, method)
        # Scores are divided by sqrt(r), the model was trained with sqrt(d).
        rescale = math.sqrt(r / shape.qk_head_dim)
        for side, mix, heads in (
            ("q", solution.query * rescale, config.num_attention_heads),
            ("k", solution.key, config.num_key_value_heads),
        ):
            for role in (side, f"{side}_bias"):
                if role in w:
                    _store(w, role, mix @ _per_head(w[role], heads).double())
        loss = solution.loss
    else:
        _select_normed(config, shape, w, C_q, C_k, kept)
        loss = _selection_loss(C_q, C_k, kept)
    lists = [shape.frequencies[0]] * len(kept) if len(shape.frequencies) == 1 else list(shape.frequencies)
    frequencies = tuple(
        tuple(own[i] for i in indices) for own, indices in zip(lists, kept.tolist(), strict=False) if own
    )
    return (frequencies[:1] if len(set(frequencies)) == 1 else frequencies), loss


def qk_losses(
    config: ModelConfig, shape: LayerShape, statistics: AttentionStatistics, sizes: Sequence[int], method: Method
) -> list[float]:
    """The share of energy that `reduce_qk` would lose at each of `sizes`.

    Every process solves for its share of the sizes, and for all heads: steps of many small matrices are bound by
    latency, and take as long for fewer of them.
    """
    C_q, C_k = statistics.q.mean(), statistics.k.mean()
    # What takes all processes comes before what each does alone.
    kept = [_kept_dimensions(shape, C_q, C_k, r, method) for r in sizes]
    distances = statistics.distances() if shape.pairs and config.qk_norm is None else None
    losses = torch.zeros(len(sizes), dtype=torch.float64, device=C_q.device)
    # Taken in turn, since larger sizes take longer.
    for i in range(ranks.rank(), len(sizes), ranks.count()):
        pairs, rest = kept[i]
        if config.qk_norm is None:
            losses[i] = _solve_heads(config, shape, C_q, C_k, distances, pairs, rest, method).loss
        else:
            losses[i] = _selection_loss(C_q, C_k, pairs)
    ranks.add_up(losses)
    found: list[float] = losses.tolist()
    return found


def _kept_dimensions(shape: LayerShape, C_q: Tensor, C_k: Tensor, r: int, method: Method) -> tuple[Tensor, int]:
    """Indices `[G, R]` of the rotated pairs that each key head keeps, and how many of its other dimensions."""
    count, turned = shape.pairs, 2 * shape.pairs
    keep, rest = ranks.same_object(split_dimensions(C_q, C_k, count, r))
    if method.frequencies == "shared":
        same = torch.tensor(select_frequencies(count, keep), dtype=torch.int64, device=C_q.device)
        return same.expand(len(C_k), -1), rest
    energy = pair_energy(C_q[:, :turned, :turned], C_k[:, :turned, :turned])
    return ranks.agreed(select_pairs(energy, keep, keep // 2 if method.fitted else 0)), rest


def _solve_qk(
    config: ModelConfig,
    shape: LayerShape,
    C_q: Tensor,
    C_k: Tensor,
    statistics: AttentionStatistics,
    kept: Tensor,
    rest: int,
    method: Method,
) -> QKSolution:
    """Every process solves for its share of the key heads and of the queries that read them."""
    H, G = config.num_attention_heads, config.num_key_value_heads
    keys, queries = _own_heads(config)
    # Added up over all processes, also those that have no heads.
    distances = statistics.distances()[queries] if shape.pairs else None
    if keys.stop > keys.start:
        frequencies = shape.frequencies if len(shape.frequencies) < 2 else shape.frequencies[keys]
        known = replace(shape, frequencies=frequencies)
        own = _solve_heads(config, known, C_q[queries], C_k[keys], distances, kept[keys], rest, method)
    else:
        none = C_k.new_zeros(0, 2 * kept.shape[1] + rest, shape.qk_head_dim, dtype=torch.float64)
        own = QKSolution(none, none, 0.0, 0.0)
    lost, energy = _added_up(own.lost, own.energy, C_q.device)
    return QKSolution(ranks.joined_rows(own.query, H, queries), ranks.joined_rows(own.key, G), lost, energy)


def _solve_heads(
    config: ModelConfig,
    shape: LayerShape,
    C_q: Tensor,
    C_k: Tensor,
    distances: Tensor | None,
    kept: Tensor,
    rest: int,
    method: Method,
) -> QKSolution:
    turned = 2 * shape.pairs
    parts = []
    if distances is not None:
        frequencies = torch.tensor(shape.frequencies, dtype=torch.float64, device=C_q.device)
        rotated_q, rotated_k = C_q[:, :turned, :turned], C_k[:, :turned, :turned]
        sweeps = SWEEPS if method.fitted else 0
        reach = min(config.max_position_embeddings, shape.sliding_window or config.max_position_embeddings)
        parts.append(solve_pairs(rotated_q, rotated_k, distances, frequencies, kept, sweeps, reach))
    if turned < shape.qk_head_dim:
        parts.append(solve_plain(C_q[:, turned:, turned:], C_k[:, turned:, turned:], rest))
    if len(parts) == 1:
        return parts[0]

    def diagonal(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat((F.pad(a, (0, b.shape[-1])), F.pad(b, (a.shape[-1], 0))), dim=-2)

    a, b = parts
    return QKSolution(diagonal(a.query, b.query), diagonal(a.key, b.key), a.lost + b.lost, a.energy + b.energy)


def _own_heads(config: ModelConfig) -> tuple[slice, slice]:
    """The key heads that this process solves for, if any, and the query heads that share them."""
    groups, shared = config.num_key_value_heads, config.queries_per_group
    own = ranks.share(groups)
    return own, slice(own.start * shared, own.stop * shared)


def _added_up(lost: float, energy: float, device: torch.device) -> tuple[float, float]:
    """Both of all processes together."""
    both = torch.tensor([lost, energy], dtype=torch.float64, device=device)
    ranks.add_up(both)
    total = both.tolist()
    return total[0], total[1]


def _select_normed(config: ModelConfig, shape: LayerShape, w: Layer, C_q: Tensor, C_k: Tensor, kept: Tensor) -> None:
    """Keep pairs of heads whose queries and keys are normed: rows, and the norms' weights, which make up for the scale.

    Over fewer dimensions the root mean square is another; its mean square ratio to the old one goes into the weight.
    """
    rows = torch.cat((kept, kept + shape.pairs), dim=-1)
    r = rows.shape[-1]
    for side, C, heads in (("q", C_q, config.num_attention_heads), ("k", C_k, config.num_key_value_heads)):
        own = rows.repeat_interleave(heads // len(rows), dim=0)
        for role in (side, f"{side}_bias"):
            if role in w:
                per_head = _per_head(w[role], heads)
                _store(w, role, per_head.gather(1, own[:, :, None].expand(-1, -1, per_head.shape[-1])))
        weight = w[f"{side}_norm"].view(-1, shape.qk_head_dim).expand(heads, -1).double()
        # E[x²] of the normed input before its weight; a weight of zero hides it, and such a dimension carries nothing.
        square = C.diagonal(dim1=-2, dim2=-1).double() / weight.square().clamp_min(1e-12)
        # What all of them lack to one is the share of the norm's epsilon, which stays.
        ratio = 1 - square.mean(-1, keepdim=True) + square.gather(1, own).mean(-1, keepdim=True)
        if config.qk_norm == "all":
            ratio = ratio.mean(0, keepdim=True)
        scale = ratio.sqrt() * (math.sqrt(r / shape.qk_head_dim) if side == "q" else 1.0)
        w[f"{side}_norm"] = (weight.gather(1, own) * scale).flatten().float()


def _selection_loss(C_q: Tensor, C_k: Tensor, kept: Tensor) -> float:
    energy = pair_energy(C_q, C_k)
    lost = energy.sum() - energy.gather(1, kept).sum()
    return float(lost / energy.sum().clamp_min(torch.finfo(torch.float32).tiny))


def spread_norms(config: ModelConfig, w: Layer) -> None:
    """Give every head its own copy of the norms' weights that all heads shared."""
    for role, heads in (("q_norm", config.num_attention_heads), ("k_norm", config.num_key_value_heads)):
        if config.qk_norm == "head":
            w[role] = w[role].repeat(heads)


def ov_losses(
    config: ModelConfig, w: Layer, statistics: AttentionStatistics, sizes: Sequence[int], method: Method
) -> list[float]:
    """The share of energy that `reduce_ov` would lose at each of `sizes`."""
    return [solution.loss for solution in _solve_ov(config, w, statistics, sizes, method)]


def _solve_ov(
    config: ModelConfig, w: Layer, statistics: AttentionStatistics, sizes: Sequence[int], method: Method
) -> list[OVSolution]:
    """Every process solves for its share of the value heads and of the queries that read them."""
    H, G = config.num_attention_heads, config.num_key_value_heads
    own, queries = _own_heads(config)
    values = None if method.fitted or H == G else statistics.v.mean()[own]
    moments, weights, groups = statistics.o.mean(), _per_head(w["o"].T, H), own.stop - own.start
    if groups:
        found = solve_ov_sizes(moments[queries], weights[queries], groups, sizes, values)
    else:
        none = [moments.new_zeros(0, moments.shape[-1], r, dtype=torch.float64) for r in sizes]
        found = [OVSolution(one, one.mT, 0.0, 0.0) for one in none]
    solutions = []
    for one in found:
        lost, energy = _added_up(one.lost, one.energy, w["o"].device)
        value, output = ranks.joined_rows(one.value, G), ranks.joined_rows(one.output, H, queries)
        solutions.append(OVSolution(value, output, lost, energy))
    return solutions


def reduce_ov(config: ModelConfig, w: Layer, statistics: AttentionStatistics, r: int, method: Method) -> float:
    """Values of `r` dimensions, in place; the share of energy lost."""
    H, G = config.num_attention_heads, config.num_key_value_heads
    (solution,) = _solve_ov(config, w, statistics, [r], method)
    for role in ("v", "v_bias"):
        if role in w:
            _store(w, role, solution.value.mT @ _per_head(w[role], G).double())
    w["o"] = (solution.output @ _per_head(w["o"].T, H).double()).reshape(H * r, -1).T.float().contiguous()
    return solution.loss


def reduce_mlp(w: Layer, m_moment: Tensor, keep: int, method: Method) -> tuple[Tensor, float]:
    """`keep` units, in place; their indices and the share of energy lost."""
    outputs = len(w["down"])
    kept = ranks.agreed(select_units(m_moment, w["down"], keep))
    found = solve_mlp(m_moment, w["down"][ranks.share(outputs)], kept, refit=method.fitted)
    for role in ("gate", "up", "gate_bias", "up_bias"):
        if role in w:
            w[role] = w[role][kept].contiguous()
    w["down"] = ranks.joined_rows(found.down.float(), outputs).contiguous()
    lost, energy = _added_up(found.lost, found.energy, m_moment.device)
    return kept, MLPSolution(kept, found.down, lost, energy).loss

"""What rounding a weight costs: how much a little noise in it changes the predictions, and how much noise a grid makes.

Rounding errors are small and nearly independent, so that the KL divergence they cause together is close to a sum: over
the weight matrices, a matrix's cost times the relative squared error `‖W − Q‖² / ‖W‖²` that its grid makes there (the
linearity theorem of arXiv 2411.17525). The cost is measured with Gaussian noise. As in `a3q.sensitivity`, the branch of
a few probe sequences in which one matrix alone is disturbed runs on through the rest of the undisturbed model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from a3q.forward import embed, norm, run_layer, to_device
from a3q.model import Model
from a3q.perplexity import mean_divergences
from a3q.solve.gptq import nearest
from a3q.solve.grid import Grid

NOISE = 0.005
"""Relative squared size of the noise; what 4 bits make."""
_DRAWS = 4
"""Draws of noise for embedding and output, the largest matrices; one draw's cost of them is a third off at times."""


@dataclass(frozen=True)
class Costs:
    """KL divergence (nats) that each weight matrix causes, per unit of its relative squared error."""

    layers: tuple[Mapping[str, float], ...]
    """Of each layer, by role."""
    top: Mapping[str, float]
    """Of `embed` and `output`; of `embed` alone where one matrix is both."""

    def of(self, layer: int | None, roles: Iterable[str]) -> float:
        """Of `roles` of a layer (None: outside the layers) that make the same relative error."""
        known = self.top if layer is None else self.layers[layer]
        return sum(known[role] for role in roles)


@dataclass(frozen=True)
class _Branch:
    """Final hidden states of the probes with one matrix disturbed, and the draw of the output's noise, if any."""

    states: Tensor
    draw: int | None = None


@torch.inference_mode()
def measure(
    model: Model,
    probes: Tensor,
    device: torch.device,
    tied: bool,
    on_layer: Callable[[], None] = lambda: None,
    noise: float = NOISE,
    seed: int = 0,
) -> Costs:
    """Costs of all matrices of `model` on `probes` `[S, T]`, whose second halves count.

    `tied`: one matrix is embedding and output, disturbed in both uses. `noise`: its relative squared size. The branches
    take `S · T · hidden_size` floats for each matrix of each layer.
    """
    config, tokens = model.config, probes.to(device)
    model = replace(model, top=to_device(model.top, device))
    probe, roles = embed(model, tokens).cpu(), matrices_of(model)
    branches = torch.empty(_DRAWS + config.num_hidden_layers * len(roles), *probe.shape)
    for draw in range(_DRAWS):
        top = {**model.top, "embed": disturb(model.embed, noise, _draw(seed, draw))}
        branches[draw].copy_(embed(replace(model, top=top), tokens))
    generator, started = _draw(seed, _DRAWS), _DRAWS
    for shape, w in zip(config.layers, model.layers, strict=True):
        w = to_device(w, device)
        run_layer(config, shape, w, branches[:started].flatten(0, 1), device)
        for role in roles:
            branches[started].copy_(probe)
            # Each sequence meets noise of its own, which costs nothing and makes the mean less a matter of chance.
            for x in branches[started, :, None]:
                run_layer(config, shape, {**w, role: disturb(w[role], noise, generator)}, x, device)
            started += 1
        run_layer(config, shape, w, probe, device)
        on_layer()
    ends = [_Branch(part, i if tied and i < _DRAWS else None) for i, part in enumerate(branches)]
    if not tied:
        ends += [_Branch(probe, draw) for draw in range(_DRAWS)]
    found = [kl / noise for kl in _divergences(model, probe, ends, noise, seed, device)]
    inner = iter(found[_DRAWS:])
    layers = tuple({role: next(inner) for role in roles} for _ in config.layers)
    top_costs = {"embed": sum(found[:_DRAWS]) / _DRAWS}
    return Costs(layers, top_costs if tied else {**top_costs, "output": sum(inner) / _DRAWS})


def _draw(seed: int, draw: int) -> torch.Generator:
    """Large noise is drawn again where it is needed again, and not kept."""
    return torch.Generator().manual_seed(seed * (_DRAWS + 1) + draw)


def matrices_of(model: Model) -> list[str]:
    """Roles of each layer that are matrices; no weight is read."""
    return [role.name for role in model.family.layer if role.name in model.layer_roles and len(role.shape) == 2]


def disturb(weight: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """`weight` `[rows, n]` with Gaussian noise of relative squared size `noise`, in proportion to each row.

    So is that of rounding; rows of an embedding differ widely, and noise alike in all hits the small ones too hard.
    """
    draw = torch.randn(weight.shape, generator=generator).to(weight.device)
    draw *= weight.norm(dim=1, keepdim=True)
    draw *= (noise * weight.square().sum() / draw.square().sum()).sqrt()
    return weight + draw


def _divergences(
    model: Model, probe: Tensor, branches: Sequence[_Branch], noise: float, seed: int, device: torch.device
) -> list[float]:
    """Mean KL (nats) of each branch from `probe` `[S, T, hidden]`; over the second half."""
    half = probe.shape[1] // 2

    def logits(branch: _Branch, rows: slice) -> Tensor:
        hidden = norm(model.config, model.top, "final_norm", branch.states[:, half:].flatten(0, 1)[rows].to(device))
        if branch.draw is None:
            return F.linear(hidden, model.output)
        return F.linear(hidden, disturb(model.output, noise, _draw(seed, branch.draw)))

    others = [partial(logits, branch) for branch in branches]
    return mean_divergences(partial(logits, _Branch(probe)), others, len(probe) * (probe.shape[1] - half))


def rounding_error(weight: Tensor, grid: Grid) -> float:
    """Relative squared error of `weight` `[rows, n]` rounded to `grid`, n a multiple of its block."""
    # Blocks are independent: as rows of one block each, they are rounded all at once.
    x = weight.float().reshape(-1, grid.block)
    left = x - nearest(x, grid, torch.ones(grid.block, device=x.device)).dequantize()
    energy = float(x.square().sum(dtype=torch.float64))
    return float(left.square().sum(dtype=torch.float64)) / energy if energy > 0 else 0.0

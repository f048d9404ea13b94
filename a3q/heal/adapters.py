"""Low-rank adapters (LoRA, arXiv 2106.09685) by PEFT, for models that are too large to train all their weights.

The weights stay as they are, in the type that is computed in. Beside each matrix `W` a product `scaling · B A` of rank
16 is trained, 0 at the start, and added to `W` afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from a3q import ranks
from a3q.errors import InputError
from a3q.forward import AdaptedLayer, lowered
from a3q.heal.student import FullStudent, trained_roles
from a3q.model import Layer, Model, free_memory
from a3q.units import megabytes

RANK = 16
SCALING = 2
"""Of every adapter's product, whatever its rank: LoRA's alpha over the rank."""
_NAME = "default"
"""PEFT's for the only set of adapters."""
_AMPLE = 1 / 3
"""Share of the free memory that is left to activations and logits where all weights are trained."""
_SCARCE = 1 / 8
"""The same where it must be enough: one sequence at a time, with layers computed twice."""


class LowRankStudent:
    """The layers' matrices stay, in `dtype`, and float32 adapters beside them are trained. A `Student`."""

    def __init__(
        self,
        model: Model,
        device: torch.device,
        dtype: torch.dtype,
        attention_only: bool = False,
        rank: int = RANK,
        seed: int = 0,
    ) -> None:
        """`rank`: at most; a matrix with a smaller side has that. InputError where PEFT is missing."""
        self.model = model
        weights: list[Layer] = []
        modules: list[dict[str, nn.Linear]] = []
        for source in model.layers:
            # Copies: they may come from a pass in which nothing is recorded for gradients.
            copied = {role: weight.to(device, torch.float32, copy=True) for role, weight in source.items()}
            layer = lowered(copied, dtype)
            # Processes may have them in another order.
            roles = [role for role in sorted(trained_roles(list(layer), attention_only)) if layer[role].dim() == 2]
            modules.append({role: _frozen(layer[role], layer.get(f"{role}_bias")) for role in roles})
            weights.append(layer)
        # Every process begins with the same, and leaves other random numbers as they were.
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed)
            self._adapters = _adapted(modules, rank)
        self._layers = [
            AdaptedLayer(layer, {role: _product(module, dtype) for role, module in adapters.items()})
            for layer, adapters in zip(weights, self._adapters, strict=True)
        ]
        wrapped = [module for adapters in self._adapters for module in adapters.values()]
        self._trained: list[Tensor] = [one for module in wrapped for one in module.parameters() if one.requires_grad]

    def parameters(self) -> list[Tensor]:
        """See `Student`."""
        return self._trained

    def layer(self, index: int) -> Layer:
        """See `Student`."""
        return self._layers[index]

    @torch.no_grad()
    def finished(self, index: int) -> Layer:
        """See `Student`."""
        device = self._trained[0].device
        layer = {role: weight.to(device, torch.float32) for role, weight in self.model.layers[index].items()}
        # To the weights as they came, and not as they were rounded to be computed with.
        return layer | {role: layer[role] + one.get_delta_weight(_NAME) for role, one in self._adapters[index].items()}


def _frozen(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A module on `weight` itself."""
    rows, columns = weight.shape
    module = nn.Linear(columns, rows, bias is not None, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    return module


def _adapted(layers: list[dict[str, nn.Linear]], rank: int) -> list[dict[str, Any]]:
    """Each matrix in PEFT's module around it."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError(
            f"--heal: the model is too large to train all its weights, and low-rank adapters need peft ({error}); "
            'pip install "a3q[heal]", or take --heal blocks'
        ) from error
    sides = {f"{i}.{role}": min(one.weight.shape) for i, layer in enumerate(layers) for role, one in layer.items()}
    smaller = {re.escape(name): side for name, side in sides.items() if side < rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=SCALING * rank,
        target_modules=sorted({name.rpartition(".")[2] for name in sides}),
        rank_pattern=smaller,
        alpha_pattern={name: SCALING * side for name, side in smaller.items()},
    )
    tree = nn.ModuleList(nn.ModuleDict(layer) for layer in layers)
    found: list[dict[str, Any]] = [dict(layer.items()) for layer in inject_adapter_in_model(config, tree, _NAME)]
    for layer in found:
        for module in layer.values():
            # PEFT makes them of the matrix's type.
            module.lora_A.float()
            module.lora_B.float()
    return found


def _product(module: Any, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    if dtype == torch.float32:
        found: Callable[[Tensor], Tensor] = module
        return found
    # Else it would turn what it multiplies into float32, and keep that for the backward pass.
    module.cast_input_dtype_enabled = False
    return partial(_in, dtype, module)


def _in(dtype: torch.dtype, product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What a module with adapters gives, these in `dtype` as well."""
    with torch.autocast(x.device.type, dtype):
        return product(x)


def student_for(
    model: Model,
    original: Model,
    device: torch.device,
    dtype: torch.dtype,
    attention_only: bool,
    free: int,
    seed: int = 0,
    adapted: bool | None = None,
) -> tuple[FullStudent | LowRankStudent, list[str]]:
    """The student for `free` bytes of the device's memory, the teacher's to be among them; notes for the user.

    All weights are trained where there is ample room for it, and otherwise low-rank adapters, unless `adapted` says
    which of the two. InputError where there is too little for that.
    """
    whole, low = _needed(model, original, dtype, attention_only)
    ample = whole / (1 - _AMPLE)
    if adapted is None:
        adapted = ample > free
    needed = (low if adapted else whole) / (1 - _SCARCE)
    if needed > free:
        kind = "even with low-rank adapters" if adapted else "with all weights, as this run has begun"
        raise InputError(
            f"--heal: to train the model {kind} takes {megabytes(needed)} of memory on {device}, and {megabytes(free)} "
            "are free; free some memory, or take --heal blocks, for which one layer at a time is enough"
        )
    if not adapted:
        return FullStudent(model, device, dtype, attention_only), []
    note = (
        f"the model is too large to train all its weights, for which {megabytes(ample)} of memory are wanted: low-rank "
        f"adapters (LoRA, rank {RANK}) instead"
    )
    return LowRankStudent(model, device, dtype, attention_only, seed=seed), [note]


def _needed(model: Model, original: Model, dtype: torch.dtype, attention_only: bool) -> tuple[int, int]:
    """Bytes of teacher and student, with all weights in training and with adapters only; activations apart."""
    size = dtype.itemsize
    # Of weights in float32 there is a rounded copy beside them.
    rounded = 0 if dtype == torch.float32 else size
    roles = trained_roles(sorted(model.layer_roles), attention_only)
    shapes = [
        role.expected_shape(model.config, layer)
        for layer in model.config.layers
        for role in model.family.layer
        if role.name in roles
    ]
    trained = sum(prod(shape) for shape in shapes)
    adapters = sum(min(RANK, *shape) * sum(shape) for shape in shapes if len(shape) == 2)
    inner, teacher_inner = (one.parameters() - sum(w.numel() for w in one.top.values()) for one in (model, original))
    own = [weight for role, weight in model.top.items() if weight is not original.top.get(role)]
    top = 4 * sum(weight.numel() for weight in (*original.top.values(), *own))
    outputs = rounded * (model.output.numel() + original.output.numel())
    both = size * teacher_inner + top + outputs
    # Float32 values; of those that are trained the gradient and two moments of Adam's.
    value, learning = 4 + rounded, 12
    return both + value * inner + learning * trained, both + size * inner + (value + learning) * adapters


def free_on(device: torch.device) -> int:
    """Bytes of a device's memory that healing may take now, over several processes where there are the fewest."""
    free, devices = free_memory(device), torch.cuda.device_count() if device.type == "cuda" else 1
    own = torch.tensor([free // -(-ranks.neighbours() // devices)])
    return int(ranks.joined_rows(own, ranks.count()).min())

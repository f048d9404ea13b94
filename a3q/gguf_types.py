"""Settle the type of every tensor of a GGUF before anything is rounded, and how it is rounded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from gguf.constants import GGMLQuantizationType
from numpy import uint8
from numpy.typing import NDArray

from a3q import ranks
from a3q.cache import costs_file, load_costs, save_costs
from a3q.choosing import PROBES, growing, spread
from a3q.errors import InputError
from a3q.model import Model, ModelConfig
from a3q.noise import Costs, matrices_of, measure
from a3q.pipeline import Calibrated
from a3q.quantize import Quantization
from a3q.reduce_layer import MLP
from a3q.solve.grid import GRIDS, Blocks, Grid
from converters import ggml_encode
from converters.assignment import Types, assign
from converters.budget import Limit, SampledError, choose
from converters.entries import Entry, entries
from converters.expected_error import ExpectedError
from converters.ggml_pack import pack
from converters.gguf_target import target_for
from converters.gptq import to_ggml
from converters.nearest import nearest
from converters.tensors import LazyLayers
from converters.types import QuantPlan

MOVED = frozenset(("q", "k", "v", "o", "down"))
"""Roles whose rows are mixed with one another, or fitted anew, before they are rounded."""
QUANTIZERS = ("gptq", "rtn", "plain")
_PRECISE = 8
"""Bits of a code from which error feedback is not worth a pass over calibration text of its own."""
_NEARLY = 6
"""Bits of a code from which rounding a tensor changes the predictions little."""


@dataclass(frozen=True)
class TypeRequest:
    """What the user asked about types and rounding."""

    plan: QuantPlan
    quantizer: str | None = None
    """`gptq`; `rtn`: to the nearest, weighted by importance, in ggml's own code; `plain`: to the nearest without
    calibration. None: `gptq`, but `plain` where nothing is reduced and all types have 8 bits or more."""
    strict: bool = False
    limit: Limit | None = None
    """Types are chosen within it; the plan then only says what the mixed file is called."""

    def facts(self) -> dict[str, str]:
        """By names and values for people."""
        output, embed = self.plan.output, self.plan.embed
        facts = {
            "--quant": None if self.limit is not None else self.plan.name,
            "--quantizer": self.quantizer,
            "--bits, --size": None if self.limit is None else str(self.limit),
            "--output-tensor-type": None if output is None else output.name,
            "--token-embedding-type": None if embed is None else embed.name,
        }
        return {name: value for name, value in facts.items() if value is not None}

    def check(self) -> None:
        """InputError for what cannot be."""
        if self.quantizer not in (None, *QUANTIZERS):
            raise InputError(f"--quantizer {self.quantizer}: give {', '.join(QUANTIZERS)}")
        if self.quantizer == "rtn" and not ggml_encode.available():
            raise InputError(
                "--quantizer rtn runs llama.cpp's own code, which is not installed; take --quantizer gptq, or "
                'pip install "a3q[verify]"'
            )
        if self.limit is None:
            return
        bits, size = self.limit.bits, self.limit.size
        if (bits is not None and not 0 < bits < math.inf) or (size is not None and size <= 0):
            raise InputError(f"{'--size' if bits is None else '--bits'} {self.limit}: give a positive size")
        if self.strict or self.plan.output is not None or self.plan.embed is not None:
            raise InputError(
                "--bits and --size choose the type of every tensor: leave out --strict, --output-tensor-type and "
                "--token-embedding-type"
            )


@dataclass
class Settled:
    """Types of all tensors of the file to be written, and what of it the calibration pass rounds."""

    types: Types
    tensors: Sequence[Entry]
    quantizer: str
    quantization: Quantization | None
    """None: nothing is rounded before the file is written."""

    @property
    def rounded(self) -> bool:
        """Whether writing the file rounds the model in memory no further, or hardly."""
        if self.quantization is None:
            return False
        left = [
            e
            for e in self.tensors
            if e.layer is None and not {role.name for role in e.roles} & self.quantization.top.keys()
        ]
        grids = [grid for entry in left if (grid := _grid(self.types.kinds[entry.name])) is not None]
        return all(grid.bits >= _NEARLY for grid in grids)


@dataclass
class TypeSettler:
    """Settles types once the dimensions are known; a `Rounding` of `a3q.pipeline`."""

    original: Model
    request: TypeRequest
    reducing: bool
    overhead: Callable[[Model], int]
    """Bytes of the file of a model before its first tensor."""
    cache_only: bool = False
    """Only the attention is reduced: what else the source stores as its type is taken over as it is."""
    settled: Settled | None = None

    def check(self) -> None:
        """InputError, before anything takes time, for what cannot be where nothing is reduced."""
        if self.reducing:
            return
        if self.request.limit is None:
            _ = self._unreduced_types
            return
        target = target_for(self.original)
        overhead = 0 if self.request.limit.size is None else self.overhead(self.original)
        layer = dict.fromkeys(matrices_of(self.original), 1.0)
        costs = Costs((layer,) * self.original.config.num_hidden_layers, {"embed": 1.0, "output": 1.0})
        choose(entries(self.original, target), costs, lambda entry, kind: 1.0, self.request.limit, overhead)

    @property
    def needs_calibration(self) -> bool:
        """Whether calibration text is needed to choose types, or for the rounding alone."""
        if self.repacked:
            return False
        if self.request.limit is not None:
            return True
        kinds = self._unreduced_types.kinds.values()
        bits = [grid.bits for kind in kinds if (grid := _grid(kind)) is not None]
        if self.request.quantizer is None:
            return any(one < _PRECISE for one in bits)
        return bool(bits) and self.request.quantizer != "plain"

    @property
    def repacked(self) -> bool:
        """Whether weights that are on a grid already are to be taken over without loss."""
        return not self.reducing and self.request.limit is None and bool(self._source_kinds)

    def __call__(self, config: ModelConfig, calibrated: Calibrated | None) -> Quantization | None:
        """Settle for the dimensions of `config`."""
        model = replace(self.original, config=config)
        if calibrated is None and config == self.original.config:
            types = self._unreduced_types
        else:
            types = self._types(model, calibrated)
        tensors = entries(model, target_for(model))
        quantizer = self.request.quantizer or "gptq"
        if self.repacked:
            types = replace(types, kinds={**types.kinds, **self._source_kinds})
            quantizer = "plain"
        elif calibrated is None or not any(_grid(kind) for kind in types.kinds.values()):
            quantizer = "plain"
        found = None if quantizer == "plain" else self._quantization(types, tensors, model, quantizer)
        self.settled = Settled(types, tensors, quantizer, found)
        return found

    @cached_property
    def _unreduced_types(self) -> Types:
        """Without a limit, and for the dimensions as they were read."""
        return self._types(self.original, None)

    def _types(self, model: Model, calibrated: Calibrated | None) -> Types:
        target = target_for(model)
        tensors = entries(model, target)
        if self.request.limit is None or calibrated is None:
            moved = MOVED - frozenset(MLP) if self.cache_only else MOVED
            error = ExpectedError(self.original.source.stored, moved)
            return assign(self.request.plan, tensors, model.config, target.tied, error, self.request.strict)
        limit, overhead = self.request.limit, 0 if self.request.limit.size is None else self.overhead(model)

        def chosen() -> Types:
            costs = _costs(self.original, calibrated, target.tied)
            return choose(tensors, costs, SampledError(self.original, MOVED), limit, overhead)

        return ranks.by_first(chosen)

    def _quantization(self, types: Types, tensors: Sequence[Entry], model: Model, quantizer: str) -> Quantization:
        tied = target_for(model).tied
        # One matrix that the file holds twice, on two grids, cannot be rounded in memory.
        twice = model.config.tie_word_embeddings and not tied
        layers: list[dict[str, Grid]] = [{} for _ in model.config.layers]
        top: dict[str, Grid] = {}
        kept = self._kept(types, tensors)
        for entry in tensors:
            if (grid := _grid(types.kinds[entry.name])) is None or entry.name in kept:
                continue
            for role in entry.roles:
                if entry.layer is not None:
                    layers[entry.layer][role.name] = grid
                    continue
                # The layers can make up for an embedding's errors; an output of many bits has hardly any.
                first = role.name == "embed" and not tied
                if not twice and (first or self.request.limit is not None or grid.bits < _NEARLY):
                    top[role.name] = grid
        return Quantization(layers, top, nearest if quantizer == "rtn" else None)

    @cached_property
    def _source_kinds(self) -> dict[str, GGMLQuantizationType]:
        """Types that the layers' tensors can take over from a quantized source as they are; none unless all can.

        From a GGUF these are the types that were asked for, from a GPTQ checkpoint any with as many bits.
        """
        wanted = self._unreduced_types.kinds
        bits = _grid(self.request.plan.matrix)
        found: dict[str, GGMLQuantizationType] = {}
        layer = _by_layer(self.original)
        for entry in entries(self.original, target_for(self.original)):
            if entry.layer is None or len(entry.shape) == 1:
                continue
            grids = {part.grid for role in entry.roles if (part := layer(entry.layer).get(role.name)) is not None}
            if not grids:
                continue
            grid = grids.pop()
            same = (
                grid == _grid(wanted[entry.name])
                if self.original.source.format == "gguf"
                else grid.bits == (bits.bits if bits is not None else 0)
            )
            if grids or not same:
                return {}
            found[entry.name] = GGMLQuantizationType[grid.name.upper()]
        return found

    def _kept(self, types: Types, tensors: Sequence[Entry]) -> frozenset[str]:
        """Names of the tensors that are taken over as the source stores them while at most the attention is reduced.

        Of the layers all of an MLP or none, since rounding a part of it moves the rest.
        """
        if not self.cache_only and not self.repacked:
            return frozenset()
        same = {e.name for e in tensors if self.original.source.stored.get(e.name) == types.kinds[e.name].name}
        mlp = {e.name for e in tensors if e.layer is not None and {role.name for role in e.roles} & set(MLP)}
        top = {e.name for e in tensors if e.layer is None}
        return frozenset((same & top) | (mlp if mlp <= same else set()))

    def packer(self) -> Callable[[int | None, Mapping[str, Blocks], str], NDArray[uint8] | None]:
        """Given a layer (None: outside the layers), what was rounded there and a role: the encoded weight, if any."""
        source = _by_layer(self.original)
        assert self.settled is not None
        kept = self._kept(self.settled.types, self.settled.tensors)
        roles = {role.name for entry in self.settled.tensors if entry.name in kept for role in entry.roles}

        def of(i: int | None, rounded: Mapping[str, Blocks], role: str) -> NDArray[uint8] | None:
            taken_over = role in roles or (i is not None and self.repacked)
            blocks = source(i).get(role) if taken_over else rounded.get(role)
            return None if blocks is None else pack(blocks)

        return of


def _by_layer(source: Model) -> Callable[[int | None], dict[str, Blocks]]:
    """The weights of a layer (None: outside the layers) that its maker left on a GGUF grid, by role."""

    @lru_cache(maxsize=1)
    def layer(i: int | None) -> dict[str, Blocks]:
        if not isinstance(source.layers, LazyLayers):
            return {}
        blocks_of = source.layers.top_blocks() if i is None else source.layers.blocks(i)
        found = {role: _in_gguf(blocks) for role, blocks in blocks_of.items()}
        return {role: blocks for role, blocks in found.items() if blocks is not None}

    return layer


def _in_gguf(blocks: Blocks) -> Blocks | None:
    return blocks if GRIDS.get(blocks.grid.name) == blocks.grid else to_ggml(blocks)


def _grid(kind: GGMLQuantizationType) -> Grid | None:
    return GRIDS.get(kind.name.lower())


def _costs(model: Model, calibrated: Calibrated, tied: bool) -> Costs:
    count, length = PROBES[calibrated.device.type]
    probes = spread(calibrated.calibration.tokens, count)[:, :length]
    file = costs_file(calibrated.digests, model.config, probes, tied)
    known = load_costs(file, model, tied)
    if known is None:
        with calibrated.stages("weigh the matrices", model.config.num_hidden_layers**2) as advance:
            known = measure(model, probes, calibrated.device, tied, growing(advance))
        save_costs(file, known)
    return known

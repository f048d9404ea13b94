"""Which type each tensor of a GGUF file gets, settled from shapes before any weight is quantized."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gguf.constants import GGMLQuantizationType

from a3q.errors import InputError
from a3q.model import ModelConfig
from a3q.solve.grid import GRIDS
from converters.entries import Entry
from converters.mixes import MIXES, category_of, type_in
from converters.types import TENSOR_TYPES, QuantPlan, bits_per_weight, block_size

_T = GGMLQuantizationType

RoundingError = Callable[[Entry, GGMLQuantizationType], float]
"""Relative squared error of a tensor's weights when they are rounded to a type."""

_SMALL_BLOCKS = [TENSOR_TYPES[name] for name, grid in GRIDS.items() if grid.block == 32]
_CLOSE = 1.0
"""Bits per weight that a substitute may differ by; further off it would belong to another size of file."""

# llama.cpp's own choice, taken where nothing can be measured.
_UNMEASURED = {_T.Q2_K: _T.Q4_0, _T.Q3_K: _T.Q4_0, _T.Q4_K: _T.Q5_0, _T.Q5_K: _T.Q5_1, _T.Q6_K: _T.Q8_0}


@dataclass(frozen=True)
class Substitution:
    """Tensors whose rows do not divide into the blocks of the type that was wanted."""

    tensors: tuple[str, ...]
    """Names in the file."""
    kinds_of_tensors: tuple[str, ...]
    """Their names without the layer, such as `attn_q`."""
    row_lengths: tuple[int, ...]
    """Weights of a row, ascending; several where layers differ in size."""
    wanted: GGMLQuantizationType
    taken: GGMLQuantizationType

    @property
    def obstacle(self) -> str:
        """Why, in words."""
        count = f"{len(self.tensors)} tensor{'s' if len(self.tensors) > 1 else ''}"
        low, high = self.row_lengths[0], self.row_lengths[-1]
        rows = f"{low}" if low == high else f"{low} to {high}"
        blocks = "super-blocks" if block_size(self.wanted) == 256 else "blocks"
        return (
            f"{', '.join(self.kinds_of_tensors)} ({count}): rows of {rows} do not divide into "
            f"{self.wanted.name}'s {blocks} of {block_size(self.wanted)}"
        )

    @property
    def note(self) -> str:
        """Why, and what is stored instead, in words."""
        bits, instead_of = bits_per_weight(self.taken), bits_per_weight(self.wanted)
        return f"{self.obstacle}; stored as {self.taken.name}, {bits:.2f} bits per weight instead of {instead_of:.2f}"


@dataclass(frozen=True)
class Types:
    """The type of every tensor of a file."""

    kinds: Mapping[str, GGMLQuantizationType]
    """By the tensor's name."""
    substitutions: tuple[Substitution, ...]
    """Where a tensor has another type than the plan's."""

    @property
    def notes(self) -> tuple[str, ...]:
        """The substitutions in words, one line each."""
        return tuple(one.note for one in self.substitutions)

    def bits_per_weight(self, entries: Sequence[Entry]) -> float:
        """Mean storage of a weight over all tensors of the file."""
        size = sum(entry.bytes(self.kinds[entry.name]) for entry in entries)
        return 8.0 * size / sum(entry.weights for entry in entries)


def assign(
    plan: QuantPlan,
    entries: Sequence[Entry],
    config: ModelConfig,
    tied: bool,
    error: RoundingError | None = None,
    strict: bool = False,
) -> Types:
    """The type of each of `entries`, which are all of a file; `tied`: it has no output of its own.

    A tensor whose rows do not fit the type of its mix takes one of similar size with blocks of 32: that of least
    `error` at equal bytes, measured once for all layers on the middle one of those concerned, or without `error`
    llama.cpp's choice. It takes F16 where even these do not fit. InputError where `strict` and any does not fit.
    """
    kinds: dict[str, GGMLQuantizationType] = {}
    misfits: dict[tuple[str, GGMLQuantizationType, bool], list[Entry]] = defaultdict(list)
    for entry in entries:
        kind = kinds[entry.name] = _wanted(plan, entry, config, tied)
        if not _fits(entry, kind):
            misfits[entry.short_name, kind, entry.shape[-1] % 32 == 0].append(entry)
    if misfits and strict:
        substitutions = _merged([(found, kind, kind) for (_, kind, _), found in misfits.items()])
        raise InputError(_refusal(plan, substitutions, entries, config, tied))
    taken = [(found, kind, _substitute(found, kind, error)) for (_, kind, _), found in misfits.items()]
    for found, _, substitute in taken:
        kinds.update((entry.name, substitute) for entry in found)
    return Types(kinds, _merged(taken))


def _wanted(plan: QuantPlan, entry: Entry, config: ModelConfig, tied: bool) -> GGMLQuantizationType:
    """The type that the plan means, whether or not the rows fit."""
    roles = [role.name for role in entry.roles]
    # llama.cpp's own programs leave positions as they are, too.
    if len(entry.shape) == 1 or "positions" in roles:
        return _T.F32
    category = category_of(roles, tied)
    if plan.embed is not None and "embed" in roles:
        return plan.embed
    if plan.output is not None and category == "output":
        return plan.output
    return type_in(plan.mix, category, entry.layer or 0, entry.shape[-1], config)


def _fits(entry: Entry, kind: GGMLQuantizationType) -> bool:
    return entry.shape[-1] % block_size(kind) == 0


def _substitute(
    found: Sequence[Entry], wanted: GGMLQuantizationType, error: RoundingError | None
) -> GGMLQuantizationType:
    """What `found` take instead of `wanted`: the same tensor of several layers, all of which fit the same types."""
    middle = found[len(found) // 2]
    fitting = [kind for kind in _SMALL_BLOCKS if _fits(middle, kind)]
    if not fitting:
        return _T.F16
    if error is None:
        return _UNMEASURED[wanted]
    bits = bits_per_weight(wanted)
    candidates = [kind for kind in fitting if abs(bits_per_weight(kind) - bits) <= _CLOSE]
    if not candidates:
        nearest = min(bits_per_weight(kind) for kind in fitting if bits_per_weight(kind) > bits)
        candidates = [kind for kind in fitting if bits_per_weight(kind) == nearest]
    # Each bit more divides the squared error by four, so this is the error at equal bytes.
    return min(candidates, key=lambda kind: error(middle, kind) * 4.0 ** bits_per_weight(kind))


def _merged(
    taken: Sequence[tuple[Sequence[Entry], GGMLQuantizationType, GGMLQuantizationType]],
) -> tuple[Substitution, ...]:
    """Substitutions of entries, wanted and taken type; those that differ only in which tensors they concern are one."""
    groups: dict[tuple[GGMLQuantizationType, GGMLQuantizationType, tuple[int, ...]], list[Entry]] = defaultdict(list)
    for found, wanted, substitute in taken:
        groups[wanted, substitute, tuple(sorted({entry.shape[-1] for entry in found}))] += found
    return tuple(
        Substitution(
            tuple(entry.name for entry in found),
            tuple(dict.fromkeys(entry.short_name for entry in found)),
            lengths,
            wanted,
            substitute,
        )
        for (wanted, substitute, lengths), found in groups.items()
    )


def _refusal(
    plan: QuantPlan, substitutions: Sequence[Substitution], entries: Sequence[Entry], config: ModelConfig, tied: bool
) -> str:
    """What --strict says."""
    fitting = [
        name.lower()
        for name in MIXES
        if all(_fits(e, _wanted(QuantPlan(name.lower(), plan.output, plan.embed), e, config, tied)) for e in entries)
    ]
    advice = f", or choose a type that fits: {', '.join(fitting)}" if fitting else ""
    obstacles = "; ".join(one.obstacle for one in substitutions)
    return f"--strict: {plan.name} does not fit all tensors: {obstacles}. Leave out --strict{advice}"

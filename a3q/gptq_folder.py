"""Settle which weights of a Hugging Face folder are stored in GPTQ's layout, and how they are rounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import gcd, lcm

from a3q.dimensions import Grid as Sizes
from a3q.errors import InputError
from a3q.hf.layout import Part, layer_parts
from a3q.model import Model, ModelConfig
from a3q.pipeline import Calibrated
from a3q.quantize import Quantization
from a3q.solve.gptq import nearest
from a3q.solve.grid import Grid
from converters.gptq import ALIGNED, BITS, Form, fits, gptq_grid

GROUP_SIZES = (128, 64, 32)
QUANTIZERS = ("gptq", "rtn")


@dataclass(frozen=True)
class FolderQuant:
    """What the user asked about the rounding of a folder."""

    bits: int
    group_size: int
    symmetric: bool
    quantizer: str
    """`gptq`, or `rtn`: to the nearest, weighted by importance."""

    @classmethod
    def of(
        cls, quant: str | None, fmt: str | None, group_size: int, symmetric: bool, quantizer: str | None
    ) -> FolderQuant | None:
        """From the options; None where nothing is quantized. InputError for what cannot be."""
        if quant is None:
            given = {
                f"--format {fmt}": fmt is not None,
                f"--group-size {group_size}": group_size != GROUP_SIZES[0],
                "--asym": not symmetric,
                f"--quantizer {quantizer}": quantizer is not None,
            }
            if alone := [option for option, there in given.items() if there]:
                raise InputError(f"{alone[0]}: nothing is quantized; give --quant 4bit as well")
            return None
        bits = {f"{bits}bit": bits for bits in BITS}.get(quant.lower())
        if bits is None:
            known = ", ".join(f"{bits}bit" for bits in BITS)
            raise InputError(f"--quant {quant}: a folder is quantized with {known}; a3q convert has llama.cpp's types")
        if fmt is not None and fmt.lower() != "gptq":
            raise InputError(f"--format {fmt}: quantized folders are written as gptq")
        if group_size not in GROUP_SIZES:
            raise InputError(f"--group-size {group_size}: give {', '.join(map(str, GROUP_SIZES))}")
        if quantizer not in (None, *QUANTIZERS):
            raise InputError(f"--quantizer {quantizer}: a folder is rounded by {' or '.join(QUANTIZERS)}")
        return cls(bits, group_size, symmetric, quantizer or "gptq")

    def facts(self) -> dict[str, str]:
        """By names and values for people."""
        return {
            "--quant": f"{self.bits}bit",
            "--group-size": str(self.group_size),
            "--asym": "no" if self.symmetric else "yes",
            "--quantizer": self.quantizer,
        }

    @property
    def grid(self) -> Grid:
        """Values that a weight may take."""
        return gptq_grid(self.bits, self.group_size, self.symmetric)

    @property
    def type_name(self) -> str:
        """What the written weights are called."""
        return Form(self.bits, self.group_size).type_name

    def check(self, model: Model) -> None:
        """InputError where most of the weights of `model` cannot be stored so."""
        hidden, path = model.config.hidden_size, model.source.path
        if hidden % self.group_size == 0:
            return
        possible = sorted(size for size in GROUP_SIZES if hidden % size == 0)
        if not possible:
            raise InputError(
                f"{path}: GPTQ's kernels want multiples of {ALIGNED}, and the hidden size is {hidden}; leave --quant "
                "out, or write a GGUF with a3q convert"
            )
        raise InputError(
            f"{path}: the hidden size of {hidden} is no multiple of --group-size {self.group_size}; take --group-size "
            f"{' or '.join(map(str, possible))}"
        )

    def sizes(self, config: ModelConfig, sizes: Sizes) -> Sizes:
        """Those of `sizes` at which the weights that are reduced can be stored so."""
        block = lcm(self.group_size, ALIGNED)
        # With these, queries and keys, or values, have as many rows as kernels want.
        step = max(ALIGNED // gcd(ALIGNED, heads) for heads in (config.num_attention_heads, config.num_key_value_heads))
        return replace(sizes, head_step=step * -(-sizes.head_step // step), block=block, unit_block=block)


@dataclass
class FolderRounding:
    """Settles the rounding once the dimensions are known; a `Rounding` of `a3q.pipeline`."""

    model: Model
    """As it was read."""
    request: FolderQuant
    notes: list[str] = field(default_factory=list)
    """What the user should know, once it is settled."""

    @property
    def needs_calibration(self) -> bool:
        """Whether a pass over calibration text is to be made for the rounding alone."""
        return True

    def __call__(self, config: ModelConfig, calibrated: Calibrated | None) -> Quantization:
        """Settle for the dimensions of `config`."""
        grid, odd = self.request.grid, dict[tuple[tuple[str, ...], str], list[int]]()
        layers: list[dict[str, Grid]] = [{} for _ in config.layers]
        for i, part, rows, n in self._matrices(config):
            names = tuple(role.name for role in part.roles)
            # Roles in one tensor are one matrix for the kernels.
            if fits(rows, n, grid):
                layers[i] |= dict.fromkeys(names, grid)
            else:
                odd.setdefault((names, _why(rows, n, grid)), []).append(i)
        if not any(layers):
            raise InputError(
                f"{self.model.source.path}: no weight of its layers can be stored as {self.request.type_name}: "
                f"{next(iter(odd))[1]}; leave --quant out, or write a GGUF with a3q convert"
            )
        self.notes = [
            f"not quantized: {', '.join(names)} {_where(found, len(layers))}: {why}"
            for (names, why), found in odd.items()
        ]
        return Quantization(layers, nearest=nearest if self.request.quantizer == "rtn" else None)

    def _matrices(self, config: ModelConfig) -> Iterator[tuple[int, Part, int, int]]:
        """Layer, tensor, rows and inputs of every matrix of the layers."""
        for i, shape in enumerate(config.layers):
            # A family's own layout joins the same roles.
            for part in layer_parts(self.model.family, self.model.layer_roles, i):
                if len(size := part.shape(config, shape)) == 2:
                    yield i, part, size[0], size[1]


def _why(rows: int, n: int, grid: Grid) -> str:
    if n % grid.block:
        return f"{n} inputs are no whole groups of {grid.block}"
    return f"{rows} rows are no multiple of {ALIGNED}, which kernels want"


def _where(layers: Sequence[int], total: int) -> str:
    if len(layers) == total:
        return "of all layers"
    return f"of layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"

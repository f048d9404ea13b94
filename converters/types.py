"""What a user may name as the type of a GGUF file or of one of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from a3q.errors import InputError
from a3q.solve.grid import GRIDS
from converters.mixes import MIXES, Mix

BITS: Mapping[str, str] = {
    "8bit": "Q8_0",
    "6bit": "Q6_K",
    "5bit": "Q5_K_M",
    "4bit": "Q4_K_M",
    "3bit": "Q3_K_M",
    "2bit": "Q2_K",
}
"""What the short names stand for."""

# The first three are llama.cpp's own.
_ALIASES = {"q5_k": "Q5_K_M", "q4_k": "Q4_K_M", "q3_k": "Q3_K_M", "fp16": "F16", "fp32": "F32"}

TENSOR_TYPES: Mapping[str, GGMLQuantizationType] = {
    name: GGMLQuantizationType[name.upper()] for name in ("f32", "f16", "bf16", *GRIDS)
}
"""Types that a single tensor can have, by their name in lower case."""


@dataclass(frozen=True)
class QuantPlan:
    """Which tensor types a file is written with."""

    name: str
    """The mix's name in llama.cpp, in lower case, such as `q4_k_m`."""
    output: GGMLQuantizationType | None = None
    """Of the output, in place of the mix's; of an embedding that is tied to it too, unless `embed` says otherwise."""
    embed: GGMLQuantizationType | None = None
    """Of the embedding, in place of the mix's."""

    @property
    def mix(self) -> Mix:
        """What the name stands for."""
        return MIXES[self.name.upper()]

    @property
    def matrix(self) -> GGMLQuantizationType:
        """Type of most weights of the layers."""
        return self.mix.matrix

    @property
    def file_type(self) -> LlamaFileType:
        """For `general.file_type`."""
        return self.mix.file_type

    def with_overrides(self, output_type: str | None, embed_type: str | None) -> QuantPlan:
        """This plan with the output's or the embedding's type as the user named it; None: the mix's.

        InputError for a name that is not in `TENSOR_TYPES`, in any case.
        """
        return replace(
            self,
            output=_tensor_type("--output-tensor-type", output_type),
            embed=_tensor_type("--token-embedding-type", embed_type),
        )


def _tensor_type(option: str, name: str | None) -> GGMLQuantizationType | None:
    if name is None:
        return None
    if (kind := TENSOR_TYPES.get(name.lower())) is None:
        raise InputError(f"{option} {name}: give one of {', '.join(TENSOR_TYPES)}")
    return kind


def resolve_quant(name: str) -> QuantPlan:
    """The plan behind a name such as `4bit` or `Q4_K_M`, in any case; InputError lists those that work."""
    lower = name.lower()
    wanted = BITS.get(lower) or _ALIASES.get(lower) or name.upper()
    if wanted not in MIXES:
        known = ", ".join([*BITS, *(mix.lower() for mix in MIXES)])
        raise InputError(
            f"quantization {name!r} cannot be written by a3q; it writes {known}. For another type write f16 and run "
            "llama.cpp's llama-quantize on the file"
        )
    return QuantPlan(wanted.lower())


def block_size(kind: GGMLQuantizationType) -> int:
    """Weights of a row that are stored together; a row's length must be a multiple of it."""
    return int(GGML_QUANT_SIZES[kind][0])


def bits_per_weight(kind: GGMLQuantizationType) -> float:
    """Storage of one weight, its share of the block's scales included."""
    block, size = GGML_QUANT_SIZES[kind]
    return 8.0 * float(size) / float(block)

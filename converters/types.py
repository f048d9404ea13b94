"""Tensor types of a written GGUF: what the user may name, and which type each weight gets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from a3q.errors import InputError

FOUR_BIT = "Q4_0"
"""What `4bit` stands for."""

_ALIASES = {"8bit": "Q8_0", "4bit": FOUR_BIT, "fp16": "F16", "fp32": "F32"}
# The gguf package can also encode these, but they suit only weights trained for them.
_UNSUITED = ("TQ1_0", "TQ2_0", "MXFP4", "NVFP4")
_FILE_TYPES = {"F32": "ALL_F32"}


@dataclass(frozen=True)
class QuantPlan:
    """Which tensor types a file is written with."""

    name: str
    """The type's GGUF name in lower case, such as `q4_0`."""
    matrix: GGMLQuantizationType
    """Weights of the layers."""
    vocabulary: GGMLQuantizationType
    """Embedding and output, which lose more to coarse types than the layers do."""
    file_type: LlamaFileType
    """For `general.file_type`."""


@cache
def encodable() -> tuple[str, ...]:
    """GGUF names of the types that can be written, found by trying."""
    found = []
    for kind in GGMLQuantizationType:
        if kind.name in _UNSUITED:
            continue
        try:
            quants.quantize(np.zeros((1, block_size(kind)), dtype=np.float32), kind)
        except NotImplementedError:
            continue
        found.append(kind.name)
    return tuple(found)


def block_size(kind: GGMLQuantizationType) -> int:
    """Weights of a row that are stored together; a row's length must be a multiple of it."""
    return int(GGML_QUANT_SIZES[kind][0])


def resolve_quant(name: str) -> QuantPlan:
    """The plan behind a name such as `4bit` or `Q8_0`, in any case; InputError lists those that work."""
    wanted = _ALIASES.get(name.lower(), name.upper())
    if wanted not in encodable():
        known = ", ".join(["8bit", "4bit", *(kind.lower() for kind in encodable())])
        raise InputError(
            f"quantization {name!r} cannot be written by a3q; it writes {known}. For another type write f16 and run "
            "llama.cpp's llama-quantize on the file"
        )
    matrix = GGMLQuantizationType[wanted]
    vocabulary = GGMLQuantizationType.Q8_0 if _bits(matrix) < _bits(GGMLQuantizationType.Q8_0) else matrix
    file_type = LlamaFileType[_FILE_TYPES.get(wanted, f"MOSTLY_{wanted}")]
    return QuantPlan(wanted.lower(), matrix, vocabulary, file_type)


def _bits(kind: GGMLQuantizationType) -> float:
    """Storage per weight."""
    block, size = GGML_QUANT_SIZES[kind]
    return 8.0 * float(size) / float(block)


def type_for(role: str, shape: tuple[int, ...], plan: QuantPlan) -> tuple[GGMLQuantizationType, str | None]:
    """Type of one tensor, and a note when its rows do not divide into blocks and it stays F16 for that."""
    # llama.cpp's own programs leave positions as they are, too.
    if len(shape) == 1 or role == "positions":
        return GGMLQuantizationType.F32, None
    kind = plan.vocabulary if role in ("embed", "output") else plan.matrix
    if shape[-1] % block_size(kind):
        note = f"rows of {shape[-1]} do not divide into {kind.name}'s blocks of {block_size(kind)}; stored as F16"
        return GGMLQuantizationType.F16, note
    return kind, None

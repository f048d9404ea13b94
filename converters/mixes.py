"""llama.cpp's mixes of tensor types, such as Q4_K_M: most matrices of one type, the most sensitive of a finer one.

The rule is that of `llama-quant.cpp` (`llama_tensor_get_type_impl`) for dense models and without an importance matrix.
With one, llama.cpp stores the first eighth of the ffn_down of Q4_0 and Q5_0 as Q4_1 and Q5_1, and no longer raises that
of IQ4_NL; a3q does neither, so that a name means one size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from a3q.model import ModelConfig

_T, _F = GGMLQuantizationType, LlamaFileType

Category = Literal["value", "attention_output", "down", "output", "embedding", "other"]
"""How a mix tells tensors apart. `value`: attn_v, or the fused attn_qkv. `output`: also an embedding tied to it."""
Condition = Callable[[int, ModelConfig], bool]
"""Whether it holds in a layer, counted from 0, of a model."""
_Rules = tuple[tuple[Condition, GGMLQuantizationType], ...]


def _always(layer: int, config: ModelConfig) -> bool:
    return True


def _grouped(layer: int, config: ModelConfig) -> bool:
    """Values are shared by so many queries that finer ones cost little."""
    return config.queries_per_group >= 4


def _more_bits(layer: int, config: ModelConfig) -> bool:
    """The first and last eighth of the layers, and every third one between."""
    layers = config.num_hidden_layers
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _first(count: int) -> Condition:
    return lambda layer, config: layer < count


def _first_part(share: int) -> Condition:
    """The first of `share` equal parts of the layers."""
    return lambda layer, config: layer < config.num_hidden_layers // share


@dataclass(frozen=True)
class Mix:
    """One of llama.cpp's file types."""

    file_type: LlamaFileType
    """For `general.file_type`."""
    matrix: GGMLQuantizationType
    """Where nothing else is said."""
    raised: Mapping[Category, _Rules] = field(default_factory=dict)
    """The first rule whose condition holds gives another type."""


_FINER_WHERE_IT_COUNTS: Mapping[Category, _Rules] = {
    "value": ((_more_bits, _T.Q6_K),),
    "down": ((_more_bits, _T.Q6_K),),
}

MIXES: Mapping[str, Mix] = {
    "F32": Mix(_F.ALL_F32, _T.F32),
    "F16": Mix(_F.MOSTLY_F16, _T.F16),
    "BF16": Mix(_F.MOSTLY_BF16, _T.BF16),
    "Q8_0": Mix(_F.MOSTLY_Q8_0, _T.Q8_0),
    "Q6_K": Mix(_F.MOSTLY_Q6_K, _T.Q6_K),
    "Q5_K_M": Mix(_F.MOSTLY_Q5_K_M, _T.Q5_K, _FINER_WHERE_IT_COUNTS),
    "Q5_K_S": Mix(_F.MOSTLY_Q5_K_S, _T.Q5_K),
    "Q5_1": Mix(_F.MOSTLY_Q5_1, _T.Q5_1),
    "Q5_0": Mix(_F.MOSTLY_Q5_0, _T.Q5_0),
    "Q4_K_M": Mix(_F.MOSTLY_Q4_K_M, _T.Q4_K, _FINER_WHERE_IT_COUNTS),
    "Q4_K_S": Mix(_F.MOSTLY_Q4_K_S, _T.Q4_K, {"value": ((_first(4), _T.Q5_K),), "down": ((_first_part(8), _T.Q5_K),)}),
    "Q4_1": Mix(_F.MOSTLY_Q4_1, _T.Q4_1),
    "Q4_0": Mix(_F.MOSTLY_Q4_0, _T.Q4_0),
    "IQ4_NL": Mix(_F.MOSTLY_IQ4_NL, _T.IQ4_NL, {"value": ((_grouped, _T.Q5_K),), "down": ((_first_part(8), _T.Q5_K),)}),
    "Q3_K_L": Mix(
        _F.MOSTLY_Q3_K_L,
        _T.Q3_K,
        {
            "value": ((_always, _T.Q5_K),),
            "attention_output": ((_always, _T.Q5_K),),
            "down": ((_always, _T.Q5_K),),
        },
    ),
    "Q3_K_M": Mix(
        _F.MOSTLY_Q3_K_M,
        _T.Q3_K,
        {
            "value": ((_first(2), _T.Q5_K), (_always, _T.Q4_K)),
            "attention_output": ((_always, _T.Q4_K),),
            "down": ((_first_part(16), _T.Q5_K), (_always, _T.Q4_K)),
        },
    ),
    "Q3_K_S": Mix(_F.MOSTLY_Q3_K_S, _T.Q3_K),
    "Q2_K": Mix(
        _F.MOSTLY_Q2_K,
        _T.Q2_K,
        {
            "value": ((_grouped, _T.Q4_K), (_always, _T.Q3_K)),
            "attention_output": ((_always, _T.Q3_K),),
            "down": ((_always, _T.Q3_K),),
        },
    ),
    "Q2_K_S": Mix(_F.MOSTLY_Q2_K_S, _T.Q2_K, {"value": ((_grouped, _T.Q4_K),), "down": ((_first_part(8), _T.Q4_K),)}),
}
"""By their name in llama.cpp, from the largest to the smallest."""

_CATEGORIES: Mapping[str, Category] = {
    "v": "value",
    "o": "attention_output",
    "down": "down",
    "output": "output",
    "embed": "embedding",
}


def category_of(roles: Sequence[str], tied: bool) -> Category:
    """Category of a matrix made up of `roles`; `tied`: the file has no output, the embedding stands for it."""
    found: Category = next((_CATEGORIES[role] for role in roles if role in _CATEGORIES), "other")
    return "output" if tied and found == "embedding" else found


def type_in(mix: Mix, category: Category, layer: int, row_length: int, config: ModelConfig) -> GGMLQuantizationType:
    """Type that `mix` gives to a matrix of `category` in `layer` (0 outside the layers).

    Rows may not divide into its blocks, except that an output which does not fit Q6_K is Q8_0 by the rule itself.
    """
    if category == "output":
        return _output_type(mix.matrix, row_length)
    kind = next((kind for holds, kind in mix.raised.get(category, ()) if holds(layer, config)), mix.matrix)
    if category == "value" and kind in (_T.Q3_K, _T.Q4_K) and _is_70b(config):
        return _T.Q5_K
    return kind


def _output_type(matrix: GGMLQuantizationType, row_length: int) -> GGMLQuantizationType:
    """Every probability passes through the output, so it is finer than the layers."""
    if matrix in (_T.F32, _T.F16, _T.BF16):
        return matrix
    fits = row_length % int(GGML_QUANT_SIZES[_T.Q6_K][0]) == 0
    return _T.Q6_K if fits and matrix is not _T.Q8_0 else _T.Q8_0


def _is_70b(config: ModelConfig) -> bool:
    """Whether llama.cpp takes the model for Llama 2 or 3 of 70B.

    It asks for 80 layers and shared keys under the architecture llama, which is the one that a3q writes for RMS norms
    with none of queries and keys.
    """
    llama = config.norm == "rms" and config.qk_norm is None
    return llama and config.num_hidden_layers == 80 and config.queries_per_group > 1

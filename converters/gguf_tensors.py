"""The bytes of a GGUF's tensors: weights checked, their rows in the runtime's order, encoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray
from torch import Tensor

from a3q.errors import InputError, VerifyError
from a3q.families import Role
from a3q.model import ModelConfig
from a3q.solve.gptq import nearest
from a3q.solve.grid import GRIDS
from converters import ggml_encode, rope
from converters.entries import Entry
from converters.ggml_pack import pack
from converters.gguf_graphs import query_scale
from converters.gguf_target import Target
from converters.tensors import check_finite

_T = GGMLQuantizationType
_BY_GGUF = frozenset((_T.F32, _T.F16, _T.BF16, _T.Q8_0, _T.Q5_1, _T.Q5_0, _T.Q4_1, _T.Q4_0))
"""Types that the gguf package encodes itself."""
_HALF_MAX = 65504.0
_AT_ONCE = 1 << 25
"""Weights that are encoded at once."""

PackedRole = Callable[[str], NDArray[np.uint8] | None]
"""Given a role, the weight already encoded as its tensor's type, uint8 `[rows, bytes of a row]` with the rows in the
order of the model; None where there is only the weight itself."""


@dataclass(frozen=True)
class TensorEncoder:
    """Makes the tensors of one file."""

    config: ModelConfig
    """Its dimensions alone are read."""
    target: Target
    origin: Path
    """The model, for messages."""

    def join(self, entry: Entry, kind: GGMLQuantizationType, packed: PackedRole) -> NDArray[np.uint8] | None:
        """The tensor's bytes out of what was encoded before; None unless all of its roles were."""
        if len(entry.shape) == 1:
            return None
        parts = []
        for role in entry.roles:
            part = packed(role.name)
            if part is None:
                return None
            rows = role.expected_shape(self.config, self.config.layers[entry.layer or 0])[0]
            expected = (rows, entry.bytes(kind) // entry.shape[0])
            if part.shape != expected:
                raise VerifyError(
                    f"{entry.name}: the encoded {role.name} is {list(part.shape)}, {kind.name} asks for "
                    f"{list(expected)}"
                )
            heads = self._interleaved_heads(role)
            parts.append(part if heads is None else part[rope.to_interleaved(torch.arange(rows), heads).numpy()])
        return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))

    def encode(self, entry: Entry, kind: GGMLQuantizationType, parts: Sequence[Tensor]) -> NDArray[Any]:
        """The tensor's bytes as an array, from the weights of its roles, which are left alone.

        InputError: a weight that is not finite, or that the type cannot hold. VerifyError: a weight of another shape.
        """
        shape = self.config.layers[entry.layer or 0]
        arranged = []
        for role, part in zip(entry.roles, parts, strict=True):
            expected = role.expected_shape(self.config, shape)
            if tuple(part.shape) != expected:
                raise VerifyError(
                    f"{entry.name}: the weight is {list(part.shape)}, its configuration says {list(expected)}"
                )
            arranged.append(self._arranged(part.detach(), role))
        weight = arranged[0] if len(arranged) == 1 else torch.cat(arranged)
        # Encoders make several copies of what they are given, and an embedding is large.
        step = max(1, _AT_ONCE // max(1, weight[0].numel()))
        data = [_encoded(self._checked(rows, entry, kind), kind) for rows in torch.split(weight, step)]
        return data[0] if len(data) == 1 else np.concatenate(data)

    def _checked(self, rows: Tensor, entry: Entry, kind: GGMLQuantizationType) -> Tensor:
        """Some rows of a weight, float32 on the CPU, that the type can hold."""
        rows = check_finite(rows.to("cpu", torch.float32), entry.name, self.origin)
        if kind not in (_T.F32, _T.BF16):
            # The block scales of the quantized types are half floats as well.
            low, high = torch.aminmax(rows)
            largest = max(-float(low), float(high))
            if largest > _HALF_MAX:
                raise InputError(
                    f"{self.origin}: tensor {entry.name} holds {largest:g}, too large for {kind.name}; "
                    "write bf16 or f32"
                )
        return rows

    def _arranged(self, weight: Tensor, role: Role) -> Tensor:
        if role.name == "q_norm":
            weight = weight / query_scale(self.target.architecture, self.config)
        heads = self._interleaved_heads(role)
        return weight if heads is None else rope.to_interleaved(weight, heads)

    def _interleaved_heads(self, role: Role) -> int | None:
        """Heads of a weight whose rows the file holds interleaved; None where it holds them as the model does."""
        if role.rotary is None or self.target.form.written_rope == "half":
            return None
        return self.config.num_attention_heads if role.rotary == "queries" else self.config.num_key_value_heads


def _encoded(weight: Tensor, kind: GGMLQuantizationType) -> NDArray[Any]:
    rows = np.ascontiguousarray(weight.numpy())
    if kind in _BY_GGUF:
        data: NDArray[Any] = quants.quantize(rows, kind)
        return data
    if ggml_encode.available():
        return ggml_encode.encode(rows, kind, None)
    return pack(nearest(weight, GRIDS[kind.name.lower()], torch.ones(weight.shape[1])))

"""Typed access to the metadata of a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

from a3q.errors import InputError


@dataclass(frozen=True)
class Keys:
    """Typed access to the metadata of one architecture; InputError names the key."""

    path: Path
    prefix: str
    fields: Mapping[str, GGUFValue]

    def get(self, key: str) -> Any:
        """The value, None when absent; an array with one value for each layer must hold the same one."""
        field = self.fields.get(f"{self.prefix}.{key}")
        if field is None:
            return None
        if field.type is not GGUFValueType.ARRAY:
            return field.value
        if not field.value or any(value != field.value[0] for value in field.value):
            raise InputError(f"{self.path}: {self.prefix}.{key} differs between layers, which is not supported")
        return field.value[0]

    def text(self, key: str, default: str) -> str:
        return str(self._typed(key, default, str))

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._typed(key, default, int)
        if not 0 < value < 1 << 31:
            raise InputError(f"{self.path}: {self.prefix}.{key} is {value}; the file is damaged, download it again")
        return int(value)

    def integers(self, key: str, count: int) -> list[int]:
        """One number for each of `count` layers, written as such or as one for all."""
        field = self.fields.get(f"{self.prefix}.{key}")
        if field is None or field.type is not GGUFValueType.ARRAY:
            return [self.integer(key)] * count
        if len(field.value) != count or not all(
            isinstance(value, int) and 0 < value < 1 << 31 for value in field.value
        ):
            raise InputError(
                f"{self.path}: {self.prefix}.{key} must be {count} positive numbers, one for each layer; layers "
                "without are not supported"
            )
        return [int(value) for value in field.value]

    def flag(self, key: str) -> bool:
        return bool(self._typed(key, None, bool))

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        """A finite number above zero; `zero` allows that too."""
        value = float(self._typed(key, default, float))
        if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
            raise InputError(f"{self.path}: {self.prefix}.{key} is {value}; the file is damaged, download it again")
        return value

    def _typed(self, key: str, default: Any, kind: type) -> Any:
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise InputError(f"{self.path}: the key {self.prefix}.{key} is missing; download the file again")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(f"{self.path}: {self.prefix}.{key} is {value!r}; the file is damaged, download it again")
        return value


def as_keys(values: Mapping[str, object]) -> dict[str, GGUFValue]:
    """Plain values as typed ones; what is no text, number or truth value, nor a list of these, is left out."""
    typed: dict[str, GGUFValue] = {}
    for key, value in values.items():
        if isinstance(value, list):
            kinds = {_type_of(item) for item in value}
            kind = kinds.pop() if len(kinds) == 1 else None
            if kind is not None:
                typed[key] = GGUFValue(value, GGUFValueType.ARRAY, kind)
        elif (kind := _type_of(value)) is not None:
            typed[key] = GGUFValue(value, kind)
    return typed


def _type_of(value: object) -> GGUFValueType | None:
    if isinstance(value, str):
        # JSON may hold half of a surrogate pair, which no file can.
        return None if any("\ud800" <= letter <= "\udfff" for letter in value) else GGUFValueType.STRING
    if isinstance(value, float) and math.isfinite(value):
        return GGUFValueType.FLOAT32
    if isinstance(value, bool):
        return GGUFValueType.BOOL
    if isinstance(value, int) and 0 <= value < 1 << 32:
        return GGUFValueType.UINT32
    return None

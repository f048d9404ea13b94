"""The structure of a GGUF file, read without trusting a single length in it: keys, and tensors as memory maps."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, ReaderField, ReaderTensor
from gguf.gguf_writer import GGUFValue

from a3q.errors import InputError

GGUF_MAGIC = b"GGUF"

_MAX_ITEMS = 1 << 24
"""No vocabulary, list of merges or table of tensors comes near this many entries."""
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_DAMAGE = (struct.error, ValueError, LookupError, ArithmeticError, RecursionError, MemoryError)


class CheckedReader(GGUFReader):  # type: ignore[misc]  # gguf is not typed for mypy
    """`GGUFReader` that trusts no length or count of the file; damage is one of `_DAMAGE`."""

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > self.data.size:
            raise ValueError(f"it ends at byte {self.data.size}, but says that data reach to byte {end}")
        # A plain array: slicing a memmap costs ten times as much, and a vocabulary is read in 10^5 pieces.
        array = np.asarray(self.data)[int(offset) : end].view(dtype)
        return array.view(array.dtype.newbyteorder(override_order or self.byte_order))

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        """Arrays: no nesting, a sane count, and scalars read as one part rather than one by one."""
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
        item, count, start = GGUFValueType(int(head[0][0])), int(head[1][0]), orig_offs + 12
        if item is GGUFValueType.ARRAY:
            raise ValueError("an array inside an array")
        if item is GGUFValueType.STRING:
            _check_count(count, "strings")
            parts, offset = list(head), start
            for _ in range(count):
                parts += self._get_str(offset)
                offset += 8 + parts[-1].size
            return offset - orig_offs, parts, list(range(3, len(parts), 2)), [GGUFValueType.ARRAY, item]
        data = self._get(start, self.gguf_scalar_to_np[item], count)
        return 12 + int(data.nbytes), [*head, data], [2], [GGUFValueType.ARRAY, item]

    def _build_fields(self, offs: int, count: int) -> Any:
        _check_count(count, "keys")
        return super()._build_fields(offs, count)

    def _build_tensor_info(self, offs: int, count: int) -> Any:
        _check_count(count, "tensors")
        return super()._build_tensor_info(offs, count)

    def _build_tensors(self, start_offs: int, fields: Any) -> None:
        """Also holds the tensors to lie one after another, as the runtime does."""
        super()._build_tensors(start_offs, fields)
        expected = int(start_offs)
        for tensor in self.tensors:
            if tensor.data_offset != expected:
                raise ValueError(f"tensor {tensor.name} starts at byte {tensor.data_offset} instead of {expected}")
            expected += -(-int(tensor.n_bytes) // int(self.alignment)) * int(self.alignment)


def _check_count(count: int, what: str) -> None:
    if int(count) > _MAX_ITEMS:
        raise ValueError(f"it claims {count} {what}")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns whatever a damaged file causes into one line."""
    try:
        # Offsets are unsigned numpy scalars, which would wrap round with no more than a warning.
        with np.errstate(over="raise"):
            yield
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: is truncated or damaged: {reason}; download it again") from error


def read_parts(path: Path) -> tuple[tuple[Path, ...], dict[str, GGUFValue], dict[str, ReaderTensor]]:
    """Files, metadata (of the first part, which has it all) and tensors."""
    reader = _open(path)
    split = reader.get_field("split.count")
    count = 1 if split is None else int(_value(split).value)
    if count <= 1:
        files: tuple[Path, ...] = (path,)
        readers = [reader]
    else:
        name = _SHARD.fullmatch(path.name)
        if name is None or int(name[3]) != count:
            raise InputError(
                f"{path}: is part of a GGUF in {count} files and must be called NAME-00001-of-{count:05}.gguf"
            )
        files = tuple(path.with_name(f"{name[1]}-{i + 1:05}-of-{count:05}.gguf") for i in range(count))
        readers = []
        for file in files:
            if not file.is_file():
                raise InputError(f"{file}: this part of the split GGUF {path} is missing")
            with reading(file):
                readers.append(_open(file))
    fields = {key: _value(field) for key, field in readers[0].fields.items()}
    tensors: dict[str, ReaderTensor] = {}
    for file, part in zip(files, readers, strict=True):
        for tensor in part.tensors:
            if tensor.name in tensors:
                raise InputError(f"{file}: tensor {tensor.name} is also in another part; download the parts again")
            tensors[tensor.name] = tensor
    return files, fields, tensors


def _open(path: Path) -> CheckedReader:
    with path.open("rb") as file:
        start = file.read(8)
    if start[:4] != GGUF_MAGIC:
        raise InputError(f"{path}: is not a GGUF file; pass a GGUF or a Hugging Face folder")
    if len(start) == 8 and start[4:6] == b"\0\0":
        raise InputError(f"{path}: is a big-endian GGUF, which is not supported; download a little-endian one")
    return CheckedReader(path)


def _value(field: ReaderField) -> GGUFValue:
    kind = field.types[0]
    if kind is not GGUFValueType.ARRAY:
        return GGUFValue(field.contents(), kind)
    return GGUFValue(field.contents(), kind, field.types[1])

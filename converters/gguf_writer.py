"""`Model` → GGUF in one file or several: written layer by layer, checked by reading it back, then given its name."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import gguf
import numpy as np
from gguf import GGUFValueType
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType
from gguf.gguf_writer import GGUFValue
from numpy.typing import NDArray
from torch import Tensor

from a3q.errors import InputError, VerifyError
from a3q.model import Layer, Model
from converters import gguf_split
from converters.assignment import Types, assign
from converters.draft import allocate, draft_folder, sync_and_hash, write_at
from converters.entries import Entry, entries
from converters.gguf_reader import GGUFHeader, check_gguf
from converters.gguf_target import Target, as_read_back, check_runtime, dimension_keys, factors_for, target_for
from converters.gguf_tensors import PackedRole, TensorEncoder
from converters.types import QuantPlan

_T = GGMLQuantizationType
_PROVENANCE_ROOM = 16 << 10
"""What a3q says about a file takes less, with sizes of its own in each of a hundred layers."""
_HEADER_ROOM = 16 << 20
"""Free space asked for beside the tensors: metadata, of which the vocabulary is the bulk."""

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes in all."""
Packed = Callable[[int | None, str], NDArray[np.uint8] | None]
"""Given a layer (None: outside the layers) and a role, the weight already encoded as its tensor's type, uint8
`[rows, bytes of a row]` with the rows in the order of the model; None where there is only the weight itself."""


@dataclass(frozen=True)
class WrittenFile:
    """What was written."""

    path: Path
    """The only file, or the first of several, which is the one to load."""
    size: int
    """Bytes of all files."""
    tensor_types: Mapping[str, int]
    """GGML type name → number of parameters stored in it."""
    notes: tuple[str, ...]
    """Where a tensor has another type than was asked for."""
    files: tuple[Path, ...]
    sha256: tuple[str, ...]
    """Of each of `files`."""


@dataclass(frozen=True)
class _Part:
    """One file to be written."""

    name: str
    tensors: Sequence[Entry]
    metadata: Mapping[str, GGUFValue]


def check_output(path: Path, force: bool = False, split: bool = False) -> None:
    """InputError when `path` cannot become the output: no such folder, no right to write, or it exists already.

    With `split` it is its shards, of whatever number, that must not exist.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the name of a file in it")
    if not path.parent.is_dir():
        raise InputError(f"{path}: its folder does not exist; create {path.parent} first")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: its folder cannot be written to")
    if force:
        return
    if split and (old := gguf_split.existing(path)):
        raise InputError(f"{old[0]}: exists already; use --force to replace it and the files that belong to it")
    if not split and path.exists():
        raise InputError(f"{path}: exists already; use --force to replace it")


class GGUFStream:
    """A GGUF, in one file or several, that is written as the layers of the model become ready.

    A context manager: what it leaves has its name, or is gone. Headers come first, and all room is taken at once.
    """

    def __init__(
        self,
        model: Model,
        plan: QuantPlan,
        path: Path,
        *,
        name: str | None = None,
        provenance: Mapping[str, GGUFValue] | None = None,
        types: Types | None = None,
        split_max_size: int | None = None,
        scratch: Path | None = None,
    ) -> None:
        """Write everything but the tensors; the arguments are those of `write_gguf` and raise the same.

        `model`: no weight is read, only which there are. Its configuration has the final dimensions already, while of
        RoPE frequencies only the number counts, and whether they follow from the base. `scratch`: folder beside `path`
        for the drafts, emptied if it is there and removed at the end; unless given, a new one of no fixed name.
        """
        if split_max_size is not None:
            gguf_split.check_limit(split_max_size)
        if scratch is not None and path.resolve().is_relative_to(scratch.resolve()):
            raise ValueError(f"{path} lies in {scratch}, which is removed")
        target = target_for(model)
        check_output(path, force=True)
        self._path, self._target, self._is_split = path, target, split_max_size is not None
        self._encoder = TensorEncoder(model.config, target, model.source.path)
        self._tensors = entries(model, target)
        self._types = types or assign(plan, self._tensors, model.config, target.tied)
        self._sizes = {entry.name: entry.bytes(self._types.kinds[entry.name]) for entry in self._tensors}
        self._missing = dict(self._sizes)
        self._done = 0
        room = {tensor: padded(size) for tensor, size in self._sizes.items()}
        self._size = sum(room.values()) + _HEADER_ROOM
        if name is None and "general.name" not in model.metadata:
            name = path.stem
        weights = sum(entry.weights for entry in self._tensors)
        metadata = _metadata(model, target, plan, name, weights) | dict(provenance or {})
        if split_max_size is None:
            parts = [_Part(path.name, self._tensors, metadata)]
        else:
            parts = _split(path, gguf_split.plan(self._tensors, room, split_max_size), metadata)
        with _as_input_errors(path, self._size), ExitStack() as cleanup:
            folder = cleanup.enter_context(draft_folder(path, ".part", scratch))
            free = shutil.disk_usage(folder).free
            if free < self._size:
                raise InputError(f"{path}: disk full: {self._size:,} bytes are needed and {free:,} are free; make room")
            # In a folder the parts have their final names, by which they find each other.
            self._drafts = [folder / part.name for part in parts]
            self._places = self._write_headers(parts)
            self._size = sum(draft.stat().st_size for draft in self._drafts)
            self._cleanup = cleanup.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    @property
    def size(self) -> int:
        """Bytes of all files together when they are finished."""
        return self._size

    @property
    def total(self) -> int:
        """Bytes of the tensors in all."""
        return sum(self._sizes.values())

    @property
    def written(self) -> int:
        """Bytes of the tensors that are written."""
        return self._done

    def write_layer(self, i: int, layer: Layer, packed: PackedRole | None = None) -> None:
        """Write the tensors of layer `i`, in whatever order of the layers; from `packed` as `write_gguf` does."""
        for entry in self._tensors:
            if entry.layer == i:
                self._write(entry, layer, packed)

    def write_top(self, model: Model, packed: PackedRole | None = None) -> None:
        """Write what lies outside the layers: weights, and the factors of the model's RoPE frequencies, now final."""
        top = {**model.top, "output": model.output}
        for entry in self._tensors:
            if entry.layer is None and entry.roles:
                self._write(entry, top, packed)
            elif entry.layer is None:
                # The final frequencies may be plain after all.
                factors = factors_for(self._target, model.config) or (1.0,) * entry.shape[0]
                self._put(entry, np.array(factors, dtype=np.float32))

    def finish(self, model: Model) -> WrittenFile:
        """Check the files, which `model` with its final configuration is held against, and give them their names.

        ValueError: a tensor was not written. VerifyError: a file does not read back as what was meant.
        """
        if self._missing:
            raise ValueError(f"{self._path}: tensor {next(iter(self._missing))} was not written")
        check_runtime(model)
        with _as_input_errors(self._path, self._size):
            _check(check_gguf(self._drafts[0]), model, self._target, self._tensors, self._types)
            digests = tuple(sync_and_hash(draft) for draft in self._drafts)
            if self._is_split:
                files = gguf_split.place(self._drafts, self._path)
            else:
                files = (self._drafts[0].replace(self._path),)
        totals: Counter[str] = Counter()
        for entry in self._tensors:
            totals[self._types.kinds[entry.name].name] += entry.weights
        notes, target = self._types.notes, self._target
        if model.config.tie_word_embeddings and not target.tied:
            notes += (f"output: llama.cpp's {target.architecture} needs one of its own; the embedding is stored twice",)
        return WrittenFile(files[0], self._size, dict(totals), notes, files, digests)

    def _write_headers(self, parts: Sequence[_Part]) -> dict[str, tuple[Path, int]]:
        """Make the drafts, as long as they will be; where each tensor goes: the draft, and a byte in it."""
        places: dict[str, tuple[Path, int]] = {}
        for draft, part in zip(self._drafts, parts, strict=True):
            writer = gguf.GGUFWriter(draft, self._target.architecture)
            try:
                if part is not parts[0]:
                    # The architecture, which the writer has put there by itself, is metadata of the first file too.
                    writer.kv_data[0].clear()
                _write_header(writer, part.tensors, self._types.kinds, part.metadata)
            finally:
                writer.close()
            end = padded(draft.stat().st_size)
            for entry in part.tensors:
                places[entry.name] = draft, end
                end += padded(self._sizes[entry.name])
            allocate(draft, end)
        return places

    def _write(self, entry: Entry, weights: Mapping[str, Tensor], packed: PackedRole | None) -> None:
        kind = self._types.kinds[entry.name]
        data = None if packed is None else self._encoder.join(entry, kind, packed)
        if data is None:
            data = self._encoder.encode(entry, kind, [weights[role.name] for role in entry.roles])
        self._put(entry, data)

    def _put(self, entry: Entry, data: NDArray[Any]) -> None:
        # Anything longer would reach into the next tensor, which may be there already.
        assert data.nbytes == self._sizes[entry.name], entry.name
        with _as_input_errors(self._path, self._size):
            write_at(*self._places[entry.name], data)
        self._done += self._missing.pop(entry.name, 0)


def write_gguf(
    model: Model,
    plan: QuantPlan,
    path: Path,
    *,
    name: str | None = None,
    provenance: Mapping[str, GGUFValue] | None = None,
    progress: Progress | None = None,
    types: Types | None = None,
    packed: Packed | None = None,
    split_max_size: int | None = None,
) -> WrittenFile:
    """Write `model` as `plan` says. `path` is replaced at the end or not touched at all.

    `split_max_size`: bytes of tensors in a file; then `path` OUT.gguf stands for OUT-00001-of-0000N.gguf and so on,
    also where one file is enough, and all shards that it had before are replaced.

    `types`: of every tensor, as `assign` settled them; settled here, without measuring, unless given. `packed`: where
    weights were encoded before; a tensor is written from it if it has all of the tensor's roles.

    InputError: what llama.cpp cannot hold (see `check_runtime`), no room, a folder that is not there, a weight that the
    type cannot hold. VerifyError: the file does not read back as what was meant.
    """
    options: dict[str, Any] = {"name": name, "provenance": provenance, "types": types, "split_max_size": split_max_size}
    # Layers that wait on disk may fail to be read as well.
    with GGUFStream(model, plan, path, **options) as stream, _as_input_errors(path, stream.size):
        for i in (None, *range(model.config.num_hidden_layers)):
            ready = None if packed is None else partial(packed, i)
            if i is None:
                stream.write_top(model, ready)
            else:
                stream.write_layer(i, model.layers[i], ready)
            if progress is not None:
                progress(stream.written, stream.total)
        return stream.finish(model)


@contextmanager
def _as_input_errors(path: Path, needed: int) -> Iterator[None]:
    """What the system says about the output `path`, which takes `needed` bytes, in the user's words."""
    try:
        yield
    except OSError as error:
        # A library that only counts what was written raises an OSError without a number.
        if error.errno in (errno.ENOSPC, errno.EDQUOT, None):
            raise InputError(f"{path}: disk full: {needed:,} bytes are needed; make room") from error
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def padded(size: int) -> int:
    """Bytes that a tensor of this size takes in a file."""
    alignment = int(GGUF_DEFAULT_ALIGNMENT)
    return -(-size // alignment) * alignment


def _split(path: Path, shards: Sequence[Sequence[Entry]], metadata: Mapping[str, GGUFValue]) -> list[_Part]:
    """The shards as files; the first carries all metadata."""
    count, total = len(shards), sum(map(len, shards))
    return [
        _Part(name, shard, {**(metadata if i == 0 else {}), **gguf_split.keys(i, count, total)})
        for i, (name, shard) in enumerate(zip(gguf_split.names(path, count), shards, strict=True))
    ]


def _write_header(
    writer: gguf.GGUFWriter,
    tensors: Sequence[Entry],
    kinds: Mapping[str, GGMLQuantizationType],
    metadata: Mapping[str, GGUFValue],
) -> None:
    for key, value in metadata.items():
        writer.add_key_value(key, value.value, value.type, value.sub_type)
    for entry in tensors:
        kind = kinds[entry.name]
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.bytes(kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def header_size(model: Model, room: int = _PROVENANCE_ROOM) -> int:
    """Bytes of a file of `model` before its first tensor, with `room` for what is said about its making."""
    target = target_for(model)
    tensors = entries(model, target)
    metadata = _metadata(model, target, QuantPlan("f32"), model.source.path.stem, 0)
    with tempfile.TemporaryDirectory(prefix="a3q-") as folder:
        part = Path(folder) / "header"
        writer = gguf.GGUFWriter(part, target.architecture)
        try:
            _write_header(writer, tensors, {entry.name: _T.F32 for entry in tensors}, metadata)
        finally:
            writer.close()
        return part.stat().st_size + room


def _metadata(model: Model, target: Target, plan: QuantPlan, name: str | None, weights: int) -> dict[str, GGUFValue]:
    """All keys of the file but provenance; `general.architecture` is the writer's own."""
    keys = {
        key if key.startswith(("general.", "a3q.")) else f"{target.architecture}.{key}": value
        for key, value in model.metadata.items()
    }
    texts = {"general.type": "model", "general.size_label": gguf.size_label(weights, weights, 0, 0)}
    if name is not None:
        texts["general.name"] = name
    integers = {
        "general.file_type": int(plan.file_type),
        "general.quantization_version": int(gguf.GGML_QUANT_VERSION),
    }
    keys |= {key: GGUFValue(text, GGUFValueType.STRING) for key, text in texts.items()}
    keys |= {key: GGUFValue(number, GGUFValueType.UINT32) for key, number in integers.items()}
    return keys | dimension_keys(target, model.config) | model.tokenizer.metadata


def _check(header: GGUFHeader, model: Model, target: Target, tensors: list[Entry], types: Types) -> None:
    """The file read back says what was meant; VerifyError otherwise. Its shapes already fit its own metadata."""
    meant = {entry.name: (types.kinds[entry.name], entry.shape) for entry in tensors}
    found = {
        name: (tensor.tensor_type, tuple(int(size) for size in reversed(tensor.shape)))
        for name, tensor in header.tensors.items()
    }
    wrong = [name for name in meant.keys() | found.keys() if meant.get(name) != found.get(name)]
    if wrong or header.config != as_read_back(target, model.config, header.config):
        what = f"tensor {sorted(wrong)[0]}" if wrong else "its dimensions"
        raise VerifyError(f"the written file does not read back as it was meant: {what} came out different")

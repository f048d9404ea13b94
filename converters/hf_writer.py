"""`Model` → folder of `model_type` a3q that transformers runs: streamed, checked, and only then given its name."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from a3q.errors import InputError, VerifyError
from a3q.hf import MODEL_TYPE
from a3q.hf.fields import describe, read_description
from a3q.hf.layout import Part, layer_parts, norm_offset, top_parts
from a3q.model import Layer, Model
from converters import hf_tokenizer
from converters.model_card import model_card
from converters.tensors import check_finite

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_SHARD_BYTES = 4 << 30
_ROOM = 64 << 20
"""Free space asked for beside the tensors: configuration and tokenizer."""
_INDEX = "model.safetensors.index.json"
_KNOWN_SUFFIXES = (".safetensors", ".json", ".jinja", ".md", ".gitattributes")
_KNOWN_NAMES = ("merges.txt", "vocab.txt", "tokenizer.model", "LICENSE", "LICENSE.txt", "NOTICE", "NOTICE.txt")

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes in all."""


@dataclass(frozen=True)
class WrittenFolder:
    """What was written."""

    path: Path
    size: int
    """Bytes of all files."""
    parameters: int
    dtype: str
    weight_files: tuple[Path, ...]
    notes: tuple[str, ...]
    """What the user should know."""


@dataclass(frozen=True)
class _Entry:
    """One tensor to be written."""

    part: Part
    layer: int | None
    shapes: tuple[tuple[int, ...], ...]
    """Of the weights that it is made of."""
    size: int
    """Bytes."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])


def check_output_folder(folder: Path, force: bool = False, source: Path | None = None) -> None:
    """InputError when `folder` cannot become the output. With `force` an older model folder is replaced, no other."""
    parent = folder.parent
    if folder.name in ("", ".."):
        raise InputError(f"{folder}: give the folder a name of its own")
    if not parent.is_dir():
        raise InputError(f"{folder}: the folder it is to lie in does not exist; create {parent} first")
    if not os.access(parent, os.W_OK):
        raise InputError(f"{folder}: the folder it is to lie in cannot be written to")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{folder}: is there and no folder; give another name")
    if not folder.exists():
        return
    if source is not None and source.exists() and folder.samefile(source):
        raise InputError(f"{folder}: is the model that is read; give another folder")
    entries = sorted(folder.iterdir())
    if not entries:
        return
    if not force:
        raise InputError(f"{folder}: exists already; use --force to replace it")
    strange = [entry for entry in entries if entry.is_dir() or not _is_of_a_model(entry)]
    if strange or not (folder / "config.json").is_file():
        what = f"holds {strange[0].name}" if strange else "has no config.json"
        raise InputError(f"{folder}: {what}, so a3q does not replace it as a model folder; remove it or give another")


def _is_of_a_model(path: Path) -> bool:
    return path.name in _KNOWN_NAMES or path.name.endswith(_KNOWN_SUFFIXES)


def write_huggingface(
    model: Model,
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    reduction: Mapping[str, Any] | None = None,
    force: bool = False,
    progress: Progress | None = None,
    check: Callable[[Path], None] | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> WrittenFolder:
    """Write `model` with weights of `dtype`; `reduction` is provenance in JSON. `folder` appears whole or not at all.

    `check` sees the finished folder before it gets its name, which it does not where that raises.
    InputError: no room, a folder that may not be replaced, a weight that `dtype` cannot hold. VerifyError: the folder
    does not read back as what was meant.
    """
    if dtype not in _DTYPES:
        known = ", ".join(str(kind).removeprefix("torch.") for kind in _DTYPES)
        raise InputError(f"dtype {dtype}: a folder's weights are {known}")
    check_output_folder(folder, force, model.source.path)
    config = _config(model, describe(model.family, model.config, model.layer_roles, model.top, reduction), dtype)
    shards = _plan(model, dtype, shard_bytes)
    needed = sum(entry.size for entries in shards.values() for entry in entries) + _ROOM
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise InputError(f"{folder}: disk full: {needed:,} bytes are needed and {free:,} are free; make room")
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir()
        _write_weights(part, model, shards, dtype, progress)
        _write_json(part / "config.json", config)
        notes = hf_tokenizer.write_tokenizer(model, part)
        _write_generation_config(model, part, config)
        _copy_licenses(model, part)
        (part / "README.md").write_text(model_card(model, folder.name, reduction), encoding="utf-8")
        _check(part, config, shards, dtype)
        if check is not None:
            check(part)
        _give_name(part, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"{folder}: disk full: {needed:,} bytes are needed; make room") from error
        raise InputError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return WrittenFolder(
        folder,
        sum(file.stat().st_size for file in folder.iterdir()),
        model.parameters(),
        _name(dtype),
        tuple(folder / name for name in shards),
        tuple(notes),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plan(model: Model, dtype: torch.dtype, shard_bytes: int) -> dict[str, list[_Entry]]:
    """All tensors by file, in the order in which they are computed."""
    config = model.config

    def entry(part: Part, layer: int | None) -> _Entry:
        shapes = tuple(part.shapes(config, config.layers[layer or 0]))
        return _Entry(part, layer, shapes, dtype.itemsize * sum(map(prod, shapes)))

    top = [entry(part, None) for part in top_parts(model.family, model.top)]
    first = [entry for entry in top if entry.part.roles[0].name in ("embed", "positions")]
    entries = [*first]
    for i in range(config.num_hidden_layers):
        entries += [entry(part, i) for part in layer_parts(model.family, model.layer_roles, i)]
    entries += [entry for entry in top if entry not in first]
    shards: list[list[_Entry]] = [[]]
    for item in entries:
        if shards[-1] and sum(other.size for other in shards[-1]) + item.size > shard_bytes:
            shards.append([])
        shards[-1].append(item)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i + 1:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards)}


def _write_weights(
    part: Path, model: Model, shards: Mapping[str, list[_Entry]], dtype: torch.dtype, progress: Progress | None
) -> None:
    """One file after another, of each the header first, so that no more than one layer is in memory."""
    total, done = sum(entry.size for entries in shards.values() for entry in entries), 0
    weights = _weights(model, [entry for entries in shards.values() for entry in entries])
    for name, entries in shards.items():
        with (part / name).open("wb") as file:
            _write_header(file, entries, dtype)
            for entry in entries:
                tensor = _encode(entry, next(weights), model, dtype)
                file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
                done += entry.size
                if progress is not None:
                    progress(done, total)
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        where = {entry.part.name: name for name, entries in shards.items() for entry in entries}
        content = {"metadata": {"total_size": total, "total_parameters": model.parameters()}, "weight_map": where}
        (part / _INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_header(file: BinaryIO, entries: list[_Entry], dtype: torch.dtype) -> None:
    """Length and JSON of names, types, shapes and offsets: safetensors' own functions want all tensors at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.size
        header[entry.part.name] = {"dtype": _DTYPES[dtype], "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)


def _weights(model: Model, entries: list[_Entry]) -> Iterator[list[Tensor]]:
    """The weights of each tensor; a layer is loaded once."""
    layer: Layer = {}
    loaded: int | None = None
    for entry in entries:
        if entry.layer is not None and loaded != entry.layer:
            layer, loaded = model.layers[entry.layer], entry.layer
        source = model.top if entry.layer is None else layer
        yield [source[role.name] for role in entry.part.roles]


def _encode(entry: _Entry, weights: list[Tensor], model: Model, dtype: torch.dtype) -> Tensor:
    """The tensor as it is stored."""
    parts, name = [], entry.part.name
    for role, weight, shape in zip(entry.part.roles, weights, entry.shapes, strict=True):
        if tuple(weight.shape) != shape:
            raise VerifyError(f"{name}: the weight is {list(weight.shape)}, its configuration says {list(shape)}")
        full = check_finite(weight.detach().to("cpu", torch.float32), name, model.source.path)
        stored = (full - norm_offset(model.family, role.name)).to(dtype)
        if not torch.isfinite(stored).all():
            raise InputError(
                f"{model.source.path}: tensor {name} holds {float(full.abs().max()):g}, too large for {_name(dtype)}; "
                "write bfloat16 or float32"
            )
        parts.append(stored)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _config(model: Model, fields: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Content of config.json."""
    tokens: dict[str, Any] = {
        "bos_token_id": model.tokenizer.bos_id,
        "eos_token_id": hf_tokenizer.eos_ids(model),
        "pad_token_id": hf_tokenizer.pad_id(model),
    }
    if model.source.format == "huggingface":
        source = _read_json(model.source.path / "config.json")
        tokens = {key: source.get(key, value) for key, value in tokens.items()}
    return {
        "architectures": ["A3QForCausalLM"],
        "model_type": MODEL_TYPE,
        "dtype": _name(dtype),
        **fields,
        **tokens,
        "use_cache": True,
    }


def _write_generation_config(model: Model, part: Path, config: Mapping[str, Any]) -> None:
    """The source's own file, else which tokens begin and end a text."""
    own = model.source.path / "generation_config.json"
    if model.source.format == "huggingface" and own.is_file():
        shutil.copyfile(own, part / own.name)
        return
    ids = {key: value for key, value in config.items() if key.endswith("_token_id") and value is not None}
    _write_json(part / own.name, ids)


def _copy_licenses(model: Model, part: Path) -> None:
    if model.source.format == "huggingface":
        for name in _KNOWN_NAMES:
            if name.startswith(("LICENSE", "NOTICE")) and (model.source.path / name).is_file():
                shutil.copyfile(model.source.path / name, part / name)


def _read_json(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """One line for each key: thousands of frequencies would each take one otherwise."""
    lines = (f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in content.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _check(part: Path, config: Mapping[str, Any], shards: Mapping[str, list[_Entry]], dtype: torch.dtype) -> None:
    """The folder read back says what was meant; VerifyError otherwise."""
    raw = _read_json(part / "config.json")
    meant = Counter((name, entry.part.name, entry.shape) for name, entries in shards.items() for entry in entries)
    found: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    try:
        same = read_description(raw, part) == read_description(config, part)
        for name in shards:
            with safe_open(part / name, framework="pt") as file:
                for tensor in file.keys():  # noqa: SIM118 - no mapping
                    view = file.get_slice(tensor)
                    same = same and view.get_dtype() == _DTYPES[dtype]
                    found[name, tensor, tuple(view.get_shape())] += 1
    except (InputError, SafetensorError) as error:
        raise VerifyError(f"the written folder does not read back as it was meant: {error}") from error
    if not same or meant != found:
        wrong = sorted(name for _, name, _ in (meant - found) + (found - meant))
        what = f"tensor {wrong[0]}" if wrong else "its configuration"
        raise VerifyError(f"the written folder does not read back as it was meant: {what} came out different")


def _give_name(part: Path, folder: Path) -> None:
    """Rename, the folder that has the name so far out of the way first; it is back where that fails."""
    if not folder.exists():
        part.replace(folder)
        return
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    folder.replace(old)
    try:
        part.replace(folder)
    except OSError:
        old.replace(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)

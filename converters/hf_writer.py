"""`Model` → folder of `model_type` a3q that transformers runs: streamed, checked, and only then given its name."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from a3q.errors import InputError, VerifyError
from a3q.hf import MODEL_TYPE
from a3q.hf.fields import describe, read_description
from a3q.hf.layout import Part, layer_parts, top_parts
from a3q.model import Model
from converters import hf_tokenizer
from converters.gptq_config import read_form
from converters.hf_config import config_from_hf
from converters.hf_entries import DTYPES, Plan, Progress, Quantized, dtype_name, make_plan, write_files
from converters.hf_plain import plain_config, plain_parts
from converters.model_card import model_card

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SHARD_BYTES = 4 << 30
_ROOM = 64 << 20
"""Free space asked for beside the tensors: configuration and tokenizer."""
_KNOWN_SUFFIXES = (".safetensors", ".json", ".jinja", ".md", ".gitattributes")
_KNOWN_NAMES = ("merges.txt", "vocab.txt", "tokenizer.model", "LICENSE", "LICENSE.txt", "NOTICE", "NOTICE.txt")


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
    quantized: Quantized | None = None,
    quantization: Mapping[str, Any] | None = None,
    plain: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    check: Callable[[Path], None] | None = None,
    shard_bytes: int = _SHARD_BYTES,
    scratch: Path | None = None,
) -> WrittenFolder:
    """Write `model` with weights of `dtype`; `reduction` is provenance in JSON. `folder` appears whole or not at all.

    `quantized` is asked twice for the matrices to be stored in GPTQ's layout; `quantization` are further entries of
    their `quantization_config`. Their kernels compute in float16 or bfloat16, so `dtype` must be one of the two; more
    of them take float16. With `plain` the folder is of the family's own model type, where `plain_config` knows one.

    `check` sees the finished folder before it gets its name, which it does not where that raises. `scratch`: the folder
    beside it, which has that name meanwhile; what a killed process has left there is removed. Unless given, one of no
    fixed name.
    InputError: no room, a folder that may not be replaced, a weight that `dtype` cannot hold. VerifyError: the folder
    does not read back as what was meant.
    """
    known = _DTYPES if quantized is None else _DTYPES[1:]
    if dtype not in known:
        raise InputError(f"dtype {dtype}: a folder's weights are {', '.join(map(dtype_name, known))}")
    check_output_folder(folder, force, model.source.path)
    part = scratch or folder.with_name(f".{folder.name}.{os.getpid()}.part")
    _clear(part, folder)
    fields = plain_config(model) if plain else describe(model.family, model.config, model.layer_roles, model.top)
    if fields is None:
        raise InputError(f"{folder}: no model type of its family can describe this model; write it as a3q")
    plan = make_plan(model, _layout(model, plain), dtype, shard_bytes, quantized, quantization)
    config = _config(model, fields, dtype, plain, reduction, plan.quantization)
    needed = plan.size + _ROOM
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise InputError(f"{folder}: disk full: {needed:,} bytes are needed and {free:,} are free; make room")
    try:
        part.mkdir()
        write_files(part, model, plan, dtype, quantized, progress)
        _write_json(part / "config.json", config)
        notes = hf_tokenizer.write_tokenizer(model, part)
        _write_generation_config(model, part, config)
        _copy_licenses(model, part)
        card = model_card(model, folder.name, reduction, plain, plan.quantization is not None)
        (part / "README.md").write_text(card, encoding="utf-8")
        _check(part, config, plan, model)
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
        dtype_name(dtype),
        tuple(folder / name for name in plan.files),
        tuple(notes),
    )


def _layout(model: Model, plain: bool) -> Callable[[int | None], list[Part]]:
    """The tensors of a layer, or those outside the layers."""
    family, roles, top = model.family, model.layer_roles, frozenset(model.top)
    if plain:
        return lambda i: plain_parts(family, roles, top, i)
    return lambda i: top_parts(family, top) if i is None else list(layer_parts(family, roles, i))


def _config(
    model: Model,
    fields: Mapping[str, Any],
    dtype: torch.dtype,
    plain: bool,
    reduction: Mapping[str, Any] | None,
    quantization: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Content of config.json."""
    tokens: dict[str, Any] = {
        "bos_token_id": model.tokenizer.bos_id,
        "eos_token_id": hf_tokenizer.eos_ids(model),
        "pad_token_id": hf_tokenizer.pad_id(model),
    }
    if model.source.format == "huggingface":
        source = _read_json(model.source.path / "config.json")
        tokens = {key: source.get(key, value) for key, value in tokens.items()}
    own = {} if plain else {"architectures": ["A3QForCausalLM"], "model_type": MODEL_TYPE}
    config = {**own, **fields, "dtype": dtype_name(dtype), **tokens, "use_cache": True}
    if reduction is not None or not plain:
        config["reduction"] = None if reduction is None else dict(reduction)
    return config if quantization is None else {**config, "quantization_config": dict(quantization)}


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


def _check(part: Path, config: Mapping[str, Any], plan: Plan, model: Model) -> None:
    """The folder read back says what was meant; VerifyError otherwise."""
    raw = _read_json(part / "config.json")
    meant = Counter(
        (file, one.name, DTYPES[one.dtype], one.shape)
        for file, entries in plan.files.items()
        for entry in entries
        for one in entry.tensors
    )
    found: Counter[tuple[str, str, str, tuple[int, ...]]] = Counter()
    try:
        if raw.get("model_type") == MODEL_TYPE:
            same = read_description(raw, part) == read_description(config, part)
        else:
            same = config_from_hf(model.family, raw, part) == model.config
        same = same and read_form(raw, part) == next((e.form for e in plan.entries if e.form is not None), None)
        for name in plan.files:
            with safe_open(part / name, framework="pt") as file:
                for tensor in file.keys():  # noqa: SIM118 - no mapping
                    view = file.get_slice(tensor)
                    found[name, tensor, view.get_dtype(), tuple(view.get_shape())] += 1
    except (InputError, SafetensorError) as error:
        raise VerifyError(f"the written folder does not read back as it was meant: {error}") from error
    if not same or meant != found:
        wrong = sorted(name for _, name, _, _ in (meant - found) + (found - meant))
        what = f"tensor {wrong[0]}" if wrong else "its configuration"
        raise VerifyError(f"the written folder does not read back as it was meant: {what} came out different")


def _clear(part: Path, folder: Path) -> None:
    """Remove what a process left that was killed while it wrote `folder`; what it was about to replace is back."""
    shutil.rmtree(part, ignore_errors=True)
    old = _aside(part)
    if old.is_dir() and not folder.exists():
        old.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def _aside(part: Path) -> Path:
    return part.with_name(f"{part.name}.old")


def _give_name(part: Path, folder: Path) -> None:
    """Rename, the folder that has the name so far out of the way first; it is back where that fails."""
    if not folder.exists():
        part.replace(folder)
        return
    old = _aside(part)
    folder.replace(old)
    try:
        part.replace(folder)
    except OSError:
        old.replace(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)

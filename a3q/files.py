"""Files that appear whole or not at all: written beside, on the disk before they get their name."""

from __future__ import annotations

import errno
import json
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from a3q.errors import InputError

_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 64
"""Bytes; the numbers lie in a mapped file as they would in memory, so that the same instructions work on them."""


def write_whole(path: Path, content: str) -> None:
    """Write `content` (as UTF-8, with line ends as they are) beside `path` and rename it; what is there is replaced.

    InputError where it cannot be written.
    """
    try:
        with _beside(path) as part:
            part.write_text(content, encoding="utf-8", newline="\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], temporary: bool = False
) -> None:
    """The same of a safetensors file, one tensor after another; a `temporary` one need not outlive a crash.

    InputError where it cannot be written.
    """
    # Bigger elements first keeps all of them aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    try:
        # safetensors' own function leaves a file of any name behind where it is killed.
        with _beside(path, lasting=not temporary) as part, part.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in order:
                file.write(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
        remedy = "or set TMPDIR to a folder with more" if temporary else "then give the same command again"
        raise InputError(
            f"{path.parent}: disk full: {path.name} cannot be written; make room there, {remedy}"
        ) from error


@contextmanager
def _beside(path: Path, lasting: bool = True) -> Iterator[Path]:
    """A file to write, which is called `path` at the end; `lasting`: even the power may fail then."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        if lasting:
            with part.open("r+b") as file:
                os.fsync(file.fileno())
        part.replace(path)
        if lasting:
            _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    if sys.platform == "win32":
        return
    # Not every file system can; after a power cut the file is then whole or not there.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_parts(folder: Path) -> None:
    """Remove what a killed run was writing into `folder`, which no other run may be using."""
    for part in folder.glob("*.part"):
        with suppress(OSError):
            part.unlink()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, in the memory of the file, and metadata. SafetensorError or OSError for no whole file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no mapping


@contextmanager
def kept(path: Path) -> Iterator[None]:
    """What goes wrong in reading and parsing a file that an earlier run kept, as InputError."""
    try:
        yield
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: is damaged; delete the work folder and start again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error

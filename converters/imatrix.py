"""Importances → the `imatrix.gguf` that stock `llama-quantize --imatrix` reads."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
from torch import Tensor

from a3q.errors import InputError
from a3q.importance import Importance
from a3q.model import Model
from converters.entries import Entry, entries
from converters.gguf_target import target_for
from converters.gguf_writer import check_output


def write_imatrix(path: Path, model: Model, importance: Importance, dataset: str, *, force: bool = False) -> int:
    """Write the importances of `model`'s matrices, measured on text called `dataset`; returns of how many tensors.

    Tensors are named as in the GGUF that a3q writes of `model`. `path` is replaced at the end or not touched at all.
    InputError: what llama.cpp cannot hold (see `check_runtime`), or a file that cannot be written.
    """
    check_output(path, force)
    target = target_for(model)
    found = [
        (entry.name, vector) for entry in entries(model, target) if (vector := _inputs(entry, importance)) is not None
    ]
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        _write(part, target.architecture, found, importance, dataset)
        part.replace(path)
    except OSError as error:
        # numpy reports a full disk as an OSError without a number.
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
    return len(found)


def _inputs(entry: Entry, importance: Importance) -> Tensor | None:
    """Mean squares of what a tensor is multiplied with; None for what is no matrix, and for embeddings."""
    if len(entry.shape) != 2:
        return None
    known = importance.top if entry.layer is None else importance.layers[entry.layer]
    # Several roles in one tensor are one matrix product, of the same inputs.
    return known.get(entry.roles[0].name)


def _write(
    part: Path, architecture: str, found: list[tuple[str, Tensor]], importance: Importance, dataset: str
) -> None:
    writer = gguf.GGUFWriter(part, architecture)
    try:
        writer.add_string("general.type", "imatrix")
        writer.add_array("imatrix.datasets", [dataset])
        count, length = importance.windows
        writer.add_uint32("imatrix.chunk_count", count)
        writer.add_uint32("imatrix.chunk_size", length)
        for name, mean in found:
            # llama.cpp merges files by adding up sums and counts.
            sums = (mean.double() * importance.tokens).float().numpy()
            writer.add_tensor(f"{name}.in_sum2", sums)
            writer.add_tensor(f"{name}.counts", np.array([importance.tokens], dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.flush()
    finally:
        writer.close()
    with part.open("rb+") as file:
        # A crash must not leave an empty file under the name.
        os.fsync(file.fileno())

"""Main memory for hidden states within a budget; what exceeds it lies in memory-mapped files."""

from __future__ import annotations

import errno
import os
import tempfile
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from a3q.errors import InputError
from a3q.model import free_memory

_ROOMY = Path("/var/tmp")
"""Where large temporary files belong on Unix; `/tmp` is often in main memory itself."""

_GPU_SPARE = 3
"""Part of a GPU's memory that is left to a layer, its moments and its solvers."""


class Room:
    """Hands out float32 tensors: on the GPU while it has ample room, in main memory while `budget` bytes last."""

    def __init__(self, budget: int, device: torch.device, folder: Path | None = None) -> None:
        self._left = budget
        self._device = device
        self._folder = folder or scratch_folder()

    @property
    def left(self) -> int:
        """Bytes of the budget that are left."""
        return self._left

    def empty(self, *shape: int) -> Tensor:
        """Uninitialized tensor.

        InputError where a file is needed and the disk is full.
        """
        size = 4 * prod(shape)
        if self._device.type == "cuda":
            total = torch.cuda.get_device_properties(self._device).total_memory
            if size + total // _GPU_SPARE < free_memory(self._device):
                return torch.empty(shape, device=self._device)
        if size <= self._left:
            self._left -= size
            return torch.empty(shape)
        return self._mapped(shape, size)

    def _mapped(self, shape: tuple[int, ...], size: int) -> Tensor:
        try:
            with tempfile.NamedTemporaryFile(prefix="a3q-", dir=self._folder) as file:
                # A hole in the file that cannot be filled later would kill the process without a word.
                _reserve(file.fileno(), size)
                flat = torch.from_file(file.name, shared=True, size=prod(shape), dtype=torch.float32)
                return flat.view(shape)
        except OSError as error:
            what = "disk full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
            raise InputError(
                f"{self._folder}: {what}: {size:,} bytes are needed for hidden states beyond --memory; make room, set "
                "TMPDIR to another disk, or give more --memory"
            ) from error


def scratch_folder() -> Path:
    """Where large temporary files go unless the user says otherwise in TMPDIR."""
    if "TMPDIR" not in os.environ and _ROOMY.is_dir() and os.access(_ROOMY, os.W_OK):
        return _ROOMY
    return Path(tempfile.gettempdir())


def _reserve(file: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)

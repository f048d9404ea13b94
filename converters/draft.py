"""A file of known size, written in any order before it gets its name."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NOT_THERE = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
"""What file systems answer that cannot set room aside."""


def allocate(path: Path, size: int) -> None:
    """Make an existing file `size` bytes long, the new ones zero. OSError: there is no room, where the system says."""
    with path.open("rb+", buffering=0) as file:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
                return
            except OSError as error:
                if error.errno not in _NOT_THERE:
                    raise
        file.truncate(size)


def write_at(path: Path, offset: int, data: NDArray[Any]) -> None:
    """Put an array's elements, little-endian and in C order, at byte `offset` of an existing file."""
    rest = np.ascontiguousarray(data, data.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data
    # Not `tofile`, which takes no notice when the last bytes in its buffer find no room.
    with path.open("rb+", buffering=0) as file:
        file.seek(offset)
        while rest:
            # One call writes 2 GB at most, and less where the disk is about to be full.
            rest = rest[os.write(file.fileno(), rest) :]


def sync_and_hash(path: Path) -> str:
    """SHA-256 of the file, after its bytes are on the disk: a crash must not leave an empty file under the name."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def draft_folder(path: Path, suffix: str, scratch: Path | None) -> Iterator[Path]:
    """An empty folder for drafts of `path`, on the same file system; removed at the end.

    Its name is made of that of `path` and the `suffix`, or is `scratch`, which may hold what a killed process has left.
    """
    if scratch is None:
        prefix = f".{path.name}."
        with tempfile.TemporaryDirectory(suffix, prefix, path.parent, ignore_cleanup_errors=True) as folder:
            yield Path(folder)
        return
    if scratch.exists():
        shutil.rmtree(scratch)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

"""Files that are read in pieces over hours, and must be the same files all along."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from a3q.errors import InputError


@dataclass(frozen=True)
class Stamp:
    """A file as it was when it was opened."""

    path: Path
    size: int
    modified: int
    """Nanoseconds."""

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """As it is now; OSError where it is gone."""
        about = path.stat()
        return cls(path, about.st_size, about.st_mtime_ns)


def check_unchanged(stamps: Iterable[Stamp]) -> None:
    """InputError names the first file that is another now.

    Files are memory-mapped: to read behind the new end of one would kill the process without a word.
    """
    for stamp in stamps:
        try:
            same = Stamp.of(stamp.path) == stamp
        except OSError as error:
            raise InputError(
                f"{stamp.path}: cannot be read any more: {error.strerror}; is its disk still there?"
            ) from error
        if not same:
            raise InputError(
                f"{stamp.path}: was changed or cut while it was read; copy or download it again, then start anew"
            )

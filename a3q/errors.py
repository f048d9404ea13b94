"""Errors that are addressed to the person at the keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(Exception):
    """Something the user gave cannot be used. The message names it and says what to do; the CLI exits with 2."""


class VerifyError(Exception):
    """The written file is not what it should be. The CLI exits with 1."""


class LostError(Exception):
    """Another process of the same run is gone. The CLI exits with 1."""


@contextmanager
def named(hidden: Path, final: Path) -> Iterator[None]:
    """Errors from inside name the output as the user knows it, and not the hidden file that it still is."""
    try:
        yield
    except (InputError, VerifyError) as error:
        raise type(error)(str(error).replace(str(hidden), str(final))) from error

"""Stages that remember what was done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from a3q.progress import Advance


class Recorded:
    """Stages with their total and what they were advanced by."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float, float]] = []

    @contextmanager
    def __call__(self, title: str, total: float) -> Iterator[Advance]:
        done: list[float] = []
        yield done.append
        assert all(step > 0 for step in done)
        self.seen.append((title, total, sum(done)))

    @property
    def titles(self) -> list[str]:
        return [title for title, _, _ in self.seen]

    def check_totals(self) -> None:
        """Each stage did the work that it announced; tokens of a file are had at once."""
        for title, total, done in self.seen:
            if title != "read calibration text":
                assert done == pytest.approx(total), title

"""How stages say how far they are: the pipeline calls a `Stages`, the command line shows it with rich."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[float], None]
"""Called with the amount of work just done."""
Stages = Callable[[str, float], AbstractContextManager[Advance]]
"""`stages(title, total)` opens a stage of `total` units of work."""


@contextmanager
def silent(_title: str, _total: float) -> Iterator[Advance]:
    """A stage that shows nothing."""
    yield lambda _done: None


def shown_on(console: Console) -> Stages:
    """Stages as progress bars with time left; without a terminal, one line as each stage ends."""

    @contextmanager
    def stage(title: str, total: float) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(title, total=total)
            yield lambda done: progress.advance(task, done)
            progress.update(task, completed=total)

    return stage


def for_each(advance: Advance) -> Callable[[], None]:
    """Progress by one unit a call."""
    return lambda: advance(1)


def to_share(advance: Advance) -> Callable[[float], None]:
    """Progress as the share done of all, as advances of one whole."""
    done = 0.0

    def progress(share: float) -> None:
        nonlocal done
        advance(share - done)
        done = share

    return progress


def share_of(advance: Advance) -> Callable[[int, int], None]:
    """Progress in bytes done of all, as advances of one whole."""
    to = to_share(advance)
    return lambda bytes_done, bytes_total: to(bytes_done / bytes_total)

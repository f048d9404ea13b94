"""What the page of a report is made of: sections with plots and tables, and numbers in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from markupsafe import Markup

from a3q import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHEN = ("before", "after")
Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Plot:
    """A figure with what is said of it."""

    title: str
    caption: str
    svg: Markup


@dataclass(frozen=True)
class Table:
    """Cells as text."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    folded: bool = False
    """Shown when asked for: long."""
    numbers: bool = True
    """All columns but the first hold numbers."""


@dataclass(frozen=True)
class Section:
    """What has a heading of its own; `id` is that of the heading."""

    id: str
    title: str
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    lines: Sequence[str] = field(default=())


def drawn(name: str, title: str, caption: str, figure: Figure, spoken: str) -> Plot:
    """`figure` for the page; `spoken` is what is read aloud beside the title."""
    return Plot(title, caption, Markup(plots.to_svg(figure, name, f"{title}. {spoken}")))


# Numbers in words


def both(pair: Mapping[str, float]) -> tuple[float, float]:
    """What `WHEN` names."""
    return pair["before"], pair["after"]


def number(value: float | None) -> str:
    """Four digits, or that it is none."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def percent(share: float | None) -> str:
    """Two digits of a share that may be tiny; nothing where there is none."""
    if share is None:
        return ""
    return f"{100 * share:.2g}%" if share >= 1e-5 or share == 0 else "< 0.001%"

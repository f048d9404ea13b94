"""One figure of what reduction costs: perplexity against the share of the layers' weights that was removed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter


@dataclass(frozen=True)
class Row:
    """One point; ratio 0 is the original, whatever its method is called."""

    method: str
    ratio: float
    perplexity: float


CEILING = 50.0
"""Times the original's perplexity: what lies above is broken, and would press all other lines together."""


def plot(rows: Iterable[Row], path: Path, title: str = "", highlight: str = "a3q") -> None:
    """Write a PNG: a line for each method in the order of `rows`, those named `highlight…` thicker and in front."""
    rows = list(rows)
    base = [row.perplexity for row in rows if row.ratio == 0]
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row.ratio > 0:
            lines.setdefault(row.method, []).append(row)
    ceiling = CEILING * (base[0] if base else min(row.perplexity for row in rows))

    # No pyplot: nothing global, no display.
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    colours, markers = matplotlib.color_sequences["tab10"], "osD^vP*X<>"
    for i, (method, points) in enumerate(lines.items()):
        points = sorted(points, key=lambda row: row.ratio)
        ours = method.startswith(highlight)
        axes.plot(
            [row.ratio for row in points],
            # Beyond the ceiling a line leaves the picture upwards instead of ending.
            [min(row.perplexity, 100 * ceiling) for row in points],
            color=colours[i % len(colours)],
            marker=markers[i % len(markers)],
            linestyle="-" if ours else "--",
            linewidth=2.5 if ours else 1.4,
            markersize=7 if ours else 5,
            zorder=3 if ours else 2,
            label=method if points[0].perplexity <= ceiling else f"{method} (all above)",
        )
    if base:
        axes.axhline(base[0], color="black", linewidth=1, linestyle=":", label=f"original ({base[0]:.1f})")
    axes.set_yscale("log")
    shown = [row.perplexity for row in rows if row.perplexity <= ceiling]
    axes.set_ylim(min(shown) / 1.1, min(ceiling, 1.25 * max(shown)))
    # Plain numbers at 1, 2 and 5: a log axis of less than a decade has few powers of ten.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xticks(sorted({row.ratio for row in rows if row.ratio > 0}))
    axes.set_xlabel("share of the layers' weights removed")
    axes.set_ylabel("perplexity (log scale)")
    axes.set_title(title)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path)

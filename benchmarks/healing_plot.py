"""One figure of what healing wins back: perplexity against the minutes it took."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Line:
    """A point of a line of that name."""

    name: str
    minutes: float
    perplexity: float


def plot(points: Iterable[Line], path: Path) -> None:
    """Write a PNG: a line for each name in the order of `points`; the original as a level."""
    lines: dict[str, list[Line]] = {}
    for point in points:
        lines.setdefault(point.name, []).append(point)
    # No pyplot: nothing global, no display.
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    colours = matplotlib.color_sequences["tab10"]
    for i, (name, own) in enumerate(lines.items()):
        own = sorted(own, key=lambda point: point.minutes)
        if "original" in name:
            axes.axhline(own[0].perplexity, color="black", linewidth=1, linestyle=":", label="original")
            continue
        minutes, values = [point.minutes for point in own], [point.perplexity for point in own]
        axes.plot(minutes, values, color=colours[i % 10], marker="osD^vP*X"[i // 10 % 8], label=name)
    axes.set_yscale("log")
    axes.set_xlabel("minutes of healing, text included")
    axes.set_ylabel("perplexity")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path)

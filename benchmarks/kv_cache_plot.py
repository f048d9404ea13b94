"""One figure of a smaller KV cache: what bytes cost in perplexity, and whether the cost grows with the position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class Row(Protocol):
    """What is shown of a file with a type of cache."""

    @property
    def file(self) -> str: ...
    @property
    def cache(self) -> str: ...
    @property
    def bytes_per_token(self) -> float: ...
    @property
    def perplexity(self) -> tuple[float, ...]: ...
    @property
    def error(self) -> str: ...


class Bucket(Protocol):
    """What is shown of a range of positions."""

    @property
    def file(self) -> str: ...
    @property
    def begin(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def ratio(self) -> float: ...
    @property
    def ratio_error(self) -> float: ...


def plot(rows: Sequence[Row], buckets: Sequence[Bucket], contexts: Sequence[int], path: Path) -> None:
    """Write a PNG: perplexity in the longest context against bytes, and its ratio to the original's by position."""
    # Here, so that a machine without it can measure.
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    # No pyplot: nothing global, no display.
    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(row.file for row in rows))
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    first = rows[0].perplexity[-1]
    for name in names:
        shown = [row for row in rows if row.file == name and not row.error]
        xs, ys = [row.bytes_per_token for row in shown], [row.perplexity[-1] / first for row in shown]
        left.plot(xs, ys, color=colours[name], marker="o", label=name)
        for row, x, y in zip(shown, xs, ys, strict=True):
            left.annotate(row.cache, (x, y), (4, 5), textcoords="offset points", fontsize="small")
    left.set_xlim(0, 1.15 * max(row.bytes_per_token for row in rows if not row.error))
    left.set_xlabel("KV cache, bytes a token")
    left.set_ylabel(f"perplexity / original's with f16, context {contexts[-1]}")

    for name in names:
        shown_buckets = [bucket for bucket in buckets if bucket.file == name]
        right.errorbar(
            range(len(shown_buckets)),
            [bucket.ratio for bucket in shown_buckets],
            [bucket.ratio_error for bucket in shown_buckets],
            color=colours[name],
            marker="o",
            capsize=3,
            label=name,
        )
        right.set_xticks(range(len(shown_buckets)), [f"{one.begin}–{one.end}" for one in shown_buckets], rotation=30)
    right.set_xlabel("position")
    right.set_ylabel("perplexity / original's, f16 cache")
    for axes in (left, right):
        axes.set_yscale("log")
        # Plain numbers: a log axis of less than a decade has few powers of ten.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(True, alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path)

"""Shows what `benchmarks.quantization` measured: KL divergence over bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol


class Row(Protocol):
    """What is shown of a measured file."""

    method: str
    type: str
    bytes: int
    kl: float
    perplexity: float
    original_perplexity: float


def table(rows: Sequence[Row], title: str, plain: str, rival: str) -> Iterator[str]:
    """Markdown: types down, methods across, mean KL (perplexity); the last column is a3q's GPTQ to `rival`.

    Bytes are those of `plain`'s file, and a method whose own differ says so.
    """
    methods = list(dict.fromkeys(row.method for row in rows))
    yield f"| {title}, F16 perplexity {rows[0].original_perplexity:.3f} | MB | " + " | ".join(methods) + " | ratio |"
    yield "| --- |" + " ---: |" * (len(methods) + 2)
    for kind in dict.fromkeys(row.type for row in rows):
        found = {row.method: row for row in rows if row.type == kind}
        size = found.get(plain, next(iter(found.values()))).bytes
        ratio = f"{found['a3q gptq'].kl / found[rival].kl:.2f}" if "a3q gptq" in found and rival in found else ""
        cells = [_cell(found[method], size) if method in found else "" for method in methods]
        yield f"| {kind} | {size / 1e6:.2f} | " + " | ".join(cells) + f" | {ratio} |"
    yield ""


def _cell(row: Row, size: int) -> str:
    other = f", {row.bytes / size - 1:+.1%} bytes" if row.bytes != size else ""
    return f"{row.kl:.4f} ({row.perplexity:.2f}{other})"


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Write a PNG: a line for each method."""
    # Here, so that a machine without it can measure.
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    # No pyplot: nothing global, no display.
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    colours, markers = matplotlib.color_sequences["tab10"], "osD^v"
    for i, method in enumerate(dict.fromkeys(row.method for row in rows)):
        points = sorted((row for row in rows if row.method == method), key=lambda row: row.bytes)
        axes.plot(
            [row.bytes / 1e6 for row in points],
            [row.kl for row in points],
            color=colours[i],
            marker=markers[i],
            linestyle="-" if method.startswith("a3q") else "--",
            label=method,
        )
    for kind in dict.fromkeys(row.type for row in rows):
        lowest = min((row for row in rows if row.type == kind), key=lambda row: row.kl)
        point = (lowest.bytes / 1e6, lowest.kl)
        axes.annotate(kind, point, (0, -12), textcoords="offset points", fontsize="small", ha="center")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tensors, MB")
    axes.set_ylabel("mean KL divergence to F16, nats (log scale)")
    axes.set_title(title)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path)

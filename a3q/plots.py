"""Plots for reports: plain data in, a figure out, and figures as SVG that can stand in a page.

Matplotlib is imported where it is used, since the command line should start without it. Figures are drawn on white, in
colours that people with any colour vision can tell apart (Okabe and Ito's), each with a marker or place of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from html import escape
from typing import TYPE_CHECKING, Any, ParamSpec

from a3q.units import count

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS = {"QK": "#0072B2", "OV": "#E69F00", "MLP": "#009E73"}
"""Of the components."""
_CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP*"
_BEFORE = "#B8BEC6"
_INK = "#24292F"
_WIDTH = 5.0
"""Inches; narrow, so that the text is still readable on a phone."""
_SHADES = 24
"""Steps of a colour scale; more would make a plot larger than the eye can tell."""
_DECADES = 1e3
"""Range of a logarithmic colour scale."""
_LONGEST = 28
"""Characters of a label."""
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""What XML does not allow, or does not show."""

_P = ParamSpec("_P")


@contextmanager
def _style() -> Iterator[None]:
    """The same picture whatever the user has set for matplotlib."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.size": 10.5,
                "axes.labelsize": 10.5,
                "xtick.labelsize": 9.5,
                "ytick.labelsize": 9.5,
                "legend.fontsize": 9.5,
                "legend.frameon": False,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.edgecolor": "#8C959F",
                "text.color": _INK,
                "axes.labelcolor": _INK,
                "xtick.color": _INK,
                "ytick.color": _INK,
                "grid.color": "#D8DEE4",
                "axes.axisbelow": True,
                "svg.fonttype": "none",
                # Names of models are no formulas.
                "text.parse_math": False,
            }
        )
        yield


def _styled(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    @wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        with _style():
            return draw(*args, **kwargs)

    return drawn


def to_svg(figure: Figure, name: str, label: str) -> str:
    """An `<svg>` element for a page: `name` sets its ids apart from other plots', `label` is what is read aloud.

    The same figure always gives the same text.
    """
    import io

    import matplotlib

    out = io.StringIO()
    with _style():
        matplotlib.rcParams["svg.hashsalt"] = name
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    # In a page this rule would be for every element.
    text = re.sub(r"<defs>\s*<style[^>]*>[^<]*</style>\s*</defs>", "", text, count=1)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    attributes = f'<svg role="img" aria-label="{escape(_printable(label))}" style="stroke-linejoin:round"'
    return attributes + text.removeprefix("<svg")


def _printable(text: str) -> str:
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def _short(text: str) -> str:
    """What a plot has room for."""
    text = _printable(text)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _figure(height: float = 3.4) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    # No pyplot: nothing global, no display.
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def bytes_text(size: float) -> str:
    """Bytes in a unit that people read, with three digits."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        # What would be rounded up to 1000 is one of the next unit.
        if size >= 0.9995 * factor:
            return f"{float(f'{size / factor:.3g}'):g} {unit}"
    return f"{size:.0f} B"


def tokens_text(count: float) -> str:
    """Tokens as model cards give them: powers of two in K."""
    return f"{count / 1024:g}K" if count >= 1024 and count % 1024 == 0 else f"{count:g}"


def _whole_layers(axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=10, integer=True))


# Layers


@_styled
def losses_per_layer(losses: Mapping[str, Sequence[float | None]]) -> Figure:
    """Share of each component's functional energy that each layer lost; None: the component was left alone."""
    from matplotlib.ticker import PercentFormatter

    figure, axes = _figure()
    for (component, values), marker in zip(losses.items(), _MARKERS, strict=False):
        if any(value is not None for value in values):
            shown = [math.nan if value is None else value for value in values]
            axes.plot(shown, color=COLOURS[component], marker=marker, markersize=4.5, linewidth=1.6, label=component)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(bottom=0)
    # Layers that lost nothing have a place too.
    count = max(map(len, losses.values()))
    axes.set_xlim(-0.03 * count - 0.1, 1.03 * count - 0.9)
    axes.set_xlabel("layer")
    axes.set_ylabel("energy lost")
    axes.grid(True, axis="y")
    _whole_layers(axes.xaxis)
    _legend_above(axes, 3)
    return figure


@_styled
def sizes_per_layer(before: Mapping[str, Sequence[int]], after: Mapping[str, Sequence[int]]) -> Figure:
    """Inner sizes of the components QK, OV and MLP in each layer, those of the original in grey behind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 4.2), layout="constrained")
    heads, units = figure.subplots(2, sharex=True)
    # Lines may lie on one another: thick and grey, thin, and dashed.
    heads.plot(before["QK"], color=_BEFORE, linewidth=6, solid_capstyle="butt")
    heads.plot(before["OV"], color=_BEFORE, linewidth=6, solid_capstyle="butt")
    heads.plot(after["QK"], color=COLOURS["QK"], marker="o", markersize=4.5, linewidth=1.6, label="QK")
    heads.plot(after["OV"], color=COLOURS["OV"], marker="s", markersize=3, linewidth=1.6, linestyle="--", label="OV")
    heads.set_ylim(0, 1.12 * max(*before["QK"], *before["OV"]))
    layers = range(len(before["MLP"]))
    units.bar(layers, before["MLP"], color=_BEFORE, label="original")
    units.bar(layers, after["MLP"], color=COLOURS["MLP"], label="MLP")
    for axes in (heads, units):
        axes.grid(True, axis="y")
    heads.set_ylabel("head size")
    units.set_ylabel("MLP size")
    units.set_xlabel("layer")
    _whole_layers(units.xaxis)
    handles = [pair for axes in (heads, units) for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    heads.legend(
        [handle for handle, _ in handles],
        [label for _, label in handles],
        ncols=4,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        handlelength=1.2,
    )
    return figure


@_styled
def kept_frequencies(shares: Sequence[Sequence[float]], layers: Sequence[str]) -> Figure:
    """Share of the key heads that keep each of the original's RoPE frequencies; a row for each of `layers`."""
    figure, axes = _figure(1.0 + min(3.2, 0.5 + 0.16 * len(shares)))
    # Mirrored, so that the first layer is on top as in a table.
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("kept", ["#EEF1F4", COLOURS["QK"]])
    mesh = axes.pcolormesh(shares, cmap=colours.resampled(_SHADES), vmin=0, vmax=1, edgecolors="white", linewidth=0.6)
    axes.invert_yaxis()
    step = -(-len(layers) // 12)
    axes.set_yticks([i + 0.5 for i in range(0, len(layers), step)], layers[::step])
    axes.tick_params(axis="y", length=0)
    pairs = len(shares[0])
    step = max(1, 1 << max(0, math.ceil(math.log2(pairs / 12))))
    axes.set_xticks([i + 0.5 for i in range(0, pairs, step)], [str(i) for i in range(0, pairs, step)])
    axes.set_xlabel("frequency, fast to slow")
    for side in axes.spines.values():
        side.set_visible(False)
    if any(0 < share < 1 for row in shares for share in row):
        from matplotlib.ticker import PercentFormatter

        bar = figure.colorbar(mesh, ax=axes, format=PercentFormatter(1.0), pad=0.02)
        bar.set_label("heads that keep it")
    return figure


# Healing


@dataclass(frozen=True)
class Training:
    """One phase of healing the whole model."""

    label: str
    tokens: Sequence[int]
    """Trained on at each point of the curve."""
    losses: Sequence[float]
    """KL to the original (nats) in training."""
    total: int
    """Tokens in all."""
    before: float
    """The same on text that was not trained on."""
    after: float


@_styled
def healing_curve(phases: Sequence[Training]) -> Figure:
    """KL to the original over the tokens trained on, one phase after the other; what is not finite is left out."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure, axes = _figure()
    done, held, values = 0, list[tuple[float, float]](), list[float]()
    for phase, colour in zip(phases, _CYCLE, strict=False):
        axes.plot(
            [done + tokens for tokens in phase.tokens],
            phase.losses,
            color=colour,
            marker=".",
            markersize=3.5,
            linewidth=1.6,
            label=phase.label,
        )
        held += [(done, phase.before), (done + phase.total, phase.after)]
        values += phase.losses
        done += phase.total
    held = [pair for pair in held if math.isfinite(pair[1])]
    label = "text not trained on"
    axes.plot(*zip(*held, strict=True), color=_INK, marker="D", markersize=5.5, linestyle="none", label=label)
    _logarithmic_if_far_apart(axes, [*values, *(value for _, value in held)], 4)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: count(tokens)))
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("KL to the original, nats")
    axes.grid(True)
    _legend_above(axes, 2)
    return figure


@_styled
def distances_per_layer(before: Sequence[float | None], after: Sequence[float | None]) -> Figure:
    """Relative distance of each layer's output to what it should be; None: the layer was not trained."""
    from matplotlib.ticker import FuncFormatter

    figure, axes = _figure()
    for values, colour, marker, label in ((before, _BEFORE, "o", "reduced"), (after, _CYCLE[0], "D", "healed")):
        shown = [math.nan if value is None else value for value in values]
        axes.plot(shown, color=colour, marker=marker, markersize=4.5, linewidth=1.6, label=label)
    _logarithmic_if_far_apart(axes, [value for value in (*before, *after) if value is not None], 8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.2g} %"))
    axes.set_xlabel("layer")
    axes.set_ylabel("relative distance")
    axes.grid(True, axis="y")
    _whole_layers(axes.xaxis)
    _legend_above(axes, 2)
    return figure


def _logarithmic_if_far_apart(axes: Axes, values: Sequence[float], times: float) -> None:
    """Where the greatest of positive `values` is more than so many times the least."""
    finite = [value for value in values if math.isfinite(value)]
    if finite and 0 < times * min(finite) < max(finite):
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
    else:
        axes.set_ylim(bottom=0)


# Size, quality, memory


@dataclass(frozen=True)
class Point:
    """One model file."""

    label: str
    """Written beside it; may be empty."""
    bytes: int
    perplexity: float
    group: str
    """Points of a group look alike and stand once in the legend, such as `plain quantization`."""
    stderr: float | None = None
    """Of the perplexity."""


@_styled
def size_against_perplexity(points: Sequence[Point], front: Sequence[Point] = ()) -> Figure:
    """Perplexity over file size, both lower is better; `front` are the points on the Pareto front, joined by steps.

    Points whose perplexity is not finite are left out.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure, axes = _figure(3.7)
    shown = [point for point in points if math.isfinite(point.perplexity)]
    if front:
        axes.step(
            [point.bytes for point in front],
            [point.perplexity for point in front],
            where="post",
            color="#57606A",
            linewidth=1.2,
            linestyle=(0, (4, 3)),
            label="Pareto front",
            zorder=1,
        )
    for i, group in enumerate(dict.fromkeys(point.group for point in shown)):
        members = [point for point in shown if point.group == group]
        axes.errorbar(
            [point.bytes for point in members],
            [point.perplexity for point in members],
            yerr=[point.stderr or 0.0 for point in members] if any(point.stderr for point in members) else None,
            color=_CYCLE[i % len(_CYCLE)],
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=6.5,
            linestyle="none",
            elinewidth=1.2,
            capsize=3,
            label=_short(group),
            zorder=3,
        )
    values = [point.perplexity for point in shown]
    if values and max(values) > 8 * min(values):
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
    sizes = [point.bytes for point in shown]
    if sizes and max(sizes) > 8 * min(sizes):
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: bytes_text(size)))
    axes.margins(0.14, 0.16)
    axes.set_xlabel("file size")
    axes.set_ylabel("perplexity")
    axes.grid(True)
    _name(axes, shown)
    _legend_above(axes, 2)
    return figure


def _name(axes: Axes, points: Sequence[Point]) -> None:
    """Labels beside points, each on the side with room; a label that would lie on another or on a point is left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    figure = axes.get_figure(root=True)
    assert figure is not None
    # The layout is known once it was drawn.
    figure.draw_without_rendering()
    renderer: Any = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    scale = figure.dpi / 72
    places = [axes.transData.transform((point.bytes, point.perplexity)) for point in points]
    taken = [Bbox.from_bounds(x - 4 * scale, y - 4 * scale, 8 * scale, 8 * scale) for x, y in places]
    inside = axes.get_window_extent(renderer)
    for point in points:
        for dx, dy, across, up in (
            (7, 0, "left", "center"),
            (-7, 0, "right", "center"),
            (0, 7, "center", "bottom"),
            (0, -7, "center", "top"),
            (6, 6, "left", "bottom"),
            (-6, 6, "right", "bottom"),
            (6, -6, "left", "top"),
            (-6, -6, "right", "top"),
        ):
            text = axes.annotate(
                _short(point.label),
                (point.bytes, point.perplexity),
                (dx, dy),
                textcoords="offset points",
                ha=across,
                va=up,
                fontsize=9,
            )
            box = text.get_window_extent(renderer)
            free = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if free and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


@dataclass(frozen=True)
class CacheLine:
    """KV cache of one model with one type of cache."""

    label: str
    contexts: Sequence[int]
    bytes: Sequence[int]
    original: bool = False


@_styled
def cache_against_context(lines: Sequence[CacheLine]) -> Figure:
    """Bytes of the KV cache over the context's tokens, both axes logarithmic."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure, axes = _figure()
    for i, line in enumerate(lines):
        axes.plot(
            line.contexts,
            line.bytes,
            color=_INK if line.original else _CYCLE[i % len(_CYCLE)],
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=4.5,
            linewidth=1.6,
            # Lines may lie on one another where a reduction left the heads alone.
            linestyle=(0, (5, 3)) if line.original else "-",
            zorder=3 if line.original else 2,
            label=_short(line.label),
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)
    ticks = sorted({context for line in lines for context in line.contexts})
    axes.xaxis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // 7)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: tokens_text(count)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda size, _: bytes_text(size)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("KV cache")
    axes.grid(True)
    _legend_above(axes, 2)
    return figure


# Quantization


@dataclass(frozen=True)
class Cell:
    """One tensor of a layer."""

    layer: int
    row: str
    value: float


@_styled
def tensor_map(cells: Sequence[Cell], label: str, *, percent: bool = False) -> Figure:
    """A coloured cell for each tensor: layers across, one row for each kind of tensor; grey where there is no value.

    `percent`: values are shares, coloured on a logarithmic scale where they differ much.
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import FuncFormatter

    rows = list(dict.fromkeys(cell.row for cell in cells))
    count = 1 + max(cell.layer for cell in cells)
    values = [[math.nan] * count for _ in rows]
    for cell in cells:
        values[rows.index(cell.row)][cell.layer] = cell.value
    low, high = min(cell.value for cell in cells), max(cell.value for cell in cells)
    logarithmic = percent and high > 5 * low
    # What is far below the worst needs no colours of its own.
    floor = max(low, high / _DECADES) if logarithmic else low if low < high else 0.0
    high = high or 1.0
    figure, axes = _figure(1.3 + 0.27 * len(rows))
    axes.set_facecolor("#EEF1F4")
    mesh = axes.pcolormesh(
        values,
        # From light to dark, so that it also reads in grey.
        cmap=colormaps["viridis_r"].resampled(_SHADES),
        norm=LogNorm(floor, high) if logarithmic else Normalize(floor, high),
        edgecolors="white",
        linewidth=0.4,
    )
    axes.invert_yaxis()
    axes.set_yticks([i + 0.5 for i in range(len(rows))], [_short(row) for row in rows])
    step = next(step for step in (1, 2, 5, 10, 20, 50, count) if step >= count / 12)
    axes.set_xticks([i + 0.5 for i in range(0, count, step)], [str(i) for i in range(0, count, step)])
    axes.tick_params(axis="y", length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xlabel("layer")
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, extend="min" if floor > low else "neither")
    if logarithmic:
        _plain_numbers(bar.ax.yaxis)
    if percent:
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.2g} %"))
    bar.outline.set_visible(False)
    bar.set_label(label)
    return figure


def _plain_numbers(axis: Axis) -> None:
    """Ticks at 1, 2 and 5 where there are few powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend_above(axes: Axes, columns: int) -> None:
    """Outside the axes, where it hides nothing."""
    if not axes.get_legend_handles_labels()[0]:
        return
    options: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
    axes.legend(ncols=columns, handlelength=1.8, columnspacing=1.4, **options)

"""Figures show what they were given, and their SVG can stand in a page."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from a3q import plots
from a3q.plots import CacheLine, Cell, Point, Training

POINTS = [
    Point("Q2_K", 50_000_000, 40.0, "plain quantization", 1.5),
    Point("Q4_K_M", 100_000_000, 20.0, "plain quantization", 0.5),
    Point("Q8_0", 200_000_000, 25.0, "plain quantization", 0.5),
    Point("Q4_K_M", 80_000_000, 22.0, "reduced 10 %"),
    Point("Q3_K_M", 80_000_000, 30.0, "reduced 10 %"),
]
FRONT = [POINTS[0], POINTS[3], POINTS[1]]
"""Those that no other beats."""


def only_axes(figure: Figure) -> Axes:
    return figure.axes[0]


def lines(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    """Points of each line by its label."""
    return {
        str(line.get_label()): [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]
        for line in only_axes(figure).get_lines()
    }


def legend(axes: Axes) -> list[str]:
    found = axes.get_legend()
    assert found is not None
    return [text.get_text() for text in found.get_texts()]


def every_figure() -> dict[str, Figure]:
    losses = {"QK": [None, None, None], "OV": [0.1, 0.2, None], "MLP": [0.05, 0.1, 0.3]}
    sizes = {"QK": [64] * 3, "OV": [64] * 3, "MLP": [1536] * 3}
    return {
        "losses": plots.losses_per_layer(losses),
        "sizes": plots.sizes_per_layer(sizes, sizes | {"MLP": [1024, 512, 256]}),
        "frequencies": plots.kept_frequencies([[1.0, 0.5, 0.0, 1.0]], ["all"]),
        "size": plots.size_against_perplexity(POINTS, FRONT),
        "cache": plots.cache_against_context([CacheLine("original, f16", [512, 1024], [100, 200], True)]),
        "healing": plots.healing_curve([Training("end to end", [10, 20], [0.2, 0.1], 20, 0.25, 0.12)]),
        "distances": plots.distances_per_layer([0.02, None, 0.3], [0.01, None, 0.2]),
        "map": plots.tensor_map([Cell(0, "attn_q", 0.01), Cell(2, "ffn_up", 0.1)], "energy lost", percent=True),
    }


@pytest.mark.parametrize("name", every_figure())
def test_svg_can_stand_in_a_page(name: str) -> None:
    text = plots.to_svg(every_figure()[name], name, 'what <it> "shows" & says\x00')
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == 'what <it> "shows" & says\N{REPLACEMENT CHARACTER}'
    # Rules for a whole page, notes of when and by what it was made, and what a browser would load.
    assert not [part for part in root.iter() if part.tag.rpartition("}")[2] in ("style", "metadata", "script", "image")]
    ids = [part.attrib["id"] for part in root.iter() if "id" in part.attrib]
    assert len(ids) == len(set(ids))
    assert all(one.startswith(f"{name}-") for one in ids)
    # What is referred to is there, whatever other plots the page has.
    used = {value[1:] for part in root.iter() for key, value in part.attrib.items() if key.endswith("href")}
    used |= {value[5:-1] for part in root.iter() for value in part.attrib.values() if value.startswith("url(#")}
    assert used <= set(ids)


def test_svg_is_the_same_every_time() -> None:
    first, second = ({name: plots.to_svg(one, name, name) for name, one in every_figure().items()} for _ in range(2))
    assert first == second


def test_losses() -> None:
    figure = plots.losses_per_layer({"QK": [None, None], "OV": [0.25, None], "MLP": [0.5, 0.75]})
    found = lines(figure)
    assert found.keys() == {"OV", "MLP"}
    assert found["MLP"] == [(0, 0.5), (1, 0.75)]
    assert found["OV"][0] == (0, 0.25)
    assert math.isnan(found["OV"][1][1])
    assert only_axes(figure).get_ylim()[0] == 0


def test_sizes() -> None:
    before = {"QK": [64, 64], "OV": [64, 64], "MLP": [1536, 1536]}
    after = {"QK": [48, 32], "OV": [64, 40], "MLP": [1024, 512]}
    figure = plots.sizes_per_layer(before, after)
    heads, units = figure.axes
    assert [list(line.get_ydata()) for line in heads.get_lines()] == [[64, 64], [64, 64], [48, 32], [64, 40]]
    heights = [bar.get_height() for bar in units.patches]  # type: ignore[attr-defined]
    assert heights == [1536, 1536, 1024, 512]
    assert legend(figure.axes[0]) == ["QK", "OV", "original", "MLP"]


def test_healing() -> None:
    first = Training("end to end", [10, 30], [0.3, 0.2], 40, 0.35, 0.21)
    second = Training("with rounding in the loop", [5], [0.22], 5, 0.25, 0.2)
    figure = plots.healing_curve([first, second])
    assert lines(figure) == {
        "end to end": [(10, 0.3), (30, 0.2)],
        "with rounding in the loop": [(45, 0.22)],
        "text not trained on": [(0, 0.35), (40, 0.21), (40, 0.25), (45, 0.2)],
    }
    assert legend(only_axes(figure)) == ["end to end", "with rounding in the loop", "text not trained on"]
    assert (only_axes(figure).get_yscale(), only_axes(figure).get_ylim()[0]) == ("linear", 0)
    wide = plots.healing_curve([Training("end to end", [10, 30], [3.0, 0.2], 40, math.inf, 0.3)])
    assert only_axes(wide).get_yscale() == "log"
    assert lines(wide)["text not trained on"] == [(40, 0.3)]


@pytest.mark.parametrize("values", [(), (math.nan,), (0.0, 1.0), (math.inf, 0.1)])
def test_healing_of_anything(values: tuple[float, ...]) -> None:
    phase = Training("end to end", range(len(values)), values, 3, math.nan, math.nan)
    ElementTree.fromstring(plots.to_svg(plots.healing_curve([phase]), "p", ""))


def test_distances() -> None:
    figure = plots.distances_per_layer([0.02, None, 0.03], [0.01, None, 0.03])
    found = lines(figure)
    assert (found["reduced"][0], found["healed"][2]) == ((0, 0.02), (2, 0.03))
    assert math.isnan(found["healed"][1][1])
    assert only_axes(figure).get_ylim()[0] == 0
    assert only_axes(plots.distances_per_layer([0.02, 0.5], [0.01, 0.4])).get_yscale() == "log"


def test_frequencies() -> None:
    shares = [[1.0, 0.5, 0.0], [1.0, 0.0, 0.5]]
    figure = plots.kept_frequencies(shares, ["0", "1"])
    assert mesh_values(figure) == shares
    # A scale for shares only where there are any.
    assert (len(figure.axes), len(plots.kept_frequencies([[1.0, 0.0]], ["all"]).axes)) == (2, 1)


def mesh_values(figure: Figure) -> list[list[float]]:
    found = [part for part in only_axes(figure).collections if isinstance(part, QuadMesh)]
    array: Any = found[0].get_array()
    return [list(row) for row in array.reshape(-1, int(only_axes(figure).get_xlim()[1])).tolist()]


def test_size_against_perplexity() -> None:
    figure = plots.size_against_perplexity(POINTS, FRONT)
    found = lines(figure)
    assert found["Pareto front"] == [(one.bytes, one.perplexity) for one in FRONT]
    # The first line of a group are its points, the others caps of error bars.
    groups = [container.lines[0] for container in only_axes(figure).containers]  # type: ignore[attr-defined]
    drawn = [pair for line in groups for pair in zip(*line.get_data(), strict=True)]
    assert drawn == [(one.bytes, one.perplexity) for one in POINTS]
    assert legend(only_axes(figure)) == ["Pareto front", "plain quantization", "reduced 10 %"]
    written = [text.get_text() for text in only_axes(figure).texts]
    assert {"Q2_K", "Q4_K_M", "Q8_0"} <= set(written)


def test_labels_do_not_overlap() -> None:
    crowd = [Point(f"a long label {i}", 100_000_000 + i // 4, 20 + 0.01 * i, "g") for i in range(12)]
    figure = plots.size_against_perplexity([*crowd, Point("far", 300_000_000, 40.0, "g")])
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in only_axes(figure).texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert "far" in [text.get_text() for text in only_axes(figure).texts]


@pytest.mark.parametrize("values", [[], [math.inf], [12.0], [12.0, 12000.0]])
def test_size_against_perplexity_of_anything(values: list[float]) -> None:
    points = [Point(str(value), 10 ** (6 + i), value, "g") for i, value in enumerate(values)]
    ElementTree.fromstring(
        plots.to_svg(
            plots.size_against_perplexity(points, [one for one in points if math.isfinite(one.perplexity)][:1]), "p", ""
        )
    )


def test_names_are_no_formulas_and_no_markup() -> None:
    points = [Point("$x$ <b>&\x01", 1, 2.0, "$\\frac{<script>"), Point("$", 3, 4.0, "]]>")]
    root = ElementTree.fromstring(plots.to_svg(plots.size_against_perplexity(points), "p", ""))
    texts = {"".join(part.itertext()).strip() for part in root.iter() if part.tag.endswith("}text")}
    assert {"$x$ <b>&\N{REPLACEMENT CHARACTER}", "$\\frac{<script>", "]]>", "$"} <= texts


def test_long_names_leave_room_for_the_plot() -> None:
    figure = plots.size_against_perplexity([Point("l" * 500, 1, 2.0, "g" * 500), Point("", 3, 4.0, "other")])
    figure.draw_without_rendering()
    assert legend(only_axes(figure)) == ["g" * 27 + "…", "other"]
    box = only_axes(figure).get_window_extent()
    assert box.width > 0.6 * figure.bbox.width
    assert box.height > 0.5 * figure.bbox.height


def test_cache() -> None:
    given = [CacheLine("original, f16", [512, 2048], [1 << 20, 1 << 22], True), CacheLine("q8", [512, 2048], [7, 28])]
    figure = plots.cache_against_context(given)
    assert lines(figure) == {
        line.label: list(zip(map(float, line.contexts), map(float, line.bytes), strict=True)) for line in given
    }
    assert legend(only_axes(figure)) == ["original, f16", "q8"]


def test_tensor_map() -> None:
    cells = [Cell(0, "q", 0.001), Cell(1, "q", 0.1), Cell(1, "up", 0.01)]
    figure = plots.tensor_map(cells, "lost", percent=True)
    values = mesh_values(figure)
    assert values[0] == [0.001, 0.1]
    assert values[1][1] == 0.01
    assert not isinstance(values[1][0], float) or math.isnan(values[1][0])
    assert [tick.get_text() for tick in only_axes(figure).get_yticklabels()] == ["q", "up"]
    mesh = only_axes(figure).collections[0]
    assert isinstance(mesh.norm, LogNorm)
    bits = plots.tensor_map([Cell(0, "q", 4.5), Cell(1, "q", 4.5)], "bits")
    norm = only_axes(bits).collections[0].norm
    assert type(norm) is Normalize
    assert (norm.vmin, norm.vmax) == (0, 4.5)


def test_units() -> None:
    sizes = (0, 999, 999_499, 999_600, 80_873_280, 1e9, 2.5e12)
    assert [plots.bytes_text(n) for n in sizes] == ["0 B", "999 B", "999 kB", "1 MB", "80.9 MB", "1 GB", "2.5 TB"]
    assert [plots.tokens_text(n) for n in (512, 1024, 131072, 1000)] == ["512", "1K", "128K", "1000"]


def test_settings_of_the_user_change_nothing() -> None:
    import matplotlib

    before = plots.to_svg(every_figure()["size"], "p", "")
    with matplotlib.rc_context({"axes.grid": True, "lines.linewidth": 9, "text.parse_math": True, "font.size": 30}):
        assert plots.to_svg(every_figure()["size"], "p", "") == before
        assert matplotlib.rcParams["lines.linewidth"] == 9


def test_matplotlib_is_loaded_only_for_plots() -> None:
    code = "import sys, a3q.cli, a3q.to_gguf, a3q.report_html; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

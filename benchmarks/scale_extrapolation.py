"""From a run on the first layers of a model to one on all of them.

What is told layer by layer has a part for each layer, by the clock from the first layer's end to the last's, and the
rest is fixed; before the first end lies what is only done once. Weighing runs a branch for each component of each layer
through all layers behind it, so that every layer takes a little longer than the one before: a line is fitted to their
times, and continued. From fewer than FEWEST layers, all of it grows by the square, which is an upper bound. Reading and
writing grow with the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.scale_stages import Section

FEWEST = 4
"""Layers whose times a line is fitted to; the first is not among them, since it waits for what is set up once."""
QUADRATIC = ("weigh the layers", "weigh the matrices")
LAYERED = ("reduce", "reduce and quantize", "quantize", "choose dimensions")
LINEAR = ("write calibration text", "verify in llama.cpp")
"""Grow with the layers, of which they do not tell."""
BY_BYTES = ("hash the source", "write", "finish the file")
FIXED = ("read calibration text", "rest")

WARNING = (
    "how many dimensions are tried, what fits in memory and what has to wait on disk may be different for the whole "
    "model; peak memory is not extrapolated"
)


@dataclass(frozen=True)
class Estimate:
    """Seconds of a stage, measured and for the whole model."""

    measured: float
    whole: float
    how: str


def extrapolate(
    sections: Mapping[str, Section], layers: int, of: int, bytes_share: float, scale: Mapping[str, float] | None = None
) -> dict[str, Estimate]:
    """Each stage for a model of `of` layers, measured on one of `layers`; `bytes_share`: how much larger the files are.

    `scale`: seconds of the same stages in another run, which is what is meant; only proportions are taken from
    `sections` then.
    """
    found = {}
    for title, section in sections.items():
        whole, how = _whole(title, section, layers, of, bytes_share)
        measured = section.seconds if scale is None else scale.get(title, section.seconds)
        growth = whole / section.seconds if section.seconds > 0 else 1.0
        found[title] = Estimate(measured, measured * growth, how)
    return found


def _whole(title: str, section: Section, layers: int, of: int, bytes_share: float) -> tuple[float, str]:
    if layers == of:
        return section.seconds, "all layers"
    if title in QUADRATIC:
        if len(section.advances) == layers >= FEWEST:
            return _continued(section, of), "a line through the layers' times"
        return section.seconds * (of / layers) ** 2, "layers², an upper bound"
    if title in LAYERED:
        each = per_layer(section)
        more = each * len(section.advances) * (of / layers - 1)
        return section.seconds + more, f"{each:.3g} s a layer, the rest fixed"
    if title in LINEAR:
        return section.seconds * of / layers, "layers"
    if title in BY_BYTES:
        return section.seconds * bytes_share, "bytes"
    return section.seconds, "fixed" if title in FIXED else "fixed, for want of a rule"


def _continued(section: Section, of: int) -> float:
    """Seconds where layer i takes `a + b · i`, by least squares with `b` of at least 0."""
    times = [end - start for start, end in pairwise(section.advances)]
    mean_i, mean = (len(times) + 1) / 2, sum(times) / len(times)
    slope = sum((i - mean_i) * (t - mean) for i, t in enumerate(times, 1)) / sum(
        (i - mean_i) ** 2 for i in range(1, len(times) + 1)
    )
    slope = max(0.0, slope)
    more = sum(mean + slope * (i - mean_i) for i in range(len(times) + 1, of))
    return section.seconds + more


def per_layer(section: Section) -> float:
    """Seconds from one progress to the next, in the mean; the first, before which all is set up, does not count."""
    ends = section.advances
    if len(ends) < 2:
        return section.seconds / max(1, len(ends))
    return min((ends[-1] - ends[0]) / (len(ends) - 1), section.seconds / len(ends))

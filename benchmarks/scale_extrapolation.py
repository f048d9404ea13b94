"""From a run on the first layers of a model to one on all of them.

What is told layer by layer has a part for each layer, by the clock from the first layer's end to the last's, and the
rest is fixed; before the first end lies what is only done once. The choice of dimensions runs a branch for each
component of each layer through all layers behind it: it grows by the square, of which the moments, one for each layer,
are counted too, so that its figure is an upper bound. Reading and writing grow with the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.scale_stages import Section

QUADRATIC = ("weigh the layers", "weigh the matrices")
LAYERED = ("reduce", "reduce and quantize", "quantize", "choose dimensions")
LINEAR = ("write calibration text", "verify in llama.cpp")
"""Grow with the layers, of which they do not tell."""
BY_BYTES = ("hash the source", "write", "finish the file")
FIXED = ("read calibration text", "rest")

WARNING = (
    "not linear: weighing the layers, scaled by the square of their number, is an upper bound (the moments in it grow "
    "with the layers only); how many dimensions are tried, what fits in memory and what has to wait on disk may be "
    "different for the whole model; peak memory is not extrapolated"
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


def per_layer(section: Section) -> float:
    """Seconds from one progress to the next, in the mean; the first, before which all is set up, does not count."""
    ends = section.advances
    if len(ends) < 2:
        return section.seconds / max(1, len(ends))
    return min((ends[-1] - ends[0]) / (len(ends) - 1), section.seconds / len(ends))

"""What a sweep measured: which sizes none beats, where reduction wins, and the table and the plot that show it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from a3q.errors import InputError
from a3q.files import write_whole
from a3q.perplexity import Perplexity
from a3q.plots import Point, size_against_perplexity, to_svg
from a3q.units import megabytes


@dataclass(frozen=True)
class Measured:
    """One file, as stock llama.cpp runs it here."""

    ratio: float
    quantizer: str
    """`plain`: rounded to the nearest, as llama-quantize does; `gptq`: with error feedback."""
    quant: str
    """Name of the mix in llama.cpp, in lower case."""
    bytes: int
    perplexity: float
    stderr: float
    kl: float | None
    """Mean KL divergence from the original in nats."""
    prompt_speed: float
    """Tokens per second."""
    generation_speed: float
    kv_bytes_per_token: float

    @property
    def label(self) -> str:
        """For a plot."""
        return self.quant.upper()

    @property
    def reduced(self) -> bool:
        """Whether anything was taken away."""
        return self.ratio > 0

    def speed(self, what: Literal["prompt", "generation"]) -> float:
        """Tokens per second."""
        return self.prompt_speed if what == "prompt" else self.generation_speed

    @property
    def group(self) -> str:
        """Which points look alike in the plot."""
        if self.reduced:
            return f"reduced by {self.ratio:.0%}, gptq"
        return {"plain": "rounded to the nearest", "gptq": "gptq"}[self.quantizer]

    def __str__(self) -> str:
        return f"{self.label} {self.group}"


@dataclass(frozen=True)
class Sweep:
    """All that was measured of one model."""

    name: str
    original_bytes: int
    original: Perplexity
    text: str
    """What perplexity is of."""
    points: tuple[Measured, ...]
    notes: tuple[str, ...]

    @property
    def front(self) -> tuple[Measured, ...]:
        """Those that no other beats in size and perplexity, ascending in size."""
        return self._unbeaten(lambda one: (one.bytes, one.perplexity))

    @property
    def front_with_speed(self) -> tuple[Measured, ...]:
        """Those that no other beats in size, perplexity, and the speed of prompt and generation."""
        return self._unbeaten(lambda one: (one.bytes, one.perplexity, -one.prompt_speed, -one.generation_speed))

    def _unbeaten(self, cost: Callable[[Measured], tuple[float, ...]]) -> tuple[Measured, ...]:
        sound = [one for one in self.points if math.isfinite(one.perplexity)]

        def beaten(one: Measured) -> bool:
            mine = cost(one)
            others = (cost(other) for other in sound)
            return any(all(a <= b for a, b in zip(other, mine, strict=True)) and other != mine for other in others)

        return tuple(sorted((one for one in sound if not beaten(one)), key=lambda one: one.bytes))

    @property
    def verdict(self) -> tuple[str, ...]:
        """Where reduction wins and where not, in words."""
        whole = [one for one in self.points if not one.reduced]
        reduced = [one for one in self.points if one.reduced]
        if not whole or not reduced:
            return ()
        return _on_size(self.front, whole), _on_speed(reduced, whole)


def _on_size(front: Sequence[Measured], whole: Sequence[Measured]) -> str:
    winners = [one for one in front if one.reduced]
    if not winners:
        return (
            "size against perplexity: reduction wins nowhere; for every reduced file there is a quantized one without "
            "reduction that is no larger and no worse"
        )
    smallest = min(whole, key=lambda one: one.bytes)
    below = [one for one in winners if one.bytes < smallest.bytes]
    above = [one for one in winners if one.bytes >= smallest.bytes]
    parts = []
    if above:
        parts.append(f"reduction wins with {', '.join(map(str, above))}")
    if below:
        parts.append(
            f"below {megabytes(smallest.bytes)}, the smallest file without reduction ({smallest}), there are only "
            f"reduced ones: {', '.join(map(str, below))}"
        )
    if len(winners) < len(front):
        rest = [one for one in front if not one.reduced]
        parts.append(f"everywhere else quantization without reduction is better ({', '.join(map(str, rest))})")
    return "size against perplexity: " + "; ".join(parts)


def _on_speed(reduced: Sequence[Measured], whole: Sequence[Measured]) -> str:
    """The fastest of either kind."""
    parts = []
    whats: tuple[Literal["prompt", "generation"], ...] = ("prompt", "generation")
    for what in whats:
        best, other = (max(group, key=lambda one: one.speed(what)) for group in (reduced, whole))
        parts.append(
            f"{what} {best.speed(what):.0f} tokens/s with {best}, {best.speed(what) / other.speed(what):.2f}× the "
            f"fastest without reduction ({other}), at {best.perplexity / other.perplexity:.2f}× its perplexity"
        )
    return "speed: " + "; ".join(parts)


FILES = ("sweep.json", "sweep.md", "sweep.svg")
"""What is written into the folder."""


def check_folder(folder: Path, force: bool) -> None:
    """InputError when the figures of a sweep cannot be written there."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; give a folder with -o")
    if not folder.resolve().parent.is_dir():
        raise InputError(f"{folder}: its folder does not exist; create {folder.parent} first")
    if not force and (there := [name for name in FILES if (folder / name).exists()]):
        raise InputError(f"{folder / there[0]}: exists already; use --force to replace it")


def write(found: Sweep, folder: Path) -> None:
    """Table, plot and figures."""
    figures = asdict(found) | {
        "front": [str(one) for one in found.front],
        "front_with_speed": [str(one) for one in found.front_with_speed],
        "verdict": list(found.verdict),
    }
    texts = (json.dumps(figures, indent=1) + "\n", markdown(found), plot(found))
    for name, content in zip(FILES, texts, strict=True):
        write_whole(folder / name, content)


HEADINGS = ("reduced", "rounding", "type", "MB", "perplexity", "KL", "prompt", "gen.", "KV", "front")
"""Speeds in tokens a second, the cache in bytes a token."""


def rows(found: Sweep) -> list[tuple[str, ...]]:
    """The table's cells under `HEADINGS`: the original before the files in order of size."""
    front, fast = found.front, found.front_with_speed
    megabytes, perplexity = f"{found.original_bytes / 1e6:.1f}", f"{found.original.value:.2f}"
    table: list[tuple[str, ...]] = [("original", "", "", megabytes, perplexity, "", "", "", "", "")]
    for one in sorted(found.points, key=lambda one: one.bytes):
        marks = "size" if one in front else "speed" if one in fast else ""
        cells = f"{one.ratio:.0%}", one.quantizer, one.label, f"{one.bytes / 1e6:.1f}", f"{one.perplexity:.2f}"
        speeds = f"{one.prompt_speed:.0f}", f"{one.generation_speed:.0f}", f"{one.kv_bytes_per_token:.0f}"
        table.append((*cells, "" if one.kl is None else f"{one.kl:.3f}", *speeds, marks))
    return table


def explanation(found: Sweep) -> str:
    """What the table's columns mean."""
    errors = [one.stderr / one.perplexity for one in found.points]
    return (
        f"Perplexity of {found.text} (standard error about {sum(errors) / len(errors):.1%}); KL to the original in "
        "nats, on held-out calibration text; prompt and generated tokens a second on this machine; KV cache in bytes "
        "a token. Front: unbeaten in size and perplexity, or with speed besides."
    )


def markdown(found: Sweep) -> str:
    """The table, and where reduction wins."""
    lines = [f"| {' | '.join(HEADINGS)} |", "| --- | --- | --- |" + " ---: |" * (len(HEADINGS) - 4) + " --- |"]
    lines += [f"| {' | '.join(row)} |" for row in rows(found)]
    said = [f"- {line}" for line in (*found.verdict, *found.notes)]
    return "\n".join([f"{found.name}. {explanation(found)}", "", *lines, "", *said]) + "\n"


def plot(found: Sweep) -> str:
    """Size against perplexity, as SVG."""
    points = {one: Point(one.label, one.bytes, one.perplexity, one.group, one.stderr) for one in found.points}
    original = Point("original", found.original_bytes, found.original.value, "original", found.original.stderr)
    figure = size_against_perplexity([original, *points.values()], [points[one] for one in found.front])
    return to_svg(figure, "sweep", f"file size against perplexity of {found.name}")

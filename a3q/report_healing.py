"""What healing did, as facts for a report, and in the lines that the terminal and the report's page share.

Distances are relative squared ones of a layer's output to what it should be, KL divergences are in nats, both on text
that was not trained on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from a3q import plots
from a3q.calibration import SELF
from a3q.heal.stage import Healed
from a3q.report_parts import WHEN, Rows, Section, Table, both, drawn, number, percent
from a3q.result import Result
from a3q.store import LayerLosses
from a3q.units import clock, count

Facts = dict[str, Any]


def distances(losses: LayerLosses) -> dict[str, float] | None:
    """Of one layer's output before and after it was trained; None: it was not."""
    pair = {"before": losses.before_healing, "after": losses.after_healing}
    return pair if any(pair.values()) else None


def healing_facts(result: Result) -> Facts | None:
    """What was asked and what came of it; None where nothing was healed."""
    found = [pair for losses in result.job.reduction.losses if (pair := distances(losses)) is not None]
    phases = result.job.healed
    if not found and not phases:
        return None
    healing = None if result.settings is None else result.settings.healing
    calibration = result.job.calibration
    return {
        "asked": None if healing is None else asdict(healing),
        "source": None if calibration is None else calibration.source,
        "blocks": None if not found else {**_blocks(found), "predictions": _predictions(result.job.reduction.losses)},
        "end_to_end": [_phase(one) for one in phases],
    }


def _blocks(found: list[dict[str, float]]) -> Facts:
    return {
        "layers": len(found),
        "without_gain": sum(pair["after"] >= pair["before"] for pair in found),
        "mean_output_distance": {when: sum(pair[when] for pair in found) / len(found) for when in WHEN},
    }


def _predictions(losses: Sequence[LayerLosses]) -> dict[str, float] | None:
    """KL before and after the last layer was trained by its predictions; None: it was not."""
    last = losses[-1]
    pair = {"before": last.before_predictions, "after": last.after_predictions}
    return pair if any(pair.values()) else None


def _phase(one: Healed) -> Facts:
    return {
        "rounding_in_the_loop": one.rounded,
        "tokens": one.tokens,
        # What a short run got to of a long text.
        "different_tokens": min(one.text_tokens, one.tokens),
        "seconds": one.seconds,
        "kl_to_original": {"before": one.before, "after": one.after},
        "curve": [{"tokens": at.tokens, "seconds": at.seconds, "kl": at.loss} for at in one.curve],
    }


def healing_lines(facts: Facts) -> Iterator[str]:
    """One for each phase."""
    if (blocks := facts["blocks"]) is not None:
        mean = blocks["mean_output_distance"]
        without = f"; {blocks['without_gain']} of {blocks['layers']} did not gain" if blocks["without_gain"] else ""
        yield (
            f"healed layer by layer: mean relative distance of the layers' outputs {_share(mean['before'])} → "
            f"{_share(mean['after'])} on text they had not seen{without}"
        )
        if (kl := blocks["predictions"]) is not None:
            pair = f"{_nats(kl['before'])} → {_nats(kl['after'])}"
            yield f"healed the last layer by what the model predicts: KL to the original {pair}"
    for one in facts["end_to_end"]:
        all_of_it = one["different_tokens"] == one["tokens"]
        different = "all different" if all_of_it else f"{count(one['different_tokens'])} different ones"
        kl = one["kl_to_original"]
        yield (
            f"healed {phase_name(one)} on {count(one['tokens'])} tokens ({different}, {_origin(facts['source'])}) in "
            f"{clock(one['seconds'])}: KL to the original {_nats(kl['before'])} → {_nats(kl['after'])} on text it had "
            "not seen"
        )


def phase_name(phase: Facts) -> str:
    """Of an end-to-end phase."""
    return "with rounding in the loop" if phase["rounding_in_the_loop"] else "end to end"


def _origin(source: str | None) -> str:
    """Of the text."""
    if source is None:
        return "of unknown source"
    return "written by the model itself" if source == SELF else f"of {source}"


def _share(value: float | None) -> str:
    """In percent, with the digits that a gain shows in."""
    if value is None or not math.isfinite(value):
        return "unknown"
    return f"{value:.2%}" if value >= 0.01 else f"{100 * value:.3g}%"


def _nats(value: float | None) -> str:
    return "unknown" if value is None or not math.isfinite(value) else f"{value:.3f}"


# On the page


def healing_section(found: Facts) -> Section | None:
    """Of the page, from the facts of a report; None where nothing was healed."""
    healing = found["healing"]
    if healing is None:
        return None
    shown, tables = [], []
    if phases := healing["end_to_end"]:
        curves = [
            plots.Training(
                phase_name(phase),
                [at["tokens"] for at in phase["curve"]],
                [_or_nan(at["kl"]) for at in phase["curve"]],
                phase["tokens"],
                *map(_or_nan, both(phase["kl_to_original"])),
            )
            for phase in phases
        ]
        steps = "; ".join(
            f"{curve.label} {number(phase['kl_to_original']['before'])} → {number(phase['kl_to_original']['after'])}"
            for curve, phase in zip(curves, phases, strict=True)
        )
        caption = (
            "KL divergence to the original in nats a token, each point the mean of the steps since the one before. "
            f"On text that was not trained on: {steps}."
        )
        if any(curve.tokens for curve in curves):
            shown.append(drawn("healing", "Loss while healing", caption, plots.healing_curve(curves), caption))
        rows: Rows = [
            (
                phase_name(phase),
                f"{phase['tokens']:,}",
                f"{phase['different_tokens']:,}",
                clock(phase["seconds"]),
                *map(number, both(phase["kl_to_original"])),
            )
            for phase in phases
        ]
        headings = ("trained", "tokens", "different ones", "time", "KL before", "KL after")
        tables.append(Table("Healing end to end", headings, rows, "KL on text that was not trained on."))
    if healing["blocks"] is not None:
        pairs = [layer["output_distance"] or dict.fromkeys(WHEN) for layer in found["layers"]]
        before, after = ([pair[when] for pair in pairs] for when in WHEN)
        mean = " → ".join(map(percent, both(healing["blocks"]["mean_output_distance"])))
        caption = (
            "Squared distance of each layer's output to what it should be, over that one's energy, before and after "
            f"the layer was trained, on sequences that were not trained on. Mean: {mean}."
        )
        shown.append(
            drawn("blocks", "Healing of each layer", caption, plots.distances_per_layer(before, after), caption)
        )
    lines = [f"{line[0].upper()}{line[1:]}." for line in healing_lines(healing)]
    return Section("healing", "Healing", shown, tables, lines)


def moved(distance: Mapping[str, float] | None) -> str:
    """A layer's distance before and after it was trained."""
    return "" if distance is None else " → ".join(map(percent, both(distance)))


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value

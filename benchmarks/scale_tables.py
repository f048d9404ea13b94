"""What `benchmarks.scale` found, as tables; also of a file that it wrote.

python -m benchmarks.scale_tables results.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.scale_extrapolation import WARNING
from benchmarks.scale_rates import main_rate

_LITTLE = 0.001
"""Share of a section below which a row is left out."""


def show(found: Mapping[str, Any]) -> None:
    """Print all there is."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    machine, layers, of = found["machine"], found["layers"], found["of_layers"]
    part = f"{layers} layers" if layers == of else f"{layers} of {of} layers"
    job = found["job"]
    console.print(
        f"{found['model']}, {part}, {found['model_bytes'] / 1e9:.2f} GB: {job['quant']}, ratio {job['ratio']:g}, "
        f"{job['calib_tokens']} tokens, on {machine['device']}, {machine['threads']} of {machine['cpus']} CPUs used"
    )
    console.print(rates_table(found["rates"]))
    if "command" in found:
        console.print(*command_lines(found["command"]), sep="\n", highlight=False)
    if "stages" in found:
        console.print(stages_table(found))
        if found["not_found"]:
            console.print(f"not in this version of a3q, so not timed: {', '.join(found['not_found'])}", style="yellow")
        for name, error in found["misread"].items():
            console.print(f"{name}: has other arguments, so only its time is known: {error}", style="yellow")
    if "extrapolated" in found:
        console.print(extrapolation_table(found["extrapolated"], layers, of))
        console.print(WARNING, style="yellow")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def rates_table(rates: Mapping[str, float]) -> Table:
    """The machine's own rates."""
    table = _table("What this machine can do", "", "rate")
    for name, rate in rates.items():
        product = name.startswith("matmul")
        table.add_row(name, f"{rate / 1e12:.2f} TFLOP/s" if product else f"{rate / 1e9:.2f} GB/s")
    return table


def command_lines(command: Mapping[str, Any]) -> list[str]:
    """The command's time and memory."""
    end = "" if command["code"] == 0 else f", failed with {command['code']}"
    lines = [f"The command: {command['seconds']:.1f} s{end}{', out of memory' if command['out_of_memory'] else ''}"]
    if command["stages"]:
        lines.append("  " + ", ".join(f"{title} {seconds:.0f}" for title, seconds in command["stages"].items()))
    lines.append(
        f"  peak memory {_gib(command['resident'])} resident, mapped files included; {_gib(command['anonymous'])} "
        "anonymous"
    )
    if command["limit"] is not None:
        group = command["group_anonymous"]
        inside = "" if group is None else f", {_gib(group)} anonymous in it"
        lines.append(f"  limited to {_gib(command['limit'])} by {command['limited_by']}{inside}")
    if command["gpu"] is not None:
        limit = "" if command["gpu_memory"] is None else f", limited to {command['gpu_memory']}"
        lines.append(f"  peak on the GPU {_gib(command['gpu'])} (nvidia-smi){limit}")
    return lines


def stages_table(found: Mapping[str, Any]) -> Table:
    """Where the time of the timed pass went, by a3q's stages."""
    rate = main_rate(found["rates"])
    gpu = "" if found["gpu_reserved"] is None else f"; {_gib(found['gpu_reserved'])} of the GPU reserved at most"
    table = _table(
        f"The timed pass; shares of a matmul's {rate / 1e12:.2f} TFLOP/s{gpu}",
        *("stage", "calls", "s", "of stage", "TFLOP", "TFLOP/s", "of matmul", "GB", "GB/s"),
    )
    for title, section in found["sections"].items():
        own: Sequence[Mapping[str, Any]] = [one for one in found["stages"] if one["section"] == title]
        whole = section["seconds"]
        table.add_row(f"[bold]{title}[/bold]", "", f"[bold]{whole:.2f}[/bold]")
        for one in sorted(own, key=lambda one: (one["overlapped"], -one["seconds"])):
            if one["seconds"] >= _LITTLE * whole:
                table.add_row(*_row(one, whole, rate))
        other = whole - sum(one["seconds"] for one in own if not one["overlapped"])
        table.add_row("  other", "", f"{other:.2f}", _share(other, whole))
    for one in found["stages"]:
        if not one["section"]:
            table.add_row(*_row(one, 0.0, rate))
    return table


def _row(one: Mapping[str, Any], whole: float, rate: float) -> tuple[str, ...]:
    seconds, flops, size = one["seconds"], one["flops"], one["bytes"]
    speed = flops / seconds if seconds > 0 else 0.0
    share = "overlapped" if one["overlapped"] else _share(seconds, whole)
    arithmetic = (f"{flops / 1e12:.3g}", f"{speed / 1e12:.3g}", f"{speed / rate:.0%}") if flops else ("", "", "")
    moved = (f"{size / 1e9:.3g}", f"{size / 1e9 / max(seconds, 1e-9):.3g}") if size else ("", "")
    return f"  {one['name']}", str(one["calls"]), f"{seconds:.2f}", share, *arithmetic, *moved


def extrapolation_table(whole: Mapping[str, Mapping[str, Any]], layers: int, of: int) -> Table:
    """Measured and extrapolated times."""
    table = _table(f"Extrapolated from {layers} of {of} layers", "stage", "measured s", "whole model s", "by")
    for title, one in whole.items():
        table.add_row(title, f"{one['measured']:.1f}", f"{one['whole']:.0f}", one["how"])
    sums = (sum(one[key] for one in whole.values()) for key in ("measured", "whole"))
    table.add_row("[bold]all[/bold]", *(f"[bold]{total:.0f}[/bold]" for total in sums), "")
    return table


def _share(seconds: float, whole: float) -> str:
    return f"{seconds / whole:.0%}" if whole > 0 else ""


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


if __name__ == "__main__":
    show(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))

"""What running a model takes, as a table: of one model, or of several side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from a3q.footprint import BACKENDS, VECTORS, Footprint, Use
from a3q.units import megabytes, operations, span

if TYPE_CHECKING:
    from a3q.forecast import Forecast

_Cell = Callable[[Footprint], str]


def comparison(columns: Mapping[str, Footprint], title: str | None = None) -> Table:
    """One column for each footprint under its heading; of two, the second against the first in a third."""
    table = Table(title=title, title_justify="left", caption_justify="left", show_header=len(columns) > 1)
    table.add_column("")
    for heading in columns:
        table.add_column(escape(heading), justify="right", no_wrap=True)
    if len(columns) == 2:
        table.add_column("", justify="right", no_wrap=True)
    for row in compared(list(columns.values())):
        table.add_row(*row)
    return table


def compared(footprints: Sequence[Footprint]) -> list[tuple[str, ...]]:
    """Rows of a table: what it is, one cell for each footprint, and of two the second against the first."""
    found = []
    for name, cell, amount in _rows(footprints):
        cells = [name, *(cell(one) for one in footprints)]
        if len(footprints) == 2:
            cells.append("" if amount is None else _change(amount(footprints[0]), amount(footprints[1])))
        found.append(tuple(cells))
    return found


def _rows(footprints: Sequence[Footprint]) -> list[tuple[str, _Cell, Callable[[Footprint], float] | None]]:
    """Heading, cell, and the number that can be compared."""
    last = footprints[-1]
    at = f"at {last.context:,} tokens" + (f" × {last.parallel}" if last.parallel > 1 else "")
    return [
        ("parameters", lambda one: f"{one.parameters:,}", lambda one: one.parameters),
        ("file", lambda one: megabytes(one.file_bytes), lambda one: one.file_bytes),
        *_type_rows(footprints),
        (
            "KV cache of a token",
            lambda one: f"{one.kv_bytes_per_token:,.0f} B ({one.cache_type})",
            lambda one: one.kv_bytes_per_token,
        ),
        (f"KV cache {at}", lambda one: megabytes(one.kv_bytes), lambda one: one.kv_bytes),
        ("compute buffer (estimate)", lambda one: megabytes(one.compute_bytes), lambda one: one.compute_bytes),
        ("memory to run", lambda one: megabytes(one.memory), lambda one: one.memory),
        ("work of a prompt token", lambda one: operations(one.prompt_flops), lambda one: one.prompt_flops),
        ("work of a generated token", lambda one: operations(one.generation_flops), lambda one: one.generation_flops),
        ("read for a generated token", lambda one: megabytes(one.generation_bytes), lambda one: one.generation_bytes),
        *((f"flash attention on {name}", _takes(name), None) for name in BACKENDS),
        ("CPU attention at full speed", lambda one: _named(one.vectorized, VECTORS), None),
        ("cache of type q8_0, q4_0", lambda one: _yes(one.quantized_cache), None),
    ]


def _type_rows(footprints: Sequence[Footprint]) -> list[tuple[str, _Cell, None]]:
    """One for each type that any of them stores; a model's own large types first."""
    kinds = dict.fromkeys(total.type for one in reversed(footprints) for total in one.types)

    def cell(kind: str) -> _Cell:
        def of(one: Footprint) -> str:
            found = [total for total in one.types if total.type == kind]
            return f"{found[0].tensors} in {megabytes(found[0].bytes)}" if found else ""

        return of

    return [(f"  {kind}, tensors", cell(kind), None) for kind in kinds]


def _named(some: Sequence[str], of: Iterable[str]) -> str:
    return "all" if set(some) == set(of) else ", ".join(some) or "none"


def _takes(backend: str) -> _Cell:
    return lambda one: _yes(backend in one.flash_attention)


def _yes(whether: bool) -> str:
    return "yes" if whether else "no"


def _change(before: float, after: float) -> str:
    percent = round(100 * (after / before - 1)) if before else 0
    return f"{percent:+}%" if percent else "same" if after == before else "0%"


def render_forecast(forecast: Forecast, path: Path | None) -> RenderableType:
    """What a conversion comes to, before and after; `path`: where the plan was written."""
    use, plan, expected = forecast.use, forecast.plan, forecast.prediction
    name = forecast.types.plan.name.upper()
    table = comparison({"before": forecast.before, "after": forecast.after}, f"plan: {_reduction(forecast)}, {name}")
    source = "measured on this model" if expected.measured else "by rule, nothing was measured on this model yet"
    if not plan.request.groups():
        source = "nothing is reduced"
    parts = [f"reduction {expected.reduction:.3g} ({source})"]
    if expected.rounding is not None:
        parts.append(f"rounding {expected.rounding:.3g}")
    parts.append(f"cache {expected.cache:.3g}")
    lines = [
        f"predicted speed-up: prompt {forecast.speedup.prompt:.2f}×, generation {forecast.speedup.generation:.2f}× "
        f"at {use.context:,} tokens (as less is computed and read)",
        f"predicted cost in nats: {', '.join(parts)}",
        f"grid of the runtime: {forecast.grid}",
        *(f"note: {note}" for note in forecast.notes),
    ]
    lines.append(f"to run it: {command(use)}")
    if path is not None:
        lines.append(f"wrote {path}; carry it out with: a3q convert … --plan {path}")
    return Group(table, *(Text(line, style="yellow" if line.startswith("note") else "") for line in lines))


def command(use: Use, file: str = "FILE.gguf") -> str:
    """How llama.cpp is started for this use."""
    parts = ["llama-server -m", file, f"-c {use.context * use.parallel}"]
    if use.parallel > 1:
        parts.append(f"-np {use.parallel}")
    if use.cache_type != "f16":
        parts.append(f"-fa on -ctk {use.cache_type} -ctv {use.cache_type}")
    return " ".join(parts)


def _reduction(forecast: Forecast) -> str:
    plan, old, new = forecast.plan, forecast.model.config.layers, forecast.plan.dimensions
    if not plan.request.groups():
        return "nothing reduced"
    heads = span([one.qk_head_dim for one in old]), span([one.qk_head_dim for one in new])
    units = span([one.intermediate_size for one in old]), span([one.intermediate_size for one in new])
    return f"heads {_arrow(*heads)}, MLP {_arrow(*units)}"


def _arrow(old: str, new: str) -> str:
    return old if old == new else f"{old} → {new}"

"""The closing table of a run."""

from __future__ import annotations

from collections import Counter

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from a3q.dimensions import Plan, size_of
from a3q.families import COMPONENTS
from a3q.footprint import Use
from a3q.footprint_table import command
from a3q.model import Model
from a3q.report_healing import healing_facts, healing_lines
from a3q.result import Result, Rounding
from a3q.units import megabytes, span
from a3q.verify import Quality
from converters.gguf_writer import WrittenFile


def render(result: Result) -> RenderableType:
    """Original → reduced → written, the ratio per component, how it was healed and rounded, and what had to give."""
    parts: list[RenderableType] = [_models(result)]
    if result.job.plan.asked > 0:
        parts.append(_components(result))
    if (healing := healing_facts(result)) is not None:
        parts += [Text(line) for line in healing_lines(healing)]
    if result.rounding is not None:
        parts.append(_quantization(result, result.rounding))
    if result.verification is not None:
        parts.append(_verified(result))
    if result.use is not None:
        parts.append(_running(result, result.use))
    parts += [Text(f"note: {note}", style="yellow") for note in result.notes]
    if result.ollama is not None:
        parts.append(Text(result.ollama.message))
        parts += [Text(f"  {line}", style="bold") for line in result.ollama.commands]
    total = sum(result.seconds.values())
    parts.append(Text(f"{total:.0f} s: " + ", ".join(f"{k} {v:.0f}" for k, v in result.seconds.items()), style="dim"))
    parts.append(Text(f"wrote {result.path} ({megabytes(result.written.size)})", style="bold"))
    if isinstance(result.written, WrittenFile):
        files = zip(result.written.files, result.written.sha256, strict=True)
        parts += [Text(f"sha256 {digest}  {path.name}", style="dim") for path, digest in files]
    if result.reports:
        parts.append(Text(f"report: {result.reports[0]}"))
    return Group(*parts)


def _running(result: Result, use: Use) -> Text:
    """How to start it, and what that takes."""
    before, after = result.footprints["before"], result.footprints["after"]
    return Text(
        f"memory to run at {use.context:,} tokens{f' × {use.parallel}' if use.parallel > 1 else ''}: "
        f"{megabytes(after.memory)} (before: {megabytes(before.memory)}), of which {megabytes(after.kv_bytes)} KV "
        f"cache; {command(use, result.path.name)}"
    )


def _models(result: Result) -> Table:
    check = result.verification
    done = _done(result)
    title = " → ".join(filter(None, ("original", done, "written")))
    table = _table(title, "", "parameters", "bytes", "perplexity", "KL", "KV B/token")

    def row(name: str, model: Model, size: str, quality: Quality | None) -> None:
        perplexity = f"{quality.perplexity.value:.2f} ± {quality.perplexity.stderr:.2f}" if quality else "not measured"
        kl = "" if quality is None or quality.kl is None else f"{quality.kl:.4f}"
        cache = f"{model.config.kv_bytes_per_token():,.0f}"
        table.add_row(name, f"{model.parameters() / 1e6:.1f} M", size, perplexity, kl, cache)

    row("original", result.original, megabytes(result.original.source.file_size), check.original if check else None)
    if done:
        row(done, result.reduced, "in memory", check.reduced if check else None)
    row(result.type_name, result.reduced, megabytes(result.written.size), check.written if check else None)
    return table


def _done(result: Result) -> str:
    """What was done to the model in memory; nothing where it is the original itself."""
    reduction = result.job.reduction
    done = {
        "reduced": result.job.plan.asked > 0,
        "healed": healing_facts(result) is not None,
        "rounded": reduction.top or any(reduction.rounding_losses),
    }
    return ", ".join(what for what, was in done.items() if was)


def _quantization(result: Result, rounding: Rounding) -> Table:
    title = f"quantization ({rounding.quantizer}), {rounding.bits_per_weight:.2f} bits per weight"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("")
    if rounding.types:
        table.add_column("tensors and their types")
    if rounding.losses:
        table.add_column("output energy lost", justify="right", no_wrap=True)
    for role in dict.fromkeys((*rounding.types, *rounding.losses)):
        cells = [role]
        if rounding.types:
            counts = Counter(rounding.types.get(role, {})).most_common()
            cells.append(", ".join(f"{count} {kind}" for kind, count in counts))
        if rounding.losses:
            cells.append(f"{rounding.losses[role]:.2%}" if role in rounding.losses else "")
        table.add_row(*cells)
    if rounding.losses and result.job.plan.asked == 0 and result.job.calibration is not None:
        table.caption = f"calibrated on {result.job.calibration.description}"
    return table


def _components(result: Result) -> Table:
    plan, before, after = result.job.plan, result.original.config, result.reduced.config
    table = _table(f"reduction, {plan.asked:.1%} of the components asked", "", "from", "to", "gone")
    for component in COMPONENTS:
        old, new = (span([size_of(shape, component) for shape in config.layers]) for config in (before, after))
        table.add_row(f"{component}, inner size", old, new, f"{plan.per_component[component]:.1%}")
    reduced = " and ".join(c for c in COMPONENTS if c in plan.request.reduced)
    table.add_row("all components" if len(plan.request.reduced) == 3 else reduced, "", "", f"{plan.achieved:.1%}")
    old_weights, new_weights = result.original.parameters(), result.reduced.parameters()
    table.add_row("all parameters", f"{old_weights:,}", f"{new_weights:,}", f"{1 - new_weights / old_weights:.1%}")
    lines = []
    if result.job.calibration is not None:
        lines.append(f"calibrated on {result.job.calibration.description}")
    for option, kl in result.job.tried:
        verdict = "chosen" if option == plan else "not chosen"
        lines.append(f"{_describe(option)}: KL {kl:.3f} in a trial, {verdict}")
    if plan.predicted_kl is not None:
        lines.append("sizes chosen by what each layer's components cost when reduced alone (--ranks mixed)")
    table.caption = "\n".join(lines)
    return table


def _describe(plan: Plan) -> str:
    """Sizes of a plan in words."""
    heads = span([one.qk_head_dim for one in plan.dimensions])
    units = span([one.intermediate_size for one in plan.dimensions])
    return f"head size {heads}, MLP size {units}"


def _table(title: str, first: str, *numbers: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column(first)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _verified(result: Result) -> Text:
    assert result.verification is not None
    check = result.verification
    opening = {
        "llama.cpp": "llama.cpp loads it, splits text as the source does, and is",
        "transformers": "transformers loads it and is",
        # A note says why.
        "a3q": "Not tried in transformers; as a3q reads it back, it is",
    }[check.runtime]
    return Text(
        f"{opening} {check.kl_to_reduced:.2g} nats from the model in memory. Perplexity and KL to the original in "
        f"nats: {check.scored_tokens} held-out tokens of the calibration source; KV cache: bytes per token at f16"
    )

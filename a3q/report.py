"""The closing table of a conversion."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from a3q.model import Model
from a3q.pipeline import ConvertResult
from a3q.verify import Quality


def megabytes(size: float) -> str:
    """Bytes in a unit that people read."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def render(result: ConvertResult) -> RenderableType:
    """Original → reduced → written file, the ratio per component, and what had to give."""
    parts: list[RenderableType] = [_models(result)]
    if result.choice.asked > 0:
        parts.append(_components(result))
    if result.verification is not None:
        parts.append(_verified(result))
    parts += [Text(f"note: {note}", style="yellow") for note in result.notes]
    total = sum(result.seconds.values())
    parts.append(Text(f"{total:.0f} s: " + ", ".join(f"{k} {v:.0f}" for k, v in result.seconds.items()), style="dim"))
    parts.append(Text(f"wrote {result.path} ({megabytes(result.written.size)})", style="bold"))
    return Group(*parts)


def _models(result: ConvertResult) -> Table:
    check = result.verification
    table = _table("original → reduced → written file", "", "parameters", "bytes", "perplexity", "KL", "KV B/token")

    def row(name: str, model: Model, size: str, quality: Quality | None) -> None:
        perplexity = f"{quality.perplexity.value:.2f} ± {quality.perplexity.stderr:.2f}" if quality else "not measured"
        kl = "" if quality is None or quality.kl is None else f"{quality.kl:.4f}"
        cache = f"{model.config.kv_bytes_per_token():,.0f}"
        table.add_row(name, f"{model.parameters() / 1e6:.1f} M", size, perplexity, kl, cache)

    row("original", result.original, megabytes(result.original.source.file_size), check.original if check else None)
    row("reduced", result.reduced, "in memory", check.reduced if check else None)
    row(result.plan.name.upper(), result.reduced, megabytes(result.written.size), check.written if check else None)
    return table


def _components(result: ConvertResult) -> Table:
    choice, before, after = result.choice, result.original.config, result.reduced.config
    table = _table(f"reduction, {choice.asked:.1%} of the components asked", "", "from", "to", "gone")
    sizes = {
        "QK": (before.head_dim, after.head_dim),
        "OV": (before.v_head_dim, after.v_head_dim),
        "MLP": (before.intermediate_size, after.intermediate_size),
    }
    for component, gone in choice.per_component.items():
        old, new = sizes[component]
        table.add_row(f"{component}, inner size", str(old), str(new), f"{gone:.1%}")
    table.add_row("all components", "", "", f"{choice.achieved:.1%}")
    old_weights, new_weights = result.original.parameters(), result.reduced.parameters()
    table.add_row("all parameters", f"{old_weights:,}", f"{new_weights:,}", f"{1 - new_weights / old_weights:.1%}")
    lines = [f"calibrated on {result.calibration}"]
    for option, kl in result.tried:
        verdict = "chosen" if option == choice else "not chosen"
        tried = f"head size {option.dimensions.head_dim}, MLP size {option.dimensions.intermediate_size}"
        lines.append(f"{tried}: KL {kl:.3f} in a trial, {verdict}")
    table.caption = "\n".join(lines)
    return table


def _table(title: str, first: str, *numbers: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column(first)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _verified(result: ConvertResult) -> Text:
    assert result.verification is not None
    check = result.verification
    return Text(
        f"llama.cpp loads the file, splits text as the source does, and is {check.kl_to_reduced:.2g} nats from the "
        f"model in memory. Perplexity and KL to the original in nats: {check.scored_tokens} held-out tokens of the "
        "calibration source; KV cache: bytes per token at f16"
    )

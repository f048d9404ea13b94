"""The report of a run: a page that needs no network, and the same facts as JSON, both beside the output."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from a3q import plots
from a3q.errors import InputError
from a3q.families import COMPONENTS
from a3q.footprint import Footprint, TypeTotal
from a3q.footprint_table import compared
from a3q.plots import bytes_text, tokens_text
from a3q.report_facts import SIZES, Facts, facts
from a3q.report_healing import healing_section, moved
from a3q.report_parts import WHEN, Plot, Rows, Section, Table, both, drawn, number, percent
from a3q.result import Result
from a3q.units import span

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_QUANTIZED_BITS = 16
"""Tensors of as many bits a weight, and more, are not quantized."""


def report_paths(output: Path) -> tuple[Path, Path]:
    """Page and JSON of an output: `OUT.gguf`, the first of its parts, or a folder, whose report lies beside it."""
    stem = output.name.removesuffix(".gguf")
    if stem != output.name:
        stem = _SHARD.sub("", stem)
    return output.with_name(f"{stem}.report.html"), output.with_name(f"{stem}.report.json")


def check_reports(output: Path, force: bool = False) -> None:
    """InputError when a report of `output` cannot get its name, or exists already and `force` is off."""
    for path in report_paths(output):
        if path.is_dir():
            raise InputError(
                f"{path}: is a folder, and the report would have its name; remove it or give another output"
            )
        if path.exists() and not force:
            raise InputError(f"{path}: exists already; use --force to replace it")


def write_reports(result: Result) -> tuple[Path, Path]:
    """Write both beside the output, whole or not at all; what lies there is replaced. InputError: cannot be written."""
    found = facts(result)
    page, data = report_paths(result.path)
    # Names from files may hold halves of surrogate pairs, which no file can.
    texts = {
        page: render(found, data.name).encode(errors="replace"),
        data: (json.dumps(found, indent=1, allow_nan=False) + "\n").encode(),
    }
    parts = {path: path.with_name(f".{path.name}.part") for path in texts}
    old = [path for path in texts if path.exists()]
    try:
        for path, text in texts.items():
            parts[path].write_bytes(text)
        for path, part in parts.items():
            part.replace(path)
    except OSError as error:
        # Neither without the other.
        for path in texts.keys() - old:
            path.unlink(missing_ok=True)
        raise InputError(f"{page}: the report cannot be written: {error.strerror or error}") from error
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    return page, data


def render(found: Facts, json_name: str) -> str:
    """The page of a report from its facts; `json_name` is the file that holds these."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("a3q", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = [_outcome(found), _plan(found), _footprint(found), _layers(found), _rope(found), healing_section(found)]
    sections += [_quantization(found), _provenance(found)]
    longest = max(found["seconds"].values(), default=0.0) or 1.0
    return environment.get_template("report.html.j2").render(
        title=found["output"]["name"].removesuffix(".gguf"),
        subtitle=_subtitle(found),
        cards=list(_cards(found)),
        notes=found["notes"],
        sections=[section for section in sections if section is not None],
        seconds=[
            {"title": title, "seconds": f"{seconds:.1f}", "share": f"{100 * seconds / longest:.1f}"}
            for title, seconds in found["seconds"].items()
        ],
        version=found["made_by"]["a3q"],
        json_name=json_name,
    )


# What came out


def _subtitle(found: Facts) -> str:
    plan, model, output = found["plan"], found["model"], found["output"]
    done = [f"reduced by {plan['achieved']:.1%} with {plan['method']}"] if plan["asked"] > 0 else []
    kind = "Hugging Face folder" if output["format"] == "huggingface" else "GGUF"
    return ", ".join(
        [f"{model['name']} ({model['family']}, {model['layers']} layers)", *done, f"{kind} {output['type']}"]
    )


def _cards(found: Facts) -> Iterator[Facts]:
    model, quality, quantization = found["model"], found["quality"], found["quantization"]

    def card(label: str, before: float, after: float, shown: Any) -> Facts:
        was = "as before" if before == after else f"from {shown(before)}, {_change(before, after)}"
        return {"label": label, "value": shown(after), "was": was}

    yield card("File size", found["source"]["bytes"], found["output"]["bytes"], bytes_text)
    yield card("Parameters", *both(model["parameters"]), _count)
    if quality is None:
        yield {"label": "Perplexity", "value": "not measured", "was": ""}
    else:
        written, original = quality["written"], quality["original"]
        error = "" if written["perplexity"] is None else f"± {written['perplexity_stderr'] or 0.0:.2f}, "
        was = f"{error}from {_with_error(original)}"
        yield {"label": "Perplexity", "value": _perplexity(written), "was": was}
        yield {"label": "KL to the original", "value": number(written["kl_to_original"]), "was": "nats a token"}
    yield card("KV cache of a token", *both(model["kv_bytes_per_token_f16"]), bytes_text)
    if quantization is not None:
        bits, quantizer = quantization["bits_per_weight"], quantization["quantizer"]
        yield {"label": "Bits of a weight", "value": f"{bits:.2f}", "was": f"in the mean, rounded by {quantizer}"}


def _outcome(found: Facts) -> Section:
    quality, cache = found["quality"], found["cache"]
    shown: list[Plot] = []
    tables = []
    if quality is not None:
        shown += _size_plot(found)
    lines = [
        plots.CacheLine(
            f"{one['model']}, {one['type']}", cache["contexts_tokens"], one["bytes"], one["model"] == "original"
        )
        for one in cache["series"]
    ]
    last = ", ".join(f"{line.label} {bytes_text(line.bytes[-1])}" for line in lines)
    longest = tokens_text(cache["contexts_tokens"][-1])
    caption = f"Up to the context that the model was trained for. At {longest} tokens: {last}."
    if found["output"]["format"] == "gguf" and not cache["quantizable"]:
        caption += " llama.cpp has no quantized cache for heads of this size."
    shown.append(drawn("cache", "KV cache against context", caption, plots.cache_against_context(lines), caption))
    if quality is not None:
        rows = [
            (title, _with_error(quality[key]), number(quality[key]["kl_to_original"]))
            for key, title in (("original", "original"), ("in_memory", "in memory"), ("written", "written"))
        ]
        runs = {"llama.cpp": "run in llama.cpp", "transformers": "run in transformers", "a3q": "read back by a3q"}
        caption = (
            f"On {quality['scored_tokens']} held-out tokens of the calibration source. KL divergence in nats a token. "
            f"The written model was {runs.get(quality['runtime'], quality['runtime'])} and is "
            f"{number(quality['kl_of_written_to_in_memory'])} nats from the one in memory."
        )
        tables.append(Table("Quality", ("", "perplexity", "KL to the original"), rows, caption))
    return Section("outcome", "Size and quality", shown, tables)


def _size_plot(found: Facts) -> Iterator[Plot]:
    quality, files = found["quality"], {"original": found["source"], "written": found["output"]}
    points = [
        plots.Point("", files[key]["bytes"], quality[key]["perplexity"], group, quality[key]["perplexity_stderr"])
        for key, group in (("original", "original"), ("written", f"written, {found['output']['type']}"))
        if quality[key]["perplexity"] is not None
    ]
    if points:
        told = ", ".join(f"{one.group}: {bytes_text(one.bytes)}, perplexity {one.perplexity:.2f}" for one in points)
        caption = "Lower and further left is better. Bars: standard error."
        yield drawn("size", "File size against perplexity", caption, plots.size_against_perplexity(points), told)


# What was planned


def _plan(found: Facts) -> Section | None:
    plan = found["plan"]
    if plan["asked"] == 0:
        return None
    before, after = ({c: [one[key][when] for one in found["layers"]] for c, key in SIZES.items()} for when in WHEN)
    rows: Rows = []
    for component in COMPONENTS:
        one = plan["components"][component]
        asked = "" if one["asked"] == 0 else f"{one['asked']:.1%}" + (" together" if one["together_with"] else "")
        rows.append((component, asked, f"{one['achieved']:.1%}", span(before[component]), span(after[component])))
    rows.append(("together", f"{plan['asked']:.1%}", f"{plan['achieved']:.1%}", "", ""))
    lines = [f"Method {plan['method']}" + ("" if plan["ranks"] is None else f", {plan['ranks']} ranks")]
    if plan["predicted_kl"] is not None:
        lines[0] += f"; the sizes were chosen for a predicted KL of {number(plan['predicted_kl'])} nats"
    lines[0] += "."
    for one in plan["tried"]:
        sizes = one["sizes"]
        verdict = "chosen" if one["chosen"] else "not chosen"
        lines.append(
            f"Tried: head size {span(sizes['qk_head_dim'])}, MLP size {span(sizes['intermediate_size'])}: KL "
            f"{number(one['kl'])} nats, {verdict}."
        )
    if found["calibration"] is not None:
        lines.append(f"Calibrated on {found['calibration']['description']}.")
    headings = ("component", "asked to go", "gone", "size before", "size after")
    return Section("plan", "Reduction", (), (Table("Reduction of each component", headings, rows),), lines)


def _footprint(found: Facts) -> Section | None:
    footprint = found["footprint"]
    if footprint is None:
        return None
    before, after = (_restored(footprint[when]) for when in WHEN)
    speedup = footprint["predicted_speedup"]
    line = (
        f"Predicted speed-up: prompts {speedup['prompt']:.2f} × by less arithmetic, generation "
        f"{speedup['generation']:.2f} × by less that is read for each token."
    )
    table = Table("What running it takes", ("", *WHEN, "change"), compared([before, after]))
    return Section("running", "What running it takes", (), (table,), (line,))


def _restored(footprint: Facts) -> Footprint:
    return Footprint(**{**footprint, "types": tuple(TypeTotal(**one) for one in footprint["types"])})


# What it cost where


def _layers(found: Facts) -> Section | None:
    layers = found["layers"]
    lost = {component: [layer["energy_lost"][component] for layer in layers] for component in SIZES}
    reduced = {component: [one for one in values if one is not None] for component, values in lost.items()}
    before, after = ({c: [one[key][when] for one in layers] for c, key in SIZES.items()} for when in WHEN)
    if before == after:
        return None
    shown = []
    if any(reduced.values()):
        means = ", ".join(f"{c} {sum(v) / len(v):.1%}" for c, v in reduced.items() if v)
        caption = (
            "Share of each component's functional energy that its reduction lost, before output projections were "
            f"refitted. Mean: {means}."
        )
        if plain := [component for component, values in reduced.items() if not values]:
            caption += f" Left alone: {' and '.join(plain)}."
        shown.append(drawn("losses", "Functional loss of each layer", caption, plots.losses_per_layer(lost), caption))
    caption = "Grey: the original. " + "; ".join(
        f"{component} {span(before[component])} → {span(after[component])}" for component in SIZES
    )
    shown.append(drawn("sizes", "Sizes of each layer", f"{caption}.", plots.sizes_per_layer(before, after), caption))
    rows: Rows = [
        (
            str(layer["layer"]),
            *(_step(layer[key]) for key in SIZES.values()),
            *("" if layer["energy_lost"][c] is None else f"{layer['energy_lost'][c]:.2%}" for c in SIZES),
        )
        for layer in layers
    ]
    headings = ["layer", "QK head", "V head", "MLP", "QK lost", "OV lost", "MLP lost"]
    if any(layer["output_distance"] is not None for layer in layers):
        headings.append("distance, healed")
        rows = [(*row, moved(layer["output_distance"])) for row, layer in zip(rows, layers, strict=True)]
    return Section("layers", "Layers", shown, (Table(f"All {len(rows)} layers", headings, rows, folded=True),))


def _step(pair: Mapping[str, int]) -> str:
    before, after = pair["before"], pair["after"]
    return str(before) if before == after else f"{before} → {after}"


def _rope(found: Facts) -> Section | None:
    groups = found["rope"]
    if all(len(kept) == len(group["radians_per_token"][0]) for group in groups for kept in group["kept"]):
        # All stay.
        return None
    layers = sorted(((i, group) for group in groups for i in group["layers"]), key=lambda pair: pair[0])
    shown = [("all", groups[0])] if len(groups) == 1 else [(str(i), group) for i, group in layers]
    shares = [_shares(group) for _, group in shown]
    alike = len(groups) == 1 and len(groups[0]["kept"]) == 1
    several = any(len(group["kept"]) > 1 for group in groups)
    caption = "One list for all layers and heads." if alike else "Layers from top to bottom."
    caption += " Every key head keeps frequencies of its own." if several else ""
    caption += " Each frequency turns a pair of a head's dimensions; the fastest tell neighbours apart."
    figure = plots.kept_frequencies(shares, [label for label, _ in shown])
    plot = drawn("rope", "RoPE frequencies kept", caption, figure, f"{sum(map(len, groups[0]['kept']))} in layer 0")
    tables = []
    rows: Rows
    if alike:
        kept = set(groups[0]["kept"][0])
        rows = [
            (str(i), f"{turn:.6g}", _turn(turn), "kept" if i in kept else "")
            for i, turn in enumerate(groups[0]["radians_per_token"][0])
        ]
        headings: tuple[str, ...] = ("frequency", "radians a token", "tokens a turn", "")
        tables.append(Table(f"All {len(rows)} frequencies", headings, rows, folded=True))
    else:
        rows = [(label, " | ".join(_positions(kept) for kept in group["kept"])) for label, group in shown]
        headings = ("layer", "positions of the kept frequencies, the heads one after another")
        tables.append(Table("Frequencies kept in each layer", headings, rows, folded=True, numbers=False))
    return Section("rope", "Position encoding", (plot,), tables)


def _turn(radians: float) -> str:
    """Tokens until a pair has turned once."""
    if radians == 0:
        return "never"
    tokens = math.tau / radians
    return f"{tokens:,.0f}" if tokens >= 100 else f"{tokens:.3g}"


def _shares(group: Facts) -> list[float]:
    """Of the heads, how many keep each frequency."""
    kept = Counter(i for own in group["kept"] for i in own)
    return [kept[i] / len(group["kept"]) for i in range(len(group["radians_per_token"][0]))]


def _positions(kept: Sequence[int]) -> str:
    """Positions in ascending order with runs drawn together: 0-3, 7."""
    runs: list[list[int]] = []
    for position in kept:
        if runs and position == runs[-1][-1] + 1:
            runs[-1].append(position)
        else:
            runs.append([position])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _quantization(found: Facts) -> Section | None:
    quantization = found["quantization"]
    if quantization is None:
        return None
    tensors, shown = quantization["tensors"], []
    measured = [one for one in tensors if one["layer"] is not None and one["output_energy_lost"] is not None]
    if measured:
        cells = [plots.Cell(one["layer"], one["kind"], one["output_energy_lost"]) for one in measured]
        worst = max(measured, key=lambda one: one["output_energy_lost"])
        caption = (
            "Share of each matrix's output energy on the calibration text that rounding lost. Most: "
            f"{worst['name']}, {percent(worst['output_energy_lost'])}. Matrices rounded together share a value."
        )
        figure = plots.tensor_map(cells, "output energy lost", percent=True)
        shown.append(drawn("errors", "Quantization error of each tensor", caption, figure, caption))
    sized = [one for one in tensors if one["layer"] is not None and (one["bits_per_weight"] or 32) < _QUANTIZED_BITS]
    if len({one["bits_per_weight"] for one in sized}) > 1:
        types = Counter(one["type"] for one in sized).most_common()
        caption = "Types of the layers' matrices: " + ", ".join(f"{count} {kind}" for kind, count in types) + "."
        cells = [plots.Cell(one["layer"], one["kind"], one["bits_per_weight"]) for one in sized]
        figure = plots.tensor_map(cells, "bits a weight")
        shown.append(drawn("bits", "Bits of each tensor", caption, figure, caption))
    tables = []
    by_role = quantization["matrices_by_role_and_type"]
    losses = quantization["mean_output_energy_lost_by_role"]
    rows: Rows = [
        (
            role,
            ", ".join(f"{count} {kind}" for kind, count in Counter(by_role.get(role, {})).most_common()),
            percent(losses.get(role)),
        )
        for role in dict.fromkeys((*by_role, *losses))
    ]
    tables.append(Table("By role", ("weight", "matrices and their types", "output energy lost"), rows))
    rows = [
        (
            one["name"],
            one["type"] or "",
            "" if one["bits_per_weight"] is None else f"{one['bits_per_weight']:.2f}",
            "" if one["bytes"] is None else f"{one['bytes']:,}",
            percent(one["output_energy_lost"]),
        )
        for one in tensors
    ]
    headings = ("tensor", "type", "bits", "bytes", "output energy lost")
    tables.append(Table(f"All {len(rows)} tensors", headings, rows, folded=True))
    line = f"Rounded by {quantization['quantizer']} to {quantization['bits_per_weight']:.2f} bits a weight in the mean."
    return Section("quantization", "Quantization", shown, tables, (line,))


def _provenance(found: Facts) -> Section:
    made, source, output, calibration = found["made_by"], found["source"], found["output"], found["calibration"]
    rows = [(f"source {one['name']}", f"sha256 {one['sha256']}") for one in source["files"]]
    rows += [(f"written {one['name']}", f"{one['bytes']:,} bytes, sha256 {one['sha256']}") for one in output["files"]]
    if calibration is not None:
        rows.append(("calibration", f"{calibration['description']} (source {calibration['source']})"))
        if calibration["seed"] is not None:
            rows.append(("seed", str(calibration["seed"])))
    names = {"a3q": "a3q", "python": "Python", "torch": "PyTorch", "llama_cpp": "llama.cpp"}
    names |= {"device": "device", "platform": "platform"}
    rows += [(title, str(made[key])) for key, title in names.items() if made[key] is not None]
    table = Table("Where it comes from", ("", ""), rows, numbers=False)
    return Section("provenance", "Provenance", (), (table,))


# Numbers in words


def _change(before: float, after: float) -> str:
    if before == after or before == 0:
        return ""
    share = after / before - 1
    return f"{'+' if share > 0 else '−'}{abs(share):.1%}"


def _perplexity(quality: Facts) -> str:
    return "not finite" if quality["perplexity"] is None else f"{quality['perplexity']:.2f}"


def _with_error(quality: Facts) -> str:
    """Perplexity with its standard error."""
    error = "" if quality["perplexity"] is None else f" ± {quality['perplexity_stderr'] or 0.0:.2f}"
    return f"{_perplexity(quality)}{error}"


def _count(value: float) -> str:
    """In thousands, millions and so on, with four digits."""
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{value / factor:.4g}{unit}"
    return f"{value:.0f}"

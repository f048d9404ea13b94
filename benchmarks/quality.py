"""Perplexity of a3q, of the paper's own A3 and of rival methods at equal size, and of each component alone.

    python -m benchmarks.quality --calib valid.txt --eval test.raw.txt [--ood other.txt] [--model M] [--out FOLDER]
        [--ratios 0.1 0.2 0.25 0.4 0.5] [--only NAME ...] [--tasks] [--device cuda]

All methods are calibrated on the first 64 × 1024 tokens of `--calib` and evaluated on the first 8 × 1024 of `--eval`. A
ratio is the share of the layers' matrices that goes; the table gives what each method really removes. Writes
`quality.md`, `quality.json` and `quality.png` to `--out`. With `--tasks`, lm-eval's `hf` backend runs an arithmetic and
a knowledge task on the original and on each a3q and paper model, as folders that `a3q reduce` would write.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from a3q import cache
from a3q.choosing import MOMENT_SEQUENCES, PROBED_RATIOS, PROBES
from a3q.components import Method
from a3q.dimensions import ALL, Grid, Plan, Request, folder_grid, gguf_grid, mixed, uniform
from a3q.families import COMPONENTS, Component
from a3q.model import Model, pick_device
from a3q.perplexity import compare, logits_of
from a3q.reduce import reduce
from a3q.sensitivity import measure
from benchmarks.common import peak_memory, perplexity, perplexity_of, windows
from benchmarks.quality_plot import Row, plot
from benchmarks.rivals import RIVALS, layer_parameters
from benchmarks.tasks import evaluate
from converters.hf_writer import write_huggingface
from converters.open import open_model

PAPER, FREE, SHARED = Method("paper", "per_head"), Method("a3q", "per_head"), Method("a3q", "shared")
BLOCK = 32
"""Rows of Q4_0 and its like."""
RIVAL_NAMES = ("truncated SVD", "magnitude pruning", "SliceGPT", "SVD-LLM (W)", "MoDeGPT", "MoDeGPT (allocated)")


@dataclass
class Measured:
    """One row of the table."""

    method: str
    ratio: float
    removed: float
    """Share of the layers' matrices that is gone."""
    perplexity: dict[str, float]
    seconds: float
    tasks: dict[str, tuple[float, float]] = field(default_factory=dict)


class Bench:
    """The model, its texts, and what has been measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = pick_device(args.device)
        self.model = _in_memory(open_model(args.model))
        self.calibration = windows(self.model, args.calib, args.sequences)
        self.texts = {"eval": windows(self.model, args.eval, 8)}
        if args.ood:
            self.texts["ood"] = windows(self.model, args.ood, 8)
        self.tasks = args.tasks
        self.rows: list[Measured] = []
        self.only: list[str] = args.only
        self.out: Path = args.out
        self._sensitivities: dict[tuple[Method, float, frozenset[Component]], cache.Sensitivities] = {}

    def add(self, name: str, ratio: float, removed: float, run: Callable[[Tensor], float], start: float) -> Measured:
        """Evaluate and note one row."""
        seconds = time.perf_counter() - start
        row = Measured(name, ratio, removed, {text: run(ids) for text, ids in self.texts.items()}, seconds)
        self.rows.append(row)
        figures = "  ".join(f"{text} {value:9.2f}" for text, value in row.perplexity.items())
        print(f"{name:28s} {ratio:4.0%} ({removed:6.2%} gone)  {figures}  {seconds:6.1f} s", flush=True)
        self.save()
        return row

    def wanted(self, name: str) -> bool:
        """Whether this method was asked for."""
        return not self.only or any(part in name for part in self.only)

    def reduced(self, name: str, ratio: float, plan: Plan, method: Method) -> None:
        """Reduce by a plan and note the row."""
        start = time.perf_counter()
        model = reduce(self.model, self.calibration, plan.dimensions, self.device, 1 << 40, method).model
        removed = 1 - layer_parameters(model.config) / layer_parameters(self.model.config)
        row = self.add(name, ratio, removed, lambda ids: perplexity(model, ids, self.device), start)
        if self.tasks:
            self.run_tasks(row, model)

    def run_tasks(self, row: Measured, model: Model) -> None:
        """Accuracy of `model` as a folder in lm-eval."""
        with tempfile.TemporaryDirectory() as folder:
            write_huggingface(model, Path(folder) / "model", dtype=torch.float32)
            row.tasks = evaluate(Path(folder) / "model", device=self.device.type)
        print("    " + ", ".join(f"{task} {mean:.3f} ± {error:.3f}" for task, (mean, error) in row.tasks.items()))
        self.save()

    def mixed_plan(self, ratio: float, grid: Grid, method: Method, components: frozenset[Component] = ALL) -> Plan:
        """As `a3q reduce` and `a3q convert` choose their dimensions."""
        probed = min(PROBED_RATIOS, key=lambda one: abs(one - ratio))
        key = (method, probed, components)
        if key not in self._sensitivities:
            every = Grid(ALL, grid.head_step, grid.unit_step)
            config, (count, length) = self.model.config, PROBES["cuda"]
            sizes = [{c: every.sizes(config, shape, c) for c in COMPONENTS} for shape in config.layers]
            tokens, probes = self.calibration[:MOMENT_SEQUENCES], self.calibration[-count:, :length]
            found = measure(self.model, tokens, probes, sizes, probed, self.device, method)
            self._sensitivities[key] = found
        request = Request(ratio, components)
        plans = mixed(self.model.family, self.model.config, grid, request, self._sensitivities[key])
        if len(plans) == 1:
            return plans[0]
        # As a conversion does where two are predicted alike.
        tokens, held_out = self.calibration[:: len(self.calibration) // 4][:4], self.calibration[-4:, :512]
        reference = logits_of(self.model, held_out, self.device)

        def divergence(plan: Plan) -> float:
            reduced = reduce(self.model, tokens, plan.dimensions, self.device, 1 << 40, method).model
            logits = {"reduced": logits_of(reduced, held_out, self.device)}
            return compare(reference, logits, held_out)["reduced"].mean_kl

        return min(plans, key=divergence)

    def even_plan(self, ratio: float, grid: Grid, components: frozenset[Component] = ALL) -> Plan:
        """All layers alike, the nearest to the ratio."""
        plans = uniform(self.model.family, self.model.config, grid, Request(ratio, components))
        return min(plans, key=lambda plan: abs(plan.achieved - ratio))

    def save(self) -> None:
        """All rows so far, as data, table and picture."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "quality.json").write_text(json.dumps([asdict(row) for row in self.rows], indent=1) + "\n")
        (self.out / "quality.md").write_text("\n".join(_table(self.rows)) + "\n")
        points = [Row(row.method, row.ratio, row.perplexity["eval"]) for row in self.rows if " only" not in row.method]
        plot(points, self.out / "quality.png", title=self.model.source.path.stem)


def _in_memory(model: Model) -> Model:
    """Dequantized once instead of for every method."""
    return replace(model, layers=list(model.layers))


def _table(rows: list[Measured]) -> Iterator[str]:
    """Markdown: methods down, ratios across, for each text and task."""
    ratios = sorted({row.ratio for row in rows if row.ratio > 0})
    for text in rows[0].perplexity:
        base = rows[0].perplexity[text]
        yield f"| perplexity, {text} (original {base:.2f}) | " + " | ".join(f"{ratio:.0%}" for ratio in ratios) + " |"
        yield "| --- |" + " ---: |" * len(ratios)
        for name in dict.fromkeys(row.method for row in rows if row.ratio > 0):
            found = {row.ratio: row.perplexity[text] for row in rows if row.method == name}
            yield f"| {name} | " + " | ".join(f"{found[r]:.2f}" if r in found else "" for r in ratios) + " |"
        yield ""
    scored = [row for row in rows if row.tasks]
    if scored:
        tasks = list(scored[0].tasks)
        yield "| accuracy | ratio | " + " | ".join(tasks) + " |"
        yield "| --- | ---: |" + " ---: |" * len(tasks)
        for row in scored:
            cells = (f"{row.tasks[task][0]:.3f} ± {row.tasks[task][1]:.3f}" for task in tasks)
            yield f"| {row.method} | {row.ratio:.0%} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--ood", type=Path, help="a text of another domain")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.25, 0.4, 0.5])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--only", nargs="*", default=[], help="methods whose name holds one of these")
    parser.add_argument("--tasks", action="store_true", help="run lm-eval's tasks too")
    parser.add_argument("--out", type=Path, default=Path("quality"))
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()

    bench = Bench(args)
    model, device = bench.model, bench.device
    free, gguf = folder_grid(model.config), gguf_grid(model.family, model.config, BLOCK)
    start = time.perf_counter()
    original = bench.add("original", 0.0, 0.0, lambda ids: perplexity(model, ids, device), start)
    if args.tasks:
        bench.run_tasks(original, model)
    for ratio in args.ratios:
        if bench.wanted("paper A3"):
            bench.reduced("paper A3", ratio, bench.even_plan(ratio, free), PAPER)
        if bench.wanted("a3q (free)"):
            bench.reduced("a3q (free)", ratio, bench.mixed_plan(ratio, free, FREE), FREE)
        if bench.wanted("a3q (GGUF)"):
            bench.reduced("a3q (GGUF)", ratio, bench.mixed_plan(ratio, gguf, SHARED), SHARED)
        if bench.wanted("a3q (GGUF, uniform)"):
            bench.reduced("a3q (GGUF, uniform)", ratio, bench.even_plan(ratio, gguf), SHARED)
        for component in COMPONENTS:
            alone = frozenset((component,))
            for name, method in (("paper", PAPER), ("a3q free", FREE), ("a3q shared", SHARED)):
                # Only QK's frequencies can be shared.
                if bench.wanted(f"{component} only") and (method is not SHARED or component == "QK"):
                    plan = bench.even_plan(ratio, free, alone)
                    bench.reduced(f"{component} only, {name}", ratio, plan, method)
        for name in RIVAL_NAMES:
            if bench.wanted(name) or bench.wanted("rivals"):
                start = time.perf_counter()
                rival = RIVALS[name](model, bench.calibration, ratio, device)
                removed = 1 - rival.parameters / layer_parameters(model.config)
                bench.add(
                    name,
                    ratio,
                    removed,
                    lambda ids, rival=rival: perplexity_of(model, rival.hidden(ids, device), ids, device),
                    start,
                )
    Console().print(f"wrote {bench.out}; peak memory {peak_memory():.1f} GiB")


if __name__ == "__main__":
    main()

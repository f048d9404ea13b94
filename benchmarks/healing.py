"""What healing wins back, and in what time: perplexity behind each kind of it, before and after rounding.

    python -m benchmarks.healing --eval test.raw.txt [--ood other.txt] [--model M] [--ratios 0.1 0.25 0.4]
        [--modes none blocks full both] [--minutes 5 15] [--type q4_0] [--embedding q8_0] [--rounded-minutes 3]
        [--keep] [--out FOLDER] [--device cuda]

The only text is what the model writes itself; `--eval` and `--ood` are evaluated on (their first 8 × 1024 tokens) and
nothing else. Minutes are of healing alone, text included; the time of the reduction is told apart. Every kind of
healing, length and ratio is a run of its own, since the learning rate falls to nothing at its end; but the text of all
is written once, and each gets as much of it, and is charged as many seconds, as it would have had itself. Each result
is then rounded by GPTQ to `--type` (all matrices of the layers; the embedding to `--embedding`), and with
`--rounded-minutes` trained on with the rounding in the loop. With `--keep` each rounded model is also written as a GGUF
to `--out`, for `benchmarks.healing_front`. `answers` are the model's own to a dozen questions, the likeliest token each
time. Rows are added to `healing.json` in `--out`, and `healing.md` and `healing.png` are made of all that is there;
where there are several GPUs, a process on each (`CUDA_VISIBLE_DEVICES`) may add its own.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from fcntl import LOCK_EX, flock
from pathlib import Path

import torch
from numpy import uint8
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from a3q.calibration import SELF, Calibration
from a3q.choosing import Choice, choose
from a3q.components import Method
from a3q.dimensions import ALL, Request, gguf_grid
from a3q.heal.blocks import BlockLimit
from a3q.heal.distill import Point
from a3q.heal.settings import BLOCK_PASSES, Healing
from a3q.heal.stage import HealJob, heal, heal_rounded, healing_text
from a3q.heal.student import ATTENTION
from a3q.model import Model, pick_device
from a3q.pipeline import calibrate, hash_source, timed, windows
from a3q.progress import Advance, Stages, silent
from a3q.quantize import Quantization
from a3q.reduce import Reduction, reduce
from a3q.reduce_layer import MLP, Dimensions
from a3q.sampling import OPEN, sample
from a3q.solve.grid import GRIDS
from benchmarks.common import perplexity
from benchmarks.common import windows as text_windows
from benchmarks.healing_plot import Line, plot
from converters.chat_template import compile_template
from converters.ggml_pack import pack
from converters.gguf_writer import write_gguf
from converters.open import open_model
from converters.types import resolve_quant

QUESTIONS = (
    "What is the capital of France?",
    "What is 7 plus 5?",
    "Name three colours.",
    "Write one sentence about the sea.",
    "Who wrote Romeo and Juliet?",
    "What do bees make?",
    "Translate 'good morning' to Spanish.",
    "How many days are in a week?",
    "What is water made of?",
    "Give me a tip for sleeping well.",
    "What is the opposite of hot?",
    "Write a Python line that prints hello.",
)
ANSWER = 40
"""Tokens of an answer."""


@dataclass
class Row:
    """One model."""

    ratio: float
    mode: str
    minutes: float
    """Asked for."""
    rounded: str
    """``: not rounded; a type, and whether it was trained on with the rounding in the loop."""
    seconds: Mapping[str, float]
    """Of its stages."""
    perplexity: Mapping[str, float]
    held_out: tuple[float, float] | None = None
    """KL to the original on the model's own text before and after."""
    tokens: int = 0
    curve: Sequence[Point] = ()
    answers: Sequence[str] = field(default_factory=list)
    device: str = ""


class Bench:
    """The model, its texts and what has been measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, pick_device(args.device)
        model = open_model(args.model)
        self.model = replace(model, layers=list(model.layers))
        self.texts = {"eval": text_windows(model, args.eval, 8)}
        if args.ood:
            self.texts["ood"] = text_windows(model, args.ood, 8)
        self.name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        self.path: Path = args.out / "healing.json"
        self._calibrations: dict[bool, Calibration] = {}
        self._written: tuple[Tensor, float] | None = None
        """Text for the longest run, and in what time."""

    def calibration(self, blocks: bool) -> Calibration:
        """As `a3q convert` has it, with or without training layers on it."""
        if blocks not in self._calibrations:
            size = windows(self.model, self.device, self.args.calib_tokens, blocks)
            start = time.monotonic()
            self._calibrations[blocks] = calibrate(self.model, [SELF], size, 0, self.device, silent, blocks)
            print(f"calibration text: {time.monotonic() - start:.0f} s", flush=True)
        return self._calibrations[blocks]

    @property
    def rows(self) -> list[dict[str, object]]:
        """All that is known; other processes, on other GPUs, may add to it."""
        found: list[dict[str, object]] = json.loads(self.path.read_text()) if self.path.exists() else []
        return found

    def add(self, row: Row) -> None:
        """Note a row and say it."""
        self.args.out.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            flock(lock, LOCK_EX)
            beside = self.path.with_suffix(".new")
            beside.write_text(json.dumps([*self.rows, asdict(row)], indent=1) + "\n")
            beside.replace(self.path)
        figures = "  ".join(f"{text} {value:.2f}" for text, value in row.perplexity.items())
        seconds = ", ".join(f"{stage} {value:.0f}" for stage, value in row.seconds.items())
        kind = f"{row.ratio:.0%} {row.mode} {row.minutes:g} min {row.rounded or 'not rounded'}"
        print(f"{kind:44s} {figures}  held out {row.held_out}  {row.tokens / 1e6:.1f}M tokens  {seconds}", flush=True)

    def quality(self, model: Model) -> dict[str, float]:
        """Perplexity on each text."""
        return {text: perplexity(model, ids, self.device) for text, ids in self.texts.items()}

    def dimensions(self, ratio: float, calibration: Calibration) -> Sequence[Dimensions]:
        """As `a3q convert` chooses them."""
        request, grid = (
            Request(ratio, ALL),
            gguf_grid(self.model.family, self.model.config, GRIDS[self.args.type].block),
        )
        digests = hash_source(self.model.source, silent)
        job = Choice(self.model, request, grid, METHOD, calibration, digests, self.device, 1 << 40, silent)
        return choose(job, True, None)[0].dimensions

    def run(self, ratio: float, mode: str, minutes: float) -> None:
        """One way of healing, not rounded, rounded, and trained on rounded."""
        stages = _Clock()
        healing = Healing(mode, None, minutes, self.args.rounded_minutes > 0)
        calibration = self.calibration(healing.blocks)
        start = time.monotonic()
        dimensions = self.dimensions(ratio, calibration)
        stages.seconds["choose"] = time.monotonic() - start
        limit = None
        if healing.blocks:
            limit = BlockLimit(BLOCK_PASSES * calibration.tokens.numel(), healing.block_seconds())
        with stages("reduce", 1.0):
            found = self._reduce(self.model, calibration, dimensions, limit=limit)
        length = calibration.tokens.shape[1]
        alone = replace(healing, quant=False)
        job = HealJob(self.model, alone, [SELF], length, 0, self.device, 1 << 40, stages, None)
        row = Row(ratio, mode, minutes, "", stages.seconds, {}, device=self.name)
        text: Tensor | None = None
        if healing.full:
            text = self.text(job, (alone.end_to_end(False)[1] or 0.0) / 60, stages)
            found, healed = heal(job, found, text)
            row = replace(row, held_out=(healed.before, healed.after), tokens=healed.tokens, curve=healed.curve)
        self.add(replace(row, perplexity=self.quality(found.model), answers=answers(found.model, self.device)))
        self.rounded(row, job, calibration, found, text, stages)

    def text(self, job: HealJob, minutes: float, stages: _Clock) -> Tensor:
        """What the model writes to be healed on end to end for `minutes`; of a longer run's a part."""
        longest = max(*self.args.minutes, self.args.rounded_minutes)
        if self._written is None:
            start = time.monotonic()
            text = healing_text(replace(job, healing=Healing("full", None, longest), stages=silent))
            self._written = text, time.monotonic() - start
        text, seconds = self._written
        share = minutes / longest
        stages.seconds["write healing text"] = share * seconds
        return text[: max(2, round(share * len(text)))]

    def rounded(
        self, row: Row, job: HealJob, calibration: Calibration, found: Reduction, text: Tensor | None, stages: _Clock
    ) -> None:
        """The same on the grid."""
        grid = GRIDS[self.args.type]
        top = {"embed" if self.model.config.tie_word_embeddings else "output": GRIDS[self.args.embedding]}
        each = {role: grid for role in ATTENTION + MLP if role in found.model.layers[0]}
        same = [Dimensions.of(shape) for shape in found.model.config.layers]
        with stages("quantize", 1.0):
            on_grid = self._reduce(found.model, calibration, same, Quantization([each] * len(same), top))
        name = grid.name
        self.add(
            replace(
                row, rounded=name, perplexity=self.quality(on_grid.model), answers=answers(on_grid.model, self.device)
            )
        )
        self._keep(row, name, on_grid)
        if self.args.rounded_minutes <= 0:
            return
        last = replace(job, healing=Healing("none", None, self.args.rounded_minutes, True))
        if text is None:
            text = self.text(last, self.args.rounded_minutes, stages)
        trained, healed = heal_rounded(last, on_grid, text)
        row = replace(row, held_out=(healed.before, healed.after), tokens=healed.tokens, curve=healed.curve)
        quality, said = self.quality(trained.model), answers(trained.model, self.device)
        self.add(replace(row, rounded=f"{name}, in the loop", perplexity=quality, answers=said))
        self._keep(row, f"{name}-in-the-loop", trained)

    def _keep(self, row: Row, rounded: str, found: Reduction) -> None:
        if not self.args.keep:
            return

        def packed(i: int | None, role: str) -> NDArray[uint8] | None:
            blocks = found.blocks(i, role)
            return None if blocks is None else pack(blocks)

        kind = self.args.embedding
        plan = resolve_quant(self.args.type).with_overrides(kind, kind)
        path = self.args.out / f"{row.ratio:.0%}-{row.mode}-{row.minutes:g}-{rounded}.gguf".replace("%", "")
        written = write_gguf(found.model, plan, path, packed=packed)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, sha256 {written.sha256[0]}", flush=True)

    def _reduce(
        self, model: Model, calibration: Calibration, dimensions: Sequence[Dimensions],
        rounding: Quantization | None = None, limit: BlockLimit | None = None,
    ) -> Reduction:  # fmt: skip
        tokens = calibration.tokens
        return reduce(model, tokens, dimensions, self.device, 1 << 40, METHOD, quantization=rounding, healing=limit)


METHOD = Method("a3q", "shared")


class _Clock:
    """Stages that note their seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stages: Stages = timed(silent, self.seconds)

    def __call__(self, title: str, total: float) -> AbstractContextManager[Advance]:
        return self._stages(title, total)


def answers(model: Model, device: torch.device) -> list[str]:
    """What the model says to each of the questions, through its chat template if it has one."""
    try:
        template = compile_template(model.tokenizer)
    except Exception:  # whatever a stranger's template does
        template = None
    prompts = []
    for question in QUESTIONS:
        text = question if template is None else template.render(
            messages=[{"role": "user", "content": question}], add_generation_prompt=True, tools=None, documents=None
        )  # fmt: skip
        prompts.append(torch.tensor(model.tokenizer.encode(text, special=True)))
    together = pad_sequence(prompts, batch_first=True, padding_value=OPEN)
    length = together.shape[1] + ANSWER
    out = sample(model, together, length, temperature=1e-4, top_p=1.0, seed=0, device=device)
    found = []
    for prompt, row in zip(prompts, out, strict=True):
        said = row[len(prompt) : len(prompt) + ANSWER].tolist()
        if model.tokenizer.eos_id in said:
            said = said[: said.index(model.tokenizer.eos_id)]
        found.append(model.tokenizer.decode(said).strip())
    return found


def table(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Markdown."""
    lines = [
        "| off | healing | minutes | rounded to | eval | ood | KL on own text | tokens | reduce, heal s |",
        "| ---: | --- | ---: | --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for row in rows:
        quality, seconds, kl = row["perplexity"], row["seconds"], row["held_out"]
        assert isinstance(quality, dict) and isinstance(seconds, dict)
        told = f"{kl[0]:.3f} → {kl[1]:.3f}" if isinstance(kl, (list, tuple)) else ""
        healing = sum(value for stage, value in seconds.items() if "heal" in stage)
        cells = [
            f"{row['ratio']:.0%}", row["mode"], f"{row['minutes']:g}", row["rounded"], f"{quality['eval']:.2f}",
            f"{quality['ood']:.2f}" if "ood" in quality else "", told, f"{row['tokens'] / 1e6:.1f}M",  # type: ignore[operator]
            f"{seconds.get('reduce', 0):.0f}, {healing:.0f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def said(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Markdown of the answers: the original's, and of the last row of each ratio."""
    last = {row["ratio"]: row for row in rows}
    lines = []
    for i, question in enumerate(QUESTIONS):
        lines.append(f"**{question}**")
        for ratio, row in last.items():
            name = "original" if ratio == 0 else f"{ratio:.0%}, {row['mode']}, {row['rounded'] or 'not rounded'}"
            lines.append(f"- {name}: {' '.join(row['answers'][i].split())}")  # type: ignore[index]
        lines.append("")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--ood", type=Path, help="a text of another domain")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.25, 0.4])
    parser.add_argument("--modes", nargs="+", default=["none", "blocks", "full", "both"])
    parser.add_argument("--minutes", type=float, nargs="+", default=[5.0])
    parser.add_argument("--rounded-minutes", type=float, default=0.0)
    parser.add_argument("--type", default="q4_0", choices=sorted(GRIDS))
    parser.add_argument("--embedding", default="q8_0", choices=sorted(GRIDS))
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--calib-tokens", type=int)
    parser.add_argument("--out", type=Path, default=Path("healing"))
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    bench = Bench(args)
    if not any(row["ratio"] == 0 for row in bench.rows):
        quality, said_first = bench.quality(bench.model), answers(bench.model, bench.device)
        bench.add(Row(0.0, "original", 0.0, "", {}, quality, answers=said_first, device=bench.name))
    for ratio in args.ratios:
        for mode in args.modes:
            for minutes in [0.0] if mode == "none" else args.minutes:
                bench.run(ratio, mode, minutes)
    rows = bench.rows
    (args.out / "healing.md").write_text("\n".join([*table(rows), "", *said(rows)]) + "\n", encoding="utf-8")
    lines = [
        Line(f"{row['ratio']:.0%} {row['mode']} {row['rounded']}".strip(), row["minutes"], row["perplexity"]["eval"])  # type: ignore[index]
        for row in rows
    ]
    plot(lines, args.out / "healing.png")


if __name__ == "__main__":
    main()

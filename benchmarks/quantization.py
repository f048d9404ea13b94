"""Quality against bytes of quantized GGUF files: a3q's GPTQ and rounding, and llama-quantize with and without imatrix.

    python -m benchmarks.quantization prepare  --work DIR [--reduce --calib valid.txt --device cuda]
    python -m benchmarks.quantization baseline --work DIR --calib valid.txt --text test.raw.txt --programs BIN
    python -m benchmarks.quantization a3q      --work DIR --calib valid.txt --text test.raw.txt [--device cuda]
    python -m benchmarks.quantization table    --work DIR

Models, each written to DIR as F16, which both programs quantize: `dithered`, SmolLM2-135M as it may have been before it
was rounded to the Q4_1 of the demo file; `reduced`, the same less 25 %, only with `--reduce`; `padded`, the first with
zeros up to 768 hidden dimensions and 12:4 heads, which computes the same and has rows that K-quants divide. The same
seed gives the same `dithered` and `padded` anywhere; `prepare` prints digests.

Calibration is 64 × 1024 tokens of `--calib`. Mean KL divergence to the F16 file and perplexity are over the second
halves of the first `--windows` × 1024 tokens of `--text`. A row goes to DIR/rows.csv once measured and is not measured
again. Quantized files stay in DIR; where llama-quantize is missing, `baseline` measures those that are there.

Types go by llama.cpp's names, and both programs choose tensors' types by its rule without imatrix: a tied embedding is
Q6_K where its rows divide into 256, else Q8_0. With imatrix llama-quantize would raise the first `ffn_down` of Q4_0 and
Q5_0 and lower those of IQ4_NL; `--tensor-type-file` keeps them, so that bytes are equal. Where rows do not fit a type,
a3q may take another in its place than llama-quantize; the table then says how many more bytes that is.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import a3q
from a3q.model import pick_device
from benchmarks.quantization_measure import LENGTH, InForward, InLlama, contents, run
from benchmarks.quantization_models import dithered, padded
from benchmarks.quantization_table import plot, table
from converters.gguf_reader import check_gguf
from converters.gguf_writer import write_gguf
from converters.open import demo_model
from converters.types import resolve_quant

CALIBRATION = 64
"""Windows."""


SMALL = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl")
MIXES = ("q2_k", "q3_k_m", "q4_k_m", "q5_k_m")
MODELS = {
    "dithered": (*SMALL, *MIXES),
    "reduced": SMALL,
    "padded": ("q2_k_s", "q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"),
}
"""Rows of 576 do not divide into K-quants' 256, so there mixes fall back to other types for all but `ffn_down`."""
ONLY_IMATRIX = ("q2_k_s",)
"""What llama-quantize refuses to write without."""
OTHER_WITH_IMATRIX = ("q4_0", "q5_0", "iq4_nl")
"""Where its choice of types is another."""

PLAIN, IMATRIX = "llama-quantize", "llama-quantize --imatrix"
QUANTIZERS = ("plain", "rtn", "gptq")


@dataclass(frozen=True)
class Row:
    """One measured file; the first five say which and how."""

    model: str
    method: str
    type: str
    evaluator: str
    windows: int
    bytes: int
    matrices: str
    kl: float
    top1: float
    perplexity: float
    original_perplexity: float
    seconds: float
    """Taken to quantize; 0 for a file that was there."""


class Bench:
    """What was asked for, and the rows so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work: Path = args.work
        self.path = self.work / "rows.csv"
        self.rows = [_row(line) for line in csv.DictReader(self.path.open())] if self.path.exists() else []

    def original(self, model: str) -> Path:
        """The F16 file of a model."""
        return self.work / f"{model}-F16.gguf"

    def present(self) -> Iterator[str]:
        """Models that are asked for and were prepared."""
        return (model for model in self.args.models if self.original(model).exists())

    def llama_file(self, model: str, method: str, kind: str) -> Path:
        """A file of llama-quantize."""
        return self.work / f"{model}-{kind}-{'imatrix' if method == IMATRIX else 'llama'}.gguf"

    def kinds(self, model: str) -> Iterator[str]:
        """Types that are asked for."""
        return (kind for kind in MODELS[model] if self.args.types is None or kind in self.args.types)

    def evaluator(self, model: str) -> InForward | InLlama:
        """Measures against a model's F16 file."""
        args, original = self.args, self.original(model)
        if args.evaluator == "a3q":
            return InForward(original, args.text, args.windows, pick_device(args.device))
        return InLlama(original, args.text, args.windows, args.programs, args.threads)

    def measured(self, model: str, method: str, kind: str) -> bool:
        """Whether this row is there."""
        key = (model, method, kind, self.args.evaluator, self.args.windows)
        return any(key == (r.model, r.method, r.type, r.evaluator, r.windows) for r in self.rows)

    def add(
        self, model: str, method: str, kind: str, path: Path, evaluator: InForward | InLlama, seconds: float
    ) -> None:
        """Measure a file and note the row."""
        size, matrices = contents(path)
        key = (model, method, kind, self.args.evaluator, self.args.windows)
        row = Row(*key, size, matrices, **asdict(evaluator(path)), seconds=round(seconds, 1))
        self.rows.append(row)
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            if new:
                writer.writeheader()
            writer.writerow(asdict(row))
        print(f"{model:9s} {method:25s} {kind:7s} {size / 1e6:8.3f} MB  KL {row.kl:.5f}  {matrices}", flush=True)


def _row(line: dict[str, str]) -> Row:
    kinds = {"int": int, "float": float, "str": str}
    return Row(**{field.name: kinds[str(field.type)](line[field.name]) for field in fields(Row)})


def prepare(bench: Bench) -> None:
    """Write the F16 files."""
    model = dithered(demo_model())
    f16 = resolve_quant("f16")
    for name, one in (("dithered", model), ("padded", padded(model, 768, 4))):
        print(f"{name}: sha256 {write_gguf(one, f16, bench.original(name)).sha256[0]}")
    if bench.args.reduce:
        _convert(bench, "dithered", bench.original("reduced"), ratio=0.25, quant="f16")


def _convert(bench: Bench, model: str, output: Path, **how: object) -> None:
    calib, tokens, device = str(bench.args.calib), CALIBRATION * LENGTH, bench.args.device
    source = bench.original(model)
    a3q.convert(
        source, output=output, calib=calib, calib_tokens=tokens, device=device, verify_file=False, force=True, **how
    )


def baseline(bench: Bench) -> None:
    """Rows of llama-quantize, its files and imatrix made where they are missing."""
    for model in bench.present():
        evaluator = bench.evaluator(model)
        for kind in bench.kinds(model):
            for method in (IMATRIX,) if kind in ONLY_IMATRIX else (PLAIN, IMATRIX):
                there = bench.llama_file(model, method, kind).exists()
                if bench.measured(model, method, kind) or not (there or bench.args.programs):
                    continue
                if method == IMATRIX and not there:
                    _imatrix(bench, model)
                start = time.perf_counter()
                path = _llama_quantized(bench, model, method, kind)
                bench.add(model, method, kind, path, evaluator, 0 if there else time.perf_counter() - start)


def _imatrix(bench: Bench, model: str) -> Path:
    path = bench.work / f"{model}-imatrix.gguf"
    if not path.exists():
        part = path.with_suffix(".part.gguf")
        sizes = ["-c", str(LENGTH), "--chunks", str(CALIBRATION), "-t", str(bench.args.threads)]
        program = bench.args.programs / "llama-imatrix"
        run([program, "-m", bench.original(model), "-f", bench.args.calib, "-o", part, "--no-ppl", *sizes])
        part.replace(path)
    return path


def _llama_quantized(bench: Bench, model: str, method: str, kind: str) -> Path:
    path = bench.llama_file(model, method, kind)
    if path.exists():
        return path
    command: list[str | Path] = [bench.args.programs / "llama-quantize"]
    if method == IMATRIX:
        command += ["--imatrix", _imatrix(bench, model)]
        if kind in OTHER_WITH_IMATRIX:
            types = path.with_suffix(".types")
            tensors = check_gguf(_llama_quantized(bench, model, PLAIN, kind)).tensors.values()
            lines = [f"^{re.escape(one.name)}$={one.tensor_type.name}" for one in tensors if len(one.shape) > 1]
            types.write_text("\n".join(lines))
            command += ["--tensor-type-file", types]
    part = path.with_suffix(".part")
    run([*command, bench.original(model), part, kind.upper(), str(bench.args.threads)])
    part.replace(path)
    return path


def quantizers(bench: Bench) -> None:
    """Rows of a3q."""
    for model in bench.present():
        evaluator = bench.evaluator(model)
        for kind in bench.kinds(model):
            for quantizer in bench.args.quantizers:
                if bench.measured(model, f"a3q {quantizer}", kind):
                    continue
                path = bench.work / f"{model}-{kind}-a3q-{quantizer}.gguf"
                start = time.perf_counter()
                _convert(bench, model, path, ratio=0.0, quant=kind, quantizer=quantizer)
                bench.add(model, f"a3q {quantizer}", kind, path, evaluator, time.perf_counter() - start)


def summary(bench: Bench) -> None:
    """`quantization.md` and a picture for each model."""
    args = bench.args
    rows = [row for row in bench.rows if (row.evaluator, row.windows) == (args.evaluator, args.windows)]
    lines: list[str] = []
    for model in args.models:
        of_model = [row for row in rows if row.model == model]
        if of_model:
            lines += table(of_model, model, PLAIN, IMATRIX)
            plot(of_model, bench.work / f"quantization-{model}.png", model)
    (bench.work / "quantization.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


STAGES = {"prepare": prepare, "baseline": baseline, "a3q": quantizers, "table": summary}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--reduce", action="store_true", help="let prepare make the reduced model, too")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--types", nargs="+", help="only these")
    parser.add_argument("--quantizers", nargs="+", choices=QUANTIZERS, default=list(QUANTIZERS))
    parser.add_argument("--windows", type=int, default=16, help="of 1024 tokens, to measure on")
    parser.add_argument("--evaluator", choices=("a3q", "llama-perplexity"), default="a3q")
    default = os.environ.get("A3Q_LLAMA_BIN")
    parser.add_argument("--programs", type=Path, default=default and Path(default), help="folder of llama-quantize")
    parser.add_argument("--threads", type=int, default=2, help="of llama.cpp's programs")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.calib is None and (args.reduce or args.stage in ("baseline", "a3q")):
        parser.error("--calib is needed")
    if args.text is None and args.stage in ("baseline", "a3q"):
        parser.error("--text is needed")
    if args.programs is None and args.evaluator == "llama-perplexity" and args.stage != "table":
        parser.error("--programs or A3Q_LLAMA_BIN is needed")
    args.work.mkdir(parents=True, exist_ok=True)
    STAGES[args.stage](Bench(args))


if __name__ == "__main__":
    main()

"""Many conversions of one model: what each size costs in perplexity and gains in speed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a3q import runtime
from a3q.calibration import SELF
from a3q.errors import InputError
from a3q.footprint import Use
from a3q.gguf_types import TypeRequest
from a3q.model import pick_device
from a3q.perplexity import Perplexity, evaluate, evaluate_runtime, read_text
from a3q.pipeline import prepare
from a3q.progress import Stages, silent, to_share
from a3q.result import Result, stem_of
from a3q.runtime import LlamaRuntime
from a3q.settings import Settings
from a3q.sweep_results import Measured, Sweep, check_folder, write
from a3q.to_gguf import convert_opened
from a3q.verify import Verification
from converters.gguf_target import check_runtime
from converters.headers import open_header
from converters.open import open_model
from converters.types import resolve_quant

PROMPT, GENERATED = 512, 64
"""Tokens over which speed is measured."""
CTX = 512
"""Window of perplexity on a text of the user's."""


@dataclass(frozen=True)
class _Asked:
    """One conversion."""

    ratio: float
    quant: str
    quantizer: str

    @property
    def name(self) -> str:
        """For messages and files."""
        reduced = f"a3q{round(100 * self.ratio)}-" if self.ratio else ""
        return f"{reduced}{self.quantizer}-{self.quant}"


def sweep(
    model: str | Path | None = None,
    *,
    ratios: Sequence[float] = (0.0, 0.1, 0.2, 0.3),
    quants: Sequence[str] = ("8bit", "4bit", "3bit"),
    output: str | Path,
    text: str | Path | None = None,
    chunks: int | None = None,
    ranks: str | None = None,
    calib: str | Sequence[str] = SELF,
    calib_tokens: int | None = None,
    seed: int = 0,
    device: str = "auto",
    keep: bool = False,
    force: bool = False,
    pre: str | None = None,
    stages: Stages = silent,
    on_point: Callable[[Measured, int, int], None] = lambda *_: None,
) -> Sweep:
    """Convert `model` to every one of `quants` at every one of `ratios`, and measure each file in llama.cpp.

    0 is always among the ratios, and each type without reduction is also rounded to the nearest, as llama-quantize
    does without calibration. Text is written, hashes taken and layers weighed once for all. Perplexity is that of
    `text` (the first `chunks` windows of 512), or of held-out calibration text. The table, the plot and the figures go
    into the folder `output`; with `keep` the files stay there too. `on_point` hears of each point, its number and how
    many there will be. InputError for what cannot be used; llama-cpp-python must be there.
    """
    if not runtime.available():
        raise InputError('a3q sweep measures in llama.cpp, which is not installed; pip install "a3q[verify]"')
    folder = Path(output)
    check_folder(folder, force)
    asked = [_Asked(0.0, quant, "plain") for quant in quants]
    asked += [_Asked(ratio, quant, "gptq") for ratio in sorted({0.0, *ratios}) for quant in quants]
    common: dict[str, Any] = {"calib": calib, "calib_tokens": calib_tokens, "seed": seed, "device": device}
    settings = {one: Settings.of(ratio=one.ratio, ranks=ranks, **common) for one in asked}
    requests = {one: TypeRequest(resolve_quant(one.quant), one.quantizer) for one in asked}
    content = None if text is None else read_text(Path(text))
    header = open_header(model, pre)
    original = open_model(model, pre)
    check_runtime(original)
    prepared = prepare(original, settings[asked[-1]], pick_device(device), stages)
    bench = _Bench(content, chunks, stages)
    folder.mkdir(exist_ok=True)
    points: list[Measured] = []
    notes: list[str] = []
    reference: Perplexity | None = None
    if content is not None and original.source.format == "gguf":
        reference = bench.perplexity(original.source.path)
    elif content is not None:
        reference = evaluate(original, content, CTX, chunks, device=pick_device(device))
    with tempfile.TemporaryDirectory(prefix=".sweep.", dir=folder) as hidden:
        for number, one in enumerate(asked, 1):
            path = (folder if keep else Path(hidden)) / f"{stem_of(original)}-{one.name}.gguf"
            use = Use(original.config.max_position_embeddings)
            try:
                result = convert_opened(
                    original, header, settings[one], requests[one], use, path, True, None, prepared, stages
                )
            except InputError as error:
                notes.append(f"{one.name}: {error}")
                continue
            assert result.verification is not None
            points.append(bench.measure(one, result, result.verification))
            reference = reference or result.verification.original.perplexity
            on_point(points[-1], number, len(asked))
            if not keep:
                path.unlink()
    if reference is None:
        raise InputError(f"no file could be written: {notes[0]}")
    source = "held-out calibration text" if text is None else Path(text).name
    found = Sweep(stem_of(original), original.source.file_size, reference, source, tuple(points), tuple(notes))
    write(found, folder)
    return found


@dataclass(frozen=True)
class _Bench:
    """Measures written files in llama.cpp."""

    text: str | None
    chunks: int | None
    stages: Stages

    def measure(self, asked: _Asked, result: Result, checked: Verification) -> Measured:
        """Perplexity on the text, or as the check had it, and speed."""
        found = checked.written.perplexity if self.text is None else self.perplexity(result.path)
        with self.stages("measure speed", 2.0) as advance, LlamaRuntime(result.path, PROMPT) as runtime:
            prompt = runtime.prompt_speed(PROMPT)
            advance(1.0)
            generation = runtime.generation_speed(GENERATED)
            advance(1.0)
        return Measured(
            asked.ratio,
            asked.quantizer,
            resolve_quant(asked.quant).name,
            result.written.size,
            found.value,
            found.stderr,
            checked.written.kl,
            prompt,
            generation,
            result.reduced.config.kv_bytes_per_token(),
        )

    def perplexity(self, path: Path) -> Perplexity:
        """Of a file on the text."""
        assert self.text is not None
        with self.stages("perplexity", 1.0) as advance, LlamaRuntime(path, CTX) as runtime:
            to = to_share(advance)
            return evaluate_runtime(
                runtime, self.text, CTX, self.chunks, on_progress=lambda so_far, of: to(so_far.chunks / of)
            )


def default_folder(model: str | None) -> Path:
    """In the current folder, after the model's name."""
    return Path(f"{'demo' if model is None else Path(model).stem}-sweep")


def parse_ratios(text: str) -> list[float]:
    """`0,0.1,0.2`; InputError for anything else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--ratios {text}: give numbers from 0 to 0.9 with commas between") from error

"""The main job: a model in, a smaller GGUF out. What the stages do is shown through the caller's callback."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

from a3q import __version__, runtime
from a3q.calibration import HELD_OUT, SELF, Calibration, calibration_tokens, mixed
from a3q.dimensions import Choice, candidates, make_choice
from a3q.errors import InputError, VerifyError
from a3q.model import Model, Source, pick_device
from a3q.perplexity import compare, logits_of
from a3q.progress import Advance, Stages, silent
from a3q.reduce import Dimensions, Reduction, reduce
from a3q.verify import Verification, verify
from converters.gguf_writer import WrittenFile, check_output, write_gguf
from converters.open import open_model
from converters.types import QuantPlan, block_size, resolve_quant

MAX_RATIO = 0.9
WINDOWS = {"cpu": (40, 1024), "cuda": (128, 2048)}
"""Calibration sequences and their length where the user names no number of tokens."""
CHECK_ONLY = (1, 256)
"""The same where nothing is reduced and the text only serves the check."""
PROBE_SEQUENCES = 4
"""Sequences on which candidate dimensions are tried; few do, since only their order matters."""


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion did."""

    path: Path
    original: Model
    reduced: Model
    plan: QuantPlan
    choice: Choice
    tried: tuple[tuple[Choice, float], ...]
    """Candidate dimensions with the mean KL to the original (nats) measured for each; empty if there was one only."""
    written: WrittenFile
    calibration: str | None
    """What was calibrated on; None where nothing was reduced or checked."""
    verification: Verification | None
    notes: tuple[str, ...]
    seconds: dict[str, float] = field(default_factory=dict)


def convert(
    model: str | Path | None = None,
    *,
    ratio: float = 0.25,
    quant: str = "4bit",
    output: str | Path | None = None,
    calib: str | Sequence[str] = "self",
    calib_tokens: int | None = None,
    seed: int = 0,
    device: str = "auto",
    verify_file: bool = True,
    force: bool = False,
    pre: str | None = None,
    memory_budget: int | None = None,
    stages: Stages = silent,
) -> ConvertResult:
    """Reduce `model` by `ratio`, write it as GGUF with `quant` types, and check the file in llama.cpp.

    `model`: a Hugging Face folder, a GGUF, a hub name, or None for the demo model. `calib`: `self`, a text or jsonl
    file, a data set's name, or several of these, which share the tokens evenly. `memory_budget`: bytes that reduced
    layers may take before they wait on disk, half of the free memory unless told. InputError for what cannot be used,
    VerifyError for a file that is not as it should be.
    """
    plan = resolve_quant(quant)
    if not 0 <= ratio <= MAX_RATIO:
        raise InputError(f"--ratio {ratio:g} is out of range; give a number from 0 (plain conversion) to {MAX_RATIO}")
    if not 0 <= seed < 1 << 32:
        raise InputError(f"--seed {seed}: give a number from 0 to {(1 << 32) - 1}")
    if calib_tokens is not None and calib_tokens < 1:
        raise InputError(f"--calib-tokens {calib_tokens}: give a positive number of tokens")
    torch_device = pick_device(device)
    if output is not None:
        check_output(Path(output), force)
    seconds: dict[str, float] = {}
    stages = _timed(stages, seconds)
    notes: list[str] = []
    if verify_file and not runtime.available():
        verify_file = False
        notes.append('not verified: llama.cpp is not installed; pip install "a3q[verify]" to check written files')

    original = open_model(model, pre)
    path = Path(output) if output is not None else Path(default_name(original, ratio, plan))
    check_output(path, force)
    digests = _hash(original.source, stages)

    calibration: Calibration | None = None
    if ratio > 0 or verify_file:
        windows = _windows(original, torch_device, calib_tokens) if ratio > 0 else CHECK_ONLY
        sources = [calib] if isinstance(calib, str) else list(calib)
        calibration = _calibrate(original, sources, windows, seed, torch_device, stages)
    reduction = Reduction(original, list(range(original.config.head_dim // 2)), [])
    choice = make_choice(original.family, original.config, Dimensions.of(original.config), ratio)
    tried: tuple[tuple[Choice, float], ...] = ()
    if ratio > 0 and calibration is not None:
        budget = memory_budget if memory_budget is not None else _half_of_free_memory()
        options = candidates(original.family, original.config, ratio, block_size(plan.matrix))
        if len(options) > 1:
            tried = _try(original, options, calibration, torch_device, budget, stages)
            options = [min(tried, key=lambda pair: pair[1])[0]]
        choice = options[0]
        with stages("reduce", original.config.num_hidden_layers) as advance:
            reduction = reduce(original, calibration.tokens, choice.dimensions, torch_device, budget, _one(advance))

    # Whatever fails from here on, nothing stands under the final name.
    unverified = path.with_name(f".{path.name}.{os.getpid()}.unverified")
    try:
        written = _write(reduction, plan, unverified, choice, calibration, seed, digests, stages)
        verification = None
        if verify_file and calibration is not None:
            sequences = calibration.held_out
            in_memory = 1 if reduction.model is original else 2
            work = in_memory * original.config.num_hidden_layers + 2 * len(sequences)
            with stages("verify in llama.cpp", work) as advance:
                verification = verify(unverified, original, reduction.model, plan, sequences, torch_device, advance)
        unverified.replace(path)
    except (InputError, VerifyError) as error:
        # The user knows the output by its final name.
        raise type(error)(str(error).replace(str(unverified), str(path))) from error
    finally:
        unverified.unlink(missing_ok=True)
    return ConvertResult(
        path=path,
        original=original,
        reduced=reduction.model,
        plan=plan,
        choice=choice,
        tried=tried,
        written=replace(written, path=path),
        calibration=calibration.description if calibration is not None and ratio > 0 else None,
        verification=verification,
        notes=(*notes, *written.notes, *_shortfall(choice)),
        seconds=seconds,
    )


def default_name(model: Model, ratio: float, plan: QuantPlan) -> str:
    """File name in the current folder: the source's without its type, the ratio, and the new type."""
    stem = model.source.path.stem if model.source.format == "gguf" else model.source.path.resolve().name
    stem = re.sub(r"[.-]I?Q\d\w*$|[.-](F|BF)(16|32)$", "", stem, flags=re.IGNORECASE)
    reduced = f"-a3q{round(100 * ratio)}" if ratio > 0 else ""
    return f"{stem}{reduced}-{plan.name.upper()}.gguf"


def _one(advance: Advance) -> Any:
    return lambda: advance(1)


def _timed(stages: Stages, seconds: dict[str, float]) -> Stages:
    """The same stages, with the time of each noted under its title."""

    @contextmanager
    def timed(title: str, total: float) -> Iterator[Advance]:
        start = time.monotonic()
        with stages(title, total) as advance:
            yield advance
        seconds[title] = seconds.get(title, 0.0) + time.monotonic() - start

    return timed


def _hash(source: Source, stages: Stages) -> list[str]:
    """sha256 of each weight file."""
    digests = []
    with stages("hash the source", source.file_size) as advance:
        for path in source.weight_files:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
                    advance(len(chunk))
            digests.append(digest.hexdigest())
    return digests


def _windows(model: Model, device: torch.device, tokens: int | None) -> tuple[int, int]:
    """Number and length of calibration sequences."""
    count, length = WINDOWS[device.type]
    length = min(length, model.config.max_position_embeddings)
    if tokens is not None:
        count = -(-tokens // length)
    return count, length


def _calibrate(
    model: Model, sources: Sequence[str], windows: tuple[int, int], seed: int, device: torch.device, stages: Stages
) -> Calibration:
    total, length = windows
    parts = []
    for i, source in enumerate(sources):
        count = max(1, total * (i + 1) // len(sources) - total * i // len(sources))
        by_itself = source == SELF
        title = "write calibration text" if by_itself else "read calibration text"
        with stages(title, (count + HELD_OUT) * length if by_itself else 1.0) as advance:
            parts.append(calibration_tokens(model, source, count, length, seed=seed, device=device, on_tokens=advance))
    return mixed(parts)


def _try(
    model: Model, options: list[Choice], calibration: Calibration, device: torch.device, budget: int, stages: Stages
) -> tuple[tuple[Choice, float], ...]:
    """Reduce to each candidate on a few sequences and measure the KL to the original on held-out ones."""
    stride = max(1, len(calibration.tokens) // PROBE_SEQUENCES)
    tokens, sequences = calibration.tokens[::stride][:PROBE_SEQUENCES], calibration.held_out
    with stages("choose dimensions", len(options) * model.config.num_hidden_layers) as advance:
        reference = logits_of(model, sequences, device)
        tried = []
        for option in options:
            reduced = reduce(model, tokens, option.dimensions, device, budget, _one(advance)).model
            kl = compare(reference, {"reduced": logits_of(reduced, sequences, device)}, sequences)["reduced"].mean_kl
            tried.append((option, kl))
    return tuple(tried)


def _write(
    reduction: Reduction,
    plan: QuantPlan,
    unverified: Path,
    choice: Choice,
    calibration: Calibration | None,
    seed: int,
    digests: list[str],
    stages: Stages,
) -> WrittenFile:
    model = reduction.model
    known = model.metadata.get("general.name")
    source_name = str(known.value) if known is not None else model.source.path.stem
    name = source_name if choice.asked == 0 else f"{source_name} A3Q {choice.asked:.0%}"
    # A reduced model that is only rewritten keeps the record of its reduction, which `model.metadata` carries.
    provenance: dict[str, object] = {
        "a3q.version": __version__,
        "a3q.quantization": plan.name,
        "a3q.source.name": source_name,
        "a3q.source.files": [file.name for file in model.source.weight_files],
        "a3q.source.sha256": digests,
    }
    if choice.asked > 0 or "a3q.ratio" not in model.metadata:
        provenance |= {"a3q.ratio": float(choice.asked), "a3q.ratio_achieved": float(choice.achieved)}
    if choice.asked > 0 and calibration is not None:
        provenance |= {
            "a3q.head_dim": choice.dimensions.head_dim,
            "a3q.intermediate_size": choice.dimensions.intermediate_size,
            "a3q.frequencies_kept": reduction.frequencies_kept,
            "a3q.calibration.source": calibration.source,
            "a3q.calibration.tokens": calibration.tokens.numel(),
            "a3q.calibration.seed": seed,
        }
    if "general.base_model.count" not in model.metadata and choice.asked > 0:
        provenance |= {"general.base_model.count": 1, "general.base_model.0.name": source_name}
    fields = {key: _gguf_value(value) for key, value in provenance.items()}
    with stages("quantize and write", 1.0) as advance:
        done = 0.0

        def progress(bytes_done: int, bytes_total: int) -> None:
            nonlocal done
            advance(bytes_done / bytes_total - done)
            done = bytes_done / bytes_total

        return write_gguf(model, plan, unverified, name=name, provenance=fields, progress=progress)


def _gguf_value(value: object) -> GGUFValue:
    kinds = {str: GGUFValueType.STRING, float: GGUFValueType.FLOAT32, int: GGUFValueType.UINT32}
    if isinstance(value, list):
        return GGUFValue(value, GGUFValueType.ARRAY, kinds[type(value[0])])
    return GGUFValue(value, kinds[type(value)])


def _shortfall(choice: Choice) -> list[str]:
    if abs(choice.achieved - choice.asked) <= 0.01:
        return []
    return [
        f"asked for {choice.asked:.1%}, achieved {choice.achieved:.1%}: head size {choice.dimensions.head_dim} and MLP "
        f"size {choice.dimensions.intermediate_size} are the closest on this type's grid"
    ]


def _half_of_free_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError, AttributeError):
        return 4 << 30

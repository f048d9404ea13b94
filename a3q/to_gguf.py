"""The main job: a model in, a smaller GGUF out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from a3q import __version__, runtime
from a3q.calibration import SELF
from a3q.components import Method
from a3q.dimensions import Grid, gguf_grid
from a3q.errors import InputError, named
from a3q.families import Component
from a3q.model import Model, pick_device
from a3q.pipeline import Reduced, Settings, provenance, run, timed
from a3q.progress import Stages, share_of, silent
from a3q.result import Result, mark, stem_of
from a3q.verify import Verification, verify
from converters.gguf_keys import as_keys
from converters.gguf_target import check_runtime
from converters.gguf_writer import WrittenFile, check_output, write_gguf
from converters.open import open_model
from converters.types import QuantPlan, block_size, resolve_quant


def convert(
    model: str | Path | None = None,
    *,
    ratio: float = 0.25,
    quant: str = "4bit",
    output: str | Path | None = None,
    components: Iterable[Component] | None = None,
    own_ratios: Mapping[Component, float] | None = None,
    ranks: str | None = None,
    method: str = "a3q",
    calib: str | Sequence[str] = SELF,
    calib_tokens: int | None = None,
    seed: int = 0,
    device: str = "auto",
    verify_file: bool = True,
    force: bool = False,
    pre: str | None = None,
    memory_budget: int | None = None,
    stages: Stages = silent,
) -> Result:
    """Reduce `model` by `ratio`, write it as GGUF with `quant` types, and check the file in llama.cpp.

    `model`: a Hugging Face folder (a3q's own among them), a GGUF, a hub name, or None for the demo model.
    `components`: those to reduce, all that llama.cpp can hold unless told; `own_ratios` sets some apart. `ranks`:
    `mixed` or `uniform`. `calib`: `self`, a text or jsonl file, a data set's name, or several of these, which share the
    tokens evenly. `memory_budget`: bytes that reduced layers may take before they wait on disk, half of the free memory
    unless told. InputError for what cannot be used, VerifyError for a file that is not as it should be.
    """
    plan = resolve_quant(quant)
    settings = Settings(
        ratio,
        None if components is None else frozenset(components),
        own_ratios or {},
        ranks,
        method,
        [calib] if isinstance(calib, str) else list(calib),
        calib_tokens,
        seed,
        device,
        memory_budget,
    )
    settings.check()
    torch_device = pick_device(device)
    if output is not None:
        check_output(Path(output), force)
    seconds: dict[str, float] = {}
    stages = timed(stages, seconds)
    notes: list[str] = []
    if verify_file and not runtime.available():
        verify_file = False
        notes.append('not verified: llama.cpp is not installed; pip install "a3q[verify]" to check written files')

    original = open_model(model, pre)
    check_runtime(original)
    grid = gguf_grid(original.family, block_size(plan.matrix))
    _check_method(original, settings, grid)
    path = Path(output) if output is not None else Path(default_name(original, settings.request().largest, plan))
    check_output(path, force)
    # One list of frequencies for all heads is what a stock runtime holds.
    reduced = run(original, settings, grid, Method(method, "shared"), verify_file, stages)

    # Whatever fails from here on, nothing stands under the final name.
    unverified = path.with_name(f".{path.name}.{os.getpid()}.unverified")
    try:
        with named(unverified, path):
            written = _write(reduced, plan, settings, unverified, stages)
            verification = None
            if verify_file:
                verification = _verify(reduced, plan, unverified, torch_device, stages)
            unverified.replace(path)
    finally:
        unverified.unlink(missing_ok=True)
    return Result(
        path=path,
        job=reduced,
        written=replace(written, path=path),
        type_name=plan.name.upper(),
        verification=verification,
        notes=(*notes, *reduced.notes, *written.notes),
        seconds=seconds,
    )


def default_name(model: Model, ratio: float, plan: QuantPlan) -> str:
    """File name in the current folder: the source's without its type, the ratio, and the new type."""
    return f"{stem_of(model)}{mark(ratio)}-{plan.name.upper()}.gguf"


def _check_method(model: Model, settings: Settings, grid: Grid) -> None:
    rotated = any(shape.pairs for shape in model.config.layers)
    if settings.method == "paper" and rotated and "QK" in settings.request().reduced & grid.components:
        raise InputError(
            "--method paper: the paper's QK gives every key head its own RoPE frequencies, which no stock GGUF runtime "
            "holds; take --components mlp, or write a Hugging Face folder with a3q reduce"
        )


def _write(reduced: Reduced, plan: QuantPlan, settings: Settings, path: Path, stages: Stages) -> WrittenFile:
    facts = {**provenance(reduced, settings, __version__), "quantization": plan.name}
    base, asked = str(facts["source.name"]), reduced.plan.asked
    name = base if asked == 0 else f"{base} A3Q {asked:.0%}"
    if "general.base_model.count" not in reduced.original.metadata and asked > 0:
        base_model = {"general.base_model.count": 1, "general.base_model.0.name": base}
    else:
        base_model = {}
    fields = as_keys({**{f"a3q.{key}": value for key, value in facts.items()}, **base_model})
    with stages("quantize and write", 1.0) as advance:
        return write_gguf(reduced.model, plan, path, name=name, provenance=fields, progress=share_of(advance))


def _verify(reduced: Reduced, plan: QuantPlan, path: Path, device: torch.device, stages: Stages) -> Verification:
    assert reduced.calibration is not None
    original, sequences = reduced.original, reduced.calibration.held_out
    in_memory = 1 if reduced.model is original else 2
    work = in_memory * original.config.num_hidden_layers + 2 * len(sequences)
    with stages("verify in llama.cpp", work) as advance:
        return verify(path, original, reduced.model, plan, sequences, device, advance)

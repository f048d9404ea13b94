"""The main job: a model in, a smaller GGUF out."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from a3q import __version__, runtime
from a3q.calibration import SELF
from a3q.components import Method
from a3q.dimensions import UNIT_STEP, Grid, gguf_grid
from a3q.errors import InputError, named
from a3q.families import Component
from a3q.gguf_types import Settled, TypeRequest, TypeSettler
from a3q.model import Model, pick_device
from a3q.pipeline import Reduced, Settings, is_about_rounding, provenance, rounding_facts, run, timed
from a3q.progress import Stages, share_of, silent
from a3q.result import Result, Rounding, mark, mean_losses, stem_of
from a3q.solve.grid import GRIDS
from a3q.verify import Verification, allowed_kl, verify
from converters.budget import Limit
from converters.gguf_keys import as_keys
from converters.gguf_target import check_runtime
from converters.gguf_writer import WrittenFile, check_output, header_size, write_gguf
from converters.open import open_model
from converters.types import block_size, resolve_quant


def convert(
    model: str | Path | None = None,
    *,
    ratio: float = 0.25,
    quant: str = "4bit",
    quantizer: str | None = None,
    strict: bool = False,
    bits: float | None = None,
    size: int | None = None,
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
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
    """Reduce `model` by `ratio`, quantize it, write it as GGUF, and check the file in llama.cpp.

    `model`: a Hugging Face folder (a3q's own among them), a GGUF, a hub name, or None for the demo model.
    `quant`: one of llama.cpp's types or mixes, or `4bit` and the like; `quantizer`: `gptq`, `rtn` or `plain`, see
    `a3q.gguf_types.TypeRequest`; `strict`: InputError where a tensor's rows do not fit its type. `bits` (mean of a
    weight) or `size` (bytes of the file): choose the types within it instead; the last two types are of single tensors.
    `components`: those to reduce, all that llama.cpp can hold unless told; `own_ratios` sets some apart. `ranks`:
    `mixed` or `uniform`. `calib`: `self`, a text or jsonl file, a data set's name, or several of these, which share the
    tokens evenly. `memory_budget`: bytes that reduced layers may take before they wait on disk, half of the free memory
    unless told. InputError for what cannot be used, VerifyError for a file that is not as it should be.
    """
    plan = resolve_quant(quant).with_overrides(output_tensor_type, token_embedding_type)
    request = TypeRequest(plan, quantizer, strict, _limit(bits, size))
    request.check()
    settings = Settings.of(
        ratio=ratio,
        components=components,
        own_ratios=own_ratios,
        ranks=ranks,
        method=method,
        calib=calib,
        calib_tokens=calib_tokens,
        seed=seed,
        device=device,
        memory_budget=memory_budget,
    )
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
    # A type chosen within a limit may be any, of which most have blocks of 32.
    grid = gguf_grid(original.family, original.config, UNIT_STEP if request.limit else block_size(plan.matrix))
    _check_method(original, settings, grid)
    path = Path(output) if output is not None else Path(default_name(original, settings.request().largest, request))
    check_output(path, force)
    # One list of frequencies for all heads is what a stock runtime holds.
    how = Method(method, "shared")
    settler = TypeSettler(original, request, bool(settings.request().groups()), header_size)
    settler.check()
    reduced = run(original, settings, grid, how, verify_file, stages, settler)
    assert settler.settled is not None

    # Whatever fails from here on, nothing stands under the final name.
    unverified = path.with_name(f".{path.name}.{os.getpid()}.unverified")
    try:
        with named(unverified, path):
            written = _write(reduced, settler, settings, unverified, stages)
            verification = None
            if verify_file:
                verification = _verify(reduced, settler.settled, unverified, torch_device, stages)
            unverified.replace(path)
    finally:
        unverified.unlink(missing_ok=True)
    return Result(
        path=path,
        job=reduced,
        written=replace(written, path=path),
        type_name=_type_name(request),
        rounding=_rounding(reduced, settler.settled),
        verification=verification,
        notes=(*notes, *reduced.notes, *written.notes),
        seconds=seconds,
    )


def _limit(bits: float | None, size: int | None) -> Limit | None:
    if bits is not None and size is not None:
        raise InputError("--bits and --size: give one of the two")
    return None if bits is None and size is None else Limit(size, bits)


def _type_name(request: TypeRequest) -> str:
    limit = request.limit
    if limit is None:
        return request.plan.name.upper()
    return f"{limit.bits:g}bpw" if limit.bits is not None else "mixed"


def default_name(model: Model, ratio: float, request: TypeRequest) -> str:
    """File name in the current folder: the source's without its type, the ratio, and the new type."""
    return f"{stem_of(model)}{mark(ratio)}-{_type_name(request)}.gguf"


def _rounding(reduced: Reduced, settled: Settled) -> Rounding | None:
    types: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in settled.tensors:
        kind = settled.types.kinds[entry.name].name
        if len(entry.shape) > 1 and kind.lower() in GRIDS:
            for role in entry.roles:
                types[role.name][kind] += 1
    if not types:
        return None
    losses = mean_losses(reduced.reduction.rounding_losses)
    return Rounding(settled.quantizer, settled.types.bits_per_weight(settled.tensors), losses, types)


def _check_method(model: Model, settings: Settings, grid: Grid) -> None:
    rotated = any(shape.pairs for shape in model.config.layers)
    if settings.method == "paper" and rotated and "QK" in settings.request().reduced & grid.components:
        raise InputError(
            "--method paper: the paper's QK gives every key head its own RoPE frequencies, which no stock GGUF runtime "
            "holds; take --components mlp, or write a Hugging Face folder with a3q reduce"
        )


def _write(reduced: Reduced, settler: TypeSettler, settings: Settings, path: Path, stages: Stages) -> WrittenFile:
    settled, plan = settler.settled, settler.request.plan
    assert settled is not None
    facts = {
        **provenance(reduced, settings, __version__),
        "quantization": _type_name(settler.request).lower(),
        "quantizer": settled.quantizer,
        **(rounding_facts(reduced, settings) if settled.quantization is not None else {}),
    }
    base, asked = str(facts["source.name"]), reduced.plan.asked
    name = base if asked == 0 else f"{base} A3Q {asked:.0%}"
    if "general.base_model.count" not in reduced.original.metadata and asked > 0:
        base_model = {"general.base_model.count": 1, "general.base_model.0.name": base}
    else:
        base_model = {}
    fields = as_keys({**{f"a3q.{key}": value for key, value in facts.items()}, **base_model})
    # The source may say how its own weights were rounded.
    kept = {k: v for k, v in reduced.model.metadata.items() if not is_about_rounding(k.removeprefix("a3q."))}
    with stages("write", 1.0) as advance:
        return write_gguf(
            replace(reduced.model, metadata=kept),
            plan,
            path,
            name=name,
            provenance=fields,
            progress=share_of(advance),
            types=settled.types,
            packed=settler.packed(reduced.reduction),
        )


def _verify(reduced: Reduced, settled: Settled, path: Path, device: torch.device, stages: Stages) -> Verification:
    assert reduced.calibration is not None
    original, sequences = reduced.original, reduced.calibration.held_out
    in_memory = 1 if reduced.model is original else 2
    work = in_memory * original.config.num_hidden_layers + 2 * len(sequences)
    allowed = allowed_kl(settled.types.kinds.values(), settled.rounded)
    with stages("verify in llama.cpp", work) as advance:
        return verify(path, original, reduced.model, allowed, sequences, device, advance)

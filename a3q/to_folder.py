"""The PyTorch target: a model in, a smaller Hugging Face folder out, which transformers runs after `import a3q`.

Quantized ones go through GPTQModel, those of a family's own model type without a3q."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from a3q import __version__
from a3q.calibration import SELF
from a3q.components import Method
from a3q.dimensions import folder_grid
from a3q.errors import InputError, named
from a3q.families import Component
from a3q.gptq_folder import FolderQuant, FolderRounding
from a3q.heal.settings import Healing
from a3q.model import Model, pick_device
from a3q.pipeline import Reduced, hash_source, run, timed
from a3q.progress import Stages, share_of, silent
from a3q.provenance import is_about_rounding, provenance, rounding_facts
from a3q.ranks import Helped, alone, first, first_before_others
from a3q.report_html import check_reports, write_reports
from a3q.result import Result, Rounding, mark, mean_losses, stem_of
from a3q.settings import Settings, identity
from a3q.verify import Verification, gptq_runs, verify_folder
from a3q.work import draft_of, opened, placed
from converters.hf_plain import plain_config
from converters.hf_writer import WrittenFolder, check_output_folder, write_huggingface
from converters.open import open_model

_ROUNDED = ("quantizer", "bits", "group_size")
"""What the record says of the rounding."""
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def reduce_to_folder(
    model: str | Path | None = None,
    *,
    ratio: float | None = None,
    dtype: str | None = None,
    quant: str | None = None,
    format: str | None = None,
    group_size: int = 128,
    symmetric: bool = True,
    quantizer: str | None = None,
    output: str | Path | None = None,
    components: Iterable[Component] | None = None,
    own_ratios: Mapping[Component, float] | None = None,
    kv_ratio: float | None = None,
    ranks: str | None = None,
    method: str = "a3q",
    frequencies: str = "per_head",
    heal: str = "none",
    heal_tokens: int | None = None,
    heal_minutes: float | None = None,
    heal_quant: bool = False,
    calib: str | Sequence[str] = SELF,
    calib_tokens: int | None = None,
    seed: int = 0,
    device: str = "auto",
    verify_output: bool = True,
    report: bool = False,
    force: bool = False,
    pre: str | None = None,
    memory_budget: int | None = None,
    work: str | Path | None = None,
    stages: Stages = silent,
) -> Result:
    """Reduce `model` by `ratio` and write a folder of `model_type` a3q with weights of `dtype` (bf16, f16 or f32).

    With `quant` (2bit, 4bit or 8bit) the matrices of the layers are rounded and stored in `format` gptq, `group_size`
    (128, 64 or 32) weights to a scale, `symmetric` about 0 or with zero points; `quantizer`: `gptq` or `rtn`, see
    `a3q.gptq_folder.FolderQuant`. The folder is of the family's own model type where that can describe it. `dtype`,
    f16 or bf16, is then of the other weights. Unless told it is f16 then, and else bf16.

    Options as those of `a3q.to_gguf.convert`, but every size may differ between layers and between keys and values, and
    with `frequencies` `per_head` every key head keeps RoPE frequencies of its own. `shared` keeps one list and one head
    size, which a GGUF can hold. `report`: write one beside the folder.
    """
    request = FolderQuant.of(quant, format, group_size, symmetric, quantizer)
    dtype = (dtype or ("bf16" if request is None else "f16")).lower()
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: give {', '.join(DTYPES)}")
    if request is not None and dtype == "f32":
        raise InputError(f"--dtype {dtype}: GPTQ's kernels compute in 16 bits; give f16 or bf16")
    if frequencies not in ("per_head", "shared"):
        raise InputError(f"--frequencies {frequencies}: give per_head or shared")
    if method == "paper" and frequencies == "shared":
        raise InputError("--frequencies shared: the paper's method selects them for each head; leave the option out")
    settings = Settings.of(
        ratio=ratio,
        components=components,
        own_ratios=own_ratios,
        kv_ratio=kv_ratio,
        ranks=ranks,
        method=method,
        calib=calib,
        calib_tokens=calib_tokens,
        seed=seed,
        device=device,
        memory_budget=memory_budget,
        work=work,
        healing=Healing(heal, heal_tokens, heal_minutes, heal_quant),
    )
    if heal_quant and request is None:
        raise InputError("--heal-quant: nothing is quantized; give --quant 4bit as well")
    torch_device = pick_device(device)
    if output is not None:
        force = force or _own(Path(output), settings.work)
        alone(partial(check_output_folder, Path(output), force))
    seconds: dict[str, float] = {}
    stages = timed(stages, seconds)
    original = first_before_others(partial(open_model, model, pre))
    if frequencies == "shared" and any(len(shape.frequencies) > 1 for shape in original.config.layers):
        raise InputError(
            f"--frequencies shared: {original.source.path} has RoPE frequencies for each key head already; reduce the "
            "original model instead"
        )
    if request is not None:
        request.check(original)
    folder = Path(output) if output is not None else Path(_default_name(original, settings, request))
    force = force or _own(folder, settings.work)
    alone(partial(check_output_folder, folder, force, original.source.path))
    if report:
        alone(partial(check_reports, folder, force))
    # Only with one head size in all layers can all of them keep the same frequencies.
    grid = replace(folder_grid(original.config), one_head_size=frequencies == "shared")
    how = Method(method, frequencies)
    rounding = None if request is None else FolderRounding(original, request)
    if request is not None:
        grid = request.sizes(original.config, grid)
    digests = hash_source(original.source, stages)
    facts = identity(settings, digests, torch_device.type) | ({} if request is None else request.facts())
    with opened(settings.work, {**facts, "--frequencies": frequencies}) as kept:
        reduced = run(original, settings, grid, how, verify_output, stages, rounding, work=kept, digests=digests)
        if not first():
            raise Helped

        verification: Verification | None = None

        def check(part: Path) -> None:
            nonlocal verification
            writing.close()
            if kept is not None:
                kept.keep_output(part.iterdir())
            if reduced.calibration is None or not verify_output:
                return
            sequences = reduced.calibration.held_out
            work = 3 * original.config.num_hidden_layers + 1
            title = "verify" if request is not None and not gptq_runs() else "verify in transformers"
            with stages(title, work) as advance, named(part, folder):
                verification = verify_folder(
                    part, original, reduced.model, DTYPES[dtype], sequences, torch_device, advance, request is not None
                )

        # A reduced model that is only rewritten keeps the record of its reduction and healing.
        earlier = {
            key.removeprefix("a3q."): one.value for key, one in original.metadata.items() if key.startswith("a3q.")
        }
        earlier = {key: value for key, value in earlier.items() if not is_about_rounding(key)}
        record = (earlier if reduced.plan.asked == 0 else {}) | provenance(reduced, settings, __version__)
        if request is not None:
            record |= {key: getattr(request, key) for key in _ROUNDED} | rounding_facts(reduced, settings)
        with ExitStack() as writing:
            advance = writing.enter_context(stages("write", 1.0))
            written = write_huggingface(
                reduced.model,
                folder,
                dtype=DTYPES[dtype],
                reduction=record,
                quantized=None if request is None else reduced.reduction.blocks,
                # Any loader of GPTQ folders knows the family's own.
                plain=request is not None and plain_config(reduced.model) is not None,
                force=force,
                progress=share_of(advance),
                check=check,
                scratch=None if settings.work is None else draft_of(folder, settings.work),
            )
    notes = [] if rounding is None else rounding.notes
    if verification is not None and verification.runtime == "a3q":
        notes = [*notes, _why_not_tried(request is not None)]
    result = Result(
        path=folder,
        job=reduced,
        written=written,
        type_name=dtype.upper() if request is None else request.type_name,
        rounding=None if request is None else _rounding(request, reduced, written),
        verification=verification,
        notes=(*reduced.notes, *notes, *written.notes),
        seconds=seconds,
        settings=settings,
    )
    if report:
        result = replace(result, reports=write_reports(result))
    return result


def _own(folder: Path, work: Path | None) -> bool:
    """Whether the output that is there is of this very run, which was killed when it had its name, even at its end."""
    return folder.is_dir() and placed(work, folder.iterdir())


def _default_name(model: Model, settings: Settings, request: FolderQuant | None) -> str:
    """Of a folder in the current one: the source's without its type, the ratio, and the new type."""
    name = f"{stem_of(model)}{mark(settings.request())}"
    return name if request is None else f"{name}-{request.type_name.replace(' ', '-')}"


def _rounding(request: FolderQuant, reduced: Reduced, written: WrittenFolder) -> Rounding:
    size = sum(file.stat().st_size for file in written.weight_files)
    losses = mean_losses(reduced.reduction.rounding_losses)
    return Rounding(request.quantizer, 8 * size / written.parameters, losses)


def _why_not_tried(gptq: bool) -> str:
    """What keeps a folder from being tried in transformers."""
    if gptq and not gptq_runs():
        return (
            "not tried in transformers, which runs GPTQ folders through gptqmodel and optimum; "
            'pip install "a3q[gptq]" to check them there too'
        )
    return "too large for transformers to be tried here: twice its size in float32 must be free"

"""The PyTorch target: a model in, a smaller Hugging Face folder out, which transformers runs after `import a3q`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from a3q import __version__
from a3q.calibration import SELF
from a3q.components import Method
from a3q.dimensions import folder_grid
from a3q.errors import InputError, named
from a3q.families import Component
from a3q.model import pick_device
from a3q.pipeline import Settings, provenance, run, timed
from a3q.progress import Stages, share_of, silent
from a3q.result import Result, mark, stem_of
from a3q.verify import Verification, verify_folder
from converters.hf_writer import check_output_folder, write_huggingface
from converters.open import open_model

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def reduce_to_folder(
    model: str | Path | None = None,
    *,
    ratio: float = 0.25,
    dtype: str = "bf16",
    output: str | Path | None = None,
    components: Iterable[Component] | None = None,
    own_ratios: Mapping[Component, float] | None = None,
    ranks: str | None = None,
    method: str = "a3q",
    frequencies: str = "per_head",
    calib: str | Sequence[str] = SELF,
    calib_tokens: int | None = None,
    seed: int = 0,
    device: str = "auto",
    verify_output: bool = True,
    force: bool = False,
    pre: str | None = None,
    memory_budget: int | None = None,
    stages: Stages = silent,
) -> Result:
    """Reduce `model` by `ratio` and write a folder of `model_type` a3q with weights of `dtype` (bf16, f16 or f32).

    Options as those of `a3q.to_gguf.convert`, but every size may differ between layers and between keys and values, and
    with `frequencies` `per_head` every key head keeps RoPE frequencies of its own. `shared` keeps one list and one head
    size, which a GGUF can hold.
    """
    dtype = dtype.lower()
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: give {', '.join(DTYPES)}")
    if frequencies not in ("per_head", "shared"):
        raise InputError(f"--frequencies {frequencies}: give per_head or shared")
    if method == "paper" and frequencies == "shared":
        raise InputError("--frequencies shared: the paper's method selects them for each head; leave the option out")
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
        check_output_folder(Path(output), force)
    seconds: dict[str, float] = {}
    stages = timed(stages, seconds)
    original = open_model(model, pre)
    if frequencies == "shared" and any(len(shape.frequencies) > 1 for shape in original.config.layers):
        raise InputError(
            f"--frequencies shared: {original.source.path} has RoPE frequencies for each key head already; reduce the "
            "original model instead"
        )
    folder = Path(output) if output is not None else Path(f"{stem_of(original)}{mark(settings.request().largest)}")
    check_output_folder(folder, force, original.source.path)
    # Only with one head size in all layers can all of them keep the same frequencies.
    grid = replace(folder_grid(original.config), one_head_size=frequencies == "shared")
    how = Method(method, frequencies)
    reduced = run(original, settings, grid, how, verify_output, stages)

    verification: Verification | None = None

    def check(part: Path) -> None:
        nonlocal verification
        writing.close()
        if reduced.calibration is None:
            return
        sequences = reduced.calibration.held_out
        work = 3 * original.config.num_hidden_layers + 1
        with stages("verify in transformers", work) as advance, named(part, folder):
            verification = verify_folder(part, original, reduced.model, DTYPES[dtype], sequences, torch_device, advance)

    # A reduced model that is only rewritten keeps the record of its reduction.
    earlier = {key.removeprefix("a3q."): one.value for key, one in original.metadata.items() if key.startswith("a3q.")}
    earlier.pop("quantization", None)
    record = (earlier if reduced.plan.asked == 0 else {}) | provenance(reduced, settings, __version__)
    with ExitStack() as writing:
        advance = writing.enter_context(stages("write", 1.0))
        written = write_huggingface(
            reduced.model,
            folder,
            dtype=DTYPES[dtype],
            reduction=record,
            force=force,
            progress=share_of(advance),
            check=check if verify_output else None,
        )
    return Result(
        path=folder,
        job=reduced,
        written=written,
        type_name=dtype.upper(),
        verification=verification,
        notes=(*reduced.notes, *written.notes),
        seconds=seconds,
    )

"""The importances of a model's inputs as a file for stock `llama-quantize`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from a3q.calibration import SELF
from a3q.importance import measure
from a3q.model import pick_device
from a3q.pipeline import calibrate, windows
from a3q.progress import Stages, silent
from a3q.settings import Settings
from converters.gguf_target import check_runtime
from converters.gguf_writer import check_output
from converters.imatrix import write_imatrix
from converters.open import open_model


@dataclass(frozen=True)
class WrittenImatrix:
    """What was written."""

    path: Path
    size: int
    """Bytes."""
    tensors: int
    """Matrices whose inputs it describes."""
    tokens: int
    """Calibration tokens."""
    description: str
    """Of the calibration text, one line."""


def write_imatrix_for(
    model: str | Path | None = None,
    *,
    output: str | Path,
    calib: str | Sequence[str] = SELF,
    calib_tokens: int | None = None,
    seed: int = 0,
    device: str = "auto",
    force: bool = False,
    pre: str | None = None,
    stages: Stages = silent,
) -> WrittenImatrix:
    """Measure how strongly `model` uses each input of its matrices, and write it for `llama-quantize --imatrix`.

    Options as those of `a3q.to_gguf.convert`. The tensors are named as in the GGUF that a3q writes of the model.
    InputError for what cannot be used.
    """
    settings = Settings.of(calib=calib, calib_tokens=calib_tokens, seed=seed, device=device)
    torch_device, path = pick_device(device), Path(output)
    check_output(path, force)
    original = open_model(model, pre)
    check_runtime(original)
    size = windows(original, torch_device, calib_tokens)
    calibration = calibrate(original, settings.calib, size, seed, torch_device, stages)
    with stages("measure importances", original.config.num_hidden_layers) as advance:
        importance = measure(original, calibration.tokens, torch_device, lambda: advance(1))
    tensors = write_imatrix(path, original, importance, calibration.source, force=force)
    return WrittenImatrix(path, path.stat().st_size, tensors, importance.tokens, calibration.description)

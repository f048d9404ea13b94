"""What a distillation needs to go on after it was interrupted: weights, optimizer and how far it is, in one file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from a3q import ranks
from a3q.files import kept, read_tensors, write_tensors
from a3q.heal.distill import Distillation, Point, State

EVERY_S = 120.0
"""Seconds between two checkpoints; one of SmolLM2-135M takes about a second."""
_STATE = "a3q"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save(run: Distillation, path: Path) -> None:
    """Keep all of it; InputError where the disk is full."""
    run.settle()
    tensors: dict[str, Tensor] = {}
    steps = 0
    for i, parameter in enumerate(run.parameters):
        known = run.optimizer.state.get(parameter, {})
        tensors[f"{i}.weight"] = parameter.detach().cpu()
        for name in _MOMENTS:
            if name in known:
                tensors[f"{i}.{name}"] = known[name].cpu()
        steps = int(known.get("step", 0))
    write_tensors(path, tensors, {_STATE: json.dumps({**asdict(run.state), "adam": steps})})


def restore(run: Distillation, path: Path) -> bool:
    """Put `run` where it was when it was kept, over all processes alike; False: nothing was kept.

    InputError for a damaged file.
    """
    found = ranks.alone(lambda: _read(path))
    about = ranks.same_object(None if found is None else found[1])
    if about is None:
        return False
    device = run.parameters[0].device
    tensors = ranks.same({} if found is None else found[0], device)
    steps = about.pop("adam")
    with torch.no_grad():
        for i, parameter in enumerate(run.parameters):
            parameter.copy_(tensors[f"{i}.weight"])
            if f"{i}.{_MOMENTS[0]}" in tensors:
                state: dict[str, Any] = {name: tensors[f"{i}.{name}"] for name in _MOMENTS}
                state["step"] = torch.tensor(float(steps), device=device)
                run.optimizer.state[parameter] = state
    about["curve"] = [Point(**point) for point in about["curve"]]
    run.state = State(**about)
    return True


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    if not path.exists():
        return None
    with kept(path):
        tensors, metadata = read_tensors(path)
        return tensors, json.loads(metadata[_STATE])


def keeper(run: Distillation, path: Path | None) -> Callable[[], None]:
    """What keeps `run` at `path` from time to time when it is called after each step."""
    last = time.monotonic()

    def step() -> None:
        nonlocal last
        if path is not None and time.monotonic() - last >= EVERY_S:
            save(run, path)
            last = time.monotonic()

    return step

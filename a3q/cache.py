"""Sensitivities and costs kept on disk, so that another ratio or type of the same model need not measure them again."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

from torch import Tensor

from a3q import __version__
from a3q.components import Method
from a3q.errors import InputError
from a3q.families import COMPONENTS, Component
from a3q.files import write_whole
from a3q.model import Model, ModelConfig, Source
from a3q.noise import NOISE, Costs, matrices_of
from a3q.sensitivity import Sensitivity, Sizes
from a3q.solve.qk import FAR

_END = 1 << 20
"""Bytes at either end of a weight file by which it is known again."""


class _Entry(TypedDict):
    file: str
    ratio: float


Sensitivities = list[dict[Component, Sensitivity]]


def cache_file(
    digests: Sequence[str],
    config: ModelConfig,
    tokens: Tensor,
    probes: Tensor,
    sizes: Sequence[Sizes],
    ratio: float,
    method: Method,
) -> Path:
    """Where the sensitivities of a model (the sha256 of its weights, and its form) on these tokens belong."""
    asked = [[one[c] for c in sorted(one)] for one in sizes]
    names = [sorted(one) for one in sizes]
    return _file("sensitivity", digests, config, [asked, names, ratio, asdict(method), FAR], (tokens, probes))


def costs_file(digests: Sequence[str], config: ModelConfig, probes: Tensor, tied: bool) -> Path:
    """Where the costs of a model's matrices, as `a3q.noise.measure` finds them on `probes`, belong."""
    return _file("noise", digests, config, [NOISE, tied], (probes,))


def _file(
    folder: str, digests: Sequence[str], config: ModelConfig, asked: Sequence[object], tokens: Sequence[Tensor]
) -> Path:
    key = hashlib.sha256()
    # A folder's config.json is no part of its weight files.
    described = [__version__, list(digests), repr(config), *asked]
    key.update(json.dumps(described, default=list).encode())
    for part in tokens:
        key.update(str(tuple(part.shape)).encode() + part.cpu().numpy().tobytes())
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "a3q" / folder / f"{key.hexdigest()}.json"


def load(path: Path, sizes: Sequence[Sizes]) -> Sensitivities | None:
    """What `save` wrote about these; None where there is nothing, or nothing whole."""
    found = _read(path)
    return found if found is not None and [one.keys() for one in found] == [one.keys() for one in sizes] else None


def _read(path: Path) -> Sensitivities | None:
    try:
        raw = json.loads(path.read_text("utf-8"))
        return [{c: _sensitivity(one[c]) for c in COMPONENTS if c in one} for one in raw]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _sensitivity(raw: dict[str, object]) -> Sensitivity:
    sizes, losses, probed, kl = raw["sizes"], raw["losses"], raw["probed"], raw["kl"]
    if not isinstance(sizes, list) or not isinstance(losses, list) or len(sizes) != len(losses) or probed not in sizes:
        raise ValueError("not a sensitivity")
    return Sensitivity(tuple(int(n) for n in sizes), tuple(float(x) for x in losses), int(str(probed)), float(str(kl)))


def save(path: Path, sensitivities: Sensitivities) -> None:
    """Keep them if the folder can be written; a cache is a convenience."""
    _write(path, [{c: asdict(one[c]) for c in one} for one in sensitivities])


def remember(file: Path, source: Source, config: ModelConfig, ratio: float, method: Method) -> None:
    """Note that `file` has the sensitivities of a model, so that `recall` finds it from headers alone."""
    index = _index(source, config, method)
    others = [entry for entry in _entries(index) if entry["file"] != file.name]
    _write(index, [{"file": file.name, "ratio": ratio}, *others])


def recall(source: Source, config: ModelConfig, ratio: float, method: Method) -> Sensitivities | None:
    """What was measured last of a model, on whatever text, at the ratio nearest to this one; None: nothing.

    A model is known by its form and by the beginning and the end of its files.
    """
    index = _index(source, config, method)
    for entry in sorted(_entries(index), key=lambda entry: abs(entry["ratio"] - ratio)):
        found = _read(index.parent.parent / "sensitivity" / entry["file"])
        if found is not None and len(found) == config.num_hidden_layers:
            return found
    return None


def _index(source: Source, config: ModelConfig, method: Method) -> Path:
    ends = [part for path in source.weight_files for part in _ends(path)]
    return _file("known", ends, config, [asdict(method), FAR], ())


def _ends(path: Path) -> tuple[str, str, str]:
    """Size of a file, and digests of its first and last bytes: the header is in the first."""
    with path.open("rb") as file:
        first = file.read(_END)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END))
        last = file.read(_END)
    return str(size), hashlib.sha256(first).hexdigest(), hashlib.sha256(last).hexdigest()


def _entries(index: Path) -> list[_Entry]:
    try:
        raw = json.loads(index.read_text("utf-8"))
        return [{"file": Path(str(one["file"])).name, "ratio": float(one["ratio"])} for one in raw]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def load_costs(path: Path, model: Model, tied: bool) -> Costs | None:
    """What `save_costs` wrote about `model`; None where there is nothing, or nothing whole."""
    try:
        raw = json.loads(path.read_text("utf-8"))
        found = Costs(tuple(_numbers(one) for one in raw["layers"]), _numbers(raw["top"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    wanted = [set(matrices_of(model))] * model.config.num_hidden_layers
    top = {"embed"} if tied else {"embed", "output"}
    return found if [one.keys() for one in found.layers] == wanted and found.top.keys() == top else None


def _numbers(raw: dict[str, object]) -> dict[str, float]:
    found = {role: float(str(cost)) for role, cost in raw.items()}
    if not all(math.isfinite(cost) and cost >= 0 for cost in found.values()):
        raise ValueError("not a cost")
    return found


def save_costs(path: Path, costs: Costs) -> None:
    """Keep them if the folder can be written."""
    _write(path, {"layers": [dict(one) for one in costs.layers], "top": dict(costs.top)})


def _write(path: Path, content: object) -> None:
    # A cache is a convenience: nothing is lost where it cannot be written.
    with suppress(OSError, InputError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content))

"""What a plan decides, kept in a file that `convert` takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from a3q.dimensions import HEADS
from a3q.errors import InputError
from a3q.families import COMPONENTS, Component
from a3q.files import write_whole
from a3q.footprint import Use
from a3q.forecast import Forecast
from a3q.model import Model
from converters.hf_weights import read_json

_KIND = "a3q plan 1"


@dataclass(frozen=True)
class Choice:
    """The options of `a3q.convert` that a plan stands for."""

    ratio: float
    own_ratios: Mapping[Component, float]
    kv_ratio: float | None
    components: frozenset[Component] | None
    ranks: str | None
    head_size: int | None
    """Of all heads, where they shrink."""
    quant: str
    use: Use


def described(forecast: Forecast) -> dict[str, Any]:
    """A forecast as plain values; `read_plan` takes its choice back. Sizes in bytes, losses in nats."""
    settings, plan, use = forecast.settings, forecast.plan, forecast.use
    return {
        "kind": _KIND,
        "model": _identity(forecast.model),
        "choice": {
            "ratio": settings.ratio,
            "own_ratios": dict(settings.own_ratios),
            "kv_ratio": settings.kv_ratio,
            "components": None if settings.components is None else sorted(settings.components),
            "ranks": settings.ranks,
            "head_size": plan.dimensions[0].qk_head_dim if plan.request.reduced & HEADS else None,
            "quant": forecast.types.plan.name,
            "context": use.context,
            "cache_type": use.cache_type,
            "parallel": use.parallel,
        },
        "before": _footprint(forecast.before),
        "after": _footprint(forecast.after),
        "dimensions": [asdict(one) for one in plan.dimensions],
        "asked": plan.asked,
        "achieved": plan.achieved,
        "predicted_kl": asdict(forecast.prediction) | {"total": forecast.prediction.total},
        "predicted_speedup": asdict(forecast.speedup),
        "grid": forecast.grid,
        "notes": list(forecast.notes),
    }


def _footprint(one: Any) -> dict[str, Any]:
    return asdict(one) | {"memory": one.memory}


def _identity(model: Model) -> dict[str, Any]:
    """What tells one model's plan from another's."""
    config = model.config
    return {
        "family": model.family.name,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "parameters": model.parameters(),
    }


def write_plan(path: Path, forecast: Forecast, force: bool) -> None:
    """Write a plan file; InputError where there is one already or it cannot be written."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the name of a file in it")
    if path.exists() and not force:
        raise InputError(f"{path}: exists already; use --force to replace it")
    write_whole(path, json.dumps(described(forecast), indent=2) + "\n")


def read_plan(path: Path, model: Model) -> Choice:
    """What the plan in a file decides for `model`; InputError names what is wrong with it."""
    raw = read_json(path)
    if raw.get("kind") != _KIND:
        raise InputError(f"{path}: is no plan of this a3q; write one with a3q plan -o {path.name}")
    if (identity := raw.get("model")) != _identity(model):
        ours = ", ".join(f"{key} {value}" for key, value in _identity(model).items())
        theirs = ", ".join(f"{k} {v}" for k, v in identity.items()) if isinstance(identity, dict) else "unknown"
        raise InputError(f"{path}: is a plan for another model ({theirs}; this one: {ours})")
    try:
        return _choice(raw["choice"])
    except KeyError as error:
        raise InputError(f"{path}: is damaged (no {error}); write it again with a3q plan") from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{path}: is damaged ({error}); write it again with a3q plan") from error


def _choice(raw: Mapping[str, Any]) -> Choice:
    components = raw["components"]
    named = [*raw["own_ratios"], *(components or [])]
    if wrong := [name for name in named if name not in COMPONENTS]:
        raise ValueError(f"component {wrong[0]!r}")
    return Choice(
        ratio=float(raw["ratio"]),
        own_ratios={name: float(ratio) for name, ratio in raw["own_ratios"].items()},
        kv_ratio=None if raw["kv_ratio"] is None else float(raw["kv_ratio"]),
        components=None if components is None else frozenset(components),
        ranks=None if raw["ranks"] is None else str(raw["ranks"]),
        head_size=None if raw["head_size"] is None else int(raw["head_size"]),
        quant=str(raw["quant"]),
        use=Use(int(raw["context"]), str(raw["cache_type"]), int(raw["parallel"])),
    )

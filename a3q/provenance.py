"""What a written model says about its making: plain values under keys without a prefix."""

from __future__ import annotations

from a3q.dimensions import Plan
from a3q.families import COMPONENTS
from a3q.heal.settings import Healing
from a3q.pipeline import Settled
from a3q.settings import Settings


def provenance(reduced: Settled, settings: Settings, version: str) -> dict[str, object]:
    """What a written model says about its making: plain values, keys without a prefix."""
    original, plan = reduced.original, reduced.plan
    known = original.metadata.get("general.name")
    facts: dict[str, object] = {
        "version": version,
        "source.name": str(known.value) if known is not None else original.source.path.stem,
        "source.files": [file.name for file in original.source.weight_files],
        "source.sha256": reduced.digests,
    }
    # A reduced model that is only rewritten keeps the record of its reduction, which `metadata` carries.
    if plan.asked > 0 or "a3q.ratio" not in original.metadata:
        facts |= {"ratio": float(plan.asked), "ratio_achieved": float(plan.achieved)}
    if plan.asked == 0 or reduced.calibration is None:
        return facts
    shapes = reduced.config.layers
    facts |= {
        "method": reduced.method.name,
        "ranks": "mixed" if settings.mixed() else "uniform",
        "components": [c.lower() for c in COMPONENTS if c in plan.request.reduced],
        "qk_head_dim": _per_layer([shape.qk_head_dim for shape in shapes]),
        "v_head_dim": _per_layer([shape.v_head_dim for shape in shapes]),
        "intermediate_size": _per_layer([shape.intermediate_size for shape in shapes]),
        "calibration.source": reduced.calibration.source,
        "calibration.tokens": reduced.calibration.tokens.numel(),
        "calibration.seed": settings.seed,
    }
    return facts | _healing_facts(reduced.calibration.source, settings.healing)


def _healing_facts(source: str, healing: Healing) -> dict[str, object]:
    """How the model was to be healed, on text of `source`; what came of it is known when this is long written."""
    if not healing.any:
        return {}
    facts: dict[str, object] = {"heal.mode": healing.mode, "heal.source": source}
    if healing.tokens is not None:
        facts["heal.tokens"] = healing.tokens
    if healing.minutes is not None:
        facts["heal.minutes"] = float(healing.minutes)
    return facts


def rounding_facts(reduced: Settled, settings: Settings) -> dict[str, object]:
    """What a written model says about the text that its rounding was calibrated on, and whether it was trained."""
    if reduced.calibration is None:
        return {}
    healed: dict[str, object] = {"heal.quant": settings.healing.quant} if settings.healing.any else {}
    return healed | {
        "quantizer.calibration.source": reduced.calibration.source,
        "quantizer.calibration.tokens": reduced.calibration.tokens.numel(),
        "quantizer.calibration.seed": settings.seed,
    }


def is_about_rounding(key: str) -> bool:
    """Whether a key of provenance, without its prefix, is about how the weights of one file were rounded."""
    return key.partition(".")[0] in ("quantization", "quantizer", "bits", "group_size") or key == "heal.quant"


def is_outdated(key: str, plan: Plan) -> bool:
    """Whether a key of a source's provenance is about weights that are others after `plan`."""
    return is_about_rounding(key) or (plan.asked > 0 and key.startswith("heal."))


def _per_layer(sizes: list[int]) -> int | list[int]:
    return sizes[0] if len(set(sizes)) == 1 else sizes

"""Results of runs that say they were healed."""

from __future__ import annotations

from dataclasses import replace

from a3q import Result
from a3q.heal.distill import Point
from a3q.heal.settings import Healing
from a3q.heal.stage import Healed


def healed(
    result: Result, *, source: str = "text.txt", blocks: bool = True, phases: int = 2, before: float = 0.297
) -> Result:
    """`result` of a reduction of two layers, as if it had been healed: the second layer gained nothing."""
    curve = tuple(Point(tokens, 2.5 * tokens, loss) for tokens, loss in ((8_000_000, 0.25), (26_214_400, 0.1)))
    ended = Healed(26_214_400, 6_500_000, 250.4, before, 0.112, curve)
    rounded = Healed(1_000_000, 6_500_000, 21.0, 0.2, 0.15, (Point(1_000_000, 21.0, 0.16),), rounded=True)
    job, calibration = result.job, result.job.calibration
    assert calibration is not None
    reduction = job.reduction
    if blocks:
        first, second = reduction.losses
        losses = [
            replace(first, before_healing=0.02, after_healing=0.01),
            replace(second, before_healing=0.03, after_healing=0.03, before_predictions=0.31, after_predictions=0.3),
        ]
        reduction = replace(reduction, losses=losses)
    job = replace(
        job,
        reduction=reduction,
        calibration=replace(calibration, source=source),
        healed=(ended, rounded)[:phases],
    )
    settings = result.settings
    assert settings is not None
    mode = {(True, True): "both", (True, False): "blocks", (False, True): "full", (False, False): "none"}
    asked = Healing(mode[blocks, phases > 0], quant=phases > 1)
    return replace(result, job=job, settings=replace(settings, healing=asked))

"""What a user asks of healing."""

from __future__ import annotations

from dataclasses import dataclass

from a3q.errors import InputError

MODES = ("none", "blocks", "full", "both")
MINUTES = 15.0
"""Of end-to-end healing unless told."""
BLOCK_PASSES = 6
"""Passes over the calibration text that each layer is trained for, at most, unless told."""
_BLOCKS_SHARE = 0.1
"""Of the time of both kinds, what the layers one by one get: half a minute end to end takes a GPU beyond what they
reach in 40 minutes on two cores."""
_ROUNDED_SHARE = 0.2
"""Of the time or tokens end to end, what is left to the phase with rounding in the loop."""


@dataclass(frozen=True)
class Healing:
    """Whether and how long a reduced model is trained to behave like the original."""

    mode: str = "none"
    """`blocks`: each layer when it is reduced; `full`: end to end; `both`: one after the other."""
    tokens: int | None = None
    """To train on, of each layer or of the whole model."""
    minutes: float | None = None
    """At most, in all."""
    quant: bool = False
    """End with a phase in which the weights are rounded as they will be stored."""

    @property
    def blocks(self) -> bool:
        """Whether layers are trained one by one."""
        return self.mode in ("blocks", "both")

    @property
    def full(self) -> bool:
        """Whether the whole model is trained."""
        return self.mode in ("full", "both")

    @property
    def any(self) -> bool:
        """Whether anything is trained."""
        return self.mode != "none" or self.quant

    def check(self) -> None:
        """InputError for a value out of range."""
        if self.mode not in MODES:
            raise InputError(f"--heal {self.mode}: give {', '.join(MODES)}")
        if self.tokens is not None and self.tokens < 1:
            raise InputError(f"--heal-tokens {self.tokens}: give a positive number of tokens")
        if self.minutes is not None and not self.minutes > 0:
            raise InputError(f"--heal-minutes {self.minutes:g}: give a positive number of minutes")
        if not self.any and (self.tokens is not None or self.minutes is not None):
            raise InputError("--heal-tokens and --heal-minutes say how long to heal: give --heal as well")

    def facts(self) -> dict[str, str]:
        """What makes a run another, by names and values for people."""
        facts = {
            "--heal": self.mode if self.mode != "none" else None,
            "--heal-tokens": self.tokens,
            "--heal-minutes": None if self.minutes is None else f"{self.minutes:g}",
            "--heal-quant": "given" if self.quant else None,
        }
        return {name: str(value) for name, value in facts.items() if value is not None}

    def block_seconds(self) -> float | None:
        """Of all layers together; None: as long as the tokens take."""
        if self.minutes is None:
            return None
        return 60 * self.minutes * (_BLOCKS_SHARE if self.full else 1.0)

    def end_to_end(self, rounded: bool) -> tuple[int | None, float | None]:
        """Tokens and seconds of a phase over the whole model, the one with rounding in the loop or the one before."""
        share = 1.0
        if self.quant and self.full:
            share = _ROUNDED_SHARE if rounded else 1 - _ROUNDED_SHARE
        minutes = MINUTES if self.minutes is None and self.tokens is None else self.minutes
        if self.minutes is not None and minutes is not None and self.blocks:
            minutes *= 1 - _BLOCKS_SHARE
        tokens = None if self.tokens is None else max(1, round(share * self.tokens))
        return tokens, None if minutes is None else 60 * share * minutes

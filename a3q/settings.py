"""What a user asks of a run, whatever the output."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from a3q import __version__
from a3q.calibration import SELF
from a3q.dimensions import ALL, HEADS, Grid, Request
from a3q.errors import InputError
from a3q.families import COMPONENTS, Component
from a3q.heal.settings import Healing

RATIO = 0.25
"""Of what is reduced unless told."""
MAX_RATIO = 0.9


@dataclass(frozen=True)
class Settings:
    """What the user asked for, whatever the output."""

    ratio: float = RATIO
    components: frozenset[Component] | None = None
    """None: all that the output can hold reduced."""
    own_ratios: Mapping[Component, float] = field(default_factory=dict)
    """Components with a ratio of their own."""
    kv_ratio: float | None = None
    """Share of the KV cache that is to go; None: keys and values are components like the others."""
    ranks: str | None = None
    """`mixed`: sizes differ between layers and components by what each matters; `uniform`: all layers alike, as the
    paper has them. None: as the method has them."""
    head_size: int | None = None
    """Of all heads that shrink, where a plan has settled it."""
    method: str = "a3q"
    calib: Sequence[str] = (SELF,)
    calib_tokens: int | None = None
    seed: int = 0
    device: str = "auto"
    memory_budget: int | None = None
    """Bytes that hidden states and finished layers may take before they wait on disk; half of the free memory unless
    told."""
    work: Path | None = None
    """Folder that keeps what is finished, so that a run that was ended can be continued."""
    healing: Healing = field(default_factory=Healing)

    @classmethod
    def of(
        cls,
        *,
        ratio: float | None = None,
        components: Iterable[Component] | None = None,
        own_ratios: Mapping[Component, float] | None = None,
        kv_ratio: float | None = None,
        ranks: str | None = None,
        method: str = "a3q",
        calib: str | Sequence[str] = SELF,
        calib_tokens: int | None = None,
        seed: int = 0,
        device: str = "auto",
        memory_budget: int | None = None,
        work: str | Path | None = None,
        healing: Healing | None = None,
    ) -> Settings:
        """From what a caller of `a3q.convert` and the like may give; InputError for a value out of range.

        `ratio` is RATIO unless told, and nothing beside a `kv_ratio`.
        """
        if ratio is None:
            ratio = RATIO if kv_ratio is None else 0.0
        settings = cls(
            ratio,
            None if components is None else frozenset(components),
            own_ratios or {},
            kv_ratio,
            ranks,
            None,
            method,
            [calib] if isinstance(calib, str) else list(calib),
            calib_tokens,
            seed,
            device,
            memory_budget,
            None if work is None else Path(work),
            healing or Healing(),
        )
        settings.check()
        return settings

    def request(self) -> Request:
        """The reduction that is asked for."""
        components = ALL if self.components is None else self.components
        if self.kv_ratio is not None:
            components |= HEADS
        return Request(self.ratio, components | self.own_ratios.keys(), self.own_ratios, self.kv_ratio)

    def on(self, grid: Grid) -> Grid:
        """The grid with no more than what is asked for."""
        return grid if self.head_size is None else replace(grid, head_size=self.head_size)

    def mixed(self) -> bool:
        """Whether sizes may differ between layers."""
        return self.ranks == "mixed" or (self.ranks is None and self.method == "a3q")

    def check(self) -> None:
        """InputError for a value out of range."""
        if unknown := sorted(((self.components or frozenset()) | self.own_ratios.keys()) - ALL):
            raise InputError(f"component {unknown[0]!r}: give {', '.join(COMPONENTS)}")
        ratios = {
            "--ratio": self.ratio,
            "--kv-ratio": self.kv_ratio or 0.0,
            **{f"--ratio-{c.lower()}": r for c, r in self.own_ratios.items()},
        }
        for option, ratio in ratios.items():
            if not 0 <= ratio <= MAX_RATIO:
                raise InputError(f"{option} {ratio:g} is out of range; give a number from 0 (untouched) to {MAX_RATIO}")
        if self.ranks not in (None, "mixed", "uniform"):
            raise InputError(f"--ranks {self.ranks}: give mixed or uniform")
        if self.method not in ("a3q", "paper"):
            raise InputError(f"--method {self.method}: give a3q or paper")
        self.healing.check()
        if self.healing.any and self.method != "a3q":
            raise InputError(f"--heal with --method {self.method}: that method is there for comparison; leave one out")
        if self.healing.any and not self.request().groups():
            raise InputError(
                "--heal: nothing is reduced, so there is nothing to heal; give --ratio or leave --heal out"
            )
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"--seed {self.seed}: give a number from 0 to {(1 << 32) - 1}")
        if self.memory_budget is not None and self.memory_budget < 0:
            raise InputError(f"--memory {self.memory_budget}: give a size such as 16GiB")
        if self.calib_tokens is not None and self.calib_tokens < 1:
            raise InputError(f"--calib-tokens {self.calib_tokens}: give a positive number of tokens")


def parse_components(text: str | None) -> frozenset[Component] | None:
    """`qk,ov,mlp` in any order and case; InputError for any other name."""
    if text is None:
        return None
    known = {c.lower(): c for c in COMPONENTS}
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise InputError(f"--components {text}: give one or more of qk, ov, mlp, with commas between")
    return frozenset(known[name] for name in names)


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def parse_size(option: str, text: str) -> int:
    """Bytes in `80MB`, `1.5GiB` and the like, in any case; InputError for anything else."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+) *([kmg]?i?)b?", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise InputError(f"{option} {text}: give a size such as 80MB or 1.5GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def identity(settings: Settings, digests: Sequence[str], device_type: str) -> dict[str, str]:
    """What makes a run of a model (the sha256 of its files) the same as another, by names and values for people."""
    components = settings.components
    facts: dict[str, object] = {
        "a3q": __version__,
        "the model": f"sha256 {' '.join(digests)}",
        "--ratio": f"{settings.ratio:g}",
        "--kv-ratio": settings.kv_ratio,
        "--components": None if components is None else ",".join(sorted(components)).lower(),
        **{f"--ratio-{c.lower()}": f"{ratio:g}" for c, ratio in settings.own_ratios.items()},
        "--ranks": settings.ranks,
        "the size of heads": settings.head_size,
        "--method": settings.method,
        "--calib": " and ".join(map(_told, settings.calib)),
        "--calib-tokens": settings.calib_tokens,
        "--seed": settings.seed,
        **settings.healing.facts(),
        "the device": device_type,
    }
    return {name: str(value) for name, value in facts.items() if value is not None}


def _told(source: str) -> str:
    """A source of calibration text; of a file also what is in it."""
    path = Path(source).expanduser()
    if not path.is_file():
        return source
    try:
        with path.open("rb") as file:
            return f"{source} (sha256 {hashlib.file_digest(file, 'sha256').hexdigest()})"
    except OSError as error:
        raise InputError(f"{source}: cannot be read: {error.strerror}") from error

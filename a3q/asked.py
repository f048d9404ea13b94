"""What a user asks of a conversion, whether directly, as a memory to fit, or in a plan file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from a3q.choice import read_plan
from a3q.errors import InputError
from a3q.families import Component
from a3q.footprint import Use
from a3q.forecast import Forecast, Forecaster, grid_for
from a3q.gguf_types import TypeRequest
from a3q.model import Model
from a3q.search import fit
from a3q.settings import Settings
from converters.headers import Header
from converters.types import QuantPlan, resolve_quant

QUANT = "4bit"
"""Type of weights unless told."""


@dataclass(frozen=True)
class Asked:
    """Options by the names that `a3q.convert` has for them; None: not given."""

    ratio: float | None = None
    own_ratios: Mapping[Component, float] | None = None
    kv_ratio: float | None = None
    components: Iterable[Component] | None = None
    ranks: str | None = None
    quant: str | None = None
    cache_type: str | None = None
    context: int | None = None
    parallel: int = 1
    memory: int | None = None
    """Bytes that running the model may take (`--fit`)."""
    plan: str | Path | None = None

    def check(self, limited: bool = False) -> None:
        """InputError for options that do not go together; `limited`: types are chosen within a size."""
        how_much: dict[str, object] = {
            "--ratio": self.ratio,
            "--ratio-qk, --ratio-ov, --ratio-mlp": self.own_ratios or None,
            "--kv-ratio": self.kv_ratio,
            "--bits, --size": limited or None,
        }
        if self.plan is not None:
            how_much |= {
                "--fit": self.memory,
                "--components": self.components,
                "--ranks": self.ranks,
                "--quant": self.quant,
                "--kv-type": self.cache_type,
                "--ctx": self.context,
                "--parallel": self.parallel if self.parallel != 1 else None,
            }
        if given := [name for name, value in how_much.items() if value is not None]:
            if self.plan is not None:
                raise InputError(f"--plan and {given[0]}: the plan says that already; give one of the two")
            if self.memory is not None:
                raise InputError(f"--fit and {given[0]}: --fit chooses how much goes; give one of the two")
        if self.memory is not None and self.memory < 1:
            raise InputError("--fit: give the memory that running the model may take, such as 4GiB")
        self._use(1).check()

    def quant_plan(self, output_type: str | None = None, embed_type: str | None = None) -> QuantPlan:
        """The types that are asked for; what a plan file or `--fit` says of them comes later."""
        return resolve_quant(QUANT if self.quant is None else self.quant).with_overrides(output_type, embed_type)

    def settings(self, **common: Any) -> Settings:
        """What is asked directly, checked; `common` are the options of `Settings.of` that are not here."""
        return Settings.of(
            ratio=self.ratio,
            components=self.components,
            own_ratios=self.own_ratios,
            kv_ratio=self.kv_ratio,
            ranks=self.ranks,
            **common,
        )

    def settled(self, header: Header, request: TypeRequest, settings: Settings) -> tuple[Settings, TypeRequest, Use]:
        """How to convert the model behind `header`, where `settings` are what is asked directly."""
        if self.plan is not None:
            chosen = read_plan(Path(self.plan), header.model)
            settings = replace(
                settings,
                ratio=chosen.ratio,
                components=chosen.components,
                own_ratios=chosen.own_ratios,
                kv_ratio=chosen.kv_ratio,
                ranks=chosen.ranks,
                head_size=chosen.head_size,
            )
            try:
                chosen.use.check()
                settings.check()
                request = replace(request, plan=replace(request.plan, name=resolve_quant(chosen.quant).name))
                _check_head_size(chosen.head_size, header.model, request, chosen.use)
            except InputError as error:
                raise InputError(f"{self.plan}: {error}") from error
            return settings, request, chosen.use
        if self.memory is not None:
            found = self._fitting(header, request, settings)
            return found.settings, found.types, found.use
        return settings, request, self._use(header.model.config.max_position_embeddings)

    def forecast(self, header: Header, request: TypeRequest, settings: Settings) -> Forecast:
        """What `settled` comes to."""
        if self.memory is not None:
            return self._fitting(header, request, settings)
        settings, request, use = self.settled(header, request, settings)
        return Forecaster(header).forecast(settings, request, use)

    def _fitting(self, header: Header, request: TypeRequest, settings: Settings) -> Forecast:
        assert self.memory is not None
        forecaster, use = Forecaster(header), self._use(header.model.config.max_position_embeddings)
        return fit(forecaster, settings, request, use, self.memory, self.quant, self.cache_type)

    def _use(self, trained: int) -> Use:
        """`trained`: tokens of context that the model was trained for."""
        context = trained if self.context is None else self.context
        return Use(context, "f16" if self.cache_type is None else self.cache_type, self.parallel)


def _check_head_size(size: int | None, model: Model, request: TypeRequest, use: Use) -> None:
    grid, config = grid_for(model, request, use.cache_type), model.config
    possible = grid.sizes(config, config.layers[0], "QK") if "QK" in grid.components else ()
    if size is not None and size not in possible:
        raise InputError(f"head size {size} is none of those that the file may have ({', '.join(map(str, possible))})")

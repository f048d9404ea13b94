"""What a run did, for the caller and for the closing table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from a3q.dimensions import Request
from a3q.footprint import Footprint, Use
from a3q.model import Model
from a3q.ollama import OllamaOutcome
from a3q.pipeline import Reduced
from a3q.settings import Settings
from a3q.verify import Verification
from converters.gguf_writer import WrittenFile
from converters.hf_writer import WrittenFolder


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file that holds quantized ones."""

    name: str
    """In the file."""
    layer: int | None
    """None: outside the layers."""
    short_name: str
    """What it is called in every layer, such as `attn_q`."""
    type: str
    weights: int
    bytes: int
    loss: float | None
    """Share of its output energy that rounding cost; None where it was not rounded or not measured. Weights that were
    rounded together, such as those of q, k and v of one type, have theirs in common."""


@dataclass(frozen=True)
class Rounding:
    """How weights were rounded."""

    quantizer: str
    """`gptq`, `rtn` or `plain`."""
    bits_per_weight: float
    """Mean over the whole file."""
    losses: Mapping[str, float]
    """Mean share of output energy that rounding cost the weights of each role; empty where it was not measured."""
    types: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Of each role, how many matrices are stored in which type; empty where all are alike."""
    tensors: Sequence[StoredTensor] = ()
    """All of the file in its order; empty for a folder."""


def mean_losses(layers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each role, over the layers that have it."""
    found: dict[str, list[float]] = {}
    for layer in layers:
        for role, loss in layer.items():
            found.setdefault(role, []).append(loss)
    return {role: sum(losses) / len(losses) for role, losses in found.items()}


@dataclass(frozen=True)
class Result:
    """A reduced model and where it was written."""

    path: Path
    job: Reduced
    written: WrittenFile | WrittenFolder
    type_name: str
    """Type of the weights, such as Q4_0 or BF16."""
    verification: Verification | None
    notes: tuple[str, ...]
    rounding: Rounding | None = None
    """None where nothing is quantized."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time of each stage."""
    settings: Settings | None = None
    """What the user asked for."""
    use: Use | None = None
    """How it is going to be run; None for a folder."""
    footprints: Mapping[str, Footprint] = field(default_factory=dict)
    """What running it takes, `before` and `after`; empty for a folder."""
    ollama: OllamaOutcome | None = None
    """What became of the model in Ollama; None where nothing was asked."""
    reports: tuple[Path, ...] = ()
    """HTML and JSON, where they were asked for."""

    @property
    def original(self) -> Model:
        """The model as it was read."""
        return self.job.original

    @property
    def reduced(self) -> Model:
        """The reduced model; the original itself where nothing was reduced."""
        return self.job.model


def stem_of(model: Model) -> str:
    """A source's name without its type."""
    stem = model.source.path.stem
    if model.source.format != "gguf":
        folder = model.source.path.resolve()
        stem = folder.name
        if folder.parent.name == "snapshots":
            # In the Hub's cache, models--ORG--NAME/snapshots/COMMIT, the folder's own name says nothing.
            stem = folder.parent.parent.name.rpartition("--")[2]
    return re.sub(r"[.-]I?Q\d\w*$|[.-](F|BF)(16|32)$", "", stem, flags=re.IGNORECASE)


def mark(request: Request) -> str:
    """What a name says about the reduction."""
    kind = "kv" if request.cache_only else ""
    return f"-a3q{kind}{round(100 * request.largest)}" if request.largest > 0 else ""

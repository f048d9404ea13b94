"""Timers around functions of a3q, put there from outside: how often, how long, and how much arithmetic or how many
bytes that was.

A function's time is its own: what timed functions inside it take counts for those. On a GPU the main thread waits for
the device before and after each, so that a run with timers is a little slower than one without. What other threads do
meanwhile is listed apart, as overlapped.
"""

from __future__ import annotations

import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch

from benchmarks.scale_work import (
    array_bytes,
    attention_flops,
    attention_inner_flops,
    layer_bytes,
    linear_flops,
    mlp_flops,
    mlp_inner_flops,
    moment_flops,
    refit_flops,
    rounding_flops,
    row_count,
    select_flops,
)

Function = Callable[..., Any]


@dataclass(frozen=True)
class Stage:
    """A function whose calls count under a name."""

    name: str
    module: str
    attribute: str
    """`function`, or `Class.method`."""
    flops: Callable[..., float] | None = None
    """Of a call, from its arguments before it."""
    bytes: Callable[..., float] | None = None
    """Of a call, from what it gave, and its arguments."""


@dataclass
class Tally:
    """All calls that counted under a name."""

    calls: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0


@dataclass
class Section:
    """One stage as a3q tells it to its caller."""

    seconds: float = 0.0
    advances: list[float] = field(default_factory=list)
    """Seconds from its beginning to each progress that it told."""


STAGES: list[Stage] = [
    Stage("read layer", "converters.tensors", "LazyLayers.__getitem__", bytes=layer_bytes),
    Stage("to device", "a3q.forward", "to_device", bytes=layer_bytes),
    # The outermost counts.
    Stage("forward", "a3q.forward", "attention", attention_flops),
    Stage("forward", "a3q.forward", "attention_inner", attention_inner_flops),
    Stage("forward", "a3q.forward", "project", lambda w, rows: linear_flops(row_count(rows), w["o"])),
    Stage("forward", "a3q.forward", "mlp", mlp_flops),
    Stage("forward", "a3q.forward", "mlp_inner", mlp_inner_flops),
    Stage("forward", "a3q.forward", "mlp_output", lambda w, m: linear_flops(row_count(m), w["down"])),
    Stage("moments", "a3q.statistics", "Moment.add", moment_flops),
    Stage("distances", "a3q.statistics", "attention_distances"),
    Stage("even heads", "a3q.components", "even_heads"),
    Stage("solve QK", "a3q.components", "reduce_qk"),
    Stage("solve QK", "a3q.components", "qk_losses"),
    Stage("solve OV", "a3q.components", "reduce_ov"),
    Stage("solve OV", "a3q.components", "ov_losses"),
    Stage("solve MLP", "a3q.components", "reduce_mlp", select_flops),
    Stage("solve MLP", "a3q.solve.mlp", "mlp_losses"),
    Stage("refit", "a3q.fit", "OutputFit.apply", refit_flops),
    Stage("GPTQ", "a3q.quantize", "LayerRounding.apply", rounding_flops),
    Stage("logits", "a3q.forward", "output_logits", lambda model, x, *_: linear_flops(row_count(x), model.output)),
    Stage("store layer", "a3q.store", "LayerStore.append"),
    Stage("pack", "converters.ggml_pack", "pack", bytes=array_bytes),
    Stage("encode", "converters.gguf_tensors", "TensorEncoder.encode", bytes=array_bytes),
    Stage("write", "converters.draft", "write_at", bytes=lambda _, path, offset, data: data.nbytes),
    Stage("sync and hash", "converters.draft", "sync_and_hash", bytes=lambda _, path: path.stat().st_size),
    Stage("wait for a thread", "concurrent.futures", "Future.result"),
]
"""Names as they are where they are defined; every module that has imported one is given the timed one."""


class Timers:
    """Tallies by a3q's stage, by name, and by whether the main thread did it; and times of a3q's stages."""

    def __init__(self, device: torch.device) -> None:
        self.tallies: dict[tuple[str, str, bool], Tally] = {}
        self.sections: dict[str, Section] = {}
        self.misread: dict[str, str] = {}
        """Functions whose arguments are not as expected here: only their time is known. And what went wrong."""
        self._device = device
        self._title = ""
        self._main = threading.get_ident()
        self._running = threading.local()
        self._lock = threading.Lock()

    @contextmanager
    def stages(self, title: str, _total: float) -> Iterator[Callable[[float], None]]:
        """An `a3q.progress.Stages`."""
        section, before = self.sections.setdefault(title, Section()), self._title
        self._title, start, known = title, time.perf_counter(), section.seconds
        try:
            yield lambda _done: section.advances.append(known + time.perf_counter() - start)
        finally:
            self._wait()
            section.seconds += time.perf_counter() - start
            self._title = before

    @contextmanager
    def installed(self, stages: Sequence[Stage] = STAGES) -> Iterator[list[str]]:
        """Time all calls of `stages` meanwhile; gives the names that this version of a3q does not have."""
        missing, undo = [], []
        try:
            for stage in stages:
                found = _find(stage)
                if found is None:
                    missing.append(f"{stage.module}.{stage.attribute}")
                    continue
                function, places = found
                timed = self.timed(stage, function)
                for place, name in places:
                    setattr(place, name, timed)
                    undo.append((place, name, function))
            yield missing
        finally:
            for place, name, function in undo:
                setattr(place, name, function)

    def timed(self, stage: Stage, function: Function) -> Function:
        """`function`, whose calls count unless they are part of one under the same name."""

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            running = self._stack()
            if any(name == stage.name for name, _ in running):
                return function(*args, **kwargs)
            flops = self._figure(stage, stage.flops, *args, **kwargs)
            self._wait()
            inside = [0.0]
            running.append((stage.name, inside))
            start = time.perf_counter()
            try:
                result = function(*args, **kwargs)
                self._wait()
            finally:
                seconds = time.perf_counter() - start
                running.pop()
                if running:
                    running[-1][1][0] += seconds
                self._count(stage.name, seconds - inside[0], flops)
            self._count(stage.name, 0.0, 0.0, self._figure(stage, stage.bytes, result, *args, **kwargs), calls=0)
            return result

        return run

    def _figure(self, stage: Stage, of: Callable[..., float] | None, *args: Any, **kwargs: Any) -> float:
        if of is None:
            return 0.0
        try:
            return float(of(*args, **kwargs))
        # A changed signature must not cost a run of hours.
        except (TypeError, AttributeError, LookupError) as error:
            self.misread[f"{stage.module}.{stage.attribute}"] = str(error)
            return 0.0

    def _stack(self) -> list[tuple[str, list[float]]]:
        """Timed calls that this thread is in, with the seconds of timed calls inside each."""
        if not hasattr(self._running, "calls"):
            self._running.calls = []
        calls: list[tuple[str, list[float]]] = self._running.calls
        return calls

    def _count(self, name: str, seconds: float, flops: float, size: float = 0.0, calls: int = 1) -> None:
        overlapped = threading.get_ident() != self._main
        with self._lock:
            tally = self.tallies.setdefault((self._title, name, overlapped), Tally())
            tally.calls += calls
            tally.seconds += seconds
            tally.flops += flops
            tally.bytes += size

    def _wait(self) -> None:
        if self._device.type == "cuda" and threading.get_ident() == self._main:
            torch.cuda.synchronize()

    def own_seconds(self, title: str) -> float:
        """What timed functions took of the main thread's time in one of a3q's stages."""
        return sum(
            tally.seconds
            for (section, _, overlapped), tally in self.tallies.items()
            if section == title and not overlapped
        )


def _find(stage: Stage) -> tuple[Function, list[tuple[Any, str]]] | None:
    """The function, and all places where it is looked up; None where there is none of that name."""
    try:
        holder: Any = importlib.import_module(stage.module)
        *classes, name = stage.attribute.split(".")
        for one in classes:
            holder = getattr(holder, one)
        function: Function = getattr(holder, name)
    except (ImportError, AttributeError):
        return None
    if classes:
        return function, [(holder, name)]
    modules = [module for key, module in sys.modules.items() if key.partition(".")[0] in ("a3q", "converters")]
    return function, [(module, key) for module in modules for key, value in vars(module).items() if value is function]

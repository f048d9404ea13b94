"""Perplexity of each component reduced alone and of all together, with the time that the solvers take.

    python -m benchmarks.reduction --calib valid.txt --eval test.raw.txt [--ood other.txt] [--model M] [--device cuda]

Calibrates on the first 64 × 1024 tokens of `--calib`, evaluates on the first 8 × 1024 of `--eval`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import a3q.reduce
from a3q.model import pick_device
from a3q.reduce import Dimensions, reduce
from benchmarks.common import peak_memory, perplexity, windows
from converters.open import open_model

SOLVERS = ("solve_qk", "solve_ov", "solve_mlp", "refit")


def timed_solvers() -> Callable[[], float]:
    """Wrap the solvers that `a3q.reduce` calls; the returned function gives the seconds spent in them so far."""
    spent = 0.0

    def wrap(solver: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            try:
                return solver(*args, **kwargs)
            finally:
                spent += time.perf_counter() - start

        return timed

    for name in SOLVERS:
        setattr(a3q.reduce, name, wrap(getattr(a3q.reduce, name)))
    return lambda: spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--ood", type=Path, help="a text of another domain")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()

    device, model = pick_device(args.device), open_model(args.model)
    calibration = windows(model, args.calib, args.sequences)
    texts = {"eval": windows(model, args.eval, 8)} | ({"ood": windows(model, args.ood, 8)} if args.ood else {})
    config, keep = model.config, 1 - args.ratio
    head, units = int(config.head_dim * keep), int(config.intermediate_size * keep)
    cases = {
        "QK": Dimensions(head, config.head_dim, config.intermediate_size),
        "OV": Dimensions(config.head_dim, head, config.intermediate_size),
        "MLP": Dimensions(config.head_dim, config.head_dim, units),
        "all": Dimensions(head, head, units),
    }
    solver_seconds = timed_solvers()
    table = Table(title=f"{args.ratio:.0%} of {model.source.path.name}, {tuple(calibration.shape)} tokens, {device}")
    for heading in ("reduced", "head size", "value size", "MLP size", *texts, "seconds", "of them solving"):
        table.add_column(heading, justify="right")

    def row(name: str, dims: Dimensions, of: Any, seconds: float, solving: float) -> None:
        figures = [f"{perplexity(of, tokens, device):.2f}" for tokens in texts.values()]
        sizes = (dims.head_dim, dims.v_head_dim, dims.intermediate_size)
        table.add_row(name, *map(str, sizes), *figures, f"{seconds:.1f}", f"{solving:.1f}")

    row("nothing", Dimensions.of(config), model, 0, 0)
    for name, dimensions in cases.items():
        start, solved = time.perf_counter(), solver_seconds()
        reduced = reduce(model, calibration, dimensions, device, 1 << 40).model
        row(name, dimensions, reduced, time.perf_counter() - start, solver_seconds() - solved)
    table.caption = f"peak memory {peak_memory():.2f} GiB"
    Console().print(table)


if __name__ == "__main__":
    main()

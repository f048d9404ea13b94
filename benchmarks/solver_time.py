"""Seconds that the solvers take of a reduction, the rest being forward passes over the calibration text.

python -m benchmarks.solver_time --calib valid.txt [--model M] [--ratio 0.25] [--sequences 8] [--device cpu]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import a3q.components
import a3q.fit
from a3q.dimensions import Request, folder_grid, uniform
from a3q.model import pick_device
from a3q.reduce import reduce
from benchmarks.common import peak_memory, windows
from converters.open import open_model

SOLVERS = {
    a3q.components: ("solve_pairs", "solve_plain", "split_dimensions", "solve_ov_sizes", "solve_mlp"),
    a3q.fit: ("refit", "refit_with_bias"),
}


def timed_solvers() -> Callable[[], float]:
    """Wrap the solvers where they are called; the returned function gives the seconds spent in them so far."""
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

    for module, names in SOLVERS.items():
        for name in names:
            setattr(module, name, wrap(getattr(module, name)))
    return lambda: spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()

    device, model = pick_device(args.device), open_model(args.model)
    tokens = windows(model, args.calib, args.sequences)
    plan = uniform(model.family, model.config, folder_grid(model.config), Request(args.ratio))[0]
    solving = timed_solvers()
    start = time.perf_counter()
    reduce(model, tokens, plan.dimensions, device, 1 << 40)
    print(
        f"{len(model.layers)} layers, {tokens.numel()} tokens, {device}: {time.perf_counter() - start:.1f} s, "
        f"of them {solving():.1f} s in the solvers; peak memory {peak_memory():.2f} GiB"
    )


if __name__ == "__main__":
    main()

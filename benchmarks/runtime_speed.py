"""Prompt and generation speed in llama.cpp of GGUF files, in turn and several times, medians compared with the first.

python -m benchmarks.runtime_speed original-F16.gguf reduced-F16.gguf [--prompt 512] [--generate 64] [--rounds 5]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from a3q.runtime import LlamaRuntime, version


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    prompt: dict[Path, list[float]] = {path: [] for path in args.files}
    generation: dict[Path, list[float]] = {path: [] for path in args.files}
    for _ in range(args.rounds):
        for path in args.files:
            with LlamaRuntime(path, n_ctx=args.prompt + args.generate) as runtime:
                prompt[path].append(runtime.prompt_speed(args.prompt, repeats=1))
                generation[path].append(runtime.generation_speed(args.generate))

    first = args.files[0]
    table = Table("file", "prompt tokens/s", "against first", "generated tokens/s", "against first")
    table.title = f"llama-cpp-python {version()}, medians of {args.rounds}"
    for path in args.files:
        fast, slow = median(prompt[path]), median(generation[path])
        table.add_row(
            path.name,
            f"{fast:.1f}",
            f"{fast / median(prompt[first]):.2f}×",
            f"{slow:.1f}",
            f"{slow / median(generation[first]):.2f}×",
        )
    Console().print(table)


if __name__ == "__main__":
    main()

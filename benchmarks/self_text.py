"""What text to calibrate on: a text file against text that the model writes itself, by perplexity in and out of domain.

python -m benchmarks.self_text --text valid.txt --eval test.raw.txt --ood other.txt [--model M] [--sequences 64]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from a3q.calibration import self_text
from a3q.dimensions import Request, folder_grid, uniform
from a3q.model import pick_device
from a3q.reduce import reduce
from benchmarks.common import perplexity, windows
from converters.open import open_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--ood", type=Path, required=True)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()

    device, model = pick_device(args.device), open_model(args.model)
    texts = [windows(model, path, 8) for path in (args.eval, args.ood)]
    dimensions = uniform(model.family, model.config, folder_grid(model.config), Request(args.ratio))[0].dimensions
    written = self_text(model, args.sequences, 1024, 0, device)
    given = windows(model, args.text, args.sequences)
    half = args.sequences // 2
    sources = {"text": given, "self": written, "half of each": torch.cat((given[:half], written[:half]))}

    table = Table("calibrated on", args.eval.name, args.ood.name)
    table.title = f"all components, {args.ratio:.0%}, {args.sequences} × 1024 tokens, {device}"
    table.add_row("(original)", *(f"{perplexity(model, tokens, device):.2f}" for tokens in texts))
    for name, tokens in sources.items():
        reduced = reduce(model, tokens, dimensions, device, 1 << 40).model
        table.add_row(name, *(f"{perplexity(reduced, eval_tokens, device):.2f}" for eval_tokens in texts))
    Console().print(table)


if __name__ == "__main__":
    main()

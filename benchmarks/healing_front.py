"""Is a reduced, healed and rounded file better than any of llama-quantize's that is as small? Bytes against perplexity.

    python -m benchmarks.healing_front --healed FILE… --calib valid.txt --text test.raw.txt --programs BIN --work DIR

Plain files are of the demo model that the healed ones come from, made by llama-quantize with an importance matrix from
64 × 1024 tokens of `--calib`; each once as llama-quantize would have it, and once with the embedding at Q4_0, which
makes smaller files. The demo file is Q4_1 already, so that as Q4_1 it loses nothing. Perplexity is over all
positions of the first 8 × 1024 tokens of `--text`, in a3q's forward pass. `healing-front.md` is written to `--work`,
where made files stay.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from a3q.model import pick_device
from benchmarks.common import perplexity, windows
from benchmarks.quantization_measure import contents, run
from converters.gguf_writer import write_gguf
from converters.open import open_model
from converters.types import resolve_quant

TYPES = ("iq1_s", "iq2_xxs", "iq3_xxs", "q2_k", "q3_k_s", "q3_k_m", "q4_0", "iq4_nl", "q4_1", "q4_k_m", "q5_0")
EMBEDDINGS = (None, "q4_0")
CHUNKS = 64


@dataclass(frozen=True)
class Row:
    """One file."""

    name: str
    bytes: int
    perplexity: float
    matrices: str


def plain_files(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """llama-quantize's, by name; those that are there are not made again."""
    original: Path = args.work / "original-F16.gguf"
    if not original.exists():
        write_gguf(open_model(None), resolve_quant("f16"), original)
    matrix = args.work / "original-imatrix.gguf"
    if not matrix.exists():
        part = matrix.with_suffix(".part.gguf")
        sizes = ["-c", "1024", "--chunks", str(CHUNKS), "-t", str(args.threads)]
        run([args.programs / "llama-imatrix", "-m", original, "-f", args.calib, "-o", part, "--no-ppl", *sizes])
        part.replace(matrix)
    found = []
    for kind in TYPES:
        for embedding in EMBEDDINGS:
            path = args.work / f"front-{kind}-{embedding or 'as-is'}.gguf"
            if not path.exists():
                part = path.with_suffix(".part")
                options = ["--token-embedding-type", embedding] if embedding else []
                command = [args.programs / "llama-quantize", "--imatrix", matrix, *options]
                run([*command, original, part, kind.upper(), str(args.threads)])
                part.replace(path)
            found.append((f"{kind}{', embedding q4_0' if embedding else ''}", path))
    return found


def table(rows: list[Row], healed: set[str]) -> list[str]:
    """Markdown by size; a file is on the front where none that is as small is better."""
    lines = ["| file | MB | perplexity | front | matrices |", "| --- | ---: | ---: | --- | --- |"]
    for row in sorted(rows, key=lambda row: (row.bytes, row.perplexity)):
        better = [one for one in rows if one.bytes <= row.bytes and one.perplexity < row.perplexity]
        who = "a3q" if row.name in healed else "llama-quantize --imatrix"
        front = "" if better else "yes"
        lines.append(f"| {who}: {row.name} | {row.bytes / 1e6:.1f} | {row.perplexity:.2f} | {front} | {row.matrices} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--healed", type=Path, nargs="+", required=True)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--programs", type=Path, required=True, help="folder of llama-quantize and llama-imatrix")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2, help="of llama.cpp's programs")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    device = pick_device(args.device)
    rows = []
    healed = [(path.stem, path) for path in args.healed]
    for name, path in [*healed, *plain_files(args)]:
        size, matrices = contents(path)
        model = open_model(path)
        rows.append(Row(name, size, perplexity(model, windows(model, args.text, 8), device), matrices))
        print(f"{name:24s} {size / 1e6:7.1f} MB  {rows[-1].perplexity:.2f}  {matrices}", flush=True)
    lines = table(rows, {name for name, _ in healed})
    (args.work / "healing-front.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

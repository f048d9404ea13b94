"""Smaller heads and a rounded KV cache together: bytes, perplexity and speed in llama.cpp, and perplexity by position.

    python -m benchmarks.kv_cache [--calib valid.txt] [--text test.raw.txt] [--calib-tokens 32768] [--work DIR] …

The demo model as it is, and with keys and values reduced by 25 % and 50 % (heads of 64, 48 and 32), all F16 files;
those in `--work` from an earlier run are used again. Each with a cache of f16, q8_0 and q4_0:

- bytes of the cache for a token, from llama.cpp's own report;
- perplexity with llama-perplexity's windows (the second half of each counts), of `--tokens` tokens in windows of 512
  and of 4096, and its ratio to the original's with f16;
- tokens per second generated in an empty context and behind `--fill` tokens: files in turn, medians of `--rounds`.

Then perplexity by position in `--windows` windows of 8192 tokens, the model's trained context, with f16: were the RoPE
frequencies that all heads share after the reduction worse the further a query looks back, its ratio to the original's
would grow. Writes kv_cache.csv, kv_cache-positions.csv, kv_cache.md and kv_cache.png to `--results`.
"""

from __future__ import annotations

import argparse
import csv
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import a3q
from a3q.errors import VerifyError
from a3q.footprint import CACHE_TYPES
from a3q.perplexity import chunk_tokens, evaluate_runtime, read_text, token_nll
from a3q.runtime import LlamaRuntime, usable_cores, version
from benchmarks.kv_cache_plot import plot
from converters.gguf_reader import check_gguf

DATA = Path("../shared/data/wikitext-2")
REDUCED = {"25 %": 0.25, "50 %": 0.5}
ORIGINAL = "original"
EDGES = (0, 256, 512, 1024, 2048, 4096, 6144, 8192)
"""Of the buckets of positions."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    contexts: tuple[int, ...] = (512, 4096)
    tokens: int = 16384
    fill: int = 4096
    generate: int = 64
    rounds: int = 3
    window: int = 8192
    windows: int = 8


QUICK = Sizes((512, 1024), 2048, fill=1024, generate=16, rounds=1, window=8192, windows=1)


@dataclass(frozen=True)
class Row:
    """One file with one type of cache."""

    file: str
    head: int
    cache: str
    bytes_per_token: float = math.nan
    perplexity: tuple[float, ...] = ()
    """For each context."""
    empty_speed: float = math.nan
    filled_speed: float = math.nan
    error: str = ""
    """Why it does not start, in llama.cpp's words."""


@dataclass(frozen=True)
class Bucket:
    """Positions `begin … end − 1` of all windows, of one file."""

    file: str
    begin: int
    end: int
    perplexity: float
    ratio: float
    """To the original's."""
    ratio_error: float
    """Standard error of `ratio`, from the differences token by token."""


def write_models(work: Path, calib: Path, calib_tokens: int) -> dict[str, Path]:
    """The F16 files by name, the original first."""
    files = {ORIGINAL: work / "original.gguf", **{name: work / f"kv{int(name[:2])}.gguf" for name in REDUCED}}
    for name, path in files.items():
        if path.exists():
            continue
        how: dict[str, Any] = {"kv_ratio": REDUCED[name]} if name in REDUCED else {"ratio": 0.0}
        a3q.convert(None, quant="f16", output=path, calib=str(calib), calib_tokens=calib_tokens, **how)
    return files


def measure(files: Mapping[str, Path], text: str, sizes: Sizes, n_threads: int | None = None) -> list[Row]:
    """Every file with every type of cache; the runtimes of a type are open at the same time, for speeds in turn."""
    n_ctx = max(*sizes.contexts, sizes.fill + sizes.generate)
    # Ten characters a token are more than any text here needs; a whole corpus would take long to tokenize.
    text = text[: 10 * sizes.tokens]
    heads = {name: check_gguf(path).config.layers[0].qk_head_dim for name, path in files.items()}
    rows = []
    for cache in CACHE_TYPES:
        errors: dict[str, str] = {}
        with ExitStack() as stack:
            opened = {}
            for name, path in files.items():
                try:
                    opened[name] = stack.enter_context(LlamaRuntime(path, n_ctx, n_threads, cache_type=cache))
                except VerifyError as error:
                    errors[name] = str(error).rpartition(": ")[2]
            speeds = _speeds(opened, sizes)
            for name in files:
                if name in errors:
                    rows.append(Row(name, heads[name], cache, error=errors[name]))
                    continue
                runtime = opened[name]
                perplexity = tuple(
                    evaluate_runtime(runtime, text, n, max(1, sizes.tokens // n)).value for n in sizes.contexts
                )
                empty, filled = map(median, speeds[name])
                per_token = runtime.memory.kv_bytes_per_token
                row = Row(name, heads[name], cache, per_token, perplexity, empty, filled)
                rows.append(row)
                print(row, flush=True)
    return rows


def _speeds(opened: Mapping[str, LlamaRuntime], sizes: Sizes) -> dict[str, tuple[list[float], list[float]]]:
    """Of each file, in an empty and in a filled context."""
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in opened}
    for _ in range(sizes.rounds):
        for name, runtime in opened.items():
            for speeds, after in zip(found[name], (0, sizes.fill), strict=True):
                speeds.append(runtime.generation_speed(sizes.generate, after))
    return found


def by_position(files: Mapping[str, Path], text: str, sizes: Sizes, n_threads: int | None = None) -> list[Bucket]:
    """Perplexity in buckets of positions, of each file with an f16 cache; the first file is the original."""
    losses: dict[str, Tensor] = {}
    for name, path in files.items():
        with LlamaRuntime(path, sizes.window, n_threads) as runtime:
            losses[name] = _losses(runtime, text[: 10 * sizes.window * sizes.windows], sizes)
    original = losses[next(iter(files))]
    edges = [edge for edge in EDGES if edge < sizes.window] + [sizes.window]
    buckets = []
    for name, found in losses.items():
        for begin, end in pairwise(edges):
            # The first token of a window is predicted by none.
            where = slice(max(begin, 1) - 1, end - 1)
            change = (found - original)[:, where].flatten()
            ratio = math.exp(change.mean())
            error = ratio * float(change.std()) / math.sqrt(len(change))
            buckets.append(Bucket(name, begin, end, math.exp(found[:, where].mean()), ratio, error))
    return buckets


def _losses(runtime: LlamaRuntime, text: str, sizes: Sizes) -> Tensor:
    """Negative log-likelihood of every token but each window's first, float64 `[windows, window − 1]`."""
    bos_id = runtime.bos_id if runtime.add_bos else None
    found = []
    for window in chunk_tokens(runtime.tokenize(text), sizes.window, bos_id, sizes.windows):
        targets = window[1:]
        pieces = []
        for piece in runtime.logits_chunks(window[:-1].tolist()):
            pieces.append(token_nll(torch.from_numpy(piece), targets[: len(piece)]))
            targets = targets[len(piece) :]
        found.append(torch.cat(pieces))
    return torch.stack(found)


def caches_table(rows: Sequence[Row], sizes: Sizes) -> Iterator[str]:
    """Markdown: perplexity and bytes against the original's with f16, speed against the original's with that cache."""
    base = rows[0]
    titles = ["KV cache bytes a token", *(f"perplexity at {n}" for n in sizes.contexts)]
    titles += ["tokens/s, empty", f"behind {sizes.fill}"]
    yield f"| keys and values | head | cache | {' | '.join(titles)} |"
    yield "| --- | ---: | --- |" + " ---: |" * len(titles)
    for row in rows:
        start = f"| {row.file} | {row.head} | {row.cache} |"
        if row.error:
            yield f"{start} does not start: {row.error} |{' |' * (len(titles) - 1)}"
            continue
        beside = next(one for one in rows if one.cache == row.cache and not one.error)
        cells = [f"{row.bytes_per_token:.0f} ({row.bytes_per_token / base.bytes_per_token:.0%})"]
        for mine, first in zip(row.perplexity, base.perplexity, strict=True):
            cells.append(f"{mine:.3f} ({mine / first:.4f}×)")
        for speed, first in ((row.empty_speed, beside.empty_speed), (row.filled_speed, beside.filled_speed)):
            cells.append(f"{speed:.1f} ({speed / first:.2f}×)")
        yield f"{start} {' | '.join(cells)} |"


def positions_table(buckets: Sequence[Bucket]) -> Iterator[str]:
    """Markdown: buckets down, files across."""
    names = list(dict.fromkeys(bucket.file for bucket in buckets))
    yield f"| positions | {' | '.join(names)} |"
    yield "| --- |" + " ---: |" * len(names)
    for begin, end in dict.fromkeys((bucket.begin, bucket.end) for bucket in buckets):
        cells = []
        for bucket in (one for one in buckets if one.begin == begin):
            ratio = "" if bucket.file == names[0] else f" ({bucket.ratio:.4f} ± {bucket.ratio_error:.4f}×)"
            cells.append(f"{bucket.perplexity:.3f}{ratio}")
        yield f"| {begin} to {end} | {' | '.join(cells)} |"


def write_results(folder: Path, rows: Sequence[Row], buckets: Sequence[Bucket], sizes: Sizes, title: str) -> str:
    """Write the tables and the figure, and return the tables' text."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(folder / "kv_cache.csv", (_flat(row, sizes) for row in rows))
    _write_csv(folder / "kv_cache-positions.csv", map(asdict, buckets))
    text = "\n".join([title, "", *caches_table(rows, sizes), "", *positions_table(buckets), ""])
    (folder / "kv_cache.md").write_text(text, encoding="utf-8")
    plot(rows, buckets, sizes.contexts, folder / "kv_cache.png")
    return text


def _flat(row: Row, sizes: Sizes) -> dict[str, object]:
    cells = asdict(row)
    perplexity = cells.pop("perplexity")
    error = cells.pop("error")
    return cells | {f"perplexity_{n}": x for n, x in zip(sizes.contexts, perplexity, strict=False)} | {"error": error}


def _write_csv(path: Path, rows: Iterable[dict[str, object]]) -> None:
    rows = list(rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calib", type=Path, default=DATA / "valid.txt")
    parser.add_argument("--text", type=Path, default=DATA / "test.raw.txt")
    parser.add_argument("--calib-tokens", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--fill", type=int)
    parser.add_argument("--generate", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--quick", action="store_true", help="little of everything, to see that it works")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--work", type=Path, help="keep the files here")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    names = ("tokens", "fill", "generate", "rounds", "windows")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    sizes = Sizes(**asdict(QUICK if args.quick else Sizes()) | given)
    calib_tokens = args.calib_tokens or (4096 if args.quick else 32 * 1024)

    text = read_text(args.text)
    with nullcontext(args.work) if args.work else tempfile.TemporaryDirectory() as work:
        Path(work).mkdir(parents=True, exist_ok=True)
        files = write_models(Path(work), args.calib, calib_tokens)
        rows = measure(files, text, sizes, args.threads)
        buckets = by_position(files, text, sizes, args.threads)
    title = (
        f"SmolLM2-135M-Instruct, {calib_tokens} tokens of calibration; {version()}, {args.threads} threads. Windows of "
        f"{', '.join(map(str, sizes.contexts))} over {sizes.tokens} tokens; medians of {sizes.rounds} × "
        f"{sizes.generate} tokens; positions in {sizes.windows} × {sizes.window} tokens."
    )
    print(write_results(args.results, rows, buckets, sizes, title))


if __name__ == "__main__":
    main()

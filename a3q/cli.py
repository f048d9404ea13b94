"""The command line: parses, calls the pipeline, prints, and turns errors into one line and an exit code."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from a3q.errors import InputError, VerifyError

# Read when PyTorch loads its OpenMP. Threads that spin while they wait take the core from the one that they wait for
# as soon as anything else runs on the machine: on two cores with one busy, text was written 13 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    help="Make language models smaller with A3 and run them in stock llama.cpp and Ollama.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_errors = Console(stderr=True)
_output = Console()

_Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


@app.command()
def convert(
    model: Annotated[
        str | None, typer.Argument(help="Hugging Face folder, GGUF file or hub name; left out: the demo model.")
    ] = None,
    ratio: Annotated[
        float, typer.Option(help="Share of the reduced components' parameters that goes, 0 to 0.9.")
    ] = 0.25,
    quant: Annotated[str, typer.Option(help="f16, bf16, 8bit, 4bit or a GGUF type such as q4_1.")] = "4bit",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="GGUF to write.")] = None,
    calib: Annotated[
        list[str] | None,
        typer.Option(help="Calibration text: 'self' (default), a .txt or .jsonl file, or a data set; may be repeated."),
    ] = None,
    calib_tokens: Annotated[
        int | None, typer.Option(help="Calibration tokens; default 40 × 1024, on a GPU 128 × 2048.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the text the model writes itself.")] = 0,
    device: _Device = "auto",
    verify: Annotated[bool, typer.Option(help="Check the file in llama.cpp.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    pre: Annotated[
        str | None, typer.Option(help="llama.cpp's name of the pre-tokenizer, where a3q cannot tell.")
    ] = None,
) -> None:
    """Reduce a model, write it as GGUF, and check the file in llama.cpp."""
    from a3q import convert as run
    from a3q.progress import shown_on
    from a3q.report import render

    result = run(
        model,
        ratio=ratio,
        quant=quant,
        output=output,
        calib=calib or ["self"],
        calib_tokens=calib_tokens,
        seed=seed,
        device=device,
        verify_file=verify,
        force=force,
        pre=pre,
        stages=shown_on(_errors),
    )
    _output.print(render(result))


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="GGUF file or Hugging Face folder.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
) -> None:
    """Show architecture, dimensions, types, sizes, KV cache bytes and provenance."""
    from a3q.inspect import inspect_file, render

    _output.print(render(inspect_file(file), list_tensors=tensors))


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="GGUF file or Hugging Face folder.")],
    text: Annotated[Path, typer.Option(help="Text file to score.")],
    ctx: Annotated[int, typer.Option(help="Tokens per window, as llama-perplexity's -c.")] = 512,
    chunks: Annotated[int | None, typer.Option(help="Score only the first windows.")] = None,
    device: _Device = "auto",
    pre: Annotated[str | None, typer.Option(help="llama.cpp's name of the pre-tokenizer.")] = None,
) -> None:
    """Measure perplexity with llama-perplexity's windowing."""
    from a3q.model import pick_device
    from a3q.perplexity import Perplexity, read_text
    from a3q.perplexity import evaluate as run
    from a3q.progress import shown_on
    from converters.open import open_model

    content = read_text(text)
    opened = open_model(model, pre)
    with shown_on(_errors)("perplexity", 1.0) as advance:
        done = 0

        def progress(so_far: Perplexity, total: int) -> None:
            nonlocal done
            advance((so_far.chunks - done) / total)
            done = so_far.chunks

        result = run(opened, content, ctx, chunks, device=pick_device(device), on_progress=progress)
    _output.print(
        f"perplexity {result.value:.4f} ± {result.stderr:.4f} "
        f"({result.tokens_scored:,} tokens scored, {result.chunks} windows of {ctx})"
    )


def main() -> None:
    """Entry point of `a3q` and `python -m a3q`: exit code 2 for bad input, 1 for a file that failed its checks."""
    try:
        app()
    except InputError as error:
        _errors.print(f"a3q: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except VerifyError as error:
        _errors.print(f"a3q: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)

"""The command line: parses, calls the pipeline, prints, and turns errors into one line and an exit code."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from a3q.errors import InputError, VerifyError

if TYPE_CHECKING:
    from a3q.families import Component

# Read when PyTorch loads its OpenMP. Threads that spin while they wait take the core from the one that they wait for
# as soon as anything else runs on the machine: on two cores with one busy, text was written 13 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    help="Make language models smaller with A3 and run them in stock llama.cpp and Ollama, or in PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_errors = Console(stderr=True)
_output = Console()

_Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
_Model = Annotated[
    str | None, typer.Argument(help="Hugging Face folder, GGUF file or hub name; left out: the demo model.")
]
_Ratio = Annotated[float, typer.Option(help="Share of the reduced components' parameters that goes, 0 to 0.9.")]
_OwnRatio = Annotated[float | None, typer.Option(help="This component's own share, apart from --ratio.")]
_Components = Annotated[str | None, typer.Option(help="What to reduce, of qk,ov,mlp; all the output can hold.")]
_Ranks = Annotated[
    str | None,
    typer.Option(help="mixed (default): layers and components shrink by how little they matter; uniform: all alike."),
]
_Method = Annotated[str, typer.Option(help="a3q, or paper: A3 as published, all layers alike, for comparison.")]
_Calib = Annotated[
    list[str] | None,
    typer.Option(help="Calibration text: 'self' (default), a .txt or .jsonl file, or a data set; may be repeated."),
]
_CalibTokens = Annotated[int | None, typer.Option(help="Calibration tokens; default 40 × 1024, on a GPU 128 × 2048.")]
_Seed = Annotated[int, typer.Option(help="Of the text the model writes itself.")]
_Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
_Pre = Annotated[str | None, typer.Option(help="llama.cpp's name of the pre-tokenizer, where a3q cannot tell.")]


def _own(qk: float | None, ov: float | None, mlp: float | None) -> dict[Component, float]:
    """Components that were given a ratio of their own."""
    given: dict[Component, float | None] = {"QK": qk, "OV": ov, "MLP": mlp}
    return {component: ratio for component, ratio in given.items() if ratio is not None}


@app.command()
def convert(
    model: _Model = None,
    ratio: _Ratio = 0.25,
    quant: Annotated[
        str, typer.Option(help="2bit, 3bit, 4bit, 5bit, 6bit, 8bit, f16, or a type of llama.cpp such as Q4_K_M, Q4_0.")
    ] = "4bit",
    quantizer: Annotated[
        str | None,
        typer.Option(help="gptq (default): error feedback; rtn: to the nearest, by importance; plain: no calibration."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where a tensor does not fit its type.")] = False,
    bits: Annotated[
        float | None, typer.Option(help="Choose types of this many bits per weight in the mean, by predicted loss.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Choose types for a file of at most this size, as 80MB.")] = None,
    output_tensor_type: Annotated[str | None, typer.Option(help="Type of the output, and of a tied embedding.")] = None,
    token_embedding_type: Annotated[str | None, typer.Option(help="Type of the embedding.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="GGUF to write.")] = None,
    components: _Components = None,
    ratio_qk: _OwnRatio = None,
    ratio_ov: _OwnRatio = None,
    ratio_mlp: _OwnRatio = None,
    ranks: _Ranks = None,
    method: _Method = "a3q",
    calib: _Calib = None,
    calib_tokens: _CalibTokens = None,
    seed: _Seed = 0,
    device: _Device = "auto",
    verify: Annotated[bool, typer.Option(help="Check the file in llama.cpp.")] = True,
    force: _Force = False,
    pre: _Pre = None,
) -> None:
    """Reduce a model, quantize it, write it as GGUF, and check the file in llama.cpp."""
    from a3q import convert as run
    from a3q.pipeline import parse_components, parse_size
    from a3q.progress import shown_on
    from a3q.report import render

    result = run(
        model,
        ratio=ratio,
        quant=quant,
        quantizer=quantizer,
        strict=strict,
        bits=bits,
        size=None if size is None else parse_size("--size", size),
        output_tensor_type=output_tensor_type,
        token_embedding_type=token_embedding_type,
        output=output,
        components=parse_components(components),
        own_ratios=_own(ratio_qk, ratio_ov, ratio_mlp),
        ranks=ranks,
        method=method,
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
def reduce(
    model: _Model = None,
    ratio: _Ratio = 0.25,
    dtype: Annotated[
        str | None, typer.Option(help="Type of the weights: bf16, f16 or f32; bf16, beside quantized ones f16.")
    ] = None,
    quant: Annotated[str | None, typer.Option(help="Quantize the layers: 2bit, 4bit or 8bit.")] = None,
    format_: Annotated[str | None, typer.Option("--format", help="Of quantized weights: gptq (default).")] = None,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale: 128, 64 or 32.")] = 128,
    asym: Annotated[bool, typer.Option("--asym", help="Quantize with zero points.")] = False,
    quantizer: Annotated[
        str | None, typer.Option(help="gptq (default): error feedback; rtn: to the nearest, by importance.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write.")] = None,
    components: _Components = None,
    ratio_qk: _OwnRatio = None,
    ratio_ov: _OwnRatio = None,
    ratio_mlp: _OwnRatio = None,
    ranks: _Ranks = None,
    method: _Method = "a3q",
    frequencies: Annotated[
        str,
        typer.Option(help="per_head: each key head its own RoPE frequencies; shared: one list, for a GGUF."),
    ] = "per_head",
    calib: _Calib = None,
    calib_tokens: _CalibTokens = None,
    seed: _Seed = 0,
    device: _Device = "auto",
    verify: Annotated[bool, typer.Option(help="Check the folder in transformers.")] = True,
    force: _Force = False,
    pre: _Pre = None,
) -> None:
    """Reduce a model and write it as a Hugging Face folder, which transformers runs after `import a3q`."""
    from a3q import reduce_to_folder
    from a3q.pipeline import parse_components
    from a3q.progress import shown_on
    from a3q.report import render

    result = reduce_to_folder(
        model,
        ratio=ratio,
        dtype=dtype,
        quant=quant,
        format=format_,
        group_size=group_size,
        symmetric=not asym,
        quantizer=quantizer,
        output=output,
        components=parse_components(components),
        own_ratios=_own(ratio_qk, ratio_ov, ratio_mlp),
        ranks=ranks,
        method=method,
        frequencies=frequencies,
        calib=calib or ["self"],
        calib_tokens=calib_tokens,
        seed=seed,
        device=device,
        verify_output=verify,
        force=force,
        pre=pre,
        stages=shown_on(_errors),
    )
    _output.print(render(result))


@app.command()
def imatrix(
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    model: _Model = None,
    calib: _Calib = None,
    calib_tokens: _CalibTokens = None,
    seed: _Seed = 0,
    device: _Device = "auto",
    force: _Force = False,
    pre: _Pre = None,
) -> None:
    """Measure how strongly a model uses each input of its matrices, for llama-quantize --imatrix."""
    from a3q.progress import shown_on
    from a3q.report import megabytes
    from a3q.to_imatrix import write_imatrix_for

    result = write_imatrix_for(
        model,
        output=output,
        calib=calib or ["self"],
        calib_tokens=calib_tokens,
        seed=seed,
        device=device,
        force=force,
        pre=pre,
        stages=shown_on(_errors),
    )
    _output.print(
        f"wrote {result.path} ({megabytes(result.size)}): {result.tensors} tensors, {result.tokens:,} tokens "
        f"({result.description})",
        soft_wrap=True,
    )


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

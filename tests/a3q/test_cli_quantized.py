"""What the command line prints where it quantizes, and the importances that it writes."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from typer.testing import CliRunner, Result

from a3q.cli import app
from a3q.errors import InputError
from a3q.inspect import inspect_file
from tests.pico import corpus, write_model

QUICK = ("--calib-tokens", "1024", "--device", "cpu", "--calib", "text.txt")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose rows fit the K types, and a text."""
    folder = tmp_path_factory.mktemp("quantized")
    write_model(folder / "pico", hidden_size=256, intermediate_size=512)
    (folder / "text.txt").write_text("\n".join(corpus(200, seed=3)))
    return folder


@pytest.fixture(autouse=True)
def _here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "160")


def a3q(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def printed(*arguments: object) -> str:
    """What a command that goes well prints, every white space one space."""
    done = a3q(*arguments)
    assert done.exit_code == 0, done.exception
    return " ".join(done.output.split())


def test_four_bits(place: Path) -> None:
    shown = printed("convert", "pico", "--ratio", 0, "--quant", "4bit", *QUICK)
    for part in (
        "original → rounded → written",
        "quantization (gptq), 4.95 bits per weight",
        "│ v │ 1 Q4_K, 1 Q6_K │",
        "calibrated on 4 × 256 tokens of text.txt",
        "│ Q4_K_M │",
        "wrote pico-Q4_K_M.gguf",
    ):
        assert part in shown, part
    facts = inspect_file(place / "pico-Q4_K_M.gguf").provenance
    assert (facts["quantization"], facts["quantizer"]) == ("q4_k_m", "gptq")


def test_a_size(place: Path) -> None:
    shown = printed("convert", "pico", "--ratio", 0, "--size", "0.8 MB", *QUICK, "--no-verify")
    assert (place / "pico-mixed.gguf").stat().st_size <= 800_000
    for part in ("types under 0.8 MB:", "wrote pico-mixed.gguf (0.8 MB)", "weigh the matrices"):
        assert part in shown, part


def test_bits(place: Path) -> None:
    options = ("--quantizer", "plain", "--output", "m.gguf", "--no-verify")
    shown = printed("convert", "pico", "--ratio", 0, "--bits", 3.5, *QUICK, *options)
    assert "original → written" in shown
    assert "quantization (plain), 3.5" in shown
    assert "3.5bpw" in shown


def test_ends(place: Path) -> None:
    options = ("--quant", "Q3_K_S", "--output-tensor-type", "Q5_K", "--token-embedding-type", "iq4_nl", "--no-verify")
    shown = printed("convert", "pico", "--ratio", 0.25, "--ranks", "uniform", *options, *QUICK)
    assert "original → reduced, rounded → written" in shown
    assert "│ embed │ 1 IQ4_NL" in shown
    assert "│ output │ 1 Q5_K" in shown
    assert (place / "pico-a3q25-Q3_K_S.gguf").is_file()


def test_importances(place: Path) -> None:
    shown = printed("imatrix", "pico", "-o", "m.imatrix.gguf", *QUICK)
    # Seven matrices in each of two layers, and the output.
    assert "wrote m.imatrix.gguf (" in shown
    assert "15 tensors, 1,024 tokens (4 × 256 tokens of text.txt)" in shown
    assert gguf.GGUFReader(place / "m.imatrix.gguf").fields["general.type"].contents() == "imatrix"
    again = a3q("imatrix", "pico", "-o", "m.imatrix.gguf", *QUICK)
    assert isinstance(again.exception, InputError)
    assert "exists already; use --force" in str(again.exception)
    assert a3q("imatrix", "pico").exit_code == 2

"""The closing table: every number that a run ends with, in words that fit a terminal."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from a3q import Result, convert, reduce_to_folder, runtime
from a3q.report import megabytes, render, sizes
from tests.pico import corpus, write_model

CALIB: dict[str, Any] = {"calib_tokens": 1024, "device": "cpu"}
needs_llama_cpp = pytest.mark.skipif(not runtime.available(), reason="llama.cpp is not installed")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    (folder / "text.txt").write_text("\n".join(corpus(200, seed=7)))
    return write_model(folder / "pico", intermediate_size=320)


@pytest.fixture(scope="module")
def mixed(source: Path) -> Result:
    """Mixed ranks as a folder, verified."""
    text = str(source.with_name("text.txt"))
    return reduce_to_folder(source, output=source.with_name("mixed"), calib=text, **CALIB)


@pytest.fixture(scope="module")
def tried(source: Path) -> Result:
    """Candidates tried, not verified."""
    text, path = str(source.with_name("text.txt")), source.with_name("tried.gguf")
    return convert(source, output=path, calib=text, ranks="uniform", verify_file=False, **CALIB)


def shown(result: Result, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(render(result))
    return console.export_text()


def words(result: Result) -> str:
    """What is printed, every white space one space."""
    return " ".join(shown(result).split())


def test_sizes_in_units_that_people_read() -> None:
    assert [megabytes(n) for n in (0, 123_456, 999.9e6, 1e9, 12.34e9)] == [
        "0.0 MB", "0.1 MB", "999.9 MB", "1.00 GB", "12.34 GB",
    ]  # fmt: skip


def test_ranges() -> None:
    assert (sizes([8, 8]), sizes([8, 4, 6])) == ("8", "4 to 8")


def test_mixed(mixed: Result) -> None:
    text, plan = words(mixed), mixed.job.plan
    heads = [one.v_head_dim for one in plan.dimensions]
    units = [one.intermediate_size for one in plan.dimensions]
    assert mixed.verification is not None
    for part in (
        "reduction, 25.0% of the components asked",
        sizes(heads),
        sizes(units),
        f"{plan.achieved:.1%}",
        f"{mixed.original.parameters():,}",
        f"{mixed.reduced.parameters():,}",
        "calibrated on 4 × 256 tokens of text.txt",
        "sizes chosen by what each layer's components cost when reduced alone (--ranks mixed)",
        "BF16",
        f"{mixed.verification.written.perplexity.value:.2f} ±",
        f"{mixed.verification.written.kl:.4f}",
        "transformers loads it and is",
        f"wrote {mixed.path} (",
        "verify in transformers",
    ):
        assert part in text, part
    assert "None" not in text
    assert "llama.cpp" not in text


def test_candidates(tried: Result) -> None:
    text = words(tried)
    assert len(tried.job.tried) == 2
    for plan, kl in tried.job.tried:
        one, verdict = plan.dimensions[0], "chosen" if plan == tried.job.plan else "not chosen"
        said = f"head size {one.qk_head_dim}, MLP size {one.intermediate_size}: KL {kl:.3f} in a trial, {verdict}"
        assert said in text
    assert "not measured" in text
    assert "--ranks mixed" not in text
    assert "None" not in text


def test_notes(tried: Result) -> None:
    assert "note: [b]mind[/b] this" in words(replace(tried, notes=("[b]mind[/b] this",)))


def test_nothing_reduced(source: Path) -> None:
    result = convert(source, ratio=0, output=source.with_name("plain.gguf"), verify_file=False, **CALIB)
    assert "reduction" not in words(result)
    assert f"wrote {result.path}" in words(result)


def test_some_components_are_named(source: Path) -> None:
    text = str(source.with_name("text.txt"))
    result = reduce_to_folder(
        source, output=source.with_name("some"), components={"QK", "MLP"}, calib=text, verify_output=False, **CALIB
    )
    assert "QK and MLP" in words(result)
    assert "all components" not in words(result)


@needs_llama_cpp
def test_llama_cpp_is_named(source: Path) -> None:
    text = str(source.with_name("text.txt"))
    result = convert(source, output=source.with_name("llama.gguf"), calib=text, quant="f16", **CALIB)
    assert "llama.cpp loads it, splits text as the source does, and is" in words(result)


def test_fits_a_terminal(mixed: Result, tried: Result) -> None:
    for result in (mixed, tried):
        assert all(len(line) <= 80 for line in shown(result, 80).splitlines())
        # Numbers are whole at that width.
        assert "…" not in shown(result, 80)

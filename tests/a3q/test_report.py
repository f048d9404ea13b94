"""The closing table: every number that a run ends with, in words that fit a terminal."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from rich.console import Console

from a3q import Result, convert, reduce_to_folder, runtime
from a3q.report import render
from a3q.units import clock, count, megabytes, span
from tests.healed import healed
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


def test_counts_and_times() -> None:
    assert [count(n) for n in (0, 999, 999.7, 4100, 26_214_400, 6.5e6, 1e9, 2e12)] == [
        "0", "999", "1k", "4.1k", "26.2M", "6.5M", "1G", "2T",
    ]  # fmt: skip
    assert [clock(s) for s in (0, 9.6, 250, 3599.4, 3599.5, 3725)] == [
        "0:00", "0:10", "4:10", "59:59", "1:00:00", "1:02:05",
    ]  # fmt: skip


def test_ranges() -> None:
    assert (span([8, 8]), span([8, 4, 6])) == ("8", "4 to 8")


def test_mixed(mixed: Result) -> None:
    text, plan = words(mixed), mixed.job.plan
    heads = [one.v_head_dim for one in plan.dimensions]
    units = [one.intermediate_size for one in plan.dimensions]
    assert mixed.verification is not None
    for part in (
        "reduction, 25.0% of the components asked",
        span(heads),
        span(units),
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


def test_what_was_done_in_memory(source: Path, mixed: Result, tried: Result) -> None:
    assert "original → reduced → written" in words(mixed)
    assert "original → reduced, rounded → written" in words(tried)
    options: dict[str, Any] = {"ratio": 0, "quant": "q4_0", "verify_file": False, "calib": text_of(source)}
    rounded = convert(source, output=source.with_name("rounded.gguf"), **options, **CALIB)
    assert "original → rounded → written" in words(rounded)
    assert "│ rounded │" in words(rounded)
    plain = convert(source, output=source.with_name("unrounded.gguf"), quantizer="plain", **options, **CALIB)
    assert "original → written" in words(plain)
    assert "in memory" not in words(plain)


def text_of(source: Path) -> str:
    return str(source.with_name("text.txt"))


def test_healing(mixed: Result, tried: Result) -> None:
    assert "healed" not in words(mixed)
    text = words(healed(mixed, source="self"))
    for part in (
        "original → reduced, healed → written",
        "healed layer by layer: mean relative distance of the layers' outputs 2.50% → 2.00% on text they had not seen; "
        "1 of 2 did not gain ",
        "healed end to end on 26.2M tokens (6.5M different ones, written by the model itself) in 4:10: KL to the "
        "original 0.297 → 0.112 on text it had not seen ",
        "healed with rounding in the loop on 1M tokens (all different, written by the model itself) in 0:21: KL to the "
        "original 0.200 → 0.150 on text it had not seen ",
    ):
        assert part in text, part
    assert "original → reduced, healed, rounded → written" in words(healed(tried))
    assert "(6.5M different ones, of [b]my[/b].txt)" in words(healed(tried, source="[b]my[/b].txt"))
    text = words(healed(mixed, blocks=False))
    assert "layer by layer" not in text
    assert text.count("healed end to end") == 1
    text = words(healed(mixed, phases=0))
    assert "layer by layer" in text
    assert "on text it had" not in text
    assert "KL to the original unknown → 0.112" in words(healed(mixed, before=float("nan")))


def test_quantization(tried: Result, mixed: Result) -> None:
    rounding, text = tried.rounding, words(tried)
    assert rounding is not None
    assert f"quantization (gptq), {rounding.bits_per_weight:.2f} bits per weight" in text
    assert rounding.types["q"] == {rounding_type(tried, "blk.0.attn_q.weight"): 2}
    assert f"│ q │ 2 {next(iter(rounding.types['q']))} │ {rounding.losses['q']:.2%} │" in text
    # Outside the layers the loss is not measured.
    assert rounding.types["output"] == {"Q8_0": 1}
    assert "│ output │ 1 Q8_0 │ │" in text
    several = replace(rounding, quantizer="rtn", types={"v": {"Q4_K": 1, "Q6_K": 29}}, losses={"v": 0.0123, "o": 0.5})
    text = words(replace(tried, rounding=several))
    for part in ("quantization (rtn)", "│ v │ 29 Q6_K, 1 Q4_K │ 1.23% │", "│ o │ │ 50.00% │"):
        assert part in text, part
    assert "output energy lost" not in words(replace(tried, rounding=replace(several, losses={})))
    assert "their types" not in words(replace(tried, rounding=replace(several, types={})))
    assert "quantization" not in words(mixed)


def rounding_type(result: Result, name: str) -> str:
    return next(tensor.tensor_type.name for tensor in gguf.GGUFReader(result.path).tensors if tensor.name == name)


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
    for result in (mixed, tried, healed(tried)):
        assert all(len(line) <= 80 for line in shown(result, 80).splitlines())
        # Numbers are whole at that width.
        assert "…" not in shown(result, 80)

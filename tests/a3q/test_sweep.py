"""Sweeps: which files none beats, what is said about reduction, and a whole one on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from a3q import InputError, sweep
from a3q.perplexity import Perplexity
from a3q.sweep_results import HEADINGS, Measured, Sweep, markdown, rows
from a3q.sweeps import parse_ratios
from converters.gguf_reader import check_gguf
from tests.a3q.stages import Recorded
from tests.pico import corpus, write_model


def point(size: int, perplexity: float, ratio: float = 0.0, **values: Any) -> Measured:
    speed = values.pop("speed", 100.0)
    facts = {"quantizer": "gptq", "quant": "q4_0", "stderr": 0.1, "kl": 0.1, "kv_bytes_per_token": 64.0} | values
    return Measured(ratio=ratio, bytes=size, perplexity=perplexity, prompt_speed=speed, generation_speed=10.0, **facts)


def swept(*points: Measured) -> Sweep:
    return Sweep("pico", 1000, Perplexity(20.0, 0.1, 100, 1), "a text", points, ())


def test_front() -> None:
    small, large = point(100, 30.0), point(300, 20.0)
    beaten = point(310, 20.5)
    fast = point(200, 31.0, 0.2, speed=150.0)
    found = swept(large, beaten, fast, small)
    assert found.front == (small, large)
    sizes = [point(50, 40.0), point(100, 20.0), point(200, 25.0), point(80, 22.0, 0.1), point(80, 30.0, 0.1)]
    assert swept(*sizes).front == (sizes[0], sizes[3], sizes[1])
    assert found.front_with_speed == (small, fast, large)


def test_files_that_predict_nothing_are_on_no_front() -> None:
    whole, broken, endless = point(100, 30.0), point(1, math.nan), point(2, math.inf)
    assert swept(whole, broken, endless).front == swept(whole, broken, endless).front_with_speed == (whole,)
    assert swept().front == ()


def test_equals_do_not_beat_each_other() -> None:
    one, other = point(100, 30.0), point(100, 30.0, 0.1)
    assert set(swept(one, other).front) == {one, other}


def test_reduction_that_wins_nowhere() -> None:
    said = swept(point(100, 30.0), point(150, 25.0), point(120, 31.0, 0.2, speed=130.0)).verdict
    assert said[0].startswith("size against perplexity: reduction wins nowhere")
    assert "1.30× the fastest without reduction" in said[1]
    assert "at 1.03× its perplexity" in said[1]


def test_reduction_that_wins_between_and_below() -> None:
    winner, smaller = point(120, 26.0, 0.1), point(80, 50.0, 0.3)
    said = swept(point(100, 30.0), point(150, 25.0, quant="q8_0"), winner, smaller).verdict[0]
    assert "reduction wins with Q4_0 reduced by 10%" in said
    assert "the smallest file without reduction (Q4_0 gptq), there are only reduced ones: Q4_0 reduced by 30%" in said
    assert "everywhere else quantization without reduction is better (Q4_0 gptq, Q8_0 gptq)" in said


def test_nothing_to_compare() -> None:
    assert swept(point(100, 30.0)).verdict == ()


def test_table() -> None:
    found = swept(point(300_000, 20.0), point(200_000, 25.0, 0.25, kl=None))
    assert all(len(row) == len(HEADINGS) for row in rows(found))
    assert [row[0] for row in rows(found)] == ["original", "25%", "0%"]
    lines = [line for line in markdown(found).splitlines() if line.startswith("|")]
    assert len(lines) == 5
    assert {line.count("|") for line in lines} == {len(HEADINGS) + 1}


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "text.txt").write_text("\n".join(corpus(300, seed=7)))
    return write_model(folder / "pico", intermediate_size=128)


def test_sweep(pico: Path, tmp_path: Path) -> None:
    stages, seen = Recorded(), []
    text = str(pico.with_name("text.txt"))
    options: dict[str, Any] = {"calib": text, "calib_tokens": 1024, "device": "cpu", "ratios": [0.25]}
    found = sweep(
        pico,
        quants=["q8_0", "q4_0"],
        output=tmp_path / "out",
        text=text,
        chunks=2,
        keep=True,
        stages=stages,
        on_point=lambda point, number, count: seen.append((point, number, count)),
        **options,
    )
    # What all points share is done once.
    assert stages.titles.count("read calibration text") == stages.titles.count("hash the source") == 1
    assert stages.titles.count("weigh the layers") == 1
    wanted = [(0.0, "plain"), (0.0, "plain"), (0.0, "gptq"), (0.0, "gptq"), (0.25, "gptq"), (0.25, "gptq")]
    assert [(one.ratio, one.quantizer) for one in found.points] == wanted
    assert seen == [(one, i, 6) for i, one in enumerate(found.points, 1)]
    files = {path.stat().st_size: path for path in (tmp_path / "out").glob("*.gguf")}
    assert sorted(files) == sorted({one.bytes for one in found.points})
    for one in found.points:
        assert one.prompt_speed > 0 and one.generation_speed > 0
        assert 100 < one.perplexity < 1000
        whole = check_gguf(files[one.bytes]).config.widest.intermediate_size == 128
        assert whole != one.reduced
    plain, feedback = found.points[1], found.points[3]
    assert plain.kl is not None and feedback.kl is not None
    assert feedback.kl < plain.kl
    figures = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [one["bytes"] for one in figures["points"]] == [one.bytes for one in found.points]
    assert figures["verdict"] == list(found.verdict)
    assert (tmp_path / "out" / "sweep.md").read_text() == markdown(found)
    assert ElementTree.parse(tmp_path / "out" / "sweep.svg").getroot().tag.endswith("svg")
    with pytest.raises(InputError, match=r"sweep\.json: exists already; use --force"):
        sweep(pico, quants=["q8_0"], output=tmp_path / "out", **options)


def test_files_go_unless_kept_and_what_cannot_be_is_a_note(pico: Path, tmp_path: Path) -> None:
    text = str(pico.with_name("text.txt"))
    found = sweep(
        pico, ratios=[0.0], quants=["q8_0"], output=tmp_path / "out", calib=text, calib_tokens=512, device="cpu"
    )
    assert found.text == "held-out calibration text"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["sweep.json", "sweep.md", "sweep.svg"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quants": ["q9"]}, "'q9'"),
        ({"ratios": [0.95]}, r"--ratio 0\.95"),
        ({"output": "absent/out"}, "create absent first"),
        ({"output": "file"}, "is a file"),
        ({"text": "absent.txt"}, r"absent\.txt"),
    ],
)
def test_bad_options(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(InputError, match=message):
        sweep(pico, **{"output": "out", "device": "cpu"} | options)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_ratios() -> None:
    assert parse_ratios("0, 0.1,.5") == [0.0, 0.1, 0.5]
    with pytest.raises(InputError, match="--ratios a,b: give numbers"):
        parse_ratios("a,b")

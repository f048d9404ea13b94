"""The page of a report: sound HTML that loads nothing, whatever a model is called, and whole or not there at all."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

from a3q import InputError, Result, convert, reduce_to_folder, report_html
from a3q.footprint import Use, footprint, totals
from a3q.inspect import TensorInfo
from a3q.perplexity import Perplexity
from a3q.report_facts import facts
from a3q.report_html import check_reports, render, report_paths, write_reports
from a3q.verify import Quality, Verification
from tests.healed import healed
from tests.pico import corpus, write_model

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \"'&{{ 7 * 7 }}$x$"
CALIB: dict[str, Any] = {"calib_tokens": 1024, "device": "cpu"}
VOID = {"meta", "br", "img", "link", "hr", "input"}
chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Checks that elements are closed in order, and gathers what is in the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        """All of it, every white space one space."""
        return " ".join(" ".join(self.texts).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("html")
    (folder / "text.txt").write_text("\n".join(corpus(200, seed=7)))
    return write_model(folder / "pico", hidden_size=128, intermediate_size=256)


@pytest.fixture(scope="module")
def heads(source: Path) -> Result:
    """Everything reduced and rounded, and checked where llama.cpp is there."""
    own = {"QK": 0.25, "OV": 0.25, "MLP": 0.25}
    calib = str(source.with_name("text.txt"))
    path = source.with_name("heads.gguf")
    return convert(source, quant="q4_0", own_ratios=own, ranks="uniform", output=path, calib=calib, **CALIB)


@pytest.fixture(scope="module")
def folder(source: Path) -> Result:
    calib = str(source.with_name("text.txt"))
    options: dict[str, Any] = {"own_ratios": {"QK": 0.5, "OV": 0.25}, "ranks": "mixed"}
    return reduce_to_folder(source, output=source.with_name("folder"), calib=calib, **options, **CALIB)


@pytest.fixture(scope="module")
def plain(source: Path) -> Result:
    """Nothing reduced, rounded or checked."""
    path = source.with_name("plain.gguf")
    return convert(source, ratio=0, quant="f16", output=path, verify_file=False, device="cpu")


def hostile(result: Result) -> Result:
    """All that comes from files nobody has checked says something nasty."""
    original = result.original
    metadata = {**original.metadata, "general.name": GGUFValue(HOSTILE, GGUFValueType.STRING)}
    path = original.source.path.with_name(HOSTILE.replace("/", "\u2044"))
    original = replace(original, metadata=metadata, source=replace(original.source, path=path))
    calibration = result.job.calibration
    assert calibration is not None
    calibration = replace(calibration, source=HOSTILE, description=HOSTILE)
    job = replace(result.job, original=original, calibration=calibration)
    rounding = result.rounding
    if rounding is not None:
        tensors = [replace(one, name=HOSTILE, short_name=HOSTILE + one.short_name) for one in rounding.tensors]
        rounding = replace(rounding, tensors=tensors)
    notes, seconds = (HOSTILE,), {HOSTILE: 1.0}
    return replace(result, job=job, rounding=rounding, notes=notes, seconds=seconds, type_name=HOSTILE)


def page_of(result: Result) -> Page:
    return Page(render(facts(result), "m.report.json"))


def check_safe(page: Page) -> None:
    """No code, and nothing that a browser would fetch."""
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base", "form", "image"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), name
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                assert (value or "").startswith("#"), (tag, name, value)


def test_pages(heads: Result, folder: Result, plain: Result) -> None:
    sections = {
        "heads": ["outcome", "plan", "layers", "rope", "quantization", "provenance", "time"],
        "folder": ["outcome", "plan", "layers", "rope", "provenance", "time"],
        "plain": ["outcome", "provenance", "time"],
    }
    for result in (heads, folder, plain):
        page = page_of(result)
        check_safe(page)
        headings = [attributes["id"] for tag, attributes in page.elements if tag == "h2"]
        assert [one for one in headings if one not in ("notes", "running")] == sections[result.path.stem]
        assert page.count("h1") == 1
        plots = [attributes for tag, attributes in page.elements if tag == "svg"]
        assert page.count("figure") == len(plots) > 0
        assert all(one["role"] == "img" and len(one["aria-label"] or "") > 20 for one in plots)
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(ids) == len(set(ids))
        assert "None" not in page.text
        assert "nan" not in page.text.split()
        assert ("html", {"lang": "en"}) in page.elements


def test_numbers(heads: Result) -> None:
    text, plan, rounding = page_of(heads).text, heads.job.plan, heads.rounding
    assert rounding is not None
    layer, loss = heads.reduced.config.layers[0], heads.job.reduction.losses[0]
    for part in (
        f"reduced by {plan.achieved:.1%} with a3q",
        f"0 32 → {layer.qk_head_dim} 32 → {layer.v_head_dim} 256 → {layer.intermediate_size} "
        f"{loss.qk:.2%} {loss.ov:.2%} {loss.mlp:.2%}",
        f"Rounded by gptq to {rounding.bits_per_weight:.2f} bits a weight",
        f"blk.1.ffn_down.weight Q4_0 4.50 {128 * 192 * 18 // 32:,} {100 * (rounding.tensors[-1].loss or 0):.2g}%",
        heads.job.digests[0],
        "calibrated on" if heads.job.calibration is None else heads.job.calibration.description,
        "text.txt",
        *heads.notes,
    ):
        assert " ".join(part.split()) in text, part
    if heads.verification is not None:
        written = heads.verification.written
        assert f"{written.perplexity.value:.2f} ± {written.perplexity.stderr:.2f}" in text


def test_frequencies(heads: Result, folder: Result) -> None:
    (kept,) = facts(heads)["rope"][0]["kept"]
    turns = heads.original.config.layers[0].frequencies[0]
    text = page_of(heads).text
    for i, turn in enumerate(turns):
        assert f"{turn:.6g} {report_html._turn(turn)}{' kept' if i in kept else ''} " in text
    assert "Every key head keeps frequencies of its own" in page_of(folder).text


def test_turns() -> None:
    turns = [report_html._turn(one) for one in (1.0, 0.1, 2 * math.pi / 12345, 0.0)]
    assert turns == ["6.28", "62.8", "12,345", "never"]


def test_positions_in_runs() -> None:
    assert [report_html._positions(one) for one in ([], [3], [0, 1, 2, 5, 7, 8])] == ["", "3", "0-2, 5, 7-8"]


def test_hostile_names(heads: Result, folder: Result) -> None:
    for result in (heads, folder):
        text = render(facts(hostile(result)), HOSTILE)
        page = Page(text)
        check_safe(page)
        assert "<script" not in text
        assert "<img" not in text
        # As it was written, and no template of its own.
        assert " ".join(HOSTILE.split()) in page.text
        for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
            ElementTree.fromstring(svg)


def test_healing(heads: Result, folder: Result) -> None:
    for result in (heads, folder):
        page = page_of(healed(result, source=HOSTILE))
        check_safe(page)
        headings = [attributes["id"] for tag, attributes in page.elements if tag == "h2"]
        quantized = ["quantization"] if result is heads else []
        assert headings[headings.index("rope") :] == ["rope", "healing", *quantized, "provenance", "time"]
        for part in (
            "Healed layer by layer: mean relative distance of the layers' outputs 2.50% → 2.00% on text they had not "
            "seen; 1 of 2 did not gain.",
            f"Healed end to end on 26.2M tokens (6.5M different ones, of {' '.join(HOSTILE.split())}) in 4:10: KL",
            "end to end 26,214,400 6,500,000 4:10 0.297 0.112 with rounding in the loop 1,000,000 1,000,000 0:21 0.2 "
            "0.15",
            "On text that was not trained on: end to end 0.297 → 0.112; with rounding in the loop 0.2 → 0.15.",
            "Mean: 2.5% → 2%.",
            "Loss while healing",
            "Healing of each layer",
            "distance, healed",
        ):
            assert part in page.text, part
        assert re.search(r"2% → 1% 1 32 ", page.text)
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(ids) == len(set(ids))


def test_healing_of_one_kind(folder: Result) -> None:
    text = page_of(healed(folder, blocks=False)).text
    assert "Loss while healing" in text
    assert "Healing of each layer" not in text
    assert "distance, healed" not in text
    text = page_of(healed(folder, phases=0)).text
    assert "Loss while healing" not in text
    assert "Healing of each layer" in text
    broken = page_of(healed(folder, before=math.nan))
    assert "nan" not in broken.text.split()
    assert "end to end 26,214,400 6,500,000 4:10 – 0.112" in broken.text
    # Ended before its first step.
    result = healed(folder, phases=1)
    (phase,) = result.job.healed
    job = replace(result.job, healed=(replace(phase, tokens=0, curve=(), after=math.nan),))
    assert "Loss while healing" not in page_of(replace(result, job=job)).text


def test_running_takes(plain: Result) -> None:
    model, use = plain.original, Use(context=512)
    tensors = [TensorInfo(HOSTILE, "F16", (64, 64), 8192)]
    before = footprint(model.family, model.config, tensors, 10_000_000, 20_000, use)
    after = replace(before, file_bytes=5_000_000, prompt_flops=before.prompt_flops / 2, types=totals(tensors))
    result = replace(plain, use=use, footprints={"before": before, "after": after})
    found = facts(result)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["footprint"]["after"]["file_bytes"] == 5_000_000
    text = page_of(result).text
    assert "prompts 2.00 × by less arithmetic" in text
    assert "file 10.0 MB 5.0 MB -50%" in text


def test_broken_model(plain: Result) -> None:
    """A page even of a model whose predictions are no numbers."""
    fine, broken = Quality(Perplexity(12.347, 0.5, 9, 1), None), Quality(Perplexity(math.inf, math.nan, 9, 1), math.nan)
    page = page_of(replace(plain, verification=Verification(fine, broken, broken, math.nan, 9, "llama.cpp")))
    assert "not finite from 12.35 ± 0.50" in page.text
    assert "nan" not in page.text.split()
    page = page_of(replace(plain, verification=Verification(broken, broken, broken, math.nan, 9, "llama.cpp")))
    # Nothing to be drawn.
    assert "File size against perplexity" not in page.text


@pytest.mark.parametrize(
    ("output", "stem"),
    [
        ("SmolLM2-a3q25-Q4_K_M.gguf", "SmolLM2-a3q25-Q4_K_M"),
        ("some/SmolLM2-1.7B", "SmolLM2-1.7B"),
        ("m-00001-of-00003.gguf", "m"),
        ("folder-00001-of-00003", "folder-00001-of-00003"),
        ("m.bin", "m.bin"),
    ],
)
def test_paths(output: str, stem: str) -> None:
    page, data = report_paths(Path(output))
    assert (page.name, data.name) == (f"{stem}.report.html", f"{stem}.report.json")
    assert page.parent == data.parent == Path(output).parent


def test_written(heads: Result, tmp_path: Path) -> None:
    result = replace(heads, path=shutil.copy(heads.path, tmp_path / "m.gguf"))
    page, data = write_reports(result)
    assert (page, data) == report_paths(result.path)
    assert json.loads(data.read_text(encoding="utf-8")) == facts(result)
    check_safe(Page(page.read_text(encoding="utf-8")))
    assert "m.report.json" in page.read_text(encoding="utf-8")
    assert {one.name for one in tmp_path.iterdir()} == {"m.gguf", page.name, data.name}
    before = page.read_bytes(), data.read_bytes()
    write_reports(result)
    # The same of the same.
    assert (page.read_bytes(), data.read_bytes()) == before


def test_beside_a_folder(folder: Result) -> None:
    page, data = write_reports(folder)
    assert page == folder.path.parent / "folder.report.html"
    assert page.is_file()
    assert data.is_file()


def test_what_exists_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "m.gguf"
    check_reports(output)
    for path in report_paths(output):
        path.write_text("old")
        with pytest.raises(InputError, match=rf"{path.name}: exists already; use --force"):
            check_reports(output)
        check_reports(output, force=True)
        path.unlink()
    report_paths(output)[1].mkdir()
    with pytest.raises(InputError, match="is a folder"):
        check_reports(output, force=True)


@pytest.mark.parametrize("where", ["render", "write", "first name", "second name"])
@pytest.mark.parametrize("old", [None, "old"])
def test_failures_leave_what_was_there(
    plain: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, old: str | None
) -> None:
    result = replace(plain, path=shutil.copy(plain.path, tmp_path / "m.gguf"))
    reports = report_paths(result.path)
    if old is not None:
        for path in reports:
            path.write_text(old)
    full = OSError(28, "No space left on device")

    def fail(*_: object) -> None:
        raise full

    if where == "render":
        monkeypatch.setattr(report_html, "render", fail)
    elif where == "write":
        monkeypatch.setattr(Path, "write_bytes", fail)
    else:
        really, failing = Path.replace, reports[where == "second name"]
        monkeypatch.setattr(Path, "replace", lambda part, to: fail() if to == failing else really(part, to))
    with pytest.raises(OSError if where == "render" else InputError, match="No space left"):
        write_reports(result)
    monkeypatch.undo()
    # Nothing half done; of two good files, one may be new.
    left = {one.name for one in tmp_path.iterdir()} - {"m.gguf"}
    assert left == ({one.name for one in reports} if old is not None else set())


@pytest.mark.skipif(chromium is None, reason="no Chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_browser(heads: Result, tmp_path: Path, width: int) -> None:
    """Plots have a size, nothing is wider than the page, and the browser complains of nothing."""
    result = replace(hostile(healed(heads)), path=shutil.copy(heads.path, tmp_path / "m.gguf"))
    page, _ = write_reports(result)
    # A frame of that width that reports what is in it; windows have a least width.
    probe = tmp_path / "probe.html"
    probe.write_text(
        f"""<!doctype html><iframe id="f" src="{page.name}" style="width:{width}px;height:900px;border:0"></iframe>
<pre id="out"></pre><script>
document.getElementById("f").onload = event => {{
  const inside = event.target.contentDocument;
  const box = one => one.getBoundingClientRect();
  document.getElementById("out").textContent = JSON.stringify({{
    scroll: inside.documentElement.scrollWidth,
    plots: [...inside.querySelectorAll("figure svg")].map(one => [box(one).width, box(one).height]),
    wide: [...inside.querySelectorAll("main *")]
      .filter(one => !one.closest(".scroll, svg") && box(one).right > {width} + 1)
      .map(one => one.outerHTML.slice(0, 80)),
    scripts: inside.scripts.length,
  }});
}};
</script>"""
    )
    assert chromium is not None
    options = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    options += "disable-component-update disable-sync allow-file-access-from-files enable-logging=stderr dump-dom"
    done = subprocess.run(
        [
            chromium,
            *(f"--{one}" for one in options.split()),
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=5000",
            f"--window-size={width},1000",
            probe.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    found = re.search(r'<pre id="out">(.+?)</pre>', done.stdout, flags=re.DOTALL)
    assert found is not None, done.stderr
    seen = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert seen["scroll"] <= width
    assert seen["wide"] == []
    assert seen["scripts"] == 0
    assert len(seen["plots"]) == page.read_text(encoding="utf-8").count("<figure>") >= 6
    assert all(high > 100 and 250 < wide <= width for wide, high in seen["plots"])

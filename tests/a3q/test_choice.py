"""Plan files and what is asked beside them: what is written is done, and nothing else is taken for a plan."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from a3q import convert
from a3q.asked import QUANT, Asked
from a3q.choice import Choice, described, read_plan, write_plan
from a3q.errors import InputError
from a3q.footprint import Footprint, Use
from a3q.forecast import Forecast
from a3q.gguf_types import TypeRequest
from a3q.reduce_layer import Dimensions
from a3q.result import Result
from a3q.settings import Settings
from converters.headers import Header, open_header
from tests.pico import corpus, write_model

SIZE: dict[str, Any] = {"hidden_size": 128, "head_dim": 64, "intermediate_size": 256}


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("choice")
    (folder / "text.txt").write_text("\n".join(corpus(200)))
    return write_model(folder / "pico", **SIZE)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def forecast(source: Path | Header, **options: Any) -> Forecast:
    asked = Asked(**options)
    asked.check()
    header = source if isinstance(source, Header) else open_header(source)
    return asked.forecast(header, TypeRequest(asked.quant_plan()), asked.settings())


def converted(source: Path, output: Path, **options: Any) -> Result:
    given: dict[str, Any] = {"calib": str(source.with_name("text.txt")), "calib_tokens": 512, "device": "cpu"}
    return convert(source, output=output, verify_file=False, **(given | options))


def saved(path: Path, source: Path, **options: Any) -> Forecast:
    found = forecast(source, **options)
    write_plan(path, found, force=False)
    return found


# There and back

PLANS: list[dict[str, Any]] = [
    {},
    {"ratio": 0, "quant": "q8_0"},
    {"ratio": 0.5, "ranks": "uniform", "quant": "f16"},
    {"kv_ratio": 0.5, "cache_type": "q8_0", "context": 1000, "parallel": 3},
    {"ratio": 0.25, "kv_ratio": 0.5, "quant": "q4_0"},
    {"own_ratios": {"QK": 0.5, "OV": 0.5, "MLP": 0.3}, "ratio": 0},
    {"components": ("MLP",), "ratio": 0.3, "quant": "3bit"},
    {"memory": 1_500_000, "quant": "q5_0"},
]


@pytest.mark.parametrize("options", PLANS, ids=lambda options: "-".join(map(str, options.values())))
def test_plan_comes_back_and_is_done(pico: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "p.json"
    plan = saved(path, pico, **options)
    header = open_header(pico)
    asked = Asked(plan=path)
    asked.check()
    settings, types, use = asked.settled(header, TypeRequest(asked.quant_plan()), asked.settings(seed=7))
    assert use == plan.use
    assert types.plan == plan.types.plan
    assert settings.seed == 7
    assert settings.request() == plan.settings.request()
    again = asked.forecast(header, TypeRequest(asked.quant_plan()), asked.settings())
    assert (again.plan.dimensions, again.after) == (plan.plan.dimensions, plan.after)
    result = converted(pico, tmp_path / "m.gguf", plan=path)
    written = [Dimensions.of(shape) for shape in result.reduced.config.layers]
    assert written[0].qk_head_dim == plan.plan.dimensions[0].qk_head_dim
    assert result.path.stat().st_size == pytest.approx(plan.after.file_bytes, rel=0.02)
    assert result.use == plan.use
    assert result.footprints["after"].kv_bytes == plan.after.kv_bytes
    assert result.footprints["after"].parameters == pytest.approx(plan.after.parameters, rel=0.01)
    if options.get("ranks") == "uniform" or not plan.plan.request.groups():
        assert written == list(plan.plan.dimensions)
        assert result.footprints["after"].types == plan.after.types


def test_plan_of_a_measured_model_is_done_to_the_letter(pico: Path, tmp_path: Path) -> None:
    first = converted(pico, tmp_path / "first.gguf", ratio=0.25, quant="q4_0")
    assert first.job.plan.predicted_kl is not None
    plan = saved(tmp_path / "p.json", pico, ratio=0.25, quant="q4_0")
    assert plan.prediction.measured
    result = converted(pico, tmp_path / "m.gguf", plan=tmp_path / "p.json")
    assert [Dimensions.of(shape) for shape in result.reduced.config.layers] == list(plan.plan.dimensions)
    assert result.footprints["after"].types == plan.after.types
    assert result.job.tried == ()


@pytest.mark.parametrize("head", [32, 64])
def test_head_size_of_the_plan_is_kept(pico: Path, tmp_path: Path, head: int) -> None:
    """Even where measuring the model would lead to another."""
    path = tmp_path / "p.json"
    saved(path, pico, ratio=0.3, quant="q4_0")
    content = json.loads(path.read_text())
    content["choice"]["head_size"] = head
    path.write_text(json.dumps(content))
    result = converted(pico, tmp_path / "m.gguf", plan=path)
    assert {shape.qk_head_dim for shape in result.reduced.config.layers} == {head}
    assert result.job.plan.achieved == pytest.approx(0.3, abs=0.05)


def test_description_is_plain_and_whole(pico: Path) -> None:
    plan = forecast(pico, kv_ratio=0.5, cache_type="q8_0", context=1000, parallel=2)
    found = json.loads(json.dumps(described(plan), allow_nan=False))
    for name, one in (("before", plan.before), ("after", plan.after)):
        assert found[name].keys() == {field.name for field in fields(Footprint)} | {"memory"}
        assert found[name]["memory"] == one.memory == one.file_bytes + one.kv_bytes + one.compute_bytes
        assert found[name]["types"] == [asdict(total) for total in one.types]
    assert found["dimensions"] == [asdict(one) for one in plan.plan.dimensions]
    assert found["choice"]["head_size"] == 32
    assert found["predicted_kl"]["total"] == plan.prediction.total
    assert found["predicted_speedup"].keys() == {"prompt", "generation"}
    assert found["notes"] == list(plan.notes)
    assert found["grid"] == plan.grid
    assert forecast(pico, components=("MLP",)).plan.dimensions[0].qk_head_dim == 64
    assert described(forecast(pico, components=("MLP",)))["choice"]["head_size"] is None


# What is no plan


@pytest.fixture
def plan_file(pico: Path, tmp_path: Path) -> Path:
    path = tmp_path / "p.json"
    saved(path, pico)
    return path


def refuses(source: Path, path: Path, tmp_path: Path) -> str:
    """What is said, in one line, and nothing is left behind."""
    before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    with pytest.raises(InputError) as refused:
        converted(source, tmp_path / "m.gguf", plan=path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before
    message = str(refused.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1, 2]", "no JSON object"),
        (b"{}", "no plan of this a3q"),
        (b'{"kind": "a3q plan 2"}', "no plan of this a3q"),
        (b'{"kind": ["a3q plan 1"]}', "no plan of this a3q"),
        (b'{"kind": "a3q plan 1"}', "another model (unknown"),
        (b'{"kind": "a3q plan 1", "model": 3}', "another model (unknown"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_files_that_are_no_plan(pico: Path, tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(content)
    assert part in refuses(pico, path, tmp_path)


def test_plan_that_is_not_there(pico: Path, tmp_path: Path) -> None:
    assert "cannot be read" in refuses(pico, tmp_path / "none.json", tmp_path)
    assert "cannot be read" in refuses(pico, tmp_path, tmp_path)


def test_plan_of_another_model(plan_file: Path, tmp_path: Path) -> None:
    for i, change in enumerate(({"num_hidden_layers": 3}, {"intermediate_size": 512}, {"vocab_size": 600})):
        other = write_model(tmp_path / f"other{i}", **SIZE | change)
        message = refuses(other, plan_file, tmp_path)
        assert "plan for another model (family llama, layers 2" in message
        assert "this one: family llama" in message
    assert "this one: family qwen2" in refuses(write_model(tmp_path / "qwen", "qwen2"), plan_file, tmp_path)


def test_plan_of_the_same_model_elsewhere(pico: Path, plan_file: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(pico, tmp_path / "moved")
    assert read_plan(plan_file, open_header(moved).model).use == Use(256)


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("ratio", 5, "--ratio 5 is out of range"),
        ("ratio", -0.1, "--ratio -0.1 is out of range"),
        ("ratio", math.nan, "--ratio nan is out of range"),
        ("ratio", "much", "is damaged"),
        ("ratio", None, "is damaged"),
        ("kv_ratio", 1, "--kv-ratio 1 is out of range"),
        ("kv_ratio", [], "is damaged"),
        ("own_ratios", {"FFN": 0.1}, "component 'FFN'"),
        ("own_ratios", {"QK": 2}, "--ratio-qk 2 is out of range"),
        ("own_ratios", {"QK": None}, "is damaged"),
        ("own_ratios", ["QK"], "is damaged"),
        ("own_ratios", 3, "is damaged"),
        ("components", ["FFN"], "component 'FFN'"),
        ("components", "QK", "component 'Q'"),
        ("components", [["QK"]], "is damaged"),
        ("components", 3, "is damaged"),
        ("ranks", "even", "--ranks even"),
        ("head_size", "wide", "is damaged"),
        ("head_size", 60, "head size 60"),
        ("head_size", -32, "head size -32"),
        ("quant", "q9", "'q9'"),
        ("quant", None, "'None'"),
        ("context", -1, "--ctx -1"),
        ("context", math.inf, "is damaged"),
        ("context", None, "is damaged"),
        ("cache_type", "f8", "--kv-type f8"),
        ("parallel", 0, "--parallel 0"),
    ],
)
def test_values_out_of_range(pico: Path, plan_file: Path, tmp_path: Path, key: str, value: Any, part: str) -> None:
    content = json.loads(plan_file.read_text())
    content["choice"][key] = value
    plan_file.write_text(json.dumps(content))
    assert part in refuses(pico, plan_file, tmp_path)


def test_every_part_of_the_choice_is_needed(pico: Path, plan_file: Path, tmp_path: Path) -> None:
    content = json.loads(plan_file.read_text())
    for key in content["choice"]:
        less = {name: value for name, value in content["choice"].items() if name != key}
        plan_file.write_text(json.dumps(content | {"choice": less}))
        assert f"is damaged (no '{key}')" in refuses(pico, plan_file, tmp_path)
    for damaged in (None, 3, []):
        plan_file.write_text(json.dumps(content | {"choice": damaged}))
        assert "is damaged" in refuses(pico, plan_file, tmp_path)


# Writing


def test_existing_file_is_kept(pico: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text("precious")
    plan = forecast(pico)
    with pytest.raises(InputError, match=r"p.json: exists already; use --force"):
        write_plan(path, plan, force=False)
    assert path.read_text() == "precious"
    write_plan(path, plan, force=True)
    assert isinstance(read_plan(path, plan.model), Choice)
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["p.json"]


@pytest.mark.parametrize("where", ["none/p.json", "file/p.json", ".", "folder", ""])
@pytest.mark.parametrize("force", [False, True])
def test_places_that_cannot_be_written(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, force: bool
) -> None:
    plan = forecast(pico)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"cannot be written|is a folder"):
        write_plan(Path(where), plan, force)
    assert sorted(tmp_path.rglob("*")) == before


def test_full_disk_leaves_nothing(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = forecast(pico)
    path = tmp_path / "p.json"

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("write_text", "replace"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, name, full)
            with pytest.raises(InputError, match=r"p.json: cannot be written: No space left"):
                write_plan(path, plan, force=False)
    assert [file for file in tmp_path.iterdir() if file.is_file()] == []


# What does not go together


@pytest.mark.parametrize(
    ("options", "limited", "message"),
    [
        ({"plan": "p.json", "ratio": 0.0}, False, "--plan and --ratio: the plan says that already"),
        ({"plan": "p.json", "own_ratios": {"QK": 0.1}}, False, "--plan and --ratio-qk, --ratio-ov, --ratio-mlp"),
        ({"plan": "p.json", "kv_ratio": 0.5}, False, "--plan and --kv-ratio"),
        ({"plan": "p.json", "memory": 10**9}, False, "--plan and --fit"),
        ({"plan": "p.json", "components": ("MLP",)}, False, "--plan and --components"),
        ({"plan": "p.json", "ranks": "mixed"}, False, "--plan and --ranks"),
        ({"plan": "p.json", "quant": "4bit"}, False, "--plan and --quant"),
        ({"plan": "p.json", "cache_type": "f16"}, False, "--plan and --kv-type"),
        ({"plan": "p.json", "context": 256}, False, "--plan and --ctx"),
        ({"plan": "p.json", "parallel": 2}, False, "--plan and --parallel"),
        ({"plan": "p.json"}, True, "--plan and --bits, --size"),
        ({"memory": 10**9, "ratio": 0.25}, False, "--fit and --ratio: --fit chooses how much goes"),
        ({"memory": 10**9, "ratio": 0.0}, False, "--fit and --ratio"),
        ({"memory": 10**9, "own_ratios": {"MLP": 0.1}}, False, "--fit and --ratio-qk"),
        ({"memory": 10**9, "kv_ratio": 0.1}, False, "--fit and --kv-ratio"),
        ({"memory": 10**9}, True, "--fit and --bits, --size"),
        ({"memory": 0}, False, "--fit: give the memory"),
        ({"context": 0}, False, "--ctx 0"),
        ({"cache_type": "f8"}, False, "--kv-type f8"),
        ({"parallel": -1}, False, "--parallel -1"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], limited: bool, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        Asked(**options).check(limited)


def test_options_that_go_together() -> None:
    for options in (
        {},
        {"own_ratios": {}, "ratio": 0.1, "kv_ratio": 0.5, "ranks": "mixed", "components": ("MLP",)},
        {"memory": 10**9, "quant": "q8_0", "cache_type": "q4_0", "components": ("MLP",), "ranks": "uniform"},
        {"memory": 10**9, "context": 10, "parallel": 2},
        {"plan": "p.json"},
        {"plan": "p.json", "own_ratios": {}},
    ):
        Asked(**options).check()  # type: ignore[arg-type]
    Asked().check(limited=True)


def test_what_is_not_asked() -> None:
    assert Asked().quant_plan().name == "q4_k_m"
    assert QUANT == "4bit"
    assert Asked(quant="Q8_0").quant_plan("f16").output is not None
    assert Asked().settings(calib=("self",)).request() == Settings().request()
    assert Asked(kv_ratio=0.5).settings().ratio == 0
    assert Asked(kv_ratio=0.5, ratio=0.25).settings().ratio == 0.25

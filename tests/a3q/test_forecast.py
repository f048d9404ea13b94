"""Plans: what a conversion comes to is what it then does, and what is refused is refused before any work."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from a3q import cache, convert, predict
from a3q.asked import Asked
from a3q.components import Method
from a3q.dimensions import all_sizes, folder_grid
from a3q.errors import InputError
from a3q.families import COMPONENTS
from a3q.footprint import TensorInfo, Use, cache_bytes, totals
from a3q.footprint_table import render_forecast
from a3q.forecast import Forecast, Forecaster, check_cache, grid_for
from a3q.gguf_types import TypeRequest
from a3q.model import Model
from a3q.reduce_layer import Dimensions
from a3q.result import Result
from a3q.sensitivity import Sensitivity
from a3q.settings import Settings
from converters.budget import Limit
from converters.gguf_writer import write_gguf
from converters.headers import open_header
from converters.hf_reader import open_huggingface
from converters.open import open_model
from converters.types import resolve_quant
from tests.pico import corpus, write_model

SIZES: dict[str, dict[str, Any]] = {
    # Rows of super-blocks, and MLP sizes in steps of them.
    "fine": {"hidden_size": 256, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 16,
             "intermediate_size": 2048, "num_hidden_layers": 2, "tied": True},
    # Rows that K types do not fit, as SmolLM2's.
    "rough": {"hidden_size": 288, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
              "intermediate_size": 768},
}  # fmt: skip
QUICK: dict[str, Any] = {"calib_tokens": 512, "device": "cpu", "verify_file": False}


ENOUGH = {"fine": 4096, "rough": 1536}
"""Tokens of calibration, twice the MLP's units: beyond one unit a token all are redundant, and the last bits choose."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("forecast")
    return {name: write_model(root / name, **options) for name, options in SIZES.items()}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was measured before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def forecast(source: Path, **options: Any) -> Forecast:
    asked = Asked(**options)
    asked.check()
    return asked.forecast(open_header(source), TypeRequest(asked.quant_plan()), asked.settings())


def converted(source: Path, output: Path, **options: Any) -> Result:
    options = {"kv_type" if name == "cache_type" else name: value for name, value in options.items()}
    text = source.with_name("text.txt")
    text.write_text("\n".join(corpus(300)))
    return convert(source, output=output, calib=str(text), **(QUICK | options))


def shapes(model: Model) -> tuple[Dimensions, ...]:
    return tuple(Dimensions.of(shape) for shape in model.config.layers)


def as_text(one: Forecast, width: int = 80) -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(render_forecast(one, None))
    return text.getvalue()


# What is predicted comes about

UNIFORM: dict[str, Any] = {"ratio": 0.25, "ranks": "uniform"}
RUNS: list[tuple[str, dict[str, Any]]] = [
    ("rough", {"quant": "f16", "ratio": 0}),
    ("rough", {"quant": "f16", "ratio": 0.25}),
    ("rough", {"quant": "q8_0", **UNIFORM}),
    ("rough", {"quant": "q8_0", "kv_ratio": 0.5}),
    ("rough", {"quant": "q4_0", "kv_ratio": 0.5, "ratio": 0.25}),
    ("rough", {"quant": "4bit", "ratio": 0}),
    ("rough", {"quant": "4bit", "ratio": 0.25}),
    ("rough", {"quant": "4bit", "kv_ratio": 0.5, "cache_type": "q8_0"}),
    ("rough", {"quant": "3bit", **UNIFORM}),
    ("fine", {"quant": "4bit", "ratio": 0.25}),
    ("fine", {"quant": "3bit", **UNIFORM}),
    ("fine", {"quant": "q4_0", "own_ratios": {"QK": 0.5, "OV": 0.5}}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"), RUNS, ids=[f"{name}-{'-'.join(map(str, options.values()))}" for name, options in RUNS]
)
def test_conversion_is_as_predicted(
    sources: dict[str, Path], tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    before = forecast(sources[name], **options)
    assert not before.prediction.measured
    result = converted(sources[name], tmp_path / "m.gguf", calib_tokens=ENOUGH[name], **options)
    written = open_header(result.path)
    size = result.path.stat().st_size
    # Rows that fit super-blocks in one layer and not in the next make a difference where there are but two.
    near = 0.03 if options == {"quant": "4bit", "ratio": 0.25} else 0.01
    assert before.after.file_bytes == pytest.approx(size, rel=near)
    assert before.after.parameters == pytest.approx(result.reduced.parameters(), rel=near)
    # What is then measured of the model is what plans go by from now on.
    after = forecast(sources[name], **options)
    assert after.prediction.measured == bool(result.job.plan.predicted_kl)
    for plan in (before, after):
        if plan.plan.dimensions != shapes(result.reduced):
            continue
        named = {one.name: one for one in written.tensors}
        assert plan.after.types == totals(list(named.values()))
        assert plan.after.kv_bytes == cache_bytes(written.model.config, 256, options.get("cache_type", "f16"))
    assert after.after.file_bytes == pytest.approx(size, rel=0.01)
    if options.get("ranks") == "uniform" or options.get("ratio") == 0 or "kv_ratio" in options:
        # Head sizes follow from what is asked, and MLPs that are all alike too.
        assert {one.qk_head_dim for one in before.plan.dimensions} == {shapes(result.reduced)[0].qk_head_dim}
    if not result.job.tried:
        assert after.plan.dimensions == shapes(result.reduced)
        assert result.footprints["after"].types == after.after.types
        assert result.footprints["after"].kv_bytes == after.after.kv_bytes
        assert result.footprints["after"].compute_bytes == after.after.compute_bytes
    assert {note for note in before.notes if "is there" in note} == set()


@pytest.mark.parametrize("source_quant", ["q4_0", "q8_0", "q4_k_m"])
def test_quantized_source_is_kept(sources: dict[str, Path], tmp_path: Path, source_quant: str) -> None:
    path = write_gguf(open_huggingface(sources["fine"]), resolve_quant(source_quant), tmp_path / "source.gguf").path
    forecaster = Forecaster(open_header(path))
    assert forecaster.keeps(resolve_quant(source_quant))
    assert not forecaster.keeps(resolve_quant("q5_0"))
    kept = forecast(path, ratio=0, quant=source_quant)
    assert kept.prediction.total == 0
    assert kept.after.types == kept.before.types
    result = converted(path, tmp_path / "m.gguf", ratio=0, quant=source_quant)
    assert kept.after.file_bytes == pytest.approx(result.path.stat().st_size, rel=0.01)
    assert forecast(path, ratio=0.25, quant=source_quant).prediction.rounding == predict.ROUNDING[source_quant.upper()]
    assert forecast(path, ratio=0, quant="q5_0").prediction.rounding == predict.ROUNDING["Q5_0"]


def test_limit(sources: dict[str, Path], tmp_path: Path) -> None:
    """Types chosen within a size, which no option of plan asks for but a caller may."""
    limit = Limit(size=2_000_000)
    request = TypeRequest(resolve_quant("4bit"), limit=limit)
    one = Forecaster(open_header(sources["rough"])).forecast(Settings(0.0), request, Use(256))
    assert one.prediction.rounding is None
    assert one.after.file_bytes <= 2_000_000
    result = converted(sources["rough"], tmp_path / "m.gguf", ratio=0, size=2_000_000)
    assert one.after.file_bytes == pytest.approx(result.path.stat().st_size, rel=0.02)


# The prediction


def test_numbers_hang_together(sources: dict[str, Path]) -> None:
    one = forecast(sources["rough"], ratio=0.25, quant="q8_0", cache_type="q8_0", context=1000, parallel=2)
    assert one.use == Use(1000, "q8_0", 2)
    assert (one.before.cache_type, one.after.cache_type) == ("f16", "q8_0")
    assert one.after.context == one.before.context == 1000
    assert sum(total.bytes for total in one.after.types) < one.after.file_bytes
    assert sum(total.tensors for total in one.before.types) == len(open_header(sources["rough"]).tensors)
    assert one.speedup.prompt == one.before.prompt_flops / one.after.prompt_flops > 1
    assert one.speedup.generation == one.before.generation_bytes / one.after.generation_bytes > 1
    prediction = one.prediction
    assert prediction.total == prediction.reduction + predict.ROUNDING["Q8_0"] + predict.CACHE["q8_0"]


def test_default_use_is_the_trained_context(sources: dict[str, Path]) -> None:
    assert forecast(sources["rough"]).use == Use(256)
    longer = forecast(sources["rough"], context=1000)
    assert any("trained for 256 tokens" in note for note in longer.notes)
    assert not any("trained for" in note for note in forecast(sources["rough"], context=256).notes)


def test_larger_reductions_are_predicted_to_cost_more(sources: dict[str, Path]) -> None:
    costs = [forecast(sources["rough"], ratio=ratio).prediction.reduction for ratio in (0, 0.1, 0.25, 0.5, 0.9)]
    assert costs[0] == 0
    assert costs == sorted(set(costs))


def test_rule_at_a_quarter_is_what_it_says(sources: dict[str, Path]) -> None:
    model = open_huggingface(sources["fine"])
    grid = grid_for(model, TypeRequest(resolve_quant("f16")), "f16")
    known = predict.by_rule(model.config, all_sizes(model.config, grid, COMPONENTS))
    for component, cost in {"QK": 0.07, "OV": 0.089, "MLP": 0.389}.items():
        layers = [layer[component] for layer in known]  # type: ignore[index]
        whole = layers[0].sizes[-1]
        quarter = [one.curve(1) for one in layers]
        if component == "MLP":
            assert sum(curve.loss_at(whole * 3 // 4) for curve in quarter) == pytest.approx(cost)
        assert all(curve.loss_at(whole) == 0 for curve in quarter)


def test_every_type_has_a_cost() -> None:
    from converters.mixes import MIXES

    assert predict.ROUNDING.keys() == MIXES.keys()
    assert predict.CACHE.keys() == {"f16", "q8_0", "q4_0"}


# What was measured before


def remember(source: Path, ratio: float = 0.25, kl: float = 0.5, components: tuple[str, ...] = COMPONENTS) -> None:
    """As if a run had measured the model, with the first layer mattering most."""
    model = open_huggingface(source)
    grid = grid_for(model, TypeRequest(resolve_quant("f16")), "f16")
    known: cache.Sensitivities = []
    for i, sizes in enumerate(all_sizes(model.config, grid, components)):  # type: ignore[arg-type]
        of = {c: tuple((1 - n / options[-1]) for n in options) for c, options in sizes.items()}
        known.append({c: Sensitivity(tuple(sizes[c]), of[c], sizes[c][0], kl / (i + 1)) for c in sizes})
    file = cache.cache_file([f"{ratio}"], model.config, *[open_ids()] * 2, [{}], ratio, Method())
    cache.save(file, known)
    cache.remember(file, model.source, model.config, ratio, Method())


def open_ids() -> Any:
    import torch

    return torch.zeros(1, 1, dtype=torch.long)


def test_measurements_are_used(sources: dict[str, Path], tmp_path: Path) -> None:
    by_rule = forecast(sources["rough"])
    remember(sources["rough"])
    measured = forecast(sources["rough"])
    assert (by_rule.prediction.measured, measured.prediction.measured) == (False, True)
    assert measured.prediction.reduction != by_rule.prediction.reduction
    units = [one.intermediate_size for one in measured.plan.dimensions]
    assert units[0] > units[-1]
    assert "measured on this model" in as_text(measured)
    assert "by rule" in as_text(by_rule)
    # The file may have moved, and another model is another.
    moved = shutil.copytree(sources["rough"], tmp_path / "elsewhere")
    assert forecast(moved).prediction == measured.prediction
    other = write_model(tmp_path / "other", **SIZES["rough"], seed=1)
    assert not forecast(other).prediction.measured
    assert not forecast(sources["fine"]).prediction.measured
    gguf = write_gguf(open_huggingface(sources["rough"]), resolve_quant("f16"), tmp_path / "m.gguf").path
    assert not forecast(gguf).prediction.measured


def test_measurement_next_to_the_ratio(sources: dict[str, Path]) -> None:
    remember(sources["rough"], 0.1, 0.1)
    remember(sources["rough"], 0.5, 0.9)
    low, high = forecast(sources["rough"], ratio=0.15), forecast(sources["rough"], ratio=0.45)
    assert low.prediction.measured
    assert high.prediction.measured
    remember(sources["rough"], 0.5, 0.1)
    assert forecast(sources["rough"], ratio=0.15).prediction == low.prediction
    assert forecast(sources["rough"], ratio=0.45).prediction.reduction < high.prediction.reduction


def test_measurement_of_other_components_is_none(sources: dict[str, Path]) -> None:
    remember(sources["rough"], components=("MLP",))
    assert not forecast(sources["rough"]).prediction.measured
    assert forecast(sources["rough"], components=("MLP",)).prediction.measured


@pytest.mark.parametrize("content", [b"", b"[]", b"[{}]", b'[{"file": "../x", "ratio": 1}]', b"\xff", b'{"a": 1}'])
@pytest.mark.parametrize("which", ["known", "sensitivity"])
def test_damaged_measurements_are_none(sources: dict[str, Path], tmp_path: Path, content: bytes, which: str) -> None:
    remember(sources["rough"])
    [file] = (tmp_path / "cache").rglob(f"{which}/*.json")
    file.write_bytes(content)
    assert not forecast(sources["rough"]).prediction.measured


def test_measured_at_a_folders_sizes_is_of_no_use_to_a_file(sources: dict[str, Path]) -> None:
    """a3q reduce measures at other sizes, which need not hold those of a GGUF."""
    model = open_huggingface(sources["rough"])
    grid = folder_grid(model.config)
    known = predict.by_rule(model.config, all_sizes(model.config, grid, COMPONENTS))
    known = [
        {c: replace(one, sizes=one.sizes[1:], losses=one.losses[1:], probed=one.sizes[1]) for c, one in layer.items()}
        for layer in known
    ]
    file = cache.cache_file(["a"], model.config, open_ids(), open_ids(), [{}], 0.25, Method())
    cache.save(file, known)
    cache.remember(file, model.source, model.config, 0.25, Method())
    assert cache.recall(model.source, model.config, 0.25, Method()) is not None
    assert not forecast(sources["rough"]).prediction.measured


# What cannot be


@pytest.mark.parametrize("do", [forecast, converted])
@pytest.mark.parametrize(
    ("kind", "options", "parts"),
    [
        ("llama", {"ratio": 0, "cache_type": "q8_0"}, ("heads of size 80", "--kv-ratio 0.6 or 0.2", "--kv-type f16")),
        ("llama", {"components": ("MLP",), "cache_type": "q4_0"}, ("heads of size 80", "--kv-ratio 0.6 or 0.2")),
        ("qwen3", {"cache_type": "q8_0"}, ("heads of size 80", "; take --kv-type f16")),
        ("qwen3", {"kv_ratio": 0.5}, ("cannot hold ov and qk of qwen3", "--components mlp", "a3q reduce")),
        ("gpt2", {"kv_ratio": 0.5}, ("cannot hold ov and qk of gpt2", "--components mlp", "a3q reduce")),
        ("gpt2", {"cache_type": "q8_0"}, ("heads of size 16", "; take --kv-type f16")),
        ("llama", {"context": 0}, ("--ctx 0",)),
        ("llama", {"parallel": 0}, ("--parallel 0",)),
        ("llama", {"cache_type": "q5_1"}, ("--kv-type q5_1", "f16, q8_0, q4_0")),
        ("llama", {"kv_ratio": 1}, ("--kv-ratio 1 is out of range",)),
    ],
)  # fmt: skip
def test_refused_before_any_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    do: Any,
    kind: Any,
    options: dict[str, Any],
    parts: tuple[str, ...],
) -> None:
    def worked(*_: object, **__: object) -> None:
        raise AssertionError("some work was done")

    monkeypatch.setattr("a3q.pipeline.hash_source", worked)
    monkeypatch.setattr("a3q.pipeline.calibrate", worked)
    head = {} if kind == "gpt2" else {"head_dim": 80}
    source = write_model(tmp_path / "m", kind, **head)
    with pytest.raises(InputError) as refused:
        do(source, **({} if do is forecast else {"output": tmp_path / "m.gguf"}), **options)
    for part in parts:
        assert part in str(refused.value)
    if kind != "llama" and "kv_ratio" not in options:
        assert "--kv-ratio" not in str(refused.value)
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.25, 0.5])
@pytest.mark.parametrize("ranks", ["mixed", "uniform"])
def test_quantized_cache_makes_heads_shrink(tmp_path: Path, ratio: float, ranks: str) -> None:
    """Also where as little is to go that they would stay."""
    source = write_model(tmp_path / "m", head_dim=80, num_attention_heads=4)
    one = forecast(source, ratio=ratio, ranks=ranks, cache_type="q8_0")
    assert {one.qk_head_dim for one in one.plan.dimensions} <= {32, 64}
    assert one.after.quantized_cache


def test_advice_leads_to_sizes_that_work(tmp_path: Path) -> None:
    for size in (40, 48, 72, 80, 96, 112, 120, 200):
        config = open_header(write_model(tmp_path / str(size), head_dim=size)).model.config
        if size % 32 == 0:
            check_cache(config, "q8_0")
            continue
        with pytest.raises(InputError, match="--kv-ratio") as refused:
            check_cache(config, "q8_0")
        advice = str(refused.value).partition("--kv-ratio ")[2].partition(", or take")[0]
        for ratio in advice.split(" or "):
            one = forecast(tmp_path / str(size), kv_ratio=float(ratio), cache_type="q8_0")
            assert one.after.quantized_cache


# Shown


def test_table_fits_a_terminal(sources: dict[str, Path]) -> None:
    one = forecast(sources["rough"], ratio=0.25, cache_type="q8_0", context=131072, parallel=16)
    text = as_text(one)
    assert max(map(len, text.splitlines())) <= 80
    for part in (
        "parameters", "file", "F32, tensors", "KV cache of a token", "KV cache at 131,072 tokens × 16",
        "compute buffer (estimate)", "memory to run", "work of a prompt token", "work of a generated token",
        "flash attention on CPU", "CUDA", "Metal", "Vulkan", "cache of type q8_0, q4_0", "predicted speed-up: prompt",
        "grid of the runtime: heads of 32, 64; MLP in steps of 32", "llama-server -m FILE.gguf -c 2097152 -np 16",
    ):  # fmt: skip
        assert part in " ".join(text.split()) or part in text, part


def test_large_model_fits_a_terminal(sources: dict[str, Path]) -> None:
    one = forecast(sources["rough"], kv_ratio=0.5, cache_type="q8_0")
    huge = replace(one.before, parameters=405_853_388_800, file_bytes=811_706_777_600)
    huge = replace(huge, types=totals([TensorInfo(str(i), "BF16", (10**9,), 2 * 10**9) for i in range(1138)]))
    shown = replace(one, before=huge, after=replace(huge, types=one.after.types))
    assert max(map(len, as_text(shown).splitlines())) <= 80
    assert "405,853,388,800" in as_text(shown)
    assert open_model(sources["rough"]).config == one.model.config

"""--fit: what is chosen fits, and nothing of less predicted loss would."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from a3q import cache, convert, predict
from a3q.asked import Asked
from a3q.components import Method
from a3q.dimensions import all_sizes
from a3q.errors import InputError
from a3q.families import COMPONENTS
from a3q.footprint import CACHE_TYPES, Use
from a3q.forecast import Forecast, Forecaster, before_conversion, grid_for
from a3q.gguf_types import TypeRequest
from a3q.search import MLP_SHARES
from a3q.sensitivity import Sensitivity
from a3q.settings import Settings
from converters.gguf_writer import write_gguf
from converters.headers import Header, open_header
from converters.hf_reader import open_huggingface
from converters.types import BITS, resolve_quant
from tests.pico import corpus, write_model

SIZE: dict[str, Any] = {"hidden_size": 128, "head_dim": 64, "intermediate_size": 512}
CONTEXT = 4096
SHARES = MLP_SHARES[::3]


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("search") / "pico", **SIZE)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few shares of the MLP, so that all can be tried."""
    monkeypatch.setattr("a3q.search.MLP_SHARES", SHARES)


def fitted(source: Path | Header, memory: int, **options: Any) -> Forecast:
    asked = Asked(memory=memory, **({"context": CONTEXT} | options))
    asked.check()
    header = source if isinstance(source, Header) else open_header(source)
    return asked.forecast(header, TypeRequest(asked.quant_plan()), asked.settings())


def everything(source: Path, context: int = CONTEXT, quants: tuple[str, ...] = ("f16", *BITS)) -> list[Forecast]:
    """A forecast of every choice there is."""
    forecaster, found = Forecaster(open_header(source)), []
    shape = forecaster.header.model.config.layers[0]
    for quant, share, kind in product(quants, SHARES, CACHE_TYPES):
        types = TypeRequest(resolve_quant(quant))
        grid = grid_for(forecaster.header.model, types, kind)
        for head in grid.sizes(forecaster.header.model.config, shape, "QK"):
            if head < shape.qk_head_dim / 4:
                continue
            ratio = 1 - head / shape.qk_head_dim
            own: dict[Any, float] = {"QK": ratio, "OV": ratio, "MLP": share}
            found.append(forecaster.forecast(Settings(0.0, own_ratios=own), types, Use(context, kind)))
    return found


def remember(source: Path) -> None:
    """As if a run had measured the model: heads hardly matter, the second layer more than the first."""
    model = open_huggingface(source)
    grid = grid_for(model, TypeRequest(resolve_quant("f16")), "f16")
    known: cache.Sensitivities = []
    for i, sizes in enumerate(all_sizes(model.config, grid, COMPONENTS)):
        scale = {"QK": 1e-4, "OV": 1e-4, "MLP": 0.3}
        known.append(
            {
                c: Sensitivity(options, tuple(1 - n / options[-1] for n in options), options[0], scale[c] * (i + 1))
                for c, options in sizes.items()
            }
        )
    import torch

    ids = torch.zeros(1, 1, dtype=torch.long)
    file = cache.cache_file(["x"], model.config, ids, ids, [{}], 0.5, Method())
    cache.save(file, known)
    cache.remember(file, model.source, model.config, 0.5, Method())


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("measured", [False, True])
def test_nothing_better_fits(pico: Path, measured: bool) -> None:
    if measured:
        remember(pico)
    every = everything(pico)
    assert len(every) > 300
    sizes = sorted(one.after.memory for one in every)
    assert len(set(sizes)) > 100
    least, most = sizes[0], sizes[-1]
    losses = []
    for memory in (least, least + 1, *range(least, most, (most - least) // 9), most, 10 * most):
        found = fitted(pico, memory)
        fitting = [one for one in every if one.after.memory <= memory]
        assert found.after.memory <= memory
        assert found.prediction.measured == measured
        assert found.prediction.total == pytest.approx(min(one.prediction.total for one in fitting))
        losses.append(found.prediction.total)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0
    with pytest.raises(InputError, match=f"^--fit .*the least that is possible for {CONTEXT:,} tokens is") as refused:
        fitted(pico, least - 1)
    smallest = min(every, key=lambda one: one.after.memory).after
    for part in (smallest.memory, smallest.file_bytes, smallest.kv_bytes, smallest.compute_bytes):
        assert f"{part / 1e6:.1f} MB" in str(refused.value)
    assert "shorter --ctx" in str(refused.value)


def test_least_is_right_where_small_types_do_not_fit(tmp_path: Path) -> None:
    """Of rows that divide into no super-block, 2bit is no smaller than 4bit."""
    source = write_model(tmp_path / "m", hidden_size=96, head_dim=48, intermediate_size=160, num_attention_heads=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("a3q.search.MLP_SHARES", SHARES)
        least = min(everything(source), key=lambda one: one.after.memory)
        with pytest.raises(InputError, match=f"is {least.after.memory / 1e6:.1f} MB"):
            fitted(source, 1000)
        assert fitted(source, least.after.memory).after == least.after


@pytest.mark.usefixtures("coarse")
def test_what_is_fixed_stays(pico: Path) -> None:
    free = [one.after.memory for one in everything(pico)]
    middle = (min(free) + max(free)) // 2
    for quant in ("q5_0", "8bit", "f16"):
        found = fitted(pico, middle, quant=quant)
        assert found.types.plan.name == resolve_quant(quant).name
        every = [one for one in everything(pico, quants=(quant,)) if one.after.memory <= middle]
        assert found.prediction.total == pytest.approx(min(one.prediction.total for one in every))
    for kind in CACHE_TYPES:
        found = fitted(pico, middle, cache_type=kind)
        assert found.use == Use(CONTEXT, kind)
        assert found.after.cache_type == kind
        every = [one for one in everything(pico) if one.after.memory <= middle and one.use.cache_type == kind]
        assert found.prediction.total == pytest.approx(min(one.prediction.total for one in every))
    both = fitted(pico, middle, quant="8bit", cache_type="q4_0")
    assert (both.types.plan.name, both.use.cache_type) == ("q8_0", "q4_0")
    with pytest.raises(InputError, match="the least that is possible"):
        fitted(pico, middle // 3, quant="f16", cache_type="f16")


@pytest.mark.usefixtures("coarse")
def test_components_that_may_shrink(pico: Path) -> None:
    least = min(one.after.memory for one in everything(pico))
    with pytest.raises(InputError, match="the least that is possible"):
        fitted(pico, least, components=("MLP",))
    for components, stays in ((("MLP",), "qk_head_dim"), (("QK", "OV"), "intermediate_size")):
        found = fitted(pico, least + 2_500_000, components=components)
        whole = getattr(found.model.config.layers[0], stays)
        assert {getattr(one, stays) for one in found.plan.dimensions} == {whole}
    # One of the two alone cannot shrink in a file.
    found = fitted(pico, least + 2_500_000, components=("QK", "MLP"))
    assert {one.qk_head_dim for one in found.plan.dimensions} == {64}


def test_heads_that_cannot_shrink(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", "qwen3", num_attention_heads=4, head_dim=48)
    found = fitted(source, 10**9)
    assert found.use.cache_type == "f16"
    with pytest.raises(InputError, match=r"heads of size 48 are no multiple of 32.*start; take --kv-type f16"):
        fitted(source, 10**9, cache_type="q8_0")
    with pytest.raises(InputError, match="the least that is possible"):
        fitted(source, 10**4)


def test_heads_that_must_shrink_for_the_cache(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", head_dim=80)
    found = fitted(source, 10**9, cache_type="q8_0")
    assert {one.qk_head_dim for one in found.plan.dimensions} == {64}
    assert found.after.quantized_cache


@pytest.mark.parametrize("quant", ["q4_0", "q8_0", "q4_k_m"])
def test_quantized_source_that_fits_is_kept(tmp_path: Path, quant: str) -> None:
    folder = write_model(tmp_path / "m", hidden_size=256, num_attention_heads=32, head_dim=8, intermediate_size=2048)
    path = write_gguf(open_huggingface(folder), resolve_quant(quant), tmp_path / "m.gguf").path
    header = open_header(path)
    whole = before_conversion(header, Use(CONTEXT)).memory
    found = fitted(header, whole + 20_000)
    assert found.plan.request.groups() == []
    assert found.types.plan.name == quant
    assert found.prediction.total == 0
    assert found.after.types == found.before.types
    assert fitted(header, whole - 200_000).prediction.total > 0


def test_parallel_sequences_count(pico: Path) -> None:
    one = fitted(pico, 10**9)
    assert one.after.parallel == 1
    memory = one.after.memory
    two = fitted(pico, memory, parallel=2)
    assert two.after.memory <= memory
    assert two.prediction.total > 0
    with pytest.raises(InputError, match=r"tokens × 900 is"):
        fitted(pico, memory, parallel=900)


def test_every_share_and_head_size_is_a_candidate(pico: Path) -> None:
    """Not only those that the types chosen by default have: float16 has no blocks."""
    forecaster = Forecaster(open_header(write_model(pico.parent / "odd", **SIZE | {"num_attention_heads": 2})))
    model = forecaster.header.model
    config, shape = model.config, model.config.layers[0]
    coarse = grid_for(model, TypeRequest(resolve_quant("4bit")), "f16").sizes(config, shape, "QK")
    fine = grid_for(model, TypeRequest(resolve_quant("f16")), "f16").sizes(config, shape, "QK")
    assert set(coarse) < set(fine)
    whole = fitted(forecaster.header, 10**9, quant="f16", components=("QK", "OV"), cache_type="f16")
    less = fitted(
        forecaster.header, whole.after.memory - 50_000, quant="f16", components=("QK", "OV"), cache_type="f16"
    )
    assert less.plan.dimensions[0].qk_head_dim in set(fine) - set(coarse)


def test_convert_does_what_fits(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("a3q.search.MLP_SHARES", SHARES)
    (tmp_path / "text.txt").write_text("\n".join(corpus(100)))
    memory = fitted(pico, 10**9, quant="f16").after.memory - 600_000
    planned = fitted(pico, memory, quant="f16")
    options: dict[str, Any] = {"calib": str(tmp_path / "text.txt"), "calib_tokens": 512, "device": "cpu"}
    result = convert(
        pico, output=tmp_path / "m.gguf", fit=memory, quant="f16", context=CONTEXT, verify_file=False, **options
    )
    assert result.path.stat().st_size == pytest.approx(planned.after.file_bytes, rel=0.01)
    assert result.use == planned.use
    after = result.footprints["after"]
    assert (after.kv_bytes, after.compute_bytes) == (planned.after.kv_bytes, planned.after.compute_bytes)
    assert after.memory <= 1.01 * memory
    assert replace(after, file_bytes=0, types=()).head_sizes == planned.after.head_sizes


def test_rule_prefers_the_cheapest() -> None:
    """What the rule says of the order: a smaller cache and types before dimensions."""
    assert predict.CACHE["q8_0"] < predict.ROUNDING["Q6_K"] < predict.CACHE["q4_0"] < predict.ROUNDING["Q4_K_M"]

"""The stages that both outputs share: what is refused, what is measured once only, and what the record says."""

from __future__ import annotations

import gc
import hashlib
import math
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from a3q import choosing, pipeline
from a3q.components import Method
from a3q.dimensions import ALL, Grid, folder_grid, gguf_grid, unreduced
from a3q.errors import InputError
from a3q.families import COMPONENTS
from a3q.heal.settings import Healing
from a3q.model import Model
from a3q.pipeline import Reduced, run, timed
from a3q.provenance import is_outdated, provenance, rounding_facts
from a3q.reduce import reduce
from a3q.settings import Settings, parse_components
from converters.open import open_model
from tests.a3q.stages import Recorded
from tests.pico import KINDS, Kind, corpus, write_model

WEIGH = "weigh the layers"
PER_HEAD = Method("a3q", "per_head")


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "text.txt").write_text("\n".join(corpus(200, seed=7)))
    (folder / "other.txt").write_text("\n".join(corpus(200, seed=8)))
    return write_model(folder / "pico")


@pytest.fixture
def model(pico: Path) -> Model:
    return open_model(pico)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def settings(model: Model, **options: Any) -> Settings:
    text = model.source.path.with_name("text.txt")
    return Settings(**({"calib": [str(text)], "calib_tokens": 1024, "device": "cpu"} | options))


def stock(model: Model, block: int) -> Grid:
    """What stock llama.cpp holds."""
    return gguf_grid(model.family, model.config, block)


def reduced(
    model: Model, grid: Grid | None = None, method: Method = PER_HEAD, held_out: bool = False, **options: Any
) -> tuple[Reduced, Recorded]:
    stages = Recorded()
    grid = folder_grid(model.config) if grid is None else grid
    result = run(model, settings(model, method=method.name, **options), grid, method, held_out, stages)
    stages.check_totals()
    return result, stages


# What is asked


def test_settings_that_are_right() -> None:
    Settings().check()
    Settings(0.9, own_ratios={"QK": 0, "OV": 0.9}, ranks="uniform", method="paper", seed=2**32 - 1).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": -0.1}, r"--ratio -0\.1 is out of range; give a number from 0 \(untouched\) to 0\.9"),
        ({"ratio": 0.91}, r"--ratio 0\.91 is out of range"),
        ({"ratio": math.nan}, "--ratio nan is out of range"),
        ({"own_ratios": {"QK": 1}}, "--ratio-qk 1 is out of range"),
        ({"own_ratios": {"OV": -1}}, "--ratio-ov -1 is out of range"),
        ({"own_ratios": {"MLP": math.inf}}, "--ratio-mlp inf is out of range"),
        ({"components": frozenset(("qk",))}, "component 'qk': give QK, OV, MLP"),
        ({"own_ratios": {"FFN": 0.1}}, "component 'FFN': give QK, OV, MLP"),
        ({"ranks": "even"}, "--ranks even: give mixed or uniform"),
        ({"method": "svd"}, "--method svd: give a3q or paper"),
        ({"seed": -1}, "--seed -1: give a number from 0 to 4294967295"),
        ({"seed": 2**32}, "--seed 4294967296"),
        ({"calib_tokens": 0}, "--calib-tokens 0: give a positive number of tokens"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        Settings(**options).check()


@pytest.mark.parametrize("text", ["mlp,qk", "QK,MLP", " mlp , Qk ,", "qk,mlp,qk"])
def test_components(text: str) -> None:
    assert parse_components(text) == {"QK", "MLP"}


@pytest.mark.parametrize("text", ["", ",", "ffn", "qk,ffn", "qk ov", "all"])
def test_components_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="give one or more of qk, ov, mlp, with commas between"):
        parse_components(text)


def test_components_left_out() -> None:
    assert parse_components(None) is None
    assert Settings().request().components == ALL
    # A ratio of its own asks for a component.
    request = Settings(0.25, frozenset(("MLP",)), {"QK": 0.5}).request()
    assert request.components == {"MLP", "QK"}
    assert Settings(0.25, frozenset(("MLP",)), {"MLP": 0.5}).request().groups() == [({"MLP"}, 0.5)]


# Measured once


def test_second_run_measures_nothing(model: Model, cache: Path) -> None:
    first, stages = reduced(model)
    assert stages.titles == ["hash the source", "read calibration text", WEIGH, "reduce"]
    again, stages = reduced(model)
    assert stages.titles == ["hash the source", "read calibration text", "reduce"]
    assert again.plan == first.plan
    assert first.plan.predicted_kl is not None
    assert len([path for path in cache.rglob("*") if path.is_file()]) == 2  # the measurement and where it belongs
    for mine, theirs in zip(again.model.layers, first.model.layers, strict=True):
        assert all(torch.equal(mine[role], theirs[role]) for role in theirs)


def test_other_ratios_next_to_the_same_probe_share_a_measurement(model: Model) -> None:
    reduced(model, ratio=0.25)
    for options in ({"ratio": 0.2}, {"ratio": 0.3}, {"ratio": 0.1, "own_ratios": {"MLP": 0.3}}):
        assert WEIGH not in reduced(model, **options)[1].titles, options


def test_any_block_of_a_type_shares_a_measurement(model: Model) -> None:
    reduced(model, stock(model, 1))
    for block in (32, 256):
        assert WEIGH not in reduced(model, stock(model, block))[1].titles


OTHERS: dict[str, dict[str, Any]] = {
    "ratio": {"ratio": 0.5},
    "components": {"components": frozenset(("MLP", "OV"))},
    "tokens": {"calib_tokens": 2048},
    "frequencies": {"method": Method("a3q", "shared")},
    "method": {"method": Method("paper", "per_head"), "ranks": "mixed"},
    "grid": {"grid": Grid(ALL, 4, 8)},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_measured_again_where_something_counts(model: Model, options: dict[str, Any]) -> None:
    reduced(model)
    assert WEIGH in reduced(model, **options)[1].titles
    assert WEIGH not in reduced(model, **options)[1].titles
    assert WEIGH not in reduced(model)[1].titles


def test_measured_again_for_another_text_or_model(model: Model, tmp_path: Path) -> None:
    reduced(model)
    other = str(model.source.path.with_name("other.txt"))
    assert WEIGH in reduced(model, calib=[other])[1].titles
    copy = open_model(write_model(tmp_path / "pico", seed=1))
    text = str(model.source.path.with_name("text.txt"))
    assert WEIGH in reduced(copy, calib=[text])[1].titles
    # The same weights elsewhere are the same model.
    copy = open_model(write_model(tmp_path / "elsewhere"))
    assert WEIGH not in reduced(copy, calib=[text])[1].titles


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"null", b"3", b"[]", b'[{"QK": {}}, {}]', b'[{"QK": []}, {}]', b"[{}, {}]", b"cut"],
)
def test_broken_cache_file(model: Model, cache: Path, content: bytes) -> None:
    first, _ = reduced(model)
    [file] = cache.rglob("sensitivity/*.json")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content == b"cut" else content)
    again, stages = reduced(model)
    assert WEIGH in stages.titles
    assert again.plan == first.plan
    assert file.read_bytes() == whole


def test_cache_that_cannot_be_written(model: Model, cache: Path) -> None:
    cache.write_text("a file where a folder should be")
    assert WEIGH in reduced(model)[1].titles
    assert WEIGH in reduced(model)[1].titles
    assert cache.is_file()


def test_nothing_is_weighed_that_nothing_depends_on(model: Model) -> None:
    even = {"ranks": "uniform"}
    assert WEIGH not in reduced(model, **even)[1].titles
    grid = stock(model, 1)
    # One head size, and no MLP: nothing to choose.
    assert WEIGH not in reduced(model, grid, components=frozenset(("QK", "OV")), ratio=0.5)[1].titles
    assert WEIGH in reduced(model, grid, components=frozenset(("MLP",)))[1].titles


# What is done


def test_nothing_asked_is_nothing_done(model: Model) -> None:
    result, stages = reduced(model, ratio=0.0)
    assert stages.titles == ["hash the source"]
    assert (result.model, result.calibration, result.plan.achieved) == (model, None, 0)
    result, stages = reduced(model, ratio=0.0, held_out=True, calib=["self"], calib_tokens=None)
    assert stages.titles == ["hash the source", "write calibration text"]
    assert result.calibration is not None
    assert result.calibration.tokens.shape == (1, 256)


@pytest.mark.parametrize("ranks", ["mixed", "uniform"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_family(pico: Path, tmp_path: Path, kind: Kind, ranks: str) -> None:
    model = open_model(write_model(tmp_path / kind, kind))
    text = str(pico.with_name("text.txt"))
    result, stages = reduced(model, calib=[text], held_out=True, ranks=ranks, ratio=0.3)
    assert result.plan.achieved == pytest.approx(0.3, abs=0.03)
    assert [one.qk_head_dim for one in result.plan.dimensions] == [
        shape.qk_head_dim for shape in result.model.config.layers
    ]
    assert result.model.parameters() < model.parameters()
    assert result.calibration is not None
    # Positions that a model knows: 256 here.
    assert result.calibration.held_out.shape[1] == 256
    assert (ranks == "mixed") == (WEIGH in stages.titles)


def test_candidates_are_tried(model: Model) -> None:
    """Head size 16 cannot lose a quarter on the grid of 8: either the MLP loses it, or the heads lose half."""
    result, stages = reduced(model, stock(model, 1), Method("a3q", "shared"), ranks="uniform", ratio=0.2)
    assert len(result.tried) == 2
    assert "choose dimensions" in stages.titles
    assert result.plan == min(result.tried, key=lambda pair: pair[1])[0]
    assert all(kl > 0 for _, kl in result.tried)


def test_one_candidate_is_held_at_a_time(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []

    def watched(*arguments: Any, **more: Any) -> Any:
        gc.collect()
        assert not any(ref() for ref in made)
        reduction = reduce(*arguments, **more)
        made.append(weakref.ref(reduction.model.layers))
        return reduction

    monkeypatch.setattr(pipeline, "reduce", watched)
    monkeypatch.setattr(choosing, "reduce", watched)
    reduced(model, stock(model, 1), Method("a3q", "shared"), ranks="uniform", ratio=0.2)
    assert len(made) == 3


def test_a_kv_cache_that_stays_is_said(pico: Path) -> None:
    model = open_model(pico)
    text = str(pico.with_name("text.txt"))
    for ranks, options in (("mixed", {}), ("uniform", {}), ("uniform", {"components": frozenset(("MLP",))})):
        result, _ = reduced(
            model,
            stock(model, 1),
            Method("a3q", "shared"),
            calib=[text],
            ranks=ranks,
            **options,
        )
        same = result.model.config.kv_bytes_per_token() == model.config.kv_bytes_per_token()
        said = any("the KV cache stays as large" in note for note in result.notes)
        assert said == (same and not options)


def test_qwen3_has_one_mlp_size_in_llama_cpp(pico: Path, tmp_path: Path) -> None:
    model = open_model(write_model(tmp_path / "qwen3", "qwen3", intermediate_size=256, num_hidden_layers=3))
    text = str(pico.with_name("text.txt"))
    result, stages = reduced(model, stock(model, 32), Method("a3q", "shared"), calib=[text])
    assert {shape.intermediate_size for shape in result.model.config.layers} == {192}
    assert WEIGH not in stages.titles
    stay, few = result.notes
    assert "QK stay" in stay
    assert "calibration tokens are few for 256 MLP units" in few
    # Nothing to say where nothing is reduced.
    assert reduced(model, stock(model, 32), calib=[text], ratio=0.0)[0].notes == ()


def test_shortfall_is_said(model: Model) -> None:
    for ranks in ("mixed", "uniform"):
        result, _ = reduced(model, stock(model, 32), Method("a3q", "shared"), ratio=0.9, ranks=ranks)
        assert any(note.startswith("asked for 90.0%, achieved ") for note in result.notes), ranks


def test_paper_needs_no_second_stream(model: Model) -> None:
    result, _ = reduced(model, method=Method("paper", "per_head"), ranks="uniform", ratio=0.25)
    assert result.model.config.layers[0].qk_head_dim == 12
    assert len(result.model.config.layers[0].frequencies) == 2


def test_disk_instead_of_memory(model: Model) -> None:
    one, _ = reduced(model)
    other, _ = reduced(model, memory_budget=0)
    for mine, theirs in zip(one.model.layers, other.model.layers, strict=True):
        assert all(torch.equal(mine[role], theirs[role]) for role in theirs)


def test_times_are_noted() -> None:
    seconds: dict[str, float] = {}
    stages = timed(Recorded(), seconds)
    for title in ("one", "two", "one"):
        with stages(title, 1.0) as advance:
            advance(1)
    assert list(seconds) == ["one", "two"]
    assert all(value >= 0 for value in seconds.values())


# The record


def record(result: Reduced, settings_: Settings) -> Mapping[str, object]:
    return provenance(result, settings_, "1.2")


def test_provenance(model: Model) -> None:
    options: dict[str, Any] = {"ratio": 0.25, "own_ratios": {"QK": 0.5}, "seed": 3}
    result, _ = reduced(model, **options)
    layers = result.model.config.layers
    weights = model.source.path / "model.safetensors"

    def sizes(name: str) -> int | list[int]:
        found = [getattr(shape, name) for shape in layers]
        return found[0] if len(set(found)) == 1 else found

    assert record(result, settings(model, **options)) == {
        "version": "1.2",
        "source.name": "Pico",
        "source.files": ["model.safetensors"],
        "source.sha256": [hashlib.sha256(weights.read_bytes()).hexdigest()],
        "ratio": result.plan.asked,
        "ratio_achieved": result.plan.achieved,
        "method": "a3q",
        "ranks": "mixed",
        "components": ["qk", "ov", "mlp"],
        "qk_head_dim": sizes("qk_head_dim"),
        "v_head_dim": sizes("v_head_dim"),
        "intermediate_size": sizes("intermediate_size"),
        "calibration.source": "text.txt",
        "calibration.tokens": 1024,
        "calibration.seed": 3,
    }
    assert 0.25 < result.plan.asked < 0.5
    assert any(isinstance(sizes(name), list) for name in ("v_head_dim", "intermediate_size"))


def test_provenance_of_some_components(model: Model) -> None:
    result, _ = reduced(model, components=frozenset(("MLP",)), ranks="uniform")
    facts = record(result, settings(model, ranks="uniform"))
    assert facts["components"] == ["mlp"]
    assert (facts["ranks"], facts["qk_head_dim"], facts["intermediate_size"]) == ("uniform", 16, 72)
    assert (facts["ratio"], facts["ratio_achieved"]) == (0.25, 0.25)


def test_provenance_of_healing(model: Model) -> None:
    result, _ = reduced(model, ranks="uniform")

    def told(**options: Any) -> dict[str, object]:
        asked = settings(model, ranks="uniform", **options)
        found = {**record(result, asked), **rounding_facts(result, asked)}
        return {key: value for key, value in found.items() if key.startswith("heal")}

    assert told() == {}
    assert told(healing=Healing("both", tokens=5000)) == {
        "heal.mode": "both", "heal.source": "text.txt", "heal.tokens": 5000, "heal.quant": False,
    }  # fmt: skip
    assert told(healing=Healing(minutes=3, quant=True)) == {
        "heal.mode": "none", "heal.source": "text.txt", "heal.minutes": 3.0, "heal.quant": True,
    }  # fmt: skip
    plain = unreduced(model.family, model.config, settings(model, ratio=0.0).request())
    gone = {key for key in told(healing=Healing("full", 7, 3)) if is_outdated(key, plain)}
    assert gone == {"heal.quant"}
    assert is_outdated("heal.mode", result.plan)
    assert is_outdated("quantizer.calibration.seed", plain)
    assert not is_outdated("calibration.seed", result.plan)


def test_provenance_of_a_plain_rewrite(model: Model) -> None:
    result, _ = reduced(model, ratio=0.0)
    assert record(result, settings(model, ratio=0.0)).keys() == {
        "version", "source.name", "source.files", "source.sha256", "ratio", "ratio_achieved",
    }  # fmt: skip
    # What is known of an earlier reduction stays true.
    entry = model.metadata["general.name"]
    earlier = replace(result, original=replace(model, metadata={**model.metadata, "a3q.ratio": entry}))
    assert "ratio" not in record(earlier, settings(model, ratio=0.0))


def test_components_are_in_the_order_of_the_table() -> None:
    assert list(COMPONENTS) == ["QK", "OV", "MLP"]
    assert choosing.PROBED_RATIOS == (0.1, 0.25, 0.5)

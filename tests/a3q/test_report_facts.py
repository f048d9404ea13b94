"""The facts of a report are those of the result."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest

from a3q import Result, __version__, convert, reduce_to_folder, runtime
from a3q.footprint import cache_bytes
from a3q.perplexity import Perplexity
from a3q.report_facts import Facts, facts
from a3q.settings import Settings
from a3q.verify import Quality, Verification
from tests.healed import healed
from tests.pico import corpus, write_model

SIZE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
"""Heads of size 32."""
CALIB: dict[str, Any] = {"calib_tokens": 1024, "device": "cpu"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("facts")
    (folder / "text.txt").write_text("\n".join(corpus(200, seed=7)))
    return write_model(folder / "pico", **SIZE)


@pytest.fixture(scope="module")
def calib(source: Path) -> dict[str, Any]:
    return {"calib": str(source.with_name("text.txt")), **CALIB}


@pytest.fixture(scope="module")
def heads(source: Path, calib: dict[str, Any]) -> Result:
    """Heads and MLP reduced, rounded, written as GGUF, checked where llama.cpp is there."""
    own = {"QK": 0.25, "OV": 0.25, "MLP": 0.25}
    return convert(source, quant="q4_0", own_ratios=own, output=source.with_name("heads.gguf"), **calib)


@pytest.fixture(scope="module")
def folder(source: Path, calib: dict[str, Any]) -> Result:
    """A folder whose layers differ, every head with frequencies of its own."""
    options: dict[str, Any] = {"own_ratios": {"QK": 0.5, "OV": 0.25}, "ranks": "mixed", "seed": 5}
    return reduce_to_folder(source, output=source.with_name("folder"), **options, **calib)


@pytest.fixture(scope="module")
def plain(source: Path) -> Result:
    """Nothing reduced, rounded or checked."""
    path = source.with_name("plain.gguf")
    return convert(source, ratio=0, quant="f16", output=path, verify_file=False, device="cpu")


def check_json(found: Facts) -> None:
    """It survives being written, so that nothing in it is strange to JSON."""
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["schema"] == 1


def test_plan(heads: Result) -> None:
    found, plan = facts(heads), heads.job.plan
    check_json(found)
    assert found["plan"]["asked"] == plan.asked == pytest.approx(0.25)
    assert found["plan"]["achieved"] == plan.achieved
    assert {c: one["achieved"] for c, one in found["plan"]["components"].items()} == plan.per_component
    assert {c: one["asked"] for c, one in found["plan"]["components"].items()} == {"QK": 0.25, "OV": 0.25, "MLP": 0.25}
    assert all(one["together_with"] == [] for one in found["plan"]["components"].values())
    assert (found["plan"]["method"], found["plan"]["frequencies"]) == ("a3q", "shared")
    assert found["model"]["parameters"] == {
        "before": heads.original.parameters(),
        "after": heads.reduced.parameters(),
    }


def test_layers(heads: Result, folder: Result) -> None:
    for result in (heads, folder):
        layers = facts(result)["layers"]
        assert len(layers) == result.original.config.num_hidden_layers
        for i, layer in enumerate(layers):
            old, new = result.original.config.layers[i], result.reduced.config.layers[i]
            lost = result.job.reduction.losses[i]
            for key in ("qk_head_dim", "v_head_dim", "intermediate_size"):
                assert layer[key] == {"before": getattr(old, key), "after": getattr(new, key)}
            for component, key in (("QK", "qk_head_dim"), ("OV", "v_head_dim"), ("MLP", "intermediate_size")):
                alone = getattr(new, key) == getattr(old, key)
                assert layer["energy_lost"][component] == (None if alone else getattr(lost, component.lower()))
        assert any(one is not None for layer in layers for one in layer["energy_lost"].values())


def test_healing(heads: Result, folder: Result) -> None:
    assert facts(heads)["healing"] is None
    assert all(layer["output_distance"] is None for layer in facts(heads)["layers"])
    found = facts(healed(folder))
    check_json(found)
    assert found["healing"] == {
        "asked": {"mode": "both", "tokens": None, "minutes": None, "quant": True},
        "source": "text.txt",
        "blocks": {
            "layers": 2,
            "without_gain": 1,
            "mean_output_distance": {"before": 0.025, "after": 0.02},
            "predictions": {"before": 0.31, "after": 0.3},
        },
        "end_to_end": [
            {
                "rounding_in_the_loop": False,
                "tokens": 26_214_400,
                "different_tokens": 6_500_000,
                "seconds": 250.4,
                "kl_to_original": {"before": 0.297, "after": 0.112},
                "curve": [
                    {"tokens": 8_000_000, "seconds": 20_000_000.0, "kl": 0.25},
                    {"tokens": 26_214_400, "seconds": 65_536_000.0, "kl": 0.1},
                ],
            },
            {
                "rounding_in_the_loop": True,
                "tokens": 1_000_000,
                "different_tokens": 1_000_000,
                "seconds": 21.0,
                "kl_to_original": {"before": 0.2, "after": 0.15},
                "curve": [{"tokens": 1_000_000, "seconds": 21.0, "kl": 0.16}],
            },
        ],
    }
    assert [layer["output_distance"] for layer in found["layers"]] == [
        {"before": 0.02, "after": 0.01},
        {"before": 0.03, "after": 0.03},
    ]
    found = facts(healed(heads, blocks=False, phases=1, before=math.nan))
    check_json(found)
    assert found["healing"]["blocks"] is None
    assert found["healing"]["asked"]["mode"] == "full"
    assert found["healing"]["end_to_end"][0]["kl_to_original"] == {"before": None, "after": 0.112}
    assert facts(healed(heads, phases=0))["healing"]["end_to_end"] == []
    without = facts(replace(healed(heads), settings=None))
    check_json(without)
    assert without["healing"]["asked"] is None


def test_one_list_of_frequencies(heads: Result) -> None:
    (group,) = facts(heads)["rope"]
    assert group["layers"] == [0, 1]
    (kept,), (before,) = group["kept"], group["radians_per_token"]
    (expected,) = heads.reduced.config.layers[0].frequencies
    assert [before[i] for i in kept] == list(expected)
    assert len(before) == 16
    assert len(kept) == 12


def test_frequencies_of_each_head(folder: Result) -> None:
    groups = facts(folder)["rope"]
    assert sorted(i for group in groups for i in group["layers"]) == [0, 1]
    for group in groups:
        for i in group["layers"]:
            (before,) = folder.original.config.layers[i].frequencies
            after = folder.reduced.config.layers[i].frequencies
            assert [[before[p] for p in kept] for kept in group["kept"]] == [sorted(own, reverse=True) for own in after]


def test_frequencies_of_a_model_without(tmp_path: Path) -> None:
    source = write_model(tmp_path / "gpt2", "gpt2")
    result = convert(source, ratio=0, quant="f16", output=tmp_path / "m.gguf", verify_file=False, device="cpu")
    assert facts(result)["rope"] == []


def test_cache(heads: Result, plain: Result, folder: Result) -> None:
    context = heads.original.config.max_position_embeddings
    for result, kinds in ((heads, ["f16"]), (plain, ["f16", "q8_0", "q4_0"]), (folder, ["f16"])):
        cache = facts(result)["cache"]
        assert cache["contexts_tokens"][-1] == context
        assert [(one["model"], one["type"]) for one in cache["series"]] == [
            ("original", "f16"),
            *(("written", kind) for kind in kinds),
        ]
        assert cache["series"][0]["bytes"][-1] == cache_bytes(result.original.config, context)
        for one in cache["series"][1:]:
            assert one["bytes"][-1] == cache_bytes(result.reduced.config, context, one["type"])
    assert not facts(heads)["cache"]["quantizable"]


def test_contexts_up_to_the_trained_one(plain: Result) -> None:
    config = replace(plain.original.config, max_position_embeddings=5000)
    job = replace(
        plain.job,
        original=replace(plain.original, config=config),
        reduction=replace(plain.job.reduction, model=replace(plain.original, config=config)),
    )
    assert facts(replace(plain, job=job))["cache"]["contexts_tokens"] == [512, 1024, 2048, 4096, 5000]


def test_tensors_are_those_of_the_file(heads: Result) -> None:
    assert heads.rounding is not None
    found = facts(heads)["quantization"]
    stored = {one.name: one for one in gguf.GGUFReader(heads.path).tensors}
    assert {one["name"] for one in found["tensors"]} == stored.keys()
    losses = heads.job.reduction.rounding_losses
    for one in found["tensors"]:
        tensor = stored[one["name"]]
        assert (one["type"], one["bytes"], one["weights"]) == (
            tensor.tensor_type.name,
            tensor.n_bytes,
            math.prod(tensor.shape.tolist()),
        )
        assert one["bits_per_weight"] == 8 * one["bytes"] / one["weights"]
    by_name = {one["name"]: one for one in found["tensors"]}
    for i in (0, 1):
        for role, kind in (("q", "attn_q"), ("o", "attn_output"), ("down", "ffn_down")):
            one = by_name[f"blk.{i}.{kind}.weight"]
            assert (one["layer"], one["kind"]) == (i, kind)
            assert one["output_energy_lost"] == losses[i][role] > 0
    # Not rounded, and not measured.
    assert by_name["blk.0.attn_norm.weight"]["output_energy_lost"] is None
    assert by_name["token_embd.weight"]["output_energy_lost"] is None
    assert found["bits_per_weight"] == heads.rounding.bits_per_weight
    assert found["mean_output_energy_lost_by_role"] == heads.rounding.losses


@pytest.mark.parametrize("options", [{"quant": "q4_0", "quantizer": "plain"}, {"bits": 6.5}, {"quant": "8bit"}])
def test_tensors_of_other_roundings(
    source: Path, calib: dict[str, Any], tmp_path: Path, options: dict[str, Any]
) -> None:
    result = convert(source, ratio=0, output=tmp_path / "m.gguf", verify_file=False, **options, **calib)
    found = facts(result)
    check_json(found)
    stored = {one.name: one.tensor_type.name for one in gguf.GGUFReader(result.path).tensors}
    assert {one["name"]: one["type"] for one in found["quantization"]["tensors"]} == stored
    measured = [one for one in found["quantization"]["tensors"] if one["output_energy_lost"] is not None]
    assert bool(measured) == ("bits" in options)


def test_gptq_folder(source: Path, calib: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"ratio": 0, "quant": "4bit", "group_size": 32, "verify_output": False}
    result = reduce_to_folder(source, output=tmp_path / "gptq", **options, **calib)
    found = facts(result)
    check_json(found)
    losses = [one["output_energy_lost"] for one in found["quantization"]["tensors"]]
    assert losses == [loss for layer in result.job.reduction.rounding_losses for loss in layer.values()]
    assert len(losses) == 14
    assert found["output"]["format"] == "huggingface"


def test_quality(heads: Result, plain: Result) -> None:
    assert facts(plain)["quality"] is None
    check = heads.verification
    if check is None:
        pytest.skip("llama.cpp is not installed")
    found = facts(heads)["quality"]
    assert found["original"]["perplexity"] == check.original.perplexity.value
    assert found["written"] == {
        "perplexity": check.written.perplexity.value,
        "perplexity_stderr": check.written.perplexity.stderr,
        "kl_to_original": check.written.kl,
    }
    assert found["kl_of_written_to_in_memory"] == check.kl_to_reduced
    assert (found["scored_tokens"], found["runtime"]) == (check.scored_tokens, "llama.cpp")


def test_numbers_that_are_none(plain: Result) -> None:
    """A broken model's perplexity has no place in JSON."""
    broken = Quality(Perplexity(math.inf, math.nan, 1, 1), math.nan)
    check = Verification(broken, broken, broken, math.inf, 1, "llama.cpp")
    found = facts(replace(plain, verification=check))
    check_json(found)
    assert found["quality"]["written"] == {"perplexity": None, "perplexity_stderr": None, "kl_to_original": None}


def test_files(heads: Result, folder: Result) -> None:
    found = facts(heads)
    digest = hashlib.sha256(heads.path.read_bytes()).hexdigest()
    size = heads.path.stat().st_size
    assert found["output"]["files"] == [{"name": "heads.gguf", "bytes": size, "sha256": digest}]
    assert found["output"]["bytes"] == size
    assert found["source"]["files"] == [{"name": "model.safetensors", "sha256": heads.job.digests[0]}]
    (written,) = facts(folder)["output"]["files"]
    path = folder.path / "model.safetensors"
    assert written["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    # Nothing tells where on this machine it happened.
    assert str(heads.path.parent) not in json.dumps(found)


def test_how_it_was_made(folder: Result, plain: Result) -> None:
    found = facts(folder)
    check_json(found)
    calibration = folder.job.calibration
    assert calibration is not None
    assert found["calibration"] == {
        "source": "text.txt",
        "description": calibration.description,
        "sequences": 4,
        "tokens": 1024,
        "held_out_tokens": calibration.held_out.numel(),
        "seed": 5,
    }
    assert found["made_by"]["a3q"] == __version__
    assert found["made_by"]["device"] == "cpu"
    assert (found["made_by"]["llama_cpp"] is not None) == runtime.available()
    assert found["plan"]["ranks"] == "mixed"
    assert found["seconds"] == folder.seconds
    assert found["notes"] == list(folder.notes)
    without = facts(replace(plain, settings=None))
    check_json(without)
    assert without["calibration"] is None
    assert without["made_by"]["device"] is None
    assert facts(replace(plain, settings=Settings(ranks="uniform")))["plan"]["ranks"] == "uniform"

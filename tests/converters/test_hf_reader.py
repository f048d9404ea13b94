"""Hugging Face reading: the same weights and frequencies as transformers, and one line for each kind of bad folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from a3q.errors import InputError
from converters import open as opening
from converters.hf_reader import open_huggingface, read_config
from converters.open import open_model
from converters.rope import frequencies_from_hf
from tests import pico


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.write_model(tmp_path_factory.mktemp("hf") / "pico-llama")


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def refuse(folder: Path, *parts: str) -> None:
    """Opening fails with one line that names the folder and holds `parts`."""
    with pytest.raises(InputError) as caught:
        open_huggingface(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(folder), *parts):
        assert part in message


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tied": True},
    "biases": {"bias": True, "head_dim": 8},
    "sharded": {"sharded": True},
    "bf16": {"dtype": torch.bfloat16},
    "f16": {"dtype": torch.float16},
    "qwen2": {"kind": "qwen2", "tied": True},
    "mistral": {"kind": "mistral"},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_weights_are_those_of_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = pico.write_model(tmp_path / "m", **options)
    model = open_huggingface(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = dict(reference.named_parameters())
    assert torch.equal(model.embed, theirs.pop("model.embed_tokens.weight"))
    assert torch.equal(model.top["final_norm"], theirs.pop("model.norm.weight"))
    assert ("output" not in model.top) == model.config.tie_word_embeddings == bool(options.get("tied"))
    if "output" in model.top:
        assert torch.equal(model.output, theirs.pop("lm_head.weight"))
    for i, layer in enumerate(model.layers):
        for role in model.family.layer:
            name = role.hf.format(i=i)
            assert (role.name in layer) == (name in theirs)
            if role.name in layer:
                assert torch.equal(layer[role.name], theirs.pop(name))
    assert not theirs
    shape = model.config.uniform
    assert shape is not None
    assert (shape.qk_head_dim, shape.v_head_dim) == (options.get("head_dim", 16),) * 2
    np.testing.assert_allclose(shape.frequencies[0], reference.model.rotary_emb.inv_freq, rtol=1e-6)
    assert model.source.format == "huggingface"
    assert sum(model.source.tensor_types.values()) == model.parameters()
    assert (len(model.source.weight_files) > 1) == bool(options.get("sharded"))


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_llama3_frequencies(theta: float, head_dim: int) -> None:
    parameters = pico.LLAMA3_ROPE | {"rope_theta": theta, "original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, rope_parameters=parameters)
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    found_theta, found = frequencies_from_hf(config.to_dict(), head_dim, "config.json")
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    old = {key: value for key, value in parameters.items() if key not in ("rope_type", "rope_theta")}
    for key in ("type", "rope_type"):
        written = {"rope_theta": theta, "rope_scaling": old | {key: "llama3"}}
        assert frequencies_from_hf(written, head_dim, "config.json") == (found_theta, found)


def test_linear_and_default_frequencies() -> None:
    theta, plain = frequencies_from_hf({"rope_theta": 5e5, "rope_scaling": None}, 8, "c")
    assert (theta, plain[1]) == (5e5, pytest.approx(5e5**-0.25))
    _, linear = frequencies_from_hf({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}}, 8, "c")
    np.testing.assert_allclose(np.array(linear) * 4, plain)


BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "mixtral"}, "'mixtral'"),
    ({"model_type": "weird", "auto_map": {"AutoModel": "x.Y"}}, "'weird'"),
    ({"model_type": "mistral", "sliding_window": "wide"}, "sliding_window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
    ({"hidden_act": "quick_gelu"}, "'quick_gelu'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
    ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope'"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
    ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
    ({"rope_parameters": "plain"}, "RoPE"),
    ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ({"num_local_experts": 8}, "mixture of experts"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"num_key_value_heads": 3}, "3 key heads"),
    ({"max_position_embeddings": None}, "max_position_embeddings"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
    # No float32, so that no GGUF could hold them.
    ({"rms_norm_eps": 1e39}, "rms_norm_eps"),
    ({"rope_parameters": {"rope_theta": 1e39}}, "rope_theta"),
    ({"intermediate_size": 128}, "gate_proj.weight has shape [96, 64]"),
    ({"vocab_size": 500}, "embed_tokens.weight has shape [512, 64]"),
    ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight"),
    ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight"),
    ({"num_hidden_layers": 2**31 - 1}, "layers"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings"),
]


@pytest.mark.parametrize(
    ("change", "part"), BAD_CONFIGS, ids=[f"{i}-{part}" for i, (_, part) in enumerate(BAD_CONFIGS)]
)
def test_bad_config(copy: Path, change: dict[str, Any], part: str) -> None:
    edit(copy / "config.json", lambda config: config.update(change))
    refuse(copy, part)


@pytest.mark.parametrize("value", [None, "x", -1, 2**70, float("inf"), [], [1], {}, {"x": 1}, True, 0.5])
def test_any_value_in_config(copy: Path, value: object) -> None:
    """Whatever one field holds, it is read or refused in one line."""
    original = json.loads((copy / "config.json").read_text())
    for key in [*original, "rope_scaling", "sliding_window", "layer_types", "quantization_config", "num_experts"]:
        (copy / "config.json").write_text(json.dumps(original | {key: value}))
        try:
            read_config(copy)
        except InputError as error:
            assert str(copy) in str(error)
            assert "\n" not in str(error)


def test_mistral_window_that_never_closes(tmp_path: Path) -> None:
    folder = pico.write_model(tmp_path / "m", "mistral", sliding_window=256)
    config = open_huggingface(folder).config
    assert config.max_position_embeddings == 256
    assert config.uniform is not None
    assert config.uniform.sliding_window is None


@pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 100_000, "\xff"])
def test_broken_json(copy: Path, content: str) -> None:
    (copy / "config.json").write_bytes(content.encode("latin-1"))
    refuse(copy, "config.json")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_tensors_missing_extra_and_of_other_dtypes(copy: Path) -> None:
    up, q = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    change_weights(copy, lambda weights: weights.update(buffer))
    open_huggingface(copy)
    original = (copy / "model.safetensors").read_bytes()
    for change, part in (
        (lambda weights: weights.pop(up), f"{up} is missing"),
        (lambda weights: weights.pop("lm_head.weight"), "lm_head.weight is missing"),
        (lambda weights: weights.update({"score.weight": torch.ones(2)}), "score.weight is not part"),
        (lambda weights: weights.update({q: weights[q].to(torch.float64)}), "F64"),
    ):
        (copy / "model.safetensors").write_bytes(original)
        change_weights(copy, change)
        refuse(copy, part)


def test_tied_and_present(tmp_path: Path) -> None:
    folder = pico.write_model(tmp_path / "m", tied=True)
    change_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    model = open_huggingface(folder)
    assert "output" not in model.top
    assert model.output is model.embed


def test_broken_weights_are_named_when_loaded(copy: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(copy, lambda weights: weights[name][0].fill_(float("nan")))
    layers = open_huggingface(copy).layers
    layers[0]
    with pytest.raises(InputError, match=name):
        layers[1]


def test_truncated_weights(copy: Path) -> None:
    content = (copy / "model.safetensors").read_bytes()
    for size in (0, 4, 100, len(content) // 2, len(content) - 1):
        (copy / "model.safetensors").write_bytes(content[:size])
        refuse(copy, "model.safetensors", "download it again")


def test_weights_that_are_not_there(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    refuse(copy, "no model.safetensors")
    (copy / "pytorch_model.bin").write_bytes(b"")
    refuse(copy, "convert them to safetensors")
    (copy / "config.json").rename(copy / "adapter_config.json")
    refuse(copy, "LoRA")
    (copy / "adapter_config.json").unlink()
    refuse(copy, "no config.json")


@pytest.mark.parametrize("file", ["../../x", "/etc/passwd", "..\\x", "sub/x.safetensors", "", 7, ".."])
def test_index_that_leads_outside(tmp_path: Path, file: object) -> None:
    folder = pico.write_model(tmp_path / "m", sharded=True)
    index = folder / "model.safetensors.index.json"
    edit(index, lambda content: content["weight_map"].update({"model.norm.weight": file}))
    refuse(folder, index.name, repr(file))


def test_index_that_is_wrong(tmp_path: Path) -> None:
    folder = pico.write_model(tmp_path / "m", sharded=True)
    index = folder / "model.safetensors.index.json"
    first = sorted(folder.glob("model-*.safetensors"))[0]
    first.rename(folder / "away")
    refuse(folder, first.name, "is missing")
    (folder / "away").rename(first)
    edit(index, lambda content: content["weight_map"].update({"ghost.weight": first.name}))
    refuse(folder, "ghost.weight")
    index.write_text("{}")
    refuse(folder, "weight_map")


CARD = """---
license: apache-2.0
language: [en, no]
version: 1.5
tags: [tiny, 7]
base_model: acme/Base-1B
---
# Text
"""


def test_general_metadata(copy: Path) -> None:
    plain = open_huggingface(copy).metadata
    assert plain["general.name"].value == "Model"
    (copy / "README.md").write_text(CARD)
    card = {key: value.value for key, value in open_huggingface(copy).metadata.items()}
    assert card["general.license"] == "apache-2.0"
    assert card["general.languages"] == ["en", "no"]
    assert card["general.tags"][:2] == ["tiny", "7"]
    assert card["general.base_model.0.name"] == "Base 1B"
    (copy / "README.md").write_text("---\n: : [\n---\n")
    assert open_huggingface(copy).metadata["general.name"].value == "model"


def test_names_that_are_no_path(monkeypatch: pytest.MonkeyPatch, copy: Path, tmp_path: Path) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> str:
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=r"acme/tiny: .*\(no network\).*GGUF$"):
        open_model("acme/tiny")
    asked: dict[str, Any] = {}

    def deliver(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(copy)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", deliver)
    assert open_model("acme/tiny").config.hidden_size == 64
    assert asked["name"] == "acme/tiny"
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])
    edit(copy / "config.json", lambda config: config.update(model_type="gemma3"))
    asked.clear()
    with pytest.raises(InputError, match="'gemma3'"):
        open_model("acme/tiny")
    assert asked["allow_patterns"] == ["config.json"]  # refused before the weights were asked for


def test_no_model_by_that_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("nothing", "a/b/c", "acme/tiny.gguf", str(tmp_path / "absent")):
        with pytest.raises(InputError, match="no such file"):
            open_model(name)
    monkeypatch.setattr(opening, "DEMO_PACKAGE", "a3q_absent_package")
    with pytest.raises(InputError, match=r"a3q\[demo\]"):
        open_model(None)
